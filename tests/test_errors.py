"""The one line of a user's mistake, and its parts."""

import copy
import pickle

import pytest

from vllm_proxy.config.errors import ProxyConfigError


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
