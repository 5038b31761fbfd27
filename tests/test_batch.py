"""Batch jobs: rows, records, what survives a kill, and that the answers are the engine's own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from test_engine import IDS, MESSAGES, OWN, PROMPT, configure, decode, strength

from vllm_proxy.batch import Job
from vllm_proxy.config import ChatFormats, ProxyConfig
from vllm_proxy.errors import ProxyConfigError
from vllm_proxy.files import Input
from vllm_proxy.prompts import chat_tokenizers
from vllm_proxy.rows import parse_row, row_id, sampling_params

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "gpu_memory_utilization": 0.1,
}


def make_config(**values) -> ProxyConfig:
    members = {"base": "b", "expert": "e", "antiexpert": "a"}
    return ProxyConfig.parse({**members, "engine": ENGINE, **values}, "test")


def write_rows(path: Path, *rows: dict | str) -> str:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return str(path)


def records(path: Path | str) -> list[dict]:
    # Not `splitlines`, which also breaks at the U+2028 and U+0085 that a text may have.
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]


class TestRows:
    @pytest.mark.parametrize(
        "line",
        [
            '{"prompt": "a"}',
            '{"prompt": " ", "id": 7, "sampling": {"top_k": 1}}\r\n',
            '{"prompt_token_ids": [1, 2], "id": null, "prompt": null}',
            '{"messages": [{"role": "user", "content": "a"}]}',
            '{"prompt": "a", "alpha": 1, "filters": {"top_p": 0.5}, "expert_prompt": "b"}',
            '{"prompt": "a", "alpha": {"schedule": "linear", "steps": 3}, "weights": null}',
            '{"prompt": "a", "weights": [1, 0.5, -2], "antiexpert_prompt": [1]}',
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}',
        ],
    )
    def test_valid(self, line):
        assert parse_row(line.encode()).kind in line

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("", "the row is empty"),
            (" \n", "the row is empty"),
            ("nonsense", "not a JSON object"),
            ("[1]", "not a JSON object"),
            ('{"prompt": "\\ud800"}', "not a JSON object"),
            ("{}", "no prompt"),
            ('{"prompt": "a", "prompt_token_ids": [1]}', "`prompt` and `prompt_token_ids`"),
            ('{"prompt": ""}', "`prompt` is empty"),
            ('{"messages": []}', "`messages` is empty"),
            ('{"promt": "a"}', "unknown key `promt`; did you mean `prompt`?"),
            ('{"prompt": 5}', "`prompt` is 5"),
            ('{"prompt_token_ids": [1, true]}', "`prompt_token_ids.1` is True"),
            ('{"prompt_token_ids": [1, 2.5]}', "`prompt_token_ids.1` is 2.5"),
            ('{"prompt": "a", "sampling": 1}', "`sampling` is 1"),
            ('{"prompt": "a", "alpha": NaN}', "`alpha` is nan"),
            ('{"prompt": "a", "alpha": true}', "`alpha` is True"),
            ('{"prompt": "a", "weights": [1, 0, Infinity]}', "`weights` is [1, 0, inf]"),
            ('{"prompt": "a", "expert_prompt": [true]}', "`expert_prompt` is [True]"),
            ('{"prompt": "a", "expert_promt": "b"}', "`expert_promt`; did you mean"),
            ('{"prompt": "a", "filters": 1}', "`filters` is 1"),
            ('{"messages": [{"content": "a"}]}', "needs a role"),
            ('{"messages": [{"role": "user", "content": 5}]}', "content is a string"),
            ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "content is"),
        ],
    )
    def test_invalid_says_what_in_one_line(self, line, says):
        with pytest.raises(ProxyConfigError) as caught:
            parse_row(line.encode())
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_long_values_are_cut_in_errors(self):
        with pytest.raises(ProxyConfigError) as caught:
            parse_row(json.dumps({"prompt": ["word"] * 10_000}).encode())
        assert len(str(caught.value)) < 200

    def test_text_lines_are_prompts(self):
        assert parse_row(b'{"a": 1}\n', text=True).prompt == '{"a": 1}'
        with pytest.raises(ProxyConfigError, match="empty"):
            parse_row(b"  \n", text=True)
        with pytest.raises(ProxyConfigError, match="UTF-8"):
            parse_row(b"\xff\n", text=True)

    def test_an_invalid_row_keeps_its_id(self):
        assert row_id(b'{"id": [1], "promt": "a"}') == [1]
        assert row_id(b"nonsense") is None
        assert row_id(b"5") is None

    def test_input_drops_a_byte_order_mark(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}')
        lines = [line for _, line in Input(str(path)).lines()]
        assert [parse_row(line).prompt for line in lines] == ["a", "b"]


class TestSampling:
    def test_builds_what_json_cannot_say(self):
        params = sampling_params(
            {"structured_outputs": {"regex": "a+"}, "logit_bias": {"5": 1}, "stop": "x"}
        )
        assert params.structured_outputs.regex == "a+"
        assert params.logit_bias == {5: 1.0}

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"temprature": 1}, "`sampling.temprature`; did you mean `temperature`?"),
            ({"temperature": "hot"}, "`sampling.temperature` is 'hot'"),
            ({"temperature": -1}, "temperature must be non-negative, got -1.0."),
            ({"temperature": float("nan")}, "temperature must be a finite number"),
            ({"max_tokens": 0}, "max_tokens must be at least 1"),
            ({"max_tokens": 2.5}, "`sampling.max_tokens` is 2.5"),
            ({"seed": 2**64}, "`sampling.seed`"),
            ({"stop": [1]}, "`sampling.stop` is [1]"),
            ({"output_kind": 1}, "`sampling.output_kind`"),
            ({"structured_outputs": {"regx": "a"}}, "`sampling.structured_outputs.regx`"),
        ],
    )
    def test_refuses(self, values, says):
        with pytest.raises(ProxyConfigError) as caught:
            sampling_params(values)
        assert says in str(caught.value)


class FakeEngine:
    """Answers a row with its own ids, one row a step; after *dies_after* answers it fails.

    Only for what happens to files: nothing here says anything about generation.
    """

    def __init__(self, dies_after: int | None = None):
        self.asked, self.most_waiting, self._left = [], 0, dies_after
        self._waiting: list[tuple[str, list[int]]] = []
        model = SimpleNamespace(
            get_vocab_size=lambda: 100,
            get_diff_sampling_param=dict,
            max_logprobs=20,
            is_diffusion=False,
        )
        self.model_config = model
        self.llm_engine = SimpleNamespace(
            step=self._step,
            tokenizer=object(),
            vllm_config=SimpleNamespace(
                model_config=model,
                scheduler_config=SimpleNamespace(max_num_seqs=2),
                speculative_config=None,
                structured_outputs_config=None,
            ),
        )

    def enqueue(self, prompts, params, use_tqdm):
        (prompt,) = prompts
        number = len(self.asked)
        self.asked.append(prompt["prompt_token_ids"])
        self._waiting.append((str(number), prompt["prompt_token_ids"]))
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        return [f"{number}-suffix"]

    def _step(self):
        if self._left == 0:
            raise RuntimeError("the engine died")
        self._left = None if self._left is None else self._left - 1
        number, ids = self._waiting.pop()  # the last first: rows finish in any order
        completion = SimpleNamespace(text="", token_ids=ids, finish_reason="length", logprobs=None)
        return [
            SimpleNamespace(
                request_id=number,
                finished=True,
                outputs=[completion],
                prompt_token_ids=ids,
                prompt_logprobs=None,
            )
        ]


class TestResume:
    """The mechanics of the files, with a fake engine; `TestEngine` kills a real one."""

    @pytest.fixture
    def rows(self, tmp_path):
        return write_rows(
            tmp_path / "rows.jsonl", *({"prompt_token_ids": [i], "id": i} for i in range(20)), "bad"
        )

    @pytest.fixture
    def out(self, tmp_path):
        return str(tmp_path / "out.jsonl")

    def die(self, rows, out, after=7, **config):
        with Job(make_config(**config), rows, out) as job, pytest.raises(RuntimeError):
            job.run(FakeEngine(dies_after=after))

    def finish(self, rows, out, **options):
        engine = FakeEngine()
        config = options.pop("config", make_config())
        with Job(config, rows, out, **options) as job:
            job.run(engine)
        return engine

    def test_only_missing_rows_are_asked_again(self, rows, out):
        self.die(rows, out)
        before = records(out)
        engine = self.finish(rows, out)
        assert len(engine.asked) == 20 - sum("error" not in record for record in before)
        assert records(out)[: len(before)] == before
        assert sorted(record["index"] for record in records(out)) == list(range(21))

    def test_an_id_that_is_no_unicode_survives(self, tmp_path, out):
        self.finish(write_rows(tmp_path / "odd.jsonl", '{"id": "\\ud800", "promt": 1}'), out)
        assert records(out)[0]["id"] == "\ud800"

    def test_a_half_line_is_dropped(self, rows, out):
        self.die(rows, out)
        whole = Path(out).read_bytes()
        Path(out).write_bytes(whole + b'{"index": 19, "id": 19, "te')
        engine = self.finish(rows, out)
        assert [19] in engine.asked or whole.count(b'"index": 19,')
        assert Path(out).read_bytes().startswith(whole)
        assert sorted(record["index"] for record in records(out)) == list(range(21))

    def test_a_finished_job_says_so(self, rows, out):
        self.finish(rows, out)
        with Job(make_config(), rows, out) as job:
            assert job.finished
            assert (job.done, job.output.failed) == (21, 1)

    def test_a_higher_limit_goes_on(self, rows, out):
        self.finish(rows, out, limit=5)
        assert len(records(out)) == 5
        engine = self.finish(rows, out, limit=8)
        assert engine.asked == [[5], [6], [7]]
        with Job(make_config(), rows, out, limit=3) as job:
            assert job.finished

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"alpha": 0.5}, "`alpha` was 1.0, is 0.5"),
            ({"alpha": "adaptive"}, "`alpha` was 1.0, is 'adaptive'"),
            ({"alpha": {"schedule": "first", "steps": 3}}, "`alpha.schedule` was None, is 'first'"),
            ({"filters": {"top_p": 0.9}}, "`filters.top_p` was None, is 0.9"),
            ({"chat": {"expert": "template"}}, "`chat.expert` was None, is 'template'"),
            ({"expert": "other"}, "`expert` was 'e', is 'other'"),
            ({"sampling": {"max_tokens": 3}}, "`sampling.max_tokens` was None, is 3"),
            ({"engine": {**ENGINE, "seed": 1}}, "`engine.seed` was None, is 1"),
        ],
    )
    def test_another_job_is_refused_by_what_differs(self, rows, out, change, says):
        self.die(rows, out)
        before = Path(out).read_bytes()
        with pytest.raises(ProxyConfigError) as caught:
            Job(make_config(**change), rows, out)
        assert says in str(caught.value)
        assert "--overwrite" in str(caught.value)
        assert Path(out).read_bytes() == before

    def test_another_input_is_refused(self, rows, out):
        self.die(rows, out)
        Path(rows).write_text('{"prompt": "new"}\n')
        with pytest.raises(ProxyConfigError, match=r"input\.sha256"):
            Job(make_config(), rows, out)

    def test_resources_may_change(self, rows, out):
        """A job that ran out of memory is resumed with less of it."""
        self.die(rows, out)
        engine = {**ENGINE, "gpu_memory_utilization": 0.5, "max_num_seqs": 1}
        self.finish(rows, out, config=make_config(engine=engine))
        assert len(records(out)) == 21

    def test_overwrite_starts_anew_but_only_once_the_engine_is_up(self, rows, out):
        self.finish(rows, out)
        before = Path(out).read_bytes()
        config = make_config(alpha=0.5)
        with Job(config, rows, out, overwrite=True):
            pass  # an engine that did not start
        assert Path(out).read_bytes() == before
        self.finish(rows, out, config=config, overwrite=True)
        assert {record["alpha"] for record in records(out) if "alpha" in record} == {0.5}
        assert len(records(out)) == 21

    def test_a_job_that_never_began_leaves_nothing(self, rows, out):
        with Job(make_config(), rows, out):
            assert Path(out).exists()
        assert not Path(out).exists()

    def test_two_processes_do_not_share_an_output(self, rows, out):
        with Job(make_config(), rows, out):
            code = (
                "import sys; from vllm_proxy.files import Output\n"
                f"try: Output({out!r}, {{}}, 1)\n"
                "except ValueError as error: sys.exit(str(error))"
            )
            other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is writing it" in other.stderr

    def test_memory_is_bounded_by_rows_in_flight(self, tmp_path, out):
        rows = write_rows(tmp_path / "many.jsonl", *[{"prompt_token_ids": [1]}] * 100)
        assert self.finish(rows, out).most_waiting == 4 * 2

    def test_a_row_has_one_answer(self, rows, out):
        with pytest.raises(ProxyConfigError, match=r"`sampling\.n` is 2: a row has one answer"):
            Job(make_config(sampling={"n": 2}), rows, out)

    def test_a_pipe_is_answered_but_not_resumed(self, tmp_path, out):
        pipe = str(tmp_path / "pipe")
        os.mkfifo(pipe)
        writer = subprocess.Popen(["bash", "-c", f"echo '{{\"prompt_token_ids\": [3]}}' > {pipe}"])
        assert self.finish(pipe, out).asked == [[3]]
        writer.wait()
        with pytest.raises(ProxyConfigError, match="cannot be resumed"):
            Job(make_config(), pipe, out)


PROMPTS = [
    {"prompt": "The large model is moved by", "id": "text"},
    {"prompt_token_ids": [5, 6, 7], "id": "ids"},
    {"messages": [{"role": "user", "content": "What is the capital of France?"}], "id": "chat"},
]
GREEDY = {"temperature": 0, "max_tokens": 12}


class TestEngine:
    """Jobs on a real engine; what they answer is compared with `LLM.generate` and `LLM.chat`."""

    def job(self, llm, members, tmp_path, *rows, **sampling) -> dict:
        source = write_rows(tmp_path / "rows.jsonl", *rows)
        config = ProxyConfig.parse(
            {**members, "engine": ENGINE, "sampling": {**GREEDY, **sampling}}, "test"
        )
        with Job(config, source, str(tmp_path / "out.jsonl")) as job:
            self.summary = job.run(llm)
        return {record["index"]: record for record in records(tmp_path / "out.jsonl")}

    def expected(self, llm, **sampling):
        params = sampling_params({**GREEDY, **sampling})
        text, ids, chat = PROMPTS
        return [
            *llm.generate([text["prompt"], ids["prompt_token_ids"]], params, use_tqdm=False),
            *llm.chat([chat["messages"]], params, use_tqdm=False),
        ]

    def test_answers_are_those_of_generate_and_chat(self, proxy_llm, members, tmp_path):
        got = self.job(proxy_llm, members, tmp_path, *PROMPTS)
        for index, output in enumerate(self.expected(proxy_llm)):
            completion = output.outputs[0]
            assert got[index] == {
                "index": index,
                "id": PROMPTS[index]["id"],
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "prompt_tokens": len(output.prompt_token_ids),
                "completion_tokens": len(completion.token_ids),
                "alpha": 1.0,
            }

    def test_rows_of_all_kinds(self, proxy_llm, reference, members, tmp_path, monkeypatch):
        """Each token-identical to plain loops; all in one job, and conversations in formats."""
        tokenizer, text = proxy_llm.get_tokenizer(), "Question: What is the capital?"
        chat = configure(proxy_llm, monkeypatch, chat=ChatFormats(expert="template"))
        monkeypatch.setattr(proxy_llm, "_tokenizers", chat_tokenizers(chat), raising=False)
        plain = tokenizer.encode(MESSAGES[0]["content"])
        template = tokenizer.apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_dict=False
        )
        first = {"alpha": 1.5, "schedule": "first", "steps": 3}
        base = tokenizer.encode(PROMPT)
        rows = [
            ({"prompt_token_ids": IDS[0]}, IDS[0], strength(1.0)),
            ({"prompt_token_ids": IDS[0], "alpha": 0}, IDS[0], strength(0.0)),
            (
                {"prompt_token_ids": IDS[1], "alpha": first},
                IDS[1],
                lambda t: strength(1.5 if t < 3 else 0.0)(t),
            ),
            ({"prompt_token_ids": IDS[2], "weights": [0, 1, 0]}, IDS[2], lambda t: (0, 1, 0)),
            ({"prompt_token_ids": IDS[3], "filters": {"top_p": 1e-6}}, IDS[3], strength(0.0)),
            (
                {"prompt": PROMPT, "expert_prompt": text},
                [base, tokenizer.encode(text), base],
                strength(1.0),
            ),
            (
                {
                    "prompt_token_ids": IDS[0],
                    "expert_prompt": OWN[0],
                    "antiexpert_prompt": OWN[1],
                    "alpha": 2,
                },
                [IDS[0], *OWN],
                strength(2.0),
            ),
            ({"messages": MESSAGES}, [plain, template, plain], strength(1.0)),
            ({"messages": MESSAGES, "alpha": 0.5}, [plain, template, plain], strength(0.5)),
            (
                {"messages": MESSAGES, "antiexpert_prompt": text},
                [plain, template, tokenizer.encode(text)],
                strength(1.0),
            ),
        ]
        got = self.job(proxy_llm, members, tmp_path, *[row for row, *_ in rows], ignore_eos=True)
        for index, (row, prompts, weights) in enumerate(rows):
            assert got[index]["token_ids"] == decode(reference, prompts, weights, 12), row
            assert got[index].get("weights") == row.get("weights")
            assert got[index].get("alpha") == (None if "weights" in row else row.get("alpha", 1.0))

    def test_an_adaptive_row(self, proxy_llm, members, tmp_path):
        row = {"prompt_token_ids": IDS[0], "alpha": "adaptive"}
        record = self.job(proxy_llm, members, tmp_path, row)[0]
        params = sampling_params(GREEDY)
        (output,) = proxy_llm.generate(IDS[0], params, use_tqdm=False, alpha="adaptive")
        assert record["token_ids"] == list(output.outputs[0].token_ids)
        assert record["alpha"] == "adaptive"

    def test_wrong_values_of_a_row(self, proxy_llm, members, tmp_path):
        logprobs = {"sampling": {"prompt_logprobs": 0}, "expert_prompt": [5]}
        wrong = [
            ({"alpha": "1"}, "`alpha` is '1': give a finite number"),
            ({"alpha": {"schedule": "first"}}, "`alpha.steps` is missing"),
            ({"alpha": 1, "weights": [1, 0, 0]}, "`weights` take the place of `alpha`"),
            ({"weights": [1, 0]}, "`weights` is [1, 0]: give three finite numbers"),
            ({"filters": {"topp": 1}}, "unknown key `filters.topp`; did you mean `top_p`?"),
            ({"filters": {"top_p": 0}}, "`filters.top_p` is 0"),
            ({"expert_prompt": ""}, "`expert_prompt` is ''"),
            ({"expert_prompt": [512]}, "`expert_prompt` has 512; ids that the expert"),
            ({"antiexpert_prompt": [5] * 300}, "`antiexpert_prompt` has 300 tokens; the most"),
            (logprobs, "`expert_prompt`: prompt_logprobs cannot be given"),
            (
                {"sampling": {"extra_args": {"proxy_alpha": 1}}},
                "`sampling.extra_args.proxy_alpha`: not a parameter of sampling; give `alpha`",
            ),
            ({"sampling": {"extra_args": {"proxy_alpah": 1}}}, "`sampling.extra_args.proxy_alpah`"),
        ]
        rows = [{"prompt": "a", "id": index, **row} for index, (row, _) in enumerate(wrong)]
        got = self.job(proxy_llm, members, tmp_path, *rows, PROMPTS[1])
        for index, (_, says) in enumerate(wrong):
            assert got[index].keys() == {"index", "id", "error"}
            assert got[index]["id"] == index
            assert got[index]["error"].startswith(says), got[index]
        assert got[len(wrong)]["completion_tokens"] > 0

    def test_our_keys_in_the_jobs_sampling(self, proxy_llm, members, tmp_path):
        with pytest.raises(ProxyConfigError, match=r"`sampling\.extra_args\.proxy_weights`"):
            self.job(proxy_llm, members, tmp_path, PROMPTS[1], extra_args={"proxy_weights": [1]})

    def test_logprobs(self, proxy_llm, members, tmp_path):
        rows = [{**PROMPTS[1], "sampling": {"prompt_logprobs": 1}}]
        record = self.job(proxy_llm, members, tmp_path, *rows, logprobs=3)[0]
        output = self.expected(proxy_llm, logprobs=3, prompt_logprobs=1)[1]
        assert [e["token_id"] for e in record["logprobs"]] == record["token_ids"]
        for entry, position in zip(record["logprobs"], output.outputs[0].logprobs, strict=True):
            assert entry["logprob"] == position[entry["token_id"]].logprob
            assert [top["token_id"] for top in entry["top"]] == [
                token for token, value in position.items() if value.rank <= 3
            ]
        assert record["prompt_logprobs"][0] is None
        assert [e["token_id"] for e in record["prompt_logprobs"][1:]] == [6, 7]

    def test_a_rows_sampling_goes_before_the_jobs(self, proxy_llm, members, tmp_path):
        rows = [PROMPTS[0], {**PROMPTS[0], "sampling": {"max_tokens": 2}}]
        got = self.job(proxy_llm, members, tmp_path, *rows)
        assert got[1]["token_ids"] == got[0]["token_ids"][:2]

    def test_wrong_rows_stop_no_other(self, proxy_llm, members, tmp_path):
        wrong = [
            ("nonsense", "not a JSON object"),
            ({"prompt": "word " * 400}, "maximum context length is 256"),
            ({"prompt_token_ids": [7] * 256}, "maximum model length of 256"),
            ({"prompt_token_ids": [512]}, "`prompt_token_ids` has 512"),
            ({"prompt_token_ids": [-1]}, "`prompt_token_ids` has -1"),
            ({"prompt": "a", "sampling": {"logprobs": 100}}, "greater than max allowed"),
            ({"prompt": "a", "sampling": {"stop_token_ids": [9999]}}, "out-of-vocab"),
            ({"messages": [{"role": "user"}], "prompt": "a"}, "`prompt` and `messages`"),
            ({"prompt": "a", "sampling": {"n": 2, "temperature": 1.0}}, "`sampling.n` is 2"),
        ]
        rows = [row for bad, _ in wrong for row in (bad, PROMPTS[1])]
        got = self.job(proxy_llm, members, tmp_path, *rows)
        for index, (_, says) in enumerate(wrong):
            assert set(got[2 * index]) == {"index", "id", "error"}
            assert says in got[2 * index]["error"]
            assert got[2 * index + 1]["completion_tokens"] > 0
        assert (self.summary.rows, self.summary.errors) == (18, 9)

    def test_a_model_without_chat_template(self, proxy_llm, members, tmp_path, monkeypatch):
        monkeypatch.setattr(proxy_llm.get_tokenizer(), "chat_template", None)
        got = self.job(proxy_llm, members, tmp_path, PROMPTS[2], PROMPTS[0])
        assert "chat template" in got[0]["error"]
        assert got[1]["completion_tokens"] > 0

    def test_wrong_sampling_of_the_job_is_said_once(self, proxy_llm, members, tmp_path):
        with pytest.raises(ProxyConfigError, match="sample logprobs of 50"):
            self.job(proxy_llm, members, tmp_path, *PROMPTS, logprobs=50)

    def test_a_killed_job_is_resumed(self, proxy_llm, members, tmp_path):
        """kill -9 in the middle: nothing written is lost, no process is left, all rows answered."""
        rows = [{"prompt_token_ids": [3 + i % 300, 4, 5], "id": i} for i in range(200)]
        source, out = write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "out.jsonl"
        config = tmp_path / "proxy.yaml"
        config.write_text(yaml.safe_dump({**members, "engine": ENGINE, "sampling": GREEDY}))
        script = "from vllm_proxy.cli import app\nif __name__ == '__main__':\n    app()"
        (tmp_path / "run.py").write_text(script)  # what the console script does
        command = [sys.executable, str(tmp_path / "run.py"), "generate", str(config)]
        command += ["--input", source, "--output", str(out)]
        # Not in the fixture's way: the engine in a process of its own, as users have it.
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

        process = subprocess.Popen(command, env=env, start_new_session=True)
        while process.poll() is None and (not out.exists() or out.read_text().count("\n") < 20):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        before = out.read_bytes()
        deadline = time.monotonic() + 30
        while (alive := living(session=process.pid)) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not alive

        second = subprocess.run(command, env=env, capture_output=True, text=True)
        assert (second.returncode, second.stdout) == (0, "")
        assert len(second.stderr.splitlines()) == 1
        whole = before[: before.rindex(b"\n") + 1]
        assert out.read_bytes().startswith(whole)
        written = whole.count(b"\n")
        assert f"; {written} rows were there before" in second.stderr

        got = {record["index"]: record["token_ids"] for record in records(out)}
        assert sorted(got) == list(range(200))
        some = range(0, 200, 10)  # the engine in this process is slow
        prompts = [rows[index]["prompt_token_ids"] for index in some]
        expected = proxy_llm.generate(prompts, sampling_params(GREEDY), use_tqdm=False)
        assert [got[index] for index in some] == [list(o.outputs[0].token_ids) for o in expected]


def living(session: int) -> list[str]:
    """Return the processes of a session that are no zombies."""
    listing = subprocess.run(["ps", "-eo", "sid,stat,cmd"], capture_output=True, text=True)
    lines = [line.split(maxsplit=2) for line in listing.stdout.splitlines()[1:]]
    return [cmd for sid, stat, cmd in lines if int(sid) == session and "Z" not in stat]
