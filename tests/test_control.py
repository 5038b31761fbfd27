"""What a request may ask for: one set of rules for rows, keywords, `extra_args` and the config."""

import math

import pytest
import torch
from pydantic import ValidationError

from vllm_proxy.config.errors import ProxyConfigError, shown
from vllm_proxy.config.request import BASE_LENGTH, FIELDS, RequestControl
from vllm_proxy.config.strength import MOST_STEPS, MOST_STRENGTH, Filters, Schedule
from vllm_proxy.config.validation import validation_error
from vllm_proxy.model.controls import LogitControls
from vllm_proxy.model.fusion import controls_at, proxy_logits

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
    control = RequestControl.model_validate(values)
    extra_args = control.to_extra_args()
    assert extra_args.keys() <= FIELDS.keys()
    assert {FIELDS[key] for key in extra_args} == values.keys()
    assert (RequestControl.from_extra_args(extra_args) or RequestControl()) == control


def test_a_schedule_may_be_an_object():
    assert RequestControl(alpha=Schedule(**LINEAR)) == RequestControl(alpha=LINEAR)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"alpha": math.nan}, "`alpha` is nan: give a finite number"),
        ({"alpha": "adaptiv"}, "`alpha` is 'adaptiv': give a finite number"),
        ({"alpha": True}, "`alpha` is True: give a finite number"),
        ({"alpha": 3e38}, "`alpha` is 3e+38: give a finite number from -1e+30 to 1e+30"),
        ({"alpha": 10**400}, "give a finite number from -1e+30 to 1e+30"),
        ({"alpha": {**LINEAR, "alpha": -1.1e30}}, "`alpha.alpha` is -1.1e+30"),
        ({"alpha": {**LINEAR, "steps": 2**53 + 1}}, "`alpha.steps` is 9007199254740993"),
        ({"weights": [1, 0, 1.1e30]}, "`weights` is [1, 0, 1.1e+30]: give three finite numbers"),
        ({"expert_prompt": "a\ud800"}, "half a character (a lone surrogate); remove it"),
        ({"expert_prompt": [2**63]}, "`expert_prompt` is [9223372036854775808]: give text"),
        ({"alpha": {"schedule": "first"}}, "`alpha.steps` is missing"),
        ({"alpha": {**LINEAR, "steps": 0}}, "`alpha.steps` is 0"),
        ({"alpha": {"schdule": "first", "steps": 1}}, "unknown key `alpha.schdule`; did you mean"),
        ({"weights": [1, 0]}, "`weights` is [1, 0]: give three finite numbers"),
        ({"weights": [1, 0, math.inf]}, "`weights` is [1, 0, inf]: give three finite numbers"),
        ({"weights": [1, 0, 0], "alpha": 1}, "`weights` replace `alpha`"),
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
        RequestControl.model_validate(values)
    message = str(validation_error(RequestControl, caught.value))
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("extra_args", "says"),
    [
        ({"proxy_alpah": 1}, "unknown key `proxy_alpah`; did you mean `proxy_alpha`?"),
        ({"proxy_alpha": "1"}, "`proxy_alpha` is '1': give a finite number"),
        ({"proxy_alpha_steps": 3}, "`proxy_alpha_steps` is 3: add `proxy_alpha_schedule`"),
        ({"proxy_alpha_schedule": "cosine"}, "`proxy_alpha_schedule` is 'cosine': give constant"),
        ({"proxy_alpha_schedule": "first"}, "`proxy_alpha_steps` is missing"),
        (
            {"proxy_alpha": "adaptive", "proxy_alpha_schedule": "first", "proxy_alpha_steps": 1},
            "`proxy_alpha_schedule` is 'first': an adaptive alpha has no schedule",
        ),
        ({"proxy_alpha": -2e30}, "`proxy_alpha` is -2e+30: give a finite number from -1e+30"),
        ({"proxy_alpha": 10**5000}, "`proxy_alpha` is a number of thousands of digits: give a"),
        ({"proxy_alpha": {"schedule": "linear"}}, "`proxy_alpha.steps` is missing"),
        (
            {"proxy_alpha": {**LINEAR, "stesp": 1}},
            "unknown key `proxy_alpha.stesp`; did you mean `steps`?",
        ),
        (
            {"proxy_alpha": LINEAR, "proxy_alpha_steps": 4},
            "`proxy_alpha_steps` is 4: `proxy_alpha` is a mapping that has it; remove one",
        ),
        (
            {"proxy_alpha_schedule": "linear", "proxy_alpha_steps": 2**64},
            "`proxy_alpha_steps` is 18446744073709551616: it must be",
        ),
        ({"proxy_weights": [1, 2]}, "`proxy_weights` is [1, 2]: give three finite numbers"),
        ({"proxy_weights": [1, 2, 10**400]}, "give three finite numbers from -1e+30 to 1e+30"),
        (
            {"proxy_expert_prompt": "\udfff"},
            "`proxy_expert_prompt` is '\\udfff': it contains half a",
        ),
        ({"alpha": 1}, "`alpha`: use `proxy_alpha` instead"),
        ({"top_p": 0.5}, "`top_p`: use `proxy_top_p` instead"),
        ({"filters": {}}, "`filters`: use `proxy_top_p` and `proxy_plausibility` instead"),
        ({"expert_prompt": "a"}, "`expert_prompt`: use `proxy_expert_prompt` instead"),
        ({"proxy_weights": [1, 2, 3], "proxy_alpha": 1}, "`proxy_weights` replaces it"),
        ({"proxy_top_p": 0}, "`proxy_top_p` is 0: it must be greater than 0"),
        (
            {"proxy_plausibility": 1.5},
            "`proxy_plausibility` is 1.5: it must be less than or equal to 1",
        ),
        ({"proxy_expert_prompt": []}, "`proxy_expert_prompt` is []: give text, or a list"),
        ({"proxy_antiexpert_prompt": [0.5]}, "`proxy_antiexpert_prompt` is [0.5]: give text"),
    ],
    ids=shown,
)
def test_wrong_extra_args_are_one_line(extra_args, says):
    with pytest.raises(ProxyConfigError) as caught:
        RequestControl.from_extra_args(extra_args)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_extra_args_of_others_are_not_ours():
    assert RequestControl.from_extra_args(None) is None
    assert RequestControl.from_extra_args({"other": 1, BASE_LENGTH: 5}) is None


def test_a_mapping_is_taken_as_a_row_has_it():
    assert RequestControl.from_extra_args({"proxy_alpha": LINEAR}).alpha == Schedule(**LINEAR)


@pytest.mark.parametrize("value", [MOST_STRENGTH, -MOST_STRENGTH, 5e-324])
def test_strengths_up_to_the_bound_are_numbers_of_float32(value):
    """Of logits in the ten thousands, over the lowest temperature that vLLM divides by."""
    linear = {"alpha": value, "schedule": "linear", "steps": MOST_STEPS}
    controls = [RequestControl(alpha=value), RequestControl(alpha=linear)]
    table = torch.tensor([LogitControls.of(own) for own in controls], dtype=torch.float32)
    for step in (0, 1, 2**20):
        weights = controls_at(table, torch.tensor([step] * 2))[:, :3]
        logits = proxy_logits(*(torch.tensor([[4e4, -4e4]] * 2) * s for s in (1, 1, -1)), weights)
        assert (logits / 0.01).isfinite().all()


def test_a_key_without_a_value_is_not_there():
    """Arrow gives every row of a table the keys of all."""
    every = dict.fromkeys(FIELDS)
    assert RequestControl.from_extra_args(every).is_default
    assert RequestControl.from_extra_args({**every, "proxy_weights": [1, 0, 0]}).weights == (
        1,
        0,
        0,
    )
    assert RequestControl.from_extra_args({**every, "proxy_alpha": 0.5}).alpha == 0.5


class TestRow:
    """The numbers that a worker reads."""

    ENGINE = RequestControl(alpha=0.5, filters=Filters(top_p=0.9, plausibility=0.1))

    def row(self, **values) -> LogitControls:
        return LogitControls.of(RequestControl(**values), self.ENGINE)

    def test_what_is_not_given_is_the_engines(self):
        assert self.row() == LogitControls(1, 0, 0, start=0.5, top_p=0.9, plausibility=0.1)
        own = self.row(alpha=2, filters={"top_p": 0.5})
        assert own == LogitControls(1, 0, 0, start=2, top_p=0.5, plausibility=0.1)

    def test_weights_are_the_whole_of_it(self):
        """So that a member alone is that member, whatever the engine filters."""
        assert self.row(weights=[0, 1, 0]) == LogitControls(0, 1, 0)

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
