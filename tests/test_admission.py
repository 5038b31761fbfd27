"""Requests are refused where vLLM admits them, in one line, by the seam of either model runner."""

import math

import pytest
from vllm import EngineArgs, SamplingParams
from vllm.config import SchedulerConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.sample.logits_processor import validate_logits_processors_parameters
from vllm.v1.worker.gpu.sample.logits_processor import (
    build_custom_logits_processors_params_validator,
)

from support.tiny_models import write_model
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine import admission
from vllm_proxy.engine.admission import (
    NO_CONTROLS,
    NO_PROMPTS_REASONS,
    inspecting,
    validator,
    without_ours,
)
from vllm_proxy.engine.limits import PROXY_SCHEDULER
from vllm_proxy.engine.scheduler import ProxyScheduler

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
        ({"proxy_alpha_schedule": "linear"}, "`proxy_alpha_steps` is missing"),
        ({"proxy_alpha_steps": 5}, "add `proxy_alpha_schedule`"),
        ({"proxy_alpha_schedule": "first", "proxy_alpha_steps": 0}, "`proxy_alpha_steps` is 0"),
        ({"proxy_alpha_schedule": "first", "proxy_alpha_steps": 2.5}, "`proxy_alpha_steps` is 2.5"),
        (
            {"proxy_alpha": "adaptive", "proxy_alpha_schedule": "first", "proxy_alpha_steps": 2},
            "an adaptive alpha has no schedule",
        ),
        ({"proxy_weights": [1, 2]}, "give three finite numbers"),
        ({"proxy_weights": [1, 2, float("inf")]}, "give three finite numbers"),
        ({"proxy_weights": "123"}, "give three finite numbers"),
        ({"proxy_weights": [1, 0, 0], "proxy_alpha": 1}, "`proxy_weights` replaces it"),
        ({"proxy_top_p": 0}, "`proxy_top_p` is 0: it must be greater than 0"),
        ({"proxy_top_p": 1.1}, "`proxy_top_p` is 1.1"),
        ({"proxy_plausibility": -0.1}, "`proxy_plausibility` is -0.1: it must be greater than"),
        ({"proxy_expert_prompt": []}, "`proxy_expert_prompt` is []"),
        ({"proxy_expert_prompt": [1, -1]}, "`proxy_expert_prompt` is [1, -1]"),
        ({"proxy_expert_prompt": [1, 2.0]}, "`proxy_expert_prompt` is [1, 2.0]"),
        ({"proxy_antiexpert_prompt": 5}, "`proxy_antiexpert_prompt` is 5"),
        ({"proxy_antiexpert_prompt": "some text"}, "text is accepted by vllm-proxy's own"),
        (
            {"proxy_expert_prompt": [1] * (LIMIT + 1)},
            "`proxy_expert_prompt`: it has 11 tokens, more than the limit of 10",
        ),
        ({"proxy_expert_prompt": [100]}, "it has the id 100; the expert reads ids from 0 to 99"),
        ({"proxy_base_prompt": [1]}, "unknown key `proxy_base_prompt`"),
        ({"proxy_base_length": 1, **PROMPT}, "`proxy_base_length`: unknown key"),
    ],
)
def test_bad_requests_are_refused_in_one_line(admit, extra_args, words):
    with pytest.raises(VLLMValidationError) as caught:
        admit(extra_args)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_we_inspect(admit):
    """Clients of a server cannot leave measurements in its workers."""
    asked = {"proxy_inspected": {"token_ids": [1, 2], "top_k": 5}}
    with pytest.raises(VLLMValidationError, match="`proxy_inspected`: unknown key; remove it"):
        admit(asked, prompt_logprobs=0)
    with inspecting():
        admit(asked, prompt_logprobs=0)
        admit({**asked, **PROMPT}, prompt_logprobs=0)
        for extra_args in ({**asked, "proxy_alfa": 1}, {**asked, "proxy_base_length": 1}):
            with pytest.raises(VLLMValidationError):
                admit(extra_args, prompt_logprobs=0)
    with pytest.raises(VLLMValidationError):
        admit(asked)


@pytest.mark.parametrize("reason", NO_PROMPTS_REASONS)
def test_an_engine_that_cannot_align_says_why(admit, reason):
    admit({"proxy_alpha": 0.5}, limit=reason)
    with pytest.raises(VLLMValidationError, match="`proxy_expert_prompt`: not possible with"):
        admit(PROMPT, limit=reason)


def test_an_engine_without_our_worker_refuses_everything(admit):
    admit(None, limit=NO_CONTROLS)
    with pytest.raises(VLLMValidationError, match="worker_cls"):
        admit({"proxy_alpha": 0.5}, limit=NO_CONTROLS)


SIZES = {"base": 100, "expert": 90, "antiexpert": 95}
END = 1


class TestAdmitted:
    """What can only be told with the prompt, the stop tokens and the words' tokens."""

    def validate(self, prompt=(5,), extra_args=None, sizes=SIZES, **params):
        params = SamplingParams(extra_args=extra_args, **params)
        params.update_from_generation_config({}, params._eos_token_id or END)
        name = validator("V1", LIMIT, sizes).partition(":")[2]
        getattr(admission, name).validate_request(prompt, params, LIMIT + 1)

    def refused(self, *args, **values) -> ProxyConfigError:
        with pytest.raises(ProxyConfigError) as caught:
            self.validate(*args, **values)
        assert "\n" not in str(caught.value)
        return caught.value

    def test_a_prompt_is_read_by_all_members(self):
        self.validate([0, 89])
        error = self.refused([5, 93, 99])
        assert "93 at position 1; the expert reads ids from 0 to 89" in str(error)
        assert error.field == "prompt"
        assert "`proxy_expert_prompt`" in error.remedy
        assert "96 at position 0; the antiexpert" in str(self.refused([96], PROMPT))
        error = self.refused([100], {"proxy_weights": [1, 0, 0]})
        assert "100 at position 0; the base reads ids from 0 to 99" in str(error)
        assert error.remedy == "remove it"
        assert "-1 at position 1" in str(self.refused([5, -1]))

    @pytest.mark.parametrize(
        "own",
        [
            {**PROMPT, "proxy_antiexpert_prompt": [5]},
            {"proxy_weights": [0.5, 0, 0]},
            {"proxy_alpha": 0},
            {**PROMPT, "proxy_weights": [1, 1, 0]},
        ],
        ids=str,
    )
    def test_but_for_members_that_read_another_or_have_no_weight(self, own):
        self.validate([5, 99], own)

    def test_an_inspection_looks_at_all_members(self):
        own = {"proxy_weights": [1, 0, 0], "proxy_inspected": {"token_ids": [5], "top_k": 1}}
        assert "the expert reads" in str(self.refused([99], own))

    def test_a_member_s_prompt_fits_where_vllm_has_fitted_the_length(self, tmp_path):
        """`max_model_len: auto` is shortened to what fits in memory, after our hook was asked.

        A longer prompt would never be scheduled, and its request never end.
        """
        members = {role: str(write_model(tmp_path / role, seed=i)) for i, role in enumerate(ROLES)}
        engine = {"dtype": "float32", "max_model_len": -1}  # auto
        config = ProxyConfig.parse({**members, "engine": engine}, "test")
        vllm_config = EngineArgs(**config.engine_args()).create_engine_config()
        processor = InputProcessor(vllm_config)
        before = vllm_config.model_config.max_model_len
        vllm_config.model_config.max_model_len = LIMIT + 1  # as vLLM's front end is told
        assert before > LIMIT + 1

        def admit(tokens: int) -> None:
            params = SamplingParams(extra_args={"proxy_expert_prompt": [5] * tokens})
            processor.process_inputs("r", {"prompt_token_ids": [5]}, params, ("generate",))

        admit(LIMIT)
        words = f"`proxy_expert_prompt`: it has {LIMIT + 1} tokens, more than the limit of {LIMIT}"
        with pytest.raises(VLLMValidationError, match=words):
            admit(LIMIT + 1)

    def test_a_missing_member_reads_nothing(self):
        sizes = {"base": 100, "antiexpert": 95}
        self.validate([94], sizes=sizes)
        assert "the antiexpert reads" in str(self.refused([95], sizes=sizes))
        self.validate(allowed_token_ids=[94], sizes=sizes)

    def test_allowed_ids_that_are_never_generated(self):
        self.validate(allowed_token_ids=[99, 89])
        error = self.refused(allowed_token_ids=[90, 99])
        assert error.field == "allowed_token_ids"
        assert "the expert lacks: all members have the ids from 0 to 89" in str(error)

    @pytest.mark.parametrize(
        ("params", "names"),
        [
            ({"min_tokens": 1, "allowed_token_ids": [END, 95]}, ("min_tokens",)),
            ({"_bad_words_token_ids": [[7], [8, 9]], "allowed_token_ids": [7]}, ("bad_words",)),
            ({"logit_bias": {7: -math.inf}, "allowed_token_ids": [7]}, ("logit_bias",)),
            (
                {"_bad_words_token_ids": [[7]], "min_tokens": 1, "allowed_token_ids": [END, 7, 7]},
                ("bad_words", "min_tokens"),
            ),
            (
                {"min_tokens": 1, "stop_token_ids": [7, 8], "allowed_token_ids": [7, 8, 91]},
                ("min_tokens",),
            ),
        ],
        ids=str,
    )
    def test_allowed_ids_of_which_nothing_is_left(self, params, names):
        listed = " and ".join(f"`{name}`" for name in ("allowed_token_ids", *names))
        words = f"{listed} leave no token to generate; remove one of them"
        assert str(self.refused(**params)) == words
        more = {"allowed_token_ids": [*params["allowed_token_ids"], 50]}
        self.validate(**params | more)

    def test_every_id_forbidden(self):
        words = {"_bad_words_token_ids": [[i] for i in range(90) if i != END]}
        self.validate(**words)
        error = self.refused(**words, min_tokens=1)
        assert "`bad_words` and `min_tokens` leave no token" in str(error)

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_a_bias_that_is_no_number(self, value):
        """Minus infinity and infinity make a NaN, which is the largest logit."""
        self.validate(logit_bias={99: 100.0, 5: -math.inf})
        assert f"`logit_bias` of 99 is {value}" in str(self.refused(logit_bias={99: value}))

    def test_structured_outputs_whose_end_is_never_generated(self):
        params = {"structured_outputs": StructuredOutputsParams(regex="a+")}
        self.validate(**params)
        error = self.refused(**params, _eos_token_id=92)
        assert error.field == "structured_outputs"
        assert "the token 92, which the expert lacks" in str(error)

    def test_a_trace_of_ids_that_a_member_cannot_read(self):
        self.validate(trace_decode_token_ids=[5, 89])
        error = self.refused(trace_decode_token_ids=[5, 90])
        assert error.field == "trace_decode_token_ids"
        assert "the expert lacks" in str(error)


def test_unknown_validators_do_not_exist():
    for name in ("V3_1_2_3_4", "V1", "V1_5", "V1_5_6_7", "V1_5_6_7_8_9", "nonsense"):
        with pytest.raises(AttributeError):
            getattr(admission, name)


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
