"""What a request may ask for: one set of rules for rows, keywords, `extra_args` and the config."""

import math

import pytest
from pydantic import ValidationError

from vllm_proxy.config import field_error
from vllm_proxy.control import (
    BASE_LENGTH,
    FIELDS,
    Control,
    Filters,
    RequestValues,
    Row,
    Schedule,
)
from vllm_proxy.errors import ProxyConfigError

LINEAR = {"alpha": 2.0, "schedule": "linear", "steps": 4}
VALUES = [
    {"alpha": 0.5},
    {"alpha": "adaptive"},
    {"alpha": LINEAR},
    {"alpha": {"schedule": "first", "steps": 3}},
    {"weights": [1, 0, 0.5]},
    {"weights": [1, 0, 0], "filters": {"top_p": 0.5}},
    {"filters": {"top_p": 1, "plausibility": 0}},
    {"expert_prompt": "text", "antiexpert_prompt": [3, 4]},
    {},
]


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_values_survive_the_way_to_the_worker(values):
    control = RequestValues.model_validate(values).control
    extra_args = control.to_request()
    assert extra_args.keys() <= FIELDS.keys()
    assert {FIELDS[key] for key in extra_args} == values.keys()
    assert (Control.from_request(extra_args) or Control()) == control


def test_a_schedule_may_be_an_object():
    assert RequestValues(alpha=Schedule(**LINEAR)) == RequestValues(alpha=LINEAR)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"alpha": math.nan}, "`alpha` is nan: give a finite number"),
        ({"alpha": "adaptiv"}, "`alpha` is 'adaptiv': give a finite number"),
        ({"alpha": True}, "`alpha` is True: give a finite number"),
        ({"alpha": {"schedule": "first"}}, "`alpha.steps` is missing"),
        ({"alpha": {**LINEAR, "steps": 0}}, "`alpha.steps` is 0"),
        ({"alpha": {"schdule": "first", "steps": 1}}, "unknown key `alpha.schdule`; did you mean"),
        ({"weights": [1, 0]}, "`weights` is [1, 0]: give three finite numbers"),
        ({"weights": [1, 0, math.inf]}, "`weights` is [1, 0, inf]: give three finite numbers"),
        ({"weights": [1, 0, 0], "alpha": 1}, "`weights` take the place of `alpha`"),
        ({"filters": {"top_p": 0}}, "`filters.top_p` is 0"),
        ({"filters": {"topp": 1}}, "unknown key `filters.topp`; did you mean `top_p`?"),
        ({"expert_prompt": ""}, "`expert_prompt` is '': give text, or a list of token ids"),
        ({"expert_prompt": [1, -1]}, "`expert_prompt` is [1, -1]: give text"),
        ({"antiexpert_prompt": [True]}, "`antiexpert_prompt` is [True]: give text"),
        ({"expert_promt": "a"}, "unknown key `expert_promt`; did you mean `expert_prompt`?"),
    ],
    ids=str,
)
def test_wrong_values_are_one_line(values, says):
    with pytest.raises(ValidationError) as caught:
        RequestValues.model_validate(values)
    message = field_error(RequestValues, caught.value)
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("extra_args", "says"),
    [
        ({"proxy_alpah": 1}, "unknown key `proxy_alpah`; did you mean `proxy_alpha`?"),
        ({"proxy_alpha": "1"}, "`proxy_alpha` is '1': give a finite number"),
        ({"proxy_alpha_steps": 3}, "`proxy_alpha_steps` is 3: add `proxy_alpha_schedule`"),
        ({"proxy_alpha_schedule": "cosine"}, "`proxy_alpha_schedule` is 'cosine': give constant"),
        ({"proxy_alpha_schedule": "first"}, "`proxy_alpha_steps` is None: give the number"),
        (
            {"proxy_alpha": "adaptive", "proxy_alpha_schedule": "first", "proxy_alpha_steps": 1},
            "`proxy_alpha_schedule` is 'first': an adaptive alpha has none",
        ),
        ({"proxy_weights": [1, 2]}, "`proxy_weights` is [1, 2]: give three finite numbers"),
        ({"proxy_weights": [1, 2, 3], "proxy_alpha": 1}, "`proxy_weights` takes its place"),
        ({"proxy_top_p": 0}, "`proxy_top_p` is 0: give a number in (0, 1]"),
        ({"proxy_plausibility": 1.5}, "`proxy_plausibility` is 1.5: give a number in [0, 1]"),
        ({"proxy_expert_prompt": []}, "`proxy_expert_prompt` is []: give text, or a list"),
        ({"proxy_antiexpert_prompt": [0.5]}, "`proxy_antiexpert_prompt` is [0.5]: give text"),
    ],
    ids=str,
)
def test_wrong_extra_args_are_one_line(extra_args, says):
    with pytest.raises(ProxyConfigError) as caught:
        Control.from_request(extra_args)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_extra_args_of_others_are_not_ours():
    assert Control.from_request(None) is None
    assert Control.from_request({"other": 1, BASE_LENGTH: 5}) is None


def test_a_key_without_a_value_is_not_there():
    """Arrow gives every row of a table the keys of all."""
    every = dict.fromkeys(FIELDS)
    assert Control.from_request(every).is_default
    assert Control.from_request({**every, "proxy_weights": [1, 0, 0]}).weights == (1, 0, 0)
    assert Control.from_request({**every, "proxy_alpha": 0.5}).alpha == 0.5


class TestRow:
    """The numbers that a worker reads."""

    ENGINE = Control(alpha=0.5, filters=Filters(top_p=0.9, plausibility=0.1))

    def row(self, **values) -> Row:
        return RequestValues(**values).control.row(self.ENGINE)

    def test_what_is_not_given_is_the_engines(self):
        assert self.row() == Row(1, 0, 0, start=0.5, top_p=0.9, plausibility=0.1)
        own = self.row(alpha=2, filters={"top_p": 0.5})
        assert own == Row(1, 0, 0, start=2, top_p=0.5, plausibility=0.1)

    def test_weights_are_the_whole_of_it(self):
        """So that a member alone is that member, whatever the engine filters."""
        assert self.row(weights=[0, 1, 0]) == Row(0, 1, 0)

    @pytest.mark.parametrize(
        ("values", "strengths"),
        [
            ({"schedule": "first", "steps": 2}, [1, 1, 0, 0]),
            ({"alpha": 2, "schedule": "linear", "steps": 4}, [2, 1.5, 1, 0.5, 0, 0]),
        ],
    )
    def test_schedules(self, values, strengths):
        row = self.row(alpha=values)
        given = [(row.start + row.slope * t) if t < row.steps else 0 for t in range(len(strengths))]
        assert given == strengths
