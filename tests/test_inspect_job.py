"""`ProxyLLM.inspect` and the job behind `vllm-proxy inspect`, on a real engine with a tokenizer."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from scipy.special import log_softmax
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from support.reference import Reference
from vllm_proxy import ProxyConfig
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.jobs.inputs import Input, Prompts
from vllm_proxy.jobs.inspect.job import InspectJob
from vllm_proxy.jobs.rows import InspectedRow, PromptRow, parse_row

PROMPT = "The large model is"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
TEXT = " moved ☘ 😀"


@pytest.fixture(scope="module")
def config(members) -> ProxyConfig:
    return ProxyConfig(**members, sampling={"temperature": 0.0, "max_tokens": 7})


def inspected(
    config: ProxyConfig, llm, path: Path, rows: list[dict | str], **options
) -> list[dict]:
    """Return the records of a job over *rows*."""
    source = path.with_suffix(".in.jsonl")
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    source.write_text("\n".join(lines) + "\n")
    with InspectJob(config, Input(str(source)), str(path), top_k=3, **options) as job:
        if not job.finished:
            job.run(llm)
        job.output.finish()
        return list(job.records())


def logprobs_of(reference: Reference, prompts: list[list[int]], answer: list[int]) -> list[float]:
    """Return the proxy's log-probability of each token of *answer*, by the transformers loop."""
    members = reference.feed([[*ids, *answer[:-1]] for ids in prompts], [None] * 3)
    rows = zip(*(logits[-len(answer) :] for logits in members), strict=True)
    return [
        log_softmax(reference.fuse(*row, {}, 0)[0])[token]
        for row, token in zip(rows, answer, strict=True)
    ]


def text_of(tokens: Iterable[str]) -> str:
    """Return the text that tokens come to; the tiny models have ids that are none (`⟨438⟩`)."""
    return re.sub("⟨[0-9]+⟩", "", "".join(tokens))


class TestApi:
    def test_generates_what_generate_does(self, proxy_llm):
        (output,) = proxy_llm.generate([PROMPT], GREEDY, use_tqdm=False)
        (one,) = proxy_llm.inspect(PROMPT, GREEDY, top_k=2)
        assert one.prompt_token_ids == output.prompt_token_ids
        assert one.token_ids == list(output.outputs[0].token_ids)
        assert (one.text, one.finish_reason) == (output.outputs[0].text, "length")
        assert [token.token_id for token in one.tokens] == one.token_ids
        assert text_of(token.token for token in one.tokens) == one.text
        assert one.missing == ()
        for token in one.tokens:
            assert token.proxy.rank == 1
            assert token.proxy.top[0].token_id == token.token_id
            assert token.proxy.top[0].logprob == pytest.approx(token.proxy.logprob, abs=1e-6)
            assert len(token.base.top) == len(token.expert.top) == 2

    def test_loglikelihood_with_a_prompt_for_each_member(self, proxy_llm, reference):
        """The plain sum that an evaluation harness needs."""
        tokenizer = proxy_llm.get_tokenizer()
        prompts = [PROMPT, "Another one,", "And a third: "]
        answers = [" small", [60, 61, 62, 200]]
        found = proxy_llm.inspect(
            [{"prompt": prompts[0], "expert_prompt": prompts[1], "antiexpert_prompt": prompts[2]}]
            * 2,
            completions=answers,
            top_k=1,
        )
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        for one, answer in zip(found, answers, strict=True):
            own = tokenizer.encode(answer) if isinstance(answer, str) else answer
            assert one.token_ids == own
            right = logprobs_of(reference, ids, own)
            assert [token.proxy.logprob for token in one.tokens] == pytest.approx(right, abs=2e-4)

    def test_one_completion(self, proxy_llm):
        (text,) = proxy_llm.inspect(PROMPT, completions=TEXT)
        (ids,) = proxy_llm.inspect(PROMPT, completions=text.token_ids)
        assert text.text == ids.text == TEXT
        assert [vars(token) for token in text.tokens] == [vars(token) for token in ids.tokens]
        assert any(token.kind == "part of a character" for token in text.tokens)

    def test_control(self, proxy_llm):
        base, schedule = proxy_llm.inspect(
            [PROMPT] * 2,
            GREEDY,
            alpha=[0, {"alpha": 1.0, "schedule": "first", "steps": 2}],
            filters={"plausibility": 0.9},
        )
        assert not any(token.changed for token in base.tokens)
        assert [token.kl > 0.01 for token in schedule.tokens][:2] == [True, True]
        assert all(len(token.proxy.top) < 5 for token in base.tokens)  # others are filtered out
        assert all(len(token.base.top) == 5 for token in base.tokens)

    def test_the_longest_answer_fits(self, proxy_llm):
        """Prompt and answer fill the context, as generation may."""
        prompt = {"prompt_token_ids": [5] * 100, "expert_prompt": [6] * 200}
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        (one,) = proxy_llm.inspect([prompt], params)
        assert len(one.tokens) == len(one.token_ids) >= 32
        assert {token.proxy.rank for token in one.tokens} == {1}

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"top_k": 0}, "`top_k` is 0: give a count from 1 to 100"),
            ({"top_k": True}, "`top_k` is True"),
            ({"completions": ["a", "b"]}, "`completions` has 2 entries for 1 prompts"),
            ({"completions": ""}, "`completion`: it is empty"),
            (
                {"completions": [[3, 512]]},
                "`completion` is 512: not every member has this token id; give ids from 0 to",
            ),
            ({"sampling_params": SamplingParams(n=2)}, "`n` is 2: it must be 1; repeat"),
            ({"alpha": "high"}, "`alpha` is 'high'"),
        ],
    )
    def test_mistakes_are_one_line(self, proxy_llm, options, says):
        with pytest.raises(ProxyConfigError) as caught:
            proxy_llm.inspect([PROMPT], **options)
        assert says in str(caught.value)
        assert not proxy_llm.llm_engine.has_unfinished_requests()

    def test_an_answer_that_does_not_fit(self, proxy_llm):
        """Those asked before it are given up, and the engine goes on."""
        with pytest.raises(VLLMValidationError, match="256"):
            proxy_llm.inspect([PROMPT] * 2, completions=[[5, 6], [5] * 300])
        assert not proxy_llm.llm_engine.has_unfinished_requests()
        assert len(proxy_llm.inspect(PROMPT, GREEDY)[0].tokens) == 7

    def test_an_engine_with_an_extension_of_its_own(self, proxy_llm, monkeypatch):
        parallel = proxy_llm.llm_engine.vllm_config.parallel_config
        monkeypatch.setattr(parallel, "worker_extension_cls", "my.Extension")
        with pytest.raises(ProxyConfigError, match="worker_extension_cls"):
            proxy_llm.inspect(PROMPT)

    def test_workers_keep_nothing(self, proxy_llm):
        proxy_llm.generate([PROMPT], GREEDY, use_tqdm=False)  # in which they hear of what ended
        (found,) = proxy_llm.collective_rpc("take_inspected", args=([],))
        assert found == {}


class TestJob:
    def test_records(self, proxy_llm, config, tmp_path):
        rows = [
            {"prompt": PROMPT, "id": "one"},
            {"messages": MESSAGES, "sampling": {"max_tokens": 3}, "continue_final_message": True},
            {"prompt": PROMPT, "completion": TEXT, "alpha": 0.5},
            {"messages": MESSAGES, "completion": [60, 61], "expert_prompt": "Other words"},
            {"prompt": PROMPT, "completion": ""},
            {"prompt": PROMPT, "completion": [9999]},
            {"prompt": PROMPT, "completion": 5},
            {"prompt_token_ids": [5] * 250, "completion": [5] * 20},
            {"prompt_token_ids": [9999]},
            {"prompt": PROMPT, "sampling": {"n": 2, "temperature": 1.0}},
            "not JSON",
        ]
        records = inspected(config, proxy_llm, tmp_path / "out.jsonl", rows)
        assert [record["index"] for record in records] == list(range(len(rows)))
        one, chat, given, own, *wrong = records
        (same,) = proxy_llm.inspect(PROMPT, top_k=3)
        assert one["tokens"] == [token.to_record() for token in same.tokens]
        assert (one["id"], one["alpha"], one["missing"]) == ("one", 1.0, [])
        assert one["prompts"] == {"base": PROMPT}
        assert text_of(token["token"] for token in one["tokens"]) == one["text"]
        begun = {"continue_final_message": True, "add_generation_prompt": False}
        (output,) = proxy_llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=3), **begun)
        assert chat["token_ids"] == list(output.outputs[0].token_ids)
        assert (chat["prompt_tokens"], chat["completion_tokens"]) == (
            len(output.prompt_token_ids),
            3,
        )
        assert chat["prompts"]["base"].startswith("[user] What is the capital")
        assert (given["text"], given["alpha"], given["finish_reason"]) == (TEXT, 0.5, None)
        (alone,) = proxy_llm.inspect(PROMPT, completions=TEXT, alpha=0.5, top_k=3)
        assert given["tokens"] == [token.to_record() for token in alone.tokens]
        assert own["prompts"]["expert"] == "Other words"
        assert len(own["tokens"]) == 2
        says = (
            *("`completion` is ''", "`completion` is 9999", "`completion` is 5"),
            *(
                "`prompt_token_ids`",
                "`prompt_token_ids`: Token id 9999",
                "`sampling.n` is 2",
                "not a JSON",
            ),
        )
        for record, words in zip(wrong, says, strict=True):
            assert words in record["error"]
            assert "tokens" not in record

    def test_the_answer_is_the_request_s_own(self, proxy_llm, config, reference, tmp_path):
        """Both passes read what each member read."""
        row = {"prompt": PROMPT, "expert_prompt": "Other words", "antiexpert_prompt": [5, 6, 7]}
        (record,) = inspected(config, proxy_llm, tmp_path / "out.jsonl", [row])
        encode = proxy_llm.get_tokenizer().encode
        prompts = [encode(PROMPT), encode("Other words"), [5, 6, 7]]
        right = logprobs_of(reference, prompts, record["token_ids"])
        said = [token["proxy"]["logprob"] for token in record["tokens"]]
        assert said == pytest.approx(right, abs=2e-4)
        assert math.isfinite(sum(said))

    def test_a_job_goes_on(self, proxy_llm, config, tmp_path):
        path, rows = tmp_path / "out.jsonl", [{"prompt": f"PromptRow {i}"} for i in range(4)]
        every = inspected(config, proxy_llm, path, rows)
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:1] + lines[2:3]) + '{"index": 1, "to')
        assert inspected(config, proxy_llm, path, rows) == every
        with pytest.raises(ProxyConfigError, match=r"`inspect.top_k` was 3, is 4"):
            InspectJob(config, Input(str(path.with_suffix(".in.jsonl"))), str(path), top_k=4)

    def test_prompts_of_options_are_rows(self, proxy_llm, config, tmp_path):
        source = Prompts([PROMPT, "</script>"])
        with InspectJob(config, source, str(tmp_path / "out"), top_k=1, keep=False) as job:
            assert not job.resumable
            job.run(proxy_llm)
            job.output.finish()
            assert [record["prompts"]["base"] for record in job.records()] == [PROMPT, "</script>"]
            summary = job.summary_of_shift()
            assert (summary.records, summary.every.tokens) == (2, 14)
            assert job.write_page(str(tmp_path / "page.html"), summary) == 2


def test_only_inspect_takes_completions():
    line = b'{"prompt": "a", "completion": "b"}'
    assert parse_row(line, row_type=InspectedRow).completion == "b"
    with pytest.raises(ProxyConfigError, match="unknown key `completion`"):
        parse_row(line, row_type=PromptRow)
