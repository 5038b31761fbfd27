"""Requests are refused where vLLM admits them, in one line, by the seam of either model runner."""

import pytest
from vllm import SamplingParams
from vllm.config import SchedulerConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.sample.logits_processor import validate_logits_processors_parameters
from vllm.v1.worker.gpu.sample.logits_processor import (
    build_custom_logits_processors_params_validator,
)

from vllm_proxy.runner import validation
from vllm_proxy.runner.scheduler import ProxyScheduler
from vllm_proxy.runner.validation import (
    NO_CONTROLS,
    NO_PROMPTS,
    inspecting,
    validator,
    without_ours,
)
from vllm_proxy.support import PROXY_SCHEDULER

LIMIT = 10
VOCAB_SIZES = {"base": 90, "expert": 100, "antiexpert": 100}
PROMPT = {"proxy_expert_prompt": [1, 2]}


@pytest.fixture(params=["V1", "V2"])
def admit(request):
    """Validate a request as vLLM does, in an engine with the given limit on prompts."""

    def admit(extra_args, limit=LIMIT, vocab_sizes=VOCAB_SIZES, **params) -> None:
        processors = [validator(request.param, limit, vocab_sizes)]
        sampling_params = SamplingParams(extra_args=extra_args, **params)
        if request.param == "V1":
            validate_logits_processors_parameters(processors, sampling_params)
        else:
            build_custom_logits_processors_params_validator(processors)(sampling_params)

    return admit


@pytest.mark.parametrize(
    "extra_args",
    [
        None,
        {},
        {"session_id": "of another plugin"},
        {"proxy_alpha": 0},
        {"proxy_alpha": -1.5, "proxy_top_p": 1, "proxy_plausibility": 0},
        {"proxy_alpha": "adaptive"},
        {"proxy_alpha_schedule": "first", "proxy_alpha_steps": 1},
        {"proxy_alpha": 2, "proxy_alpha_schedule": "constant"},
        {"proxy_weights": [1, 0, -0.5]},
        {"proxy_expert_prompt": [0] * LIMIT, "proxy_antiexpert_prompt": [99]},
    ],
)
def test_good_requests_are_admitted(admit, extra_args):
    admit(extra_args, logprobs=1)


@pytest.mark.parametrize(
    ("extra_args", "words"),
    [
        ({"proxy_alpha": float("nan")}, "`proxy_alpha` is nan: give a finite number"),
        ({"proxy_alpha": float("-inf")}, "`proxy_alpha` is -inf"),
        ({"proxy_alpha": "0.5"}, "`proxy_alpha` is '0.5'"),
        ({"proxy_alpha": True}, "`proxy_alpha` is True"),
        ({"proxy_alpha": [0.5]}, "`proxy_alpha` is [0.5]"),
        ({"proxy_alfa": 1}, "unknown key `proxy_alfa`; did you mean `proxy_alpha`?"),
        ({"proxy_alpha_schedule": "cosine"}, "`proxy_alpha_schedule` is 'cosine'"),
        ({"proxy_alpha_schedule": "linear"}, "`proxy_alpha_steps` is None: give the number"),
        ({"proxy_alpha_steps": 5}, "add `proxy_alpha_schedule`"),
        ({"proxy_alpha_schedule": "first", "proxy_alpha_steps": 0}, "`proxy_alpha_steps` is 0"),
        ({"proxy_alpha_schedule": "first", "proxy_alpha_steps": 2.5}, "`proxy_alpha_steps` is 2.5"),
        (
            {"proxy_alpha": "adaptive", "proxy_alpha_schedule": "first", "proxy_alpha_steps": 2},
            "an adaptive alpha has none",
        ),
        ({"proxy_weights": [1, 2]}, "give three finite numbers"),
        ({"proxy_weights": [1, 2, float("inf")]}, "give three finite numbers"),
        ({"proxy_weights": "123"}, "give three finite numbers"),
        ({"proxy_weights": [1, 0, 0], "proxy_alpha": 1}, "`proxy_weights` takes its place"),
        ({"proxy_top_p": 0}, "`proxy_top_p` is 0: give a number in (0, 1]"),
        ({"proxy_top_p": 1.1}, "`proxy_top_p` is 1.1"),
        ({"proxy_plausibility": -0.1}, "`proxy_plausibility` is -0.1: give a number in [0, 1]"),
        ({"proxy_expert_prompt": []}, "`proxy_expert_prompt` is []"),
        ({"proxy_expert_prompt": [1, -1]}, "`proxy_expert_prompt` is [1, -1]"),
        ({"proxy_expert_prompt": [1, 2.0]}, "`proxy_expert_prompt` is [1, 2.0]"),
        ({"proxy_antiexpert_prompt": 5}, "`proxy_antiexpert_prompt` is 5"),
        ({"proxy_antiexpert_prompt": "some text"}, "is text, which only vllm-proxy's own"),
        ({"proxy_expert_prompt": [1] * (LIMIT + 1)}, "has 11 tokens; the most here are 10"),
        ({"proxy_expert_prompt": [100]}, "has 100; ids that the expert can read go from 0 to 99"),
        ({"proxy_base_prompt": [1]}, "unknown key `proxy_base_prompt`"),
        ({"proxy_base_length": 1, **PROMPT}, "unknown key `proxy_base_length`"),
    ],
)
def test_bad_requests_are_refused_in_one_line(admit, extra_args, words):
    with pytest.raises(VLLMValidationError) as caught:
        admit(extra_args)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompt_logprobs_do_not_go_with_own_prompts(admit):
    admit({"proxy_alpha": 0.5}, prompt_logprobs=0)
    with pytest.raises(VLLMValidationError, match="`proxy_expert_prompt`: prompt_logprobs cannot"):
        admit(PROMPT, prompt_logprobs=0)


def test_only_we_inspect(admit):
    """Clients of a server cannot leave measurements in its workers."""
    asked = {"proxy_inspected": {"token_ids": [1, 2], "top_k": 5}}
    with pytest.raises(VLLMValidationError, match="unknown key `proxy_inspected`; remove it"):
        admit(asked, prompt_logprobs=0)
    with inspecting():
        admit(asked, prompt_logprobs=0)
        admit({**asked, **PROMPT}, prompt_logprobs=0)
        for extra_args in (PROMPT, {**asked, "proxy_alfa": 1}, {**asked, "proxy_base_length": 1}):
            with pytest.raises(VLLMValidationError):
                admit(extra_args, prompt_logprobs=0)
    with pytest.raises(VLLMValidationError):
        admit(asked)


@pytest.mark.parametrize("reason", NO_PROMPTS)
def test_an_engine_that_cannot_align_says_why(admit, reason):
    admit({"proxy_alpha": 0.5}, limit=reason)
    with pytest.raises(VLLMValidationError, match="`proxy_expert_prompt`: not possible with"):
        admit(PROMPT, limit=reason)


def test_an_engine_without_our_worker_refuses_everything(admit):
    admit(None, limit=NO_CONTROLS)
    with pytest.raises(VLLMValidationError, match="worker_cls"):
        admit({"proxy_alpha": 0.5}, limit=NO_CONTROLS)


def test_unknown_validators_do_not_exist():
    for name in ("V3_1_2_3_4_00", "V1", "V1_5", "V1_5_6_7_00", "nonsense"):
        with pytest.raises(AttributeError):
            getattr(validation, name)


def test_only_our_processors_are_hidden():
    class Config:
        logits_processors = ("other:Processor", validator("V1", 5, VOCAB_SIZES))

    config = Config()
    with without_ours(config):
        assert config.logits_processors == ["other:Processor"]
    assert config.logits_processors == Config.logits_processors


@pytest.mark.parametrize("is_async", [True, False])
def test_scheduler_is_asynchronous_where_vllm_s_would_be(is_async):
    config = SchedulerConfig.default_factory(
        scheduler_cls=PROXY_SCHEDULER, async_scheduling=is_async
    )
    cls = config.get_scheduler_cls()
    assert cls is ProxyScheduler

    class Config:
        scheduler_config = config

    scheduler = cls.__new__(cls, Config())
    assert isinstance(scheduler, Scheduler)
    assert isinstance(scheduler, AsyncScheduler) == is_async
