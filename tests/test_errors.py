"""The one line of a user's mistake, and its parts."""

import copy
import pickle

import pytest

from vllm_proxy.config.errors import ProxyConfigError, unknown_key


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        (
            {"field": "alpha", "value": "x", "remedy": "give a number"},
            "`alpha` is 'x': give a number",
        ),
        (
            {"problem": "not with drafts", "field": "engine.dtype", "remedy": "remove it"},
            "`engine.dtype`: not with drafts; remove it",
        ),
        ({"field": "--limit", "value": 0, "remedy": "give 1"}, "--limit is 0: give 1"),
        ({"field": "alpha", "value": None, "remedy": "give 1"}, "`alpha` is None: give 1"),
        (
            {"problem": "no config.json", "field": "expert '/x'", "remedy": "correct it"},
            "expert '/x': no config.json; correct it",
        ),
        ({"problem": "the row is empty; write a prompt"}, "the row is empty; write a prompt"),
    ],
    ids=str,
)
def test_one_line(parts, line):
    error = ProxyConfigError(**parts)
    assert str(error) == line
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # from a worker, say
        assert (str(other), other.__dict__) == (line, error.__dict__)


def test_a_source_goes_in_front_and_the_parts_stay():
    error = ProxyConfigError("too large", field="alpha", value=1e31, remedy="give 1")
    within = error.within("config 'c.yaml'")
    assert str(within) == f"config 'c.yaml': {error}"
    assert (within.field, within.value, within.remedy) == ("alpha", "1e+31", "give 1")


def test_an_unknown_key_is_a_field_with_the_nearest_one_as_its_remedy():
    near = unknown_key("engine.max_modellen", ["max_model_len", "dtype"])
    assert str(near) == "unknown key `engine.max_modellen`; did you mean `max_model_len`?"
    assert (near.field, near.remedy) == ("engine.max_modellen", "did you mean `max_model_len`?")
    many = [f"key{i}" for i in range(20)]
    assert unknown_key("x.y", many, remedy="see the list").remedy == "see the list"
