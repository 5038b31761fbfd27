"""Batch jobs: rows, records, what survives a kill, and that the answers are the engine's own."""

import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from support.commands import Command, require_complete
from support.forks import Fork
from support.jobs import JOB_ENGINE, FakeEngine, make_config, records, write_rows
from support.odd_rows import collected, lines, openai_rows
from support.questions import IDS, MESSAGES, OWN, PROMPT, configure, decode, strength
from support.tiny_models import with_template
from vllm_proxy.config.errors import EngineDiedError, ProxyConfigError
from vllm_proxy.config.schema import ChatFormats, Member, ProxyConfig
from vllm_proxy.jobs import openai_job as openai_batch
from vllm_proxy.jobs.inputs import Input
from vllm_proxy.jobs.open import open_job
from vllm_proxy.jobs.prompt_job import PromptJob
from vllm_proxy.jobs.rows import parse_row, row_id
from vllm_proxy.llm.sampling import sampling_params
from vllm_proxy.members.prompts import member_renderers


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
            ("", "empty"),
            (" \n", "empty"),
            ("nonsense", "not a JSON object"),
            ("[1]", "not a JSON object"),
            ('{"prompt": "\\ud800"}', "not a JSON object"),
            ("{}", "no prompt"),
            ('{"prompt": "a", "prompt_token_ids": [1]}', "`prompt` and `prompt_token_ids`"),
        ],
    )
    def test_what_is_no_row(self, line, says):
        error = self.error(line)
        assert error.field is None
        assert says in str(error)
        assert error.remedy is not None

    @pytest.mark.parametrize(
        ("line", "field", "value"),
        [
            ('{"prompt": ""}', "prompt", None),
            ('{"messages": []}', "messages", None),
            ('{"promt": "a"}', "promt", None),
            ('{"prompt": 5}', "prompt", "5"),
            ('{"prompt_token_ids": [1, true]}', "prompt_token_ids.1", "True"),
            ('{"prompt_token_ids": [1, 2.5]}', "prompt_token_ids.1", "2.5"),
            ('{"prompt": "a", "sampling": 1}', "sampling", "1"),
            ('{"prompt": "a", "alpha": NaN}', "alpha", "nan"),
            ('{"prompt": "a", "alpha": true}', "alpha", "True"),
            ('{"prompt": "a", "weights": [1, 0, Infinity]}', "weights", "[1, 0, inf]"),
            ('{"prompt": "a", "expert_prompt": [true]}', "expert_prompt", "[True]"),
            ('{"prompt": "a", "expert_promt": "b"}', "expert_promt", None),
            ('{"prompt": "a", "filters": 1}', "filters", "1"),
            ('{"messages": [{"content": "a"}]}', "messages.0", "{'content': 'a'}"),
            (
                '{"messages": [{"content": 5, "role": "user"}]}',
                "messages.0",
                "{'content': 5, 'role': 'user'}",
            ),
            (
                '{"messages": [{"content": [{"type": "image_url"}], "role": "user"}]}',
                "messages.0",
                "{'content': [{'type': 'image_url'}], 'role': 'user'}",
            ),
        ],
    )
    def test_a_wrong_field_by_name_and_value(self, line, field, value):
        error = self.error(line)
        assert (error.field, error.value) == (field, value)
        assert error.remedy is not None

    def error(self, line: str) -> ProxyConfigError:
        with pytest.raises(ProxyConfigError) as caught:
            parse_row(line.encode())
        assert "\n" not in str(caught.value)
        return caught.value

    def test_a_misspelt_key_has_a_suggestion(self):
        assert "`prompt`" in self.error('{"promt": "a"}').remedy
        assert "`expert_prompt`" in self.error('{"prompt": "a", "expert_promt": "b"}').remedy

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
        lines = [line.data for line in Input(str(path)).lines()]
        assert [parse_row(line).prompt for line in lines] == ["a", "b"]


class TestInputs:
    def test_many_files_are_one_job_in_the_order_of_their_names(self, tmp_path):
        (tmp_path / "b-1.jsonl").write_text('{"prompt": "3"}\n{"prompt": "4"}')
        with gzip.open(tmp_path / "a-1.jsonl.gz", "wt") as file:
            file.write('{"prompt": "1"}\n{"prompt": "2"}\n')
        (tmp_path / "c.txt").write_text("5\n6\n")
        source = Input([str(tmp_path / "[ab]-*"), str(tmp_path / "c.txt")], 5)
        lines = list(source.lines())
        assert [parse_row(line.data, text=line.is_text).prompt for line in lines] == list("12345")
        assert [line.index for line in lines] == list(range(5))
        assert source.rows == 5
        assert source.first() == lines[0]

    def test_a_table_is_read_as_the_objects_that_it_stands_for(self, tmp_path):
        rows = [
            {"prompt": "a", "sampling": {"top_k": 3}, "alpha": 0.5, "id": 7},
            {"prompt": None, "messages": [{"role": "user", "content": "b"}], "id": 8},
            {"prompt_token_ids": [5, 6], "sampling": {"stop": ["x"]}},
        ]
        columns = {key: [row.get(key) for row in rows] for key in sorted({*chain(*rows)})}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        read = list(Input(str(tmp_path / "a.parquet")).lines())
        parsed = [parse_row(line.data) for line in read]
        assert [row.kind for row in parsed] == ["prompt", "messages", "prompt_token_ids"]
        assert (parsed[0].alpha, parsed[0].id, parsed[0].sampling) == (0.5, 7, {"top_k": 3})
        assert parsed[1].messages == [{"role": "user", "content": "b"}]
        assert parsed[2].sampling == {"stop": ["x"]}

    def test_a_digest_is_of_all_files_and_their_bounds(self, tmp_path):
        texts = {"a": "1\n2\n", "b": "3\n", "c": "1\n", "d": "2\n3\n"}
        for name, text in texts.items():
            (tmp_path / f"{name}.txt").write_text(text)
        digests = {
            Input([str(tmp_path / f"{name}.txt") for name in names]).sha256
            for names in ("ab", "cd", "a", "b", "ba")
        }
        assert len(digests) == 5

    @pytest.mark.parametrize(
        ("names", "says"),
        [
            (["none*.jsonl"], "'none*.jsonl': no file matches"),
            (["none.jsonl"], "No such file or directory; give a file of rows"),
            (["a.jsonl", "a.jsonl"], "'a.jsonl': it is given twice"),
            (["a.jsonl", "-"], "'-': a stream cannot be combined"),
            (["cut.jsonl.gz"], "'cut.jsonl.gz': truncated or damaged (Compressed file ended"),
            (["damaged.jsonl.gz"], "'damaged.jsonl.gz': truncated or damaged"),
            (["plain.jsonl.gz"], "'plain.jsonl.gz': truncated or damaged (Not a gzipped file"),
            (["cut.parquet"], "'cut.parquet': it is not a Parquet file, or it is truncated ("),
            (["empty.jsonl"], "'empty.jsonl': no rows"),
        ],
        ids=str,
    )
    def test_what_cannot_be_read_is_one_line(self, tmp_path, monkeypatch, names, says):
        monkeypatch.chdir(tmp_path)
        Path("a.jsonl").write_text('{"prompt": "a"}\n')
        Path("empty.jsonl").touch()
        packed = gzip.compress(random.Random(0).randbytes(5000))
        Path("cut.jsonl.gz").write_bytes(packed[:-2000])
        Path("damaged.jsonl.gz").write_bytes(packed[:100] + b"\xff" * 50 + packed[150:])
        Path("plain.jsonl.gz").write_text('{"prompt": "a"}\n')
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), "whole.parquet")
        Path("cut.parquet").write_bytes(Path("whole.parquet").read_bytes()[:-20])
        with pytest.raises(ProxyConfigError) as caught:
            Input(names)
        assert says in str(caught.value)
        assert caught.value.field.startswith("--input ")
        assert caught.value.remedy is not None
        assert "\n" not in str(caught.value)

    def test_parquet_without_pyarrow(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        (tmp_path / "a.parquet").touch()
        with pytest.raises(ProxyConfigError, match=r"pip install 'vllm-proxy\[parquet\]'"):
            Input(str(tmp_path / "a.parquet"))

    def test_a_streams_first_row_is_not_used_up(self, tmp_path):
        pipe = str(tmp_path / "pipe")
        os.mkfifo(pipe)
        writer = subprocess.Popen(["bash", "-c", f"printf 'a\\nb\\n' > {pipe}"])
        source = Input(pipe)
        assert source.first().data == b"a\n"
        assert [line.data for line in source.lines()] == [b"a\n", b"b\n"]
        writer.wait()


class TestSampling:
    def test_builds_what_json_cannot_say(self):
        params = sampling_params(
            {"structured_outputs": {"regex": "a+"}, "logit_bias": {"5": 1}, "stop": "x"}
        )
        assert params.structured_outputs.regex == "a+"
        assert params.logit_bias == {5: 1.0}

    @pytest.mark.parametrize(
        ("values", "field", "value"),
        [
            ({"temprature": 1}, "sampling.temprature", None),
            ({"temperature": "hot"}, "sampling.temperature", "'hot'"),
            ({"temperature": -1}, "sampling.temperature", None),
            ({"temperature": float("nan")}, "sampling.temperature", None),
            ({"max_tokens": 0}, "sampling.max_tokens", None),
            ({"max_tokens": 2.5}, "sampling.max_tokens", "2.5"),
            ({"seed": 2**64}, "sampling.seed", str(2**64)),
            ({"stop": [1]}, "sampling.stop", "[1]"),
            ({"output_kind": 1}, "sampling.output_kind", None),
            ({"structured_outputs": {"regx": "a"}}, "sampling.structured_outputs.regx", None),
        ],
    )
    def test_refuses(self, values, field, value):
        with pytest.raises(ProxyConfigError) as caught:
            sampling_params(values)
        assert (caught.value.field, caught.value.value) == (field, value)
        assert field in str(caught.value)

    def test_a_misspelt_key_has_a_suggestion(self):
        with pytest.raises(ProxyConfigError) as caught:
            sampling_params({"temprature": 1})
        assert "`temperature`" in caught.value.remedy

    def test_a_refusal_of_vllm_s_keeps_its_reason(self):
        with pytest.raises(ProxyConfigError, match=r"temperature must be non-negative, got -1\.0"):
            sampling_params({"temperature": -1})


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
        with open_job(make_config(**config), rows, out) as job, pytest.raises(RuntimeError):
            job.run(FakeEngine(dies_after=after))

    def finish(self, rows, out, **options):
        engine = FakeEngine()
        config = options.pop("config", make_config())
        with open_job(config, rows, out, **options) as job:
            job.run(engine)
            job.output.finish()
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
        with open_job(make_config(), rows, out) as job:
            assert job.finished
            assert (job.done, job.output.failed) == (21, 1)

    def test_a_higher_limit_goes_on(self, rows, out):
        self.finish(rows, out, limit=5)
        assert len(records(out)) == 5
        engine = self.finish(rows, out, limit=8)
        assert engine.asked == [[5], [6], [7]]
        with open_job(make_config(), rows, out, limit=3) as job:
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
            ({"engine": {**JOB_ENGINE, "seed": 1}}, "`engine.seed` was None, is 1"),
        ],
    )
    def test_another_job_is_refused_by_what_differs(self, rows, out, change, says):
        self.die(rows, out)
        before = Path(out).read_bytes()
        with pytest.raises(ProxyConfigError) as caught:
            open_job(make_config(**change), rows, out)
        assert says in str(caught.value)
        assert "--overwrite" in str(caught.value)
        assert Path(out).read_bytes() == before

    def test_another_input_is_refused(self, rows, out):
        self.die(rows, out)
        Path(rows).write_text('{"prompt": "new"}\n')
        with pytest.raises(ProxyConfigError, match=r"input\.sha256"):
            open_job(make_config(), rows, out)

    def test_resources_may_change(self, rows, out):
        """A job that ran out of memory is resumed with less of it."""
        self.die(rows, out)
        engine = {**JOB_ENGINE, "gpu_memory_utilization": 0.5, "max_num_seqs": 1}
        self.finish(rows, out, config=make_config(engine=engine))
        assert len(records(out)) == 21

    def test_secrets_are_not_written_and_may_change(self, rows, out):
        def engine(token: str) -> dict:
            extra = {"aws": {"api_key": token}, "depth": 2}
            return {"dtype": "float32", "hf_token": token, "model_loader_extra_config": extra}

        self.die(rows, out, engine=engine("hf_first"))
        sidecar = Path(f"{out}.job.json")
        values = json.loads(sidecar.read_text())
        assert "hf_" not in sidecar.read_text()
        assert values["engine"]["model_loader_extra_config"] == {"aws": {}, "depth": 2}
        # As an earlier version wrote it.
        sidecar.write_text(json.dumps({**values, "engine": engine("hf_first")}))
        self.finish(rows, out, config=make_config(engine=engine("hf_second")))
        assert len(records(out)) == 21
        assert "hf_" not in sidecar.read_text()

    def test_overwrite_starts_anew_but_only_once_the_engine_is_up(self, rows, out):
        self.finish(rows, out)
        before = Path(out).read_bytes()
        config = make_config(alpha=0.5)
        with open_job(config, rows, out, overwrite=True):
            pass  # an engine that did not start
        assert Path(out).read_bytes() == before
        self.finish(rows, out, config=config, overwrite=True)
        assert {record["alpha"] for record in records(out) if "alpha" in record} == {0.5}
        assert len(records(out)) == 21

    def test_a_job_that_never_began_leaves_nothing(self, rows, out):
        with open_job(make_config(), rows, out):
            assert Path(out).exists()
        assert not Path(out).exists()

    def test_two_processes_do_not_share_an_output(self, rows, out):
        with open_job(make_config(), rows, out):
            code = (
                "import sys; from vllm_proxy.jobs.outputs import Output\n"
                f"try: Output({out!r}, {{}}, 1)\n"
                "except ValueError as error: sys.exit(str(error))"
            )
            other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"process {os.getpid()} is writing it; wait until it ends" in other.stderr

    def test_memory_is_bounded_by_rows_in_flight(self, tmp_path, out):
        rows = write_rows(tmp_path / "many.jsonl", *[{"prompt_token_ids": [1]}] * 100)
        assert self.finish(rows, out).most_waiting == 4 * 2

    def die_and_restart(self, rows, out, monkeypatch, deaths, **options):
        """Answer with engines that die after so many answers each; return what each was asked."""
        from vllm.v1.engine.exceptions import EngineDeadError

        engines = [FakeEngine(after, EngineDeadError) for after in deaths]
        left = iter([*engines, FakeEngine()])
        told = []
        with open_job(make_config(), rows, out) as job:
            monkeypatch.setattr(job, "engine", lambda: nullcontext(next(left)))
            job.complete(on_restart=lambda error, left: told.append((str(error), left)), **options)
        return engines, told

    def test_an_engine_that_died_is_started_again(self, rows, out, monkeypatch):
        engines, told = self.die_and_restart(rows, out, monkeypatch, [3, 0, 5])
        assert [left for _, left in told] == [2, 1, 0]
        assert "the engine died" in told[0][0]
        assert sorted(record["index"] for record in records(out)) == list(range(21))
        # What the first was asked and left unanswered is asked again, first of all.
        answered = [record["token_ids"] for record in records(out)[:3]]
        left = [ids for ids in engines[0].asked if ids not in answered]
        assert engines[2].asked == left[: len(engines[2].asked)]

    def test_an_engine_is_started_again_a_bounded_number_of_times(self, rows, out, monkeypatch):
        with pytest.raises(EngineDiedError):
            self.die_and_restart(rows, out, monkeypatch, [2, 2, 2], restarts=2)
        assert len(records(out)) == 6
        assert len(self.finish(rows, out).asked) == 14

    def run_engines(self, rows, out, monkeypatch, engines, **options) -> None:
        left = iter(engines)
        with open_job(make_config(), rows, out) as job:
            monkeypatch.setattr(job, "engine", lambda: nullcontext(next(left)))
            job.complete(**options)

    def test_an_engine_that_can_answer_nothing_is_started_again_once(self, rows, out, monkeypatch):
        engines = [FakeEngine(0) for _ in range(4)]
        with pytest.raises(EngineDiedError) as caught:
            self.run_engines(rows, out, monkeypatch, engines)
        assert "no other engine is started" in caught.value.remark
        assert [engine.most_waiting > 0 for engine in engines] == [False] * 4
        assert len(self.finish(rows, out).asked) == 20

    def test_an_engine_that_breaks_later_costs_no_row_its_answer(self, rows, out, monkeypatch):
        with pytest.raises(EngineDiedError):
            self.run_engines(rows, out, monkeypatch, [FakeEngine(after) for after in (3, 0, 0, 0)])
        assert len(records(out)) == 3
        assert len(self.finish(rows, out).asked) == 17

    @pytest.mark.parametrize("poison", [0, 7, 19])
    def test_a_row_that_kills_engines_is_one_error(self, rows, out, monkeypatch, poison):
        """Also where it is among the first rows, or the last."""
        # With the first row alone, no engine would ever have answered any.
        engines = [FakeEngine(2) if poison == 0 else FakeEngine(poison=poison)]
        engines += [FakeEngine(poison=poison) for _ in range(5)]
        self.run_engines(rows, out, monkeypatch, engines, restarts=4 if poison == 0 else 3)
        got = {record["index"]: record for record in records(out)}
        assert sorted(got) == list(range(21))
        failed = [index for index, record in got.items() if "error" in record]
        assert sorted(failed) == [poison, 20]  # which is no row
        assert got[poison]["id"] == poison
        assert "an engine died each time this row was submitted" in got[poison]["error"]

    def test_rows_of_a_stream_survive_an_engine(self, tmp_path, out, monkeypatch):
        pipe = str(tmp_path / "pipe")
        os.mkfifo(pipe)
        rows = "\n".join(f'{{"prompt_token_ids": [{i}]}}' for i in range(20))
        writer = subprocess.Popen(["bash", "-c", f"cat > {pipe}"], stdin=subprocess.PIPE)
        writer.stdin.write(rows.encode())
        writer.stdin.close()
        self.die_and_restart(pipe, out, monkeypatch, [3])
        writer.wait()
        assert sorted(record["index"] for record in records(out)) == list(range(20))

    def test_in_order_at_the_end(self, rows, out):
        self.die(rows, out)
        self.finish(rows, out, ordered=True)
        assert [record["index"] for record in records(out)] == list(range(21))
        assert not Path(f"{out}.new").exists()

    def test_a_finished_job_is_put_in_order_without_an_engine(self, rows, out):
        self.finish(rows, out)
        unordered = records(out)
        with open_job(make_config(), rows, out, ordered=True) as job:
            assert job.finished
            job.output.finish()
        assert records(out) == sorted(unordered, key=lambda record: record["index"]) != unordered

    def test_parquet(self, rows, tmp_path):
        """Records wait in a journal, which a killed job goes on with; then they are a table."""
        out = str(tmp_path / "out.parquet")
        self.die(rows, out)
        assert not Path(out).exists()
        assert len(records(f"{out}.partial.jsonl")) == 7
        self.finish(rows, out)
        assert not Path(f"{out}.partial.jsonl").exists()
        table = pyarrow.parquet.read_table(out)
        got = table.to_pylist()
        assert [row["index"] for row in got] == list(range(21))
        assert [row["token_ids"] for row in got[:20]] == [[i] for i in range(20)]
        assert [row["error"] is None for row in got] == [True] * 20 + [False]
        assert table.schema.field("id").type == pyarrow.int64()
        assert table.schema.field("alpha").type == pyarrow.float64()
        assert "logprobs" not in table.column_names
        with open_job(make_config(), rows, out) as job:
            assert job.finished
            assert (job.done, job.output.failed) == (21, 1)
        assert not Path(f"{out}.partial.jsonl").exists()

    def test_parquet_of_any_ids_and_strengths(self, tmp_path):
        ids = ["text", 3, {"a": 1}, None, "\ud800"]
        rows = [{"prompt_token_ids": [5], "id": id_} for id_ in ids]
        rows[1]["alpha"] = {"schedule": "first", "steps": 2}
        rows[2]["weights"] = [1, 0.5, -0.5]
        source = write_rows(tmp_path / "rows.jsonl", *rows)
        self.finish(source, str(tmp_path / "out.pq"))
        got = pyarrow.parquet.read_table(tmp_path / "out.pq").to_pylist()
        assert [row["id"] for row in got] == ["text", "3", '{"a": 1}', None, "\\ud800"]
        assert [row["alpha"] for row in got[::2]] == ["1.0", None, None]
        assert json.loads(got[1]["alpha"])["schedule"] == "first"
        assert got[2]["weights"] == [1.0, 0.5, -0.5]

    def test_parquet_cannot_be_added_to(self, rows, tmp_path):
        out = str(tmp_path / "out.parquet")
        self.finish(rows, out, limit=5)
        with pytest.raises(ProxyConfigError, match=r"lacks 16 rows .* add --overwrite"):
            open_job(make_config(), rows, out)
        self.finish(rows, out, overwrite=True)
        assert pyarrow.parquet.read_table(out).num_rows == 21

    @pytest.mark.parametrize(
        ("target", "options", "says"),
        [
            ("out.jsonl.gz", {}, "records are not compressed; give a .jsonl or .parquet"),
            ("-", {"ordered": True}, "--ordered: records are sorted in a file"),
        ],
    )
    def test_impossible_outputs(self, rows, target, options, says):
        with pytest.raises(ProxyConfigError, match=says):
            open_job(make_config(), rows, target, **options)

    @pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
    def test_a_full_disk_loses_nothing(self, tmp_path, name):
        """It fails in the middle of a line; with room again, the job goes on."""
        rows = write_rows(
            tmp_path / "rows.jsonl", *({"prompt_token_ids": [i] * 20} for i in range(50))
        )
        out = str(tmp_path / name)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with open_job(make_config(), rows, out) as job:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
            try:
                with pytest.raises(ProxyConfigError, match=f"{name}.*: File too large"):
                    job.run(FakeEngine())
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal = tmp_path / (name if name.endswith("jsonl") else f"{name}.partial.jsonl")
        assert 0 < len(journal.read_bytes()) <= 4500
        self.finish(rows, out, ordered=True)
        if name.endswith("jsonl"):
            assert [record["index"] for record in records(out)] == list(range(50))
        else:
            assert pyarrow.parquet.read_table(out)["index"].to_pylist() == list(range(50))

    def test_a_row_has_one_answer(self, rows, out):
        with pytest.raises(ProxyConfigError, match=r"`sampling\.n` is 2: .*; repeat"):
            open_job(make_config(sampling={"n": 2}), rows, out)

    def test_a_pipe_is_answered_but_not_resumed(self, tmp_path, out):
        pipe = str(tmp_path / "pipe")
        os.mkfifo(pipe)
        writer = subprocess.Popen(["bash", "-c", f"echo '{{\"prompt_token_ids\": [3]}}' > {pipe}"])
        assert self.finish(pipe, out).asked == [[3]]
        writer.wait()
        with pytest.raises(ProxyConfigError, match="cannot be resumed"):
            open_job(make_config(), pipe, out)


PROMPTS = [
    {"prompt": "The large model is moved by", "id": "text"},
    {"prompt_token_ids": [5, 6, 7], "id": "ids"},
    {"messages": [{"role": "user", "content": "What is the capital of France?"}], "id": "chat"},
]
GREEDY = {"temperature": 0, "max_tokens": 12}


def use_formats(llm, monkeypatch, **fields) -> None:
    """Give the engine's configuration the paper's formats, and *fields*."""
    config = configure(llm, monkeypatch, chat=ChatFormats(expert="template"), **fields)
    renderers = member_renderers(config, llm.renderer)
    monkeypatch.setattr(llm, "_renderers", renderers, raising=False)


class TestEngine:
    """Jobs on a real engine; what they answer is compared with `LLM.generate` and `LLM.chat`."""

    def job(self, llm, members, tmp_path, *rows, **sampling) -> dict:
        source = write_rows(tmp_path / "rows.jsonl", *rows)
        config = ProxyConfig.parse(
            {**members, "engine": JOB_ENGINE, "sampling": {**GREEDY, **sampling}}, "test"
        )
        with open_job(config, source, str(tmp_path / "out.jsonl")) as job:
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
        expert = with_template(members["expert"], tmp_path / "expert")
        use_formats(proxy_llm, monkeypatch, expert=Member(model=expert))
        plain = tokenizer.encode(MESSAGES[0]["content"])
        template, thoughtless, begun, unasked = (
            AutoTokenizer.from_pretrained(expert).apply_chat_template(
                MESSAGES, return_dict=False, **arguments
            )
            for arguments in (
                {"add_generation_prompt": True},
                {"add_generation_prompt": True, "enable_thinking": False},
                {"continue_final_message": True},
                {},
            )
        )
        assert len(set(map(tuple, (template, thoughtless, begun, unasked)))) == 4
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
                {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}},
                [plain, thoughtless, plain],
                strength(1.0),
            ),
            (
                {"messages": MESSAGES, "continue_final_message": True},
                [plain, begun, plain],
                strength(1.0),
            ),
            (
                {"messages": MESSAGES, "add_generation_prompt": False, "alpha": 2},
                [plain, unasked, plain],
                strength(2.0),
            ),
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

    def test_structured_rows(self, proxy_llm, members, tmp_path):
        """Rows' and Python's: what they are filtered by may leave nothing of their form."""
        words = ["Paris", "Rome"]
        schema = {"type": "object", "properties": {"known": {"type": "boolean"}}}
        schema |= {"required": ["known"], "additionalProperties": False}
        forms = {
            "choice": ({"choice": words}, words.__contains__),
            "regex": ({"regex": "[0-9]{3}-[ab]"}, re.compile("[0-9]{3}-[ab]").fullmatch),
            "grammar": ({"grammar": 'root ::= "x" [yz] "."'}, re.compile(r"x[yz]\.").fullmatch),
            "json": (
                {"json": schema},
                lambda text: json.loads(text) in ({"known": True}, {"known": False}),
            ),
        }
        own = [
            {},
            {"alpha": 20},
            {"alpha": "adaptive"},
            {"filters": {"top_p": 1e-6}},
            {"filters": {"plausibility": 1}, "weights": [1, 0.5, -0.5]},
            {"filters": {"top_p": 0.1}, "expert_prompt": OWN[0]},
        ]
        rows = [
            {"prompt": PROMPT, "id": form, "sampling": {"structured_outputs": given}, **values}
            for form, (given, _) in forms.items()
            for values in own
        ]
        got = self.job(proxy_llm, members, tmp_path, *rows, max_tokens=60)
        for index, row in enumerate(rows):
            record = got[index]
            assert record["finish_reason"] == "stop", row
            assert forms[row["id"]][1](record["text"]), (row, record["text"])
        params = sampling_params({**GREEDY, **rows[3]["sampling"], "max_tokens": 60})
        (output,) = proxy_llm.generate(PROMPT, params, use_tqdm=False, filters=rows[3]["filters"])
        assert output.outputs[0].text == got[3]["text"]

    def test_an_adaptive_row(self, proxy_llm, members, tmp_path):
        row = {"prompt_token_ids": IDS[0], "alpha": "adaptive"}
        record = self.job(proxy_llm, members, tmp_path, row)[0]
        params = sampling_params(GREEDY)
        (output,) = proxy_llm.generate(IDS[0], params, use_tqdm=False, alpha="adaptive")
        assert record["token_ids"] == list(output.outputs[0].token_ids)
        assert record["alpha"] == "adaptive"

    def test_wrong_values_of_a_row(self, proxy_llm, members, tmp_path):
        wrong = [
            ({"alpha": "1"}, "`alpha` is '1': give a finite number"),
            ({"alpha": {"schedule": "first"}}, "`alpha.steps` is missing"),
            ({"alpha": 1, "weights": [1, 0, 0]}, "`weights` replace `alpha`"),
            ({"weights": [1, 0]}, "`weights` is [1, 0]: give three finite numbers"),
            ({"filters": {"topp": 1}}, "unknown key `filters.topp`; did you mean `top_p`?"),
            ({"filters": {"top_p": 0}}, "`filters.top_p` is 0"),
            ({"continue_final_message": True}, "`continue_final_message`: it is allowed only"),
            ({"add_generation_prompt": False}, "`add_generation_prompt`: it is allowed only"),
            ({"chat_template_kwargs": {}}, "`chat_template_kwargs`: it is allowed only"),
            ({"chat_template_kwargs": 3}, "`chat_template_kwargs` is 3"),
            ({"expert_prompt": ""}, "`expert_prompt` is ''"),
            ({"expert_prompt": [512]}, "`expert_prompt`: it has the id 512; the expert"),
            ({"antiexpert_prompt": [5] * 300}, "`antiexpert_prompt`: it has 300 tokens, more than"),
            (
                {"sampling": {"extra_args": {"proxy_alpha": 1}}},
                "`sampling.extra_args.proxy_alpha`: it is not a sampling parameter; give `alpha`",
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
            ({"prompt_token_ids": [512]}, "`prompt_token_ids`: Token id 512 is out of vocabulary"),
            (
                {"prompt_token_ids": [-1]},
                "`prompt_token_ids`: Token id -1 is out of vocabulary",
            ),
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


@pytest.mark.engine
class TestDeaths:
    """The command line, killed for real; see `TestResume` for the mechanics."""

    def test_a_job_killed_at_random_moments_is_complete(self, members, reference, tmp_path):
        """Nothing written is lost or done twice, and no half line stays."""
        rows = [{"prompt_token_ids": [3 + i % 300, 4, 5 + i // 300], "id": i} for i in range(900)]
        source, out = write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "out.jsonl"
        command = Command(tmp_path, members, "--input", source, "--output", str(out), "--ordered")
        command.env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        command.kill_at_random_moments(out, len(rows), starting=3)
        require_complete(records(out), rows, reference)

    def winner(self, *processes: Fork) -> Fork:
        """Return which of two, started at once, goes on; the other one has been told of it."""
        while all(run := [process.is_running() for process in processes]):
            time.sleep(0.05)
        winner, loser = processes if run[0] else processes[::-1]
        status, stdout, stderr = loser.end()
        assert (status, stdout) == (2, ""), stderr
        assert f": process {winner.pid} is writing it; wait until it ends" in stderr
        assert len(stderr.splitlines()) == 1
        return winner

    def test_engines_end_with_a_job_and_jobs_go_on_without_an_engine(self, members, tmp_path):
        """kill -9, of the job and then of its engine; of two jobs that begin at once, one goes."""
        rows = [{"prompt_token_ids": [3 + i % 300, 4, 5], "id": i} for i in range(400)]
        source, out = write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "out.jsonl"
        command = Command(tmp_path, members, "--input", source, "--output", str(out))
        process = self.winner(command.fork(), command.fork())
        while process.is_running() and (not out.exists() or out.read_bytes().count(b"\n") < 20):
            time.sleep(0.01)
        process.kill()
        status, _, stderr = process.end()
        assert status == -signal.SIGKILL, stderr
        assert not command.survivors()
        whole = out.read_bytes()
        whole = whole[: whole.rindex(b"\n") + 1]

        process = command.fork()
        while process.is_running() and len(out.read_bytes()) <= len(whole) + 100:
            time.sleep(0.01)
        command.engine_of(process).kill()
        status, stdout, stderr = process.end()
        assert (status, stdout) == (0, ""), stderr
        died, last = stderr.splitlines()
        assert "an engine died: an engine process ended without an error message: killed" in died
        assert "; starting another one (2 more restarts after this one); " in died
        assert whole.count(b"\n") < len(rows) - 20
        assert f"; {whole.count(bytes([10]))} rows were there before" in last
        assert out.read_bytes().startswith(whole)
        assert sorted(record["index"] for record in records(out)) == list(range(len(rows)))
        assert not command.survivors()


class TestOpenAI:
    """Rows in OpenAI's format; the real server, and what needs none."""

    @pytest.mark.parametrize(
        ("line", "field", "value"),
        [
            ("nonsense", None, None),
            ('{"custom_id": "a", "url": "/v1/completions"}', "body", None),
            ('{"custom_id": 5, "url": "/v1/completions", "body": {}}', "custom_id", "5"),
            (
                '{"custom_id": "a", "url": "/v1/embeddings", "body": {}}',
                "url",
                "'/v1/embeddings'",
            ),
            (
                '{"custom_id": "a", "url": "/v1/completions", "body": {}, "method": "GET"}',
                "method",
                "'GET'",
            ),
            ('{"custom_id": "a", "url": "/v1/completions", "bdy": {}}', "bdy", None),
            (
                '{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}',
                "body.stream",
                "True",
            ),
        ],
    )
    def test_a_wrong_row_by_field_and_value(self, line, field, value):
        with pytest.raises(ProxyConfigError) as caught:
            openai_batch.parse(line.encode())
        error = caught.value
        assert (error.field, error.value) == (field, value)
        assert field is None or error.remedy is not None
        assert "\n" not in str(error)

    def test_the_first_row_says_what_the_rows_are(self, tmp_path):
        row = {"custom_id": "a", "url": "/v1/completions", "body": {}}
        ours = write_rows(tmp_path / "ours.jsonl", {"prompt": "a"}, row)
        theirs = write_rows(tmp_path / "theirs.jsonl", row, {"prompt": "a"})
        for source, kind in ((ours, PromptJob), (theirs, openai_batch.OpenAIJob)):
            with open_job(make_config(), source, str(tmp_path / "out.jsonl")) as job:
                assert type(job) is kind

    @pytest.mark.parametrize(
        ("config", "target", "says"),
        [
            ({"sampling": {"logprobs": 3}}, "out.jsonl", "`sampling.logprobs`: rows of an OpenAI"),
            ({}, "out.parquet", "an OpenAI batch file is answered in JSON lines"),
        ],
    )
    def test_what_it_cannot_honour_is_one_line(self, tmp_path, config, target, says):
        row = {"custom_id": "a", "url": "/v1/completions", "body": {}}
        source = write_rows(tmp_path / "rows.jsonl", row)
        with pytest.raises(ProxyConfigError, match=says) as caught:
            open_job(make_config(**config), source, str(tmp_path / target))
        assert caught.value.remedy is not None

    def test_requests_are_answered_as_a_server_does(
        self, proxy_llm, members, tmp_path, monkeypatch
    ):
        """Every row is answered once, in OpenAI's format, though job and engine are killed."""
        ask = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True}
        begun = {"continue_final_message": True, "add_generation_prompt": False}
        digits = {"structured_outputs": {"regex": "[0-9]{3}"}, "ignore_eos": False}
        digits["vllm_xargs"] = {"proxy_top_p": 1e-6}
        bodies = {
            "plain": ("/v1/completions", ask),
            "weak": ("/v1/completions", {**ask, "vllm_xargs": {"proxy_alpha": 0}}),
            "member": ("/v1/completions", {**ask, "model": f"{members['base']}:base"}),
            "chat": ("/v1/chat/completions", {"messages": MESSAGES, "temperature": 0, **begun}),
            "unknown": ("/v1/completions", {**ask, "model": "gpt-4"}),
            "wrong": ("/v1/completions", {**ask, "vllm_xargs": {"proxy_alpha": "x"}}),
            "stream": ("/v1/completions", {**ask, "stream": True}),
            "digits": ("/v1/completions", {**ask, **digits}),
            "chat digits": ("/v1/chat/completions", {"messages": MESSAGES, **digits}),
            **{f"more {i}": ("/v1/completions", {**ask, "prompt": [5, 6, i]}) for i in range(60)},
            # They are still being answered when the engine is killed.
            **{f"long {i}": ("/v1/completions", {**ask, "max_tokens": 200}) for i in range(4)},
        }
        rows = [
            {"custom_id": name, "method": "POST", "url": url, "body": body}
            for name, (url, body) in bodies.items()
        ]
        source, out = write_rows(tmp_path / "rows.jsonl", *rows, "bad"), tmp_path / "out.jsonl"
        odd = [line for line in collected(lines(openai_rows()), 600) if line.strip()]
        with Path(source).open("ab") as file:
            file.writelines(line + b"\n" for line in odd)
        words = ("--input", source, "--output", str(out), "--max-tokens", "12")
        command = Command(tmp_path, {**members, "chat": {"expert": "template"}}, *words)
        command.env["VLLM_API_KEY"] = "of another server"
        process = command.fork()
        while process.is_running() and len(command.processes_of(process)) < 3:
            time.sleep(0.1)  # until there are the guard, the server, and one that this has started
        process.kill()
        status, _, stderr = process.end()
        assert status == -signal.SIGKILL, stderr
        assert not command.survivors()

        process = command.fork()
        while process.is_running() and (not out.exists() or out.read_text().count("\n") < 12):
            time.sleep(0.02)
        kept = records(out)
        command.engine_of(process).kill()
        status, _, stderr = process.end()
        assert status == 1, stderr  # some rows are errors
        assert "starting another one" in stderr
        assert records(out)[: len(kept)] == kept
        every = range(len(rows) + 1 + len(odd))
        assert len(kept) < len(every)
        assert not command.survivors()

        found = sorted(records(out), key=openai_batch.FORMAT.index)
        assert [openai_batch.FORMAT.index(record) for record in found] == list(every)
        self.require_answers(odd, found[len(rows) + 1 :])
        got = {record["custom_id"]: record for record in found[: len(rows) + 1]}
        text = {
            name: record["response"]["body"]["choices"][0]["text"]
            for name, record in got.items()
            if record["error"] is None
            and record["response"]["body"].get("object") == "text_completion"
        }
        params = sampling_params({**GREEDY, "ignore_eos": True})
        prompts = [PROMPT, {"prompt_token_ids": [5, 6, 7]}]
        plain, other = proxy_llm.generate(prompts, params, use_tqdm=False)
        (base,) = proxy_llm.generate(PROMPT, params, use_tqdm=False, alpha=0)
        assert text["plain"] == plain.outputs[0].text != base.outputs[0].text
        assert text["weak"] == text["member"] == base.outputs[0].text
        assert re.fullmatch("[0-9]{3}", text["digits"])
        said = got["chat digits"]["response"]["body"]["choices"][0]["message"]["content"]
        assert re.fullmatch("[0-9]{3}", said)
        assert text["more 7"] == other.outputs[0].text
        use_formats(proxy_llm, monkeypatch)
        (chat,) = proxy_llm.chat(MESSAGES, params, use_tqdm=False, **begun)
        answer = got["chat"]["response"]["body"]
        assert answer["choices"][0]["message"]["content"] == chat.outputs[0].text
        assert answer["usage"]["prompt_tokens"] == len(chat.prompt_token_ids)
        assert got["plain"]["response"]["status_code"] == 200
        assert got["plain"]["response"]["body"]["usage"]["completion_tokens"] == 12
        assert got["unknown"]["response"]["status_code"] == 404
        assert got["wrong"]["response"]["status_code"] == 400
        assert "proxy_alpha" in got["wrong"]["response"]["body"]["error"]["message"]
        assert got["stream"]["response"] is got[None]["response"] is None
        assert got["stream"]["error"]["message"].startswith("`body.stream` is True")

    def require_answers(self, lines: list[bytes], found: list[dict]) -> None:
        """Every odd row has a record, of the server or of ours; and many are answered."""
        answered = 0
        for line, record in zip(lines, found, strict=True):
            response, error = record["response"], record["error"]
            assert (response is None) != (error is None)
            if response is None:
                assert error["message"]
                continue
            assert record["custom_id"] == json.loads(line)["custom_id"]
            assert response["status_code"] in (200, 400, 404), record
            answered += response["status_code"] == 200
        assert answered > len(lines) // 10
