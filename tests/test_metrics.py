"""Our metrics: what counts as what, from admission to the end, in vLLM's own front end."""

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import IterationStats, SchedulerStats
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_proxy.config.request import MEMBER_CONTROLS
from vllm_proxy.config.schema import ProxySection
from vllm_proxy.engine.metrics import Kind, Meter, MeteredOutputProcessor, kind_of

PAIR = {"expert": "the/expert", "antiexpert": "the/antiexpert"}


def given(**section: object) -> dict:
    """A section's values; None leaves a member out."""
    return {key: value for key, value in {**PAIR, **section}.items() if value is not None}


def kind(extra_args: dict | None, **section: object) -> Kind:
    params = SamplingParams(extra_args=extra_args)
    return kind_of(params, ProxySection.parse(given(**section), "test"))


@pytest.mark.parametrize(
    ("own", "section", "expected"),
    [
        (None, {}, ("proxy", "constant", 1.0)),
        ({"mine": 1}, {"alpha": 0.5}, ("proxy", "constant", 0.5)),
        (None, {"alpha": "adaptive"}, ("proxy", "adaptive", None)),
        (None, {"alpha": 0}, ("base", "constant", 0)),
        ({"proxy_alpha": -2.5}, {"alpha": "adaptive"}, ("proxy", "constant", -2.5)),
        ({"proxy_alpha": 0}, {}, ("base", "constant", 0.0)),
        ({"proxy_alpha": "adaptive"}, {}, ("proxy", "adaptive", None)),
        (
            {"proxy_alpha": 2, "proxy_alpha_schedule": "linear", "proxy_alpha_steps": 9},
            {},
            ("proxy", "linear", 2.0),
        ),
        (
            {"proxy_alpha_schedule": "first", "proxy_alpha_steps": 9},
            {},
            ("proxy", "first", 1.0),
        ),
        ({"proxy_weights": [1, 2, 3]}, {}, ("proxy", "weights", None)),
        ({"proxy_weights": [0, 2, 0]}, {}, ("proxy", "weights", None)),
        *(
            (member.to_extra_args(), {}, (role, "weights", None))
            for role, member in MEMBER_CONTROLS.items()
        ),
        # The base instead of a missing member.
        ({"proxy_weights": [0, 1, 0]}, {"expert": None}, ("base", "weights", None)),
        ({"proxy_alpha": 1}, {"antiexpert": None}, ("expert", "constant", 1.0)),
        ({"proxy_top_p": 0.9}, {}, ("proxy", "constant", 1.0, ("top_p",))),
        ({"proxy_top_p": 1}, {}, ("proxy", "constant", 1.0)),
        (
            {"proxy_weights": [0, 1, 0], "proxy_plausibility": 0.1},
            {"filters": {"top_p": 0.9}},
            ("expert", "weights", None, ("plausibility",)),
        ),
        (
            {"proxy_expert_prompt": [1]},
            {"filters": {"top_p": 0.9}},
            ("proxy", "constant", 1.0, ("top_p",), ("expert",)),
        ),
    ],
)
def test_kinds(own, section, expected):
    assert kind(own, **section) == Kind(*expected, *((), ())[len(expected) - 3 :])


class Front:
    """vLLM's front end of an engine, which is asked and answers here."""

    def __init__(self, name: str, **section: object) -> None:
        model = SimpleNamespace(
            hf_config=SimpleNamespace(proxy=given(**section)),
            model="the/base",
            served_model_name=name,
        )
        self.name = name
        self.processor = OutputProcessor(None, log_stats=True)
        meter = Meter(SimpleNamespace(model_config=model))
        MeteredOutputProcessor.take_over(self.processor, meter)

    def ask(self, request_id: str, prompt: int, own: dict | None = None, n: int = 1) -> None:
        params = SamplingParams(
            extra_args=own, n=n, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=[5] * prompt,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id=f"client's {request_id}",
        )
        if n == 1:
            self.processor.add_request(request, None)
            return
        parent = ParentRequest(request)
        for index in range(n):
            child, child_params = parent.get_child_info(index)
            request.request_id, request.sampling_params = child, child_params
            self.processor.add_request(request, None, parent, index)

    def answer(self, request_id: str, tokens: int, *, is_last: bool) -> None:
        reason = FinishReason.LENGTH if is_last else None
        output = EngineCoreOutput(request_id, [7] * tokens, finish_reason=reason)
        self.processor.process_outputs([output], 1.0, IterationStats())

    def value(self, metric: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(
            f"vllm_proxy_{metric}", {"model_name": self.name, **labels}
        )


def test_a_request_is_counted_where_it_begins_its_tokens_where_it_ends():
    front = Front("counted")
    assert front.value("requests_total", member="expert", strength="weights") == 0
    front.ask("a", 5, MEMBER_CONTROLS["expert"].to_extra_args())
    front.ask("b", 3, {"proxy_alpha": 0.4, "proxy_top_p": 0.5, "proxy_expert_prompt": [1, 2]})
    assert front.value("requests_total", member="expert", strength="weights") == 1
    assert front.value("requests_total", member="proxy", strength="constant") == 1
    assert front.value("prompt_tokens_total", member="expert") == 5
    assert front.value("filtered_requests_total", filter="top_p") == 1
    assert front.value("filtered_requests_total", filter="plausibility") == 0
    assert front.value("prompted_requests_total", member="expert") == 1
    assert front.value("alpha_bucket", le="0.25") == 0
    assert front.value("alpha_bucket", le="0.5") == 1
    assert front.value("alpha_count") == 1
    front.answer("a", 4, is_last=False)
    front.answer("b", 2, is_last=True)
    assert front.value("generation_tokens_total", member="expert") == 0
    assert front.value("generation_tokens_total", member="proxy") == 2
    front.answer("a", 1, is_last=True)
    assert front.value("generation_tokens_total", member="expert") == 5
    assert not front.processor.running


def test_clients_that_leave_and_every_choice_are_counted():
    front = Front("left")
    front.ask("a", 2, n=3)
    front.ask("b", 2)
    assert front.value("requests_total", member="proxy", strength="constant") == 4
    for child in list(front.processor.request_states):
        front.answer(child, 2, is_last=child == "0_a")
    front.processor.abort_requests(["client's a", "client's b"], internal=False)
    assert front.value("generation_tokens_total", member="proxy") == 8
    assert not front.processor.running
    front.processor.abort_requests(["client's a"], internal=False)
    assert front.value("generation_tokens_total", member="proxy") == 8


def test_lengths_of_drafts():
    front = Front("drafting")
    stats = SpecDecodingStats.new(4)
    for drafted, accepted in ((4, 2), (1, 0), (1, 1), (3, 3)):
        stats.observe_draft(drafted, accepted)
    front.processor.update_scheduler_stats(SchedulerStats(spec_decoding_stats=stats))
    front.processor.update_scheduler_stats(SchedulerStats())
    front.processor.update_scheduler_stats(None)
    assert front.value("draft_length_count") == 4
    assert front.value("draft_length_sum") == 9
    at_most = [front.value("draft_length_bucket", le=f"{n}.0") for n in (1, 2, 3, 4)]
    assert at_most == [2, 2, 3, 4]


def test_members_are_named():
    front = Front("named", antiexpert=None)
    for role, model in {"base": "the/base", "expert": "the/expert"}.items():
        assert front.value("member_info", member=role, model=model) == 1
    assert front.value("requests_total", member="antiexpert", strength="weights") is None
