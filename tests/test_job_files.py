"""A job's files under rude neighbours: second jobs, links, inputs that change, foreign records."""

import asyncio
import gzip
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from support.jobs import FakeEngine, make_config, records, write_rows
from vllm_proxy.cli.app import app
from vllm_proxy.config.errors import EngineDiedError, ProxyConfigError
from vllm_proxy.jobs import inputs
from vllm_proxy.jobs import openai_job as openai_batch
from vllm_proxy.jobs.files import replacing
from vllm_proxy.jobs.inputs import Input
from vllm_proxy.jobs.open import open_job
from vllm_proxy.jobs.outputs import Output
from vllm_proxy.jobs.prompt_job import PromptJob
from vllm_proxy.jobs.rows import parse_row


def run(source, out, engine=None, progress: Callable = lambda _: None, **options) -> FakeEngine:
    """Answer all rows that are missing."""
    engine = engine or FakeEngine()
    with open_job(make_config(), source, str(out), **options) as job:
        if not job.finished:
            job.run(engine, progress)
        job.output.finish()
    return engine


def die(source, out, after: int = 3) -> None:
    with open_job(make_config(), source, str(out)) as job, pytest.raises(EngineDiedError):
        job.run(FakeEngine(dies_after=after))


@pytest.fixture
def rows(tmp_path) -> str:
    return write_rows(tmp_path / "rows.jsonl", *({"prompt_token_ids": [i]} for i in range(20)))


RACE = """
import json, os, sys
from multiprocessing import get_context
from vllm_proxy.jobs.outputs import Output

def compete(barrier, directory, rounds, results):
    wins = []
    for number in range(rounds):
        path = f"{directory}/{number}.jsonl"
        barrier.wait()
        try:
            output = Output(path, {"format": 1}, 1)
        except ValueError as error:
            wins.append(str(error))
            barrier.wait()
            continue
        output.begin()
        output.write({"index": 0, "id": os.getpid(), "text": ""})
        barrier.wait()
        output.close()
        wins.append(True)
    results.put((os.getpid(), wins))

def give_up(barrier, directory, rounds, results):
    "Opens the file and goes, again and again; another one stays, and finds what it wrote."
    for number in range(rounds):
        barrier.wait()
        for _ in range(20):
            try:
                Output(f"{directory}/{number}.jsonl", {"format": 1}, 1).close()
            except ValueError:
                pass
        barrier.wait()

def stay(barrier, directory, rounds, results):
    lost = 0
    for number in range(rounds):
        path = f"{directory}/{number}.jsonl"
        barrier.wait()
        while True:
            try:
                output = Output(path, {"format": 1}, 1)
                break
            except ValueError:
                pass
        output.begin()
        output.write({"index": 0, "id": 0, "text": ""})
        output.close()
        barrier.wait()
        lost += not os.path.exists(path) or not os.path.getsize(path)
    results.put((os.getpid(), lost))

context = get_context("fork")
barrier, results = context.Barrier(2), context.Queue()
directory, rounds, *names = sys.argv[1:]
args = barrier, directory, int(rounds), results
processes = [context.Process(target=globals()[name], args=args) for name in names]
for process in processes:
    process.start()
found = [results.get(timeout=100) for name in names if name != "give_up"]
for process in processes:
    process.join()
print(json.dumps(found))
"""


def race(directory: Path, rounds: int, *names: str) -> list:
    words = [sys.executable, "-c", RACE, str(directory), str(rounds), *names]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
class TestNeighbours:
    def test_of_two_jobs_on_one_new_output_one_goes_on(self, tmp_path):
        rounds = 500
        (one, first), (two, second) = race(tmp_path, rounds, "compete", "compete")
        for number, says in enumerate(zip(first, second, strict=True)):
            assert says.count(True) == 1, says
            winner = one if says[0] is True else two
            (message,) = (word for word in says if word is not True)
            assert f": process {winner} is writing it; wait until it ends" in message
            (record,) = records(tmp_path / f"{number}.jsonl")
            assert record["id"] == winner

    def test_a_job_that_goes_takes_no_file_of_another(self, tmp_path):
        ((_, lost),) = race(tmp_path, 300, "give_up", "stay")
        assert lost == 0

    def test_in_one_process(self, tmp_path):
        """Also after the file was read by somebody in this process."""
        out = str(tmp_path / "out.jsonl")
        with closing(Output(out, {}, 1)) as first:
            first.begin()
            first.write({"index": 0, "id": None})
            assert len(records(out)) == 1
            with pytest.raises(ProxyConfigError, match=f"process {os.getpid()} is writing it"):
                Output(out, {}, 1)
            assert len(records(out)) == 1
        Output(out, {"format": 1}, 1, overwrite=True).close()

    def test_a_table_has_one_writer_too(self, rows, tmp_path):
        out = tmp_path / "out.parquet"
        with open_job(make_config(), rows, str(out)) as job:
            job.run(FakeEngine())
            with pytest.raises(ProxyConfigError, match="is writing it"):
                open_job(make_config(), rows, str(out))
            job.output.finish()
        assert pyarrow.parquet.read_table(out).num_rows == 20

    def test_two_names_of_one_output(self, rows, tmp_path):
        (tmp_path / "link.jsonl").symlink_to(tmp_path / "out.jsonl")
        with (
            open_job(make_config(), rows, str(tmp_path / "out.jsonl")),
            pytest.raises(ProxyConfigError, match="is writing it"),
        ):
            open_job(make_config(), rows, str(tmp_path / "link.jsonl"))

    def test_a_forked_engine_does_not_keep_the_lock(self, tmp_path):
        """It lives a while longer than a job that was killed; nor can it write by mistake."""
        out = str(tmp_path / "out.jsonl")
        output = Output(out, {"format": 1}, 1)
        output.begin()
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(output._file.fileno(), b"x")
            except OSError:
                os.write(writing, b"refused")
            os.close(writing)
            signal.pause()
        os.close(writing)
        try:
            assert os.read(reading, 7) == b"refused"
            output.close()
            Output(out, {"format": 1}, 1).close()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


class TestLinks:
    @pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
    @pytest.mark.parametrize("is_there", [True, False])
    def test_an_output_that_is_a_link_stays_one(self, rows, tmp_path, name, is_there):
        out, disk = tmp_path / name, tmp_path / "disk"
        disk.mkdir()
        out.symlink_to(disk / name)
        if is_there and name.endswith("jsonl"):
            (disk / name).touch()
        die(rows, out)
        run(rows, out, ordered=True)
        assert out.is_symlink()
        assert not (disk / name).is_symlink()
        if name.endswith("jsonl"):
            assert [record["index"] for record in records(disk / name)] == list(range(20))
        else:
            assert pyarrow.parquet.read_table(disk / name)["index"].to_pylist() == list(range(20))
        with open_job(make_config(), rows, str(out)) as job:
            assert job.finished
        assert sorted(path.name for path in disk.iterdir()) == [name]

    def test_a_job_that_never_began_leaves_a_link(self, rows, tmp_path):
        out = tmp_path / "out.jsonl"
        out.symlink_to(tmp_path / "elsewhere.jsonl")
        open_job(make_config(), rows, str(out)).output.close()
        assert out.is_symlink()
        assert not out.exists()

    @pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
    def test_files_of_the_user_stay(self, rows, tmp_path, name):
        precious = tmp_path / "precious.txt"
        precious.write_text("mine")
        for taken in (".new", f".{os.getpid()}", ".part", ".tmp", f".job.{os.getpid()}"):
            (tmp_path / f"{name}{taken}").symlink_to(precious)
        before = set(tmp_path.iterdir())
        run(rows, tmp_path / name, ordered=True)
        assert precious.read_text() == "mine"
        assert {path.name for path in {*tmp_path.iterdir()} - before} == {name, f"{name}.job.json"}

    def test_a_sidecar_of_somebody_else_is_refused(self, rows, tmp_path):
        other = tmp_path / "out.jsonl.job.json"
        other.write_text('{"my": "file"}')
        with pytest.raises(ProxyConfigError, match=r"out\.jsonl\.job\.json .* not written by"):
            open_job(make_config(), rows, str(tmp_path / "out.jsonl"))
        assert other.read_text() == '{"my": "file"}'
        assert not (tmp_path / "out.jsonl").exists()

    def test_the_input_may_be_no_file_of_the_job(self, tmp_path):
        rows = write_rows(tmp_path / "out.parquet.partial.jsonl", {"prompt": "a"})
        with pytest.raises(ProxyConfigError, match="is the input"):
            open_job(make_config(), rows, str(tmp_path / "out.parquet"), overwrite=True)

    def test_a_file_is_replaced_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("old")
        path.chmod(0o640)
        with pytest.raises(TypeError), replacing(path) as file:
            file.writelines([b"half", None])
        assert path.read_text() == "old"
        with replacing(path) as file:
            file.write(b"new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert list(tmp_path.iterdir()) == [path]

    def test_what_a_resume_depends_on_is_synced(self, rows, tmp_path, monkeypatch):
        """The records before their sidecar, the sidecar, and the names of both."""
        synced = []
        sync = os.fsync

        def see(descriptor: int) -> None:
            synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", see)
        with open_job(make_config(), rows, str(tmp_path / "out.jsonl")) as job:
            job.output.begin()
        first, directory, sidecar, last = synced
        assert (first, directory, last) == ("out.jsonl", tmp_path.name, tmp_path.name)
        assert sidecar.startswith(".out.jsonl.job.json.")

    def test_an_old_table_is_not_taken_for_the_new_jobs(self, rows, tmp_path):
        """Killed after it began to replace one."""
        out = str(tmp_path / "out.parquet")
        run(rows, out)
        config = make_config(alpha=0.5)
        with open_job(config, rows, out, overwrite=True) as job:
            job.output.begin()
        with open_job(config, rows, out) as job:
            assert not job.finished
            job.run(FakeEngine())
            job.output.finish()
        assert set(pyarrow.parquet.read_table(out)["alpha"].to_pylist()) == {0.5}


def write_table(path: Path, *rows: dict) -> None:
    columns = {key: [row.get(key) for row in rows] for key in {*chain(*rows)}}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_packed(path: Path, *rows: dict) -> None:
    path.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode(), 1))


WRITERS = {".jsonl": write_rows, ".jsonl.gz": write_packed, ".parquet": write_table}


def keeping_times(change: Callable) -> Callable:
    def changed(path: Path, *args) -> None:
        before = path.stat()
        change(path, *args)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return changed


def in_place(path: Path, write: Callable, rows: list) -> None:
    """As `cp` does it: the file that is open becomes another."""
    other = path.with_name(f"other{path.name}")
    write(other, *rows)
    path.write_bytes(other.read_bytes())
    other.unlink()


def by_name(path: Path, write: Callable, rows: list) -> None:
    """As `mv` does it."""
    other = path.with_name(f"other{path.name}")
    write(other, *rows)
    other.replace(path)


class TestChangingInput:
    @pytest.mark.parametrize("kind", WRITERS)
    @pytest.mark.parametrize("how", [in_place, by_name])
    @pytest.mark.parametrize(
        ("rows", "says"),
        [
            (lambda old: old[:1500], "it had 3000 rows, and now it has 1500 rows"),
            (lambda old: [*old, *old[:10]], "it had 3000 rows, and now it has 3010 rows"),
            (lambda old: [*old[:1500], *old[:1500]], "and now it has different rows"),
        ],
        ids=["shorter", "longer", "other"],
    )
    def test_is_said_and_loses_nothing(self, tmp_path, kind, how, rows, says):
        source, out = tmp_path / f"rows{kind}", tmp_path / "out.parquet"
        old = [{"prompt_token_ids": [i % 97, i % 89]} for i in range(3000)]
        WRITERS[kind](source, *old)
        first = tmp_path / "before.jsonl"
        write_rows(first, {"prompt_token_ids": [3, 3]})

        def change(summary) -> None:
            if summary.rows == 100:
                keeping_times(how)(source, WRITERS[kind], rows(old))

        with pytest.raises(ProxyConfigError) as caught:
            run([str(first), str(source)], out, progress=change)
        assert caught.value.field == f"--input {str(source)!r}"
        assert says in str(caught.value)
        assert caught.value.remedy is not None
        assert not out.exists()
        assert len(records(f"{out}.partial.jsonl")) >= 100

        with pytest.raises(ProxyConfigError, match=r"`input\.sha256`"):
            run([str(first), str(source)], out)
        WRITERS[kind](source, *old)
        run([str(first), str(source)], out)
        answers = pyarrow.parquet.read_table(out)["token_ids"].to_pylist()
        assert answers == [[3, 3], *(row["prompt_token_ids"] for row in old)]

    def test_is_seen_within_a_limit_and_before_the_first_row(self, rows, tmp_path):
        with open_job(make_config(), rows, str(tmp_path / "out.jsonl"), limit=5) as job:
            write_rows(Path(rows), *[{"prompt_token_ids": [9]}] * 20)
            with pytest.raises(ProxyConfigError, match="changed while the job ran"):
                job.run(FakeEngine())
        assert (tmp_path / "out.jsonl").read_bytes() == b""

    def test_a_file_that_is_only_touched_is_the_same(self, tmp_path):
        source = tmp_path / "rows.jsonl"
        old = [{"prompt_token_ids": [i % 97]} for i in range(300)]
        write_rows(source, *old)

        def touch(summary) -> None:
            if summary.rows == 50:
                source.chmod(0o600)
            if summary.rows == 90:
                in_place(source, write_rows, old)

        run(str(source), tmp_path / "out.jsonl", progress=touch)
        assert len(records(tmp_path / "out.jsonl")) == 300

    def test_a_file_that_is_gone(self, tmp_path):
        source = tmp_path / "rows.jsonl"
        write_rows(source, *[{"prompt_token_ids": [1]}] * 300)
        with pytest.raises(ProxyConfigError, match="No such file"):
            run(str(source), tmp_path / "out.jsonl", progress=lambda _: source.unlink(True))


class TestForeignRecords:
    @pytest.mark.parametrize(
        "index", [-1, True, 1.0, "0", None, [0], 20, 10**15], ids=lambda index: repr(index)
    )
    @pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
    def test_are_not_records(self, rows, tmp_path, name, index):
        die(rows, tmp_path / name)
        journal = tmp_path / (name if name.endswith("jsonl") else f"{name}.partial.jsonl")
        before = journal.read_bytes() + json.dumps({"index": index, "id": None}).encode() + b"\n"
        journal.write_bytes(before)
        with pytest.raises(ProxyConfigError, match="line 4 is not a record; remove the line"):
            run(rows, tmp_path / name)
        assert journal.read_bytes() == before

    def test_a_smaller_limit_keeps_records_beyond_it(self, rows, tmp_path):
        run(rows, tmp_path / "out.jsonl")
        run(rows, tmp_path / "out.jsonl", limit=5)
        assert len(records(tmp_path / "out.jsonl")) == 20

    @pytest.mark.parametrize("id_", ["batch_req_-1", "batch_req_ 1", "1", 1, "batch_req_1_0", None])
    def test_of_openai(self, id_):
        with pytest.raises((AttributeError, TypeError, ValueError)):
            openai_batch.FORMAT.index({**openai_batch.record(0, "a"), "id": id_})
        assert openai_batch.FORMAT.index(openai_batch.record(10, "a")) == 10

    def test_a_table_that_is_none_of_records(self, rows, tmp_path):
        out = tmp_path / "out.parquet"
        run(rows, out)
        write_table(out, {"a": 1})
        with pytest.raises(ProxyConfigError, match="does not hold records"):
            run(rows, out)
        write_table(out, *({"index": index, "error": "x"} for index in range(21)))
        with pytest.raises(ProxyConfigError, match="record of row 20"):
            run(rows, out)

    @pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
    def test_a_job_that_an_earlier_version_left_stuck_goes_on(self, rows, tmp_path, name):
        """Its journal has ids that Python cannot follow, or 64 bits cannot hold."""
        ids = ["[" * depth + "]" * depth for depth in (500, 985, 992, 3000)] + [str(2**70)]
        die(rows, tmp_path / name, after=1)
        journal = tmp_path / (name if name.endswith("jsonl") else f"{name}.partial.jsonl")
        (first,) = records(journal)
        left = [index for index in range(20) if index != first["index"]]
        with journal.open("a") as file:
            for index, id_ in zip(left, ids, strict=False):
                file.write(f'{{"index": {index}, "id": {id_}, "error": "too deep"}}\n')
        engine = run(rows, tmp_path / name, ordered=True)
        assert len(engine.asked) == 20 - 1 - len(ids)
        if name.endswith("parquet"):
            table = pyarrow.parquet.read_table(tmp_path / name)
            assert table["index"].to_pylist() == list(range(20))
            assert table["id"].to_pylist()[left[4]] == str(2**70)
            assert json.loads(table["id"].to_pylist()[left[0]])
        else:
            assert (tmp_path / name).read_bytes().count(b"\n") == 20


class TestBlankLines:
    def test_are_no_rows(self, tmp_path):
        source = tmp_path / "rows.jsonl"
        source.write_text('\n{"prompt_token_ids": [1]}\n \t\r\n\n{"prompt_token_ids": [2]}\n\n\n')
        run(str(source), tmp_path / "out.jsonl", ordered=True)
        assert [(r["index"], r["token_ids"]) for r in records(tmp_path / "out.jsonl")] == [
            (0, [1]),
            (1, [2]),
        ]
        assert [line.index for line in Input(str(source), limit=2).lines()] == [0, 1]

    def test_change_no_job(self, tmp_path):
        rows = ["a", "b"]
        source = tmp_path / "rows.txt"
        source.write_text("\n".join(rows))
        plain = Input(str(source))
        source.write_text("".join(f"\n{row}\n" for row in rows).removesuffix("\n"))
        blank = Input(str(source))
        assert (plain.sha256, plain.rows) == (blank.sha256, blank.rows)
        assert [line.data.strip() for line in blank.lines()] == [b"a", b"b"]

    def test_alone_are_no_input(self, tmp_path):
        (tmp_path / "rows.txt").write_bytes(b"\xef\xbb\xbf\n\n  \n")
        with pytest.raises(ProxyConfigError, match="no rows"):
            Input(str(tmp_path / "rows.txt"))


def test_null_is_as_if_a_key_were_missing():
    keys = ("id", "sampling", "alpha", "weights", "filters", "expert_prompt", "antiexpert_prompt")
    row = dict.fromkeys([*keys, "messages", "prompt_token_ids"])
    assert parse_row(json.dumps({**row, "prompt": "a"}).encode()) == parse_row(b'{"prompt": "a"}')
    row = {"custom_id": "a", "method": None, "url": "/v1/completions", "body": {}}
    assert openai_batch.parse(json.dumps(row).encode()).body == {}


class TestLongRows:
    @pytest.mark.parametrize("kind", [".jsonl", ".txt", ".jsonl.gz", ".parquet", "stream"])
    def test_are_errors_by_size_and_others_go_on(self, tmp_path, monkeypatch, kind):
        monkeypatch.setattr(inputs, "MOST_BYTES", 100)
        monkeypatch.setattr(inputs, "_PIECE", 7)
        rows = [{"prompt_token_ids": [1]}, {"prompt": "x" * 500}, {"prompt_token_ids": [2]}]
        source = tmp_path / f"rows{kind}"
        if kind == "stream":
            os.mkfifo(source)
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            writer = subprocess.Popen(["bash", "-c", f"cat > {source}"], stdin=subprocess.PIPE)
            writer.stdin.write(text.encode())
            writer.stdin.close()
        else:
            WRITERS.get(kind, write_rows)(source, *rows)
        found = list(Input(str(source)).lines())
        size = len(json.dumps(rows[1])) + (kind != ".parquet")
        assert [line.index for line in found] == [0, 1, 2]
        assert found[1].data == b""
        assert found[1].problem == f"the row has {size} bytes, more than 100; shorten or split it"
        assert [json.loads(found[index].data)["prompt_token_ids"] for index in (0, 2)] == [[1], [2]]

    def test_have_error_records(self, tmp_path, monkeypatch):
        monkeypatch.setattr(inputs, "MOST_BYTES", 100)
        source = write_rows(
            tmp_path / "rows.jsonl", {"prompt": "x" * 500}, {"prompt_token_ids": [1]}
        )
        run(source, tmp_path / "out.jsonl", ordered=True)
        long, short = records(tmp_path / "out.jsonl")
        assert (long["index"], long["id"]) == (0, None)
        assert long["error"].startswith("the row has 515 bytes, more than 100; ")
        assert short["token_ids"] == [1]

    def test_do_not_fill_the_memory(self, tmp_path):
        """A small file that unpacks to one line of 256 MiB."""
        source = tmp_path / "rows.jsonl.gz"
        with gzip.open(source, "wb", 1) as file:
            for _ in range(256):
                file.write(b"x" * 2**20)
        code = (
            "import resource, sys\n"
            "from vllm_proxy.jobs.inputs import Input\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "(line,) = Input(sys.argv[1]).lines()\n"
            "print(line.problem)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        )
        words = [sys.executable, "-c", code, str(source)]
        says, grown = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
        assert says.startswith(f"the row has {256 * 2**20} bytes, more than {2**26}; ")
        assert int(grown) * 1024 < 3 * 2**26


def test_an_output_that_nobody_reads_any_more(tmp_path, monkeypatch, capfd):
    """`--output - | head -1`: 141, as of a program that SIGPIPE ends, and a word."""
    rows = write_rows(tmp_path / "rows.jsonl", *[{"prompt_token_ids": [1]}] * 20)
    (tmp_path / "proxy.yaml").write_text("{base: b, expert: e, antiexpert: a}")
    monkeypatch.setattr(PromptJob, "engine", lambda _: nullcontext(FakeEngine()))
    reading, writing = os.pipe()
    os.close(reading)
    stdout = os.dup(1)
    os.dup2(writing, 1)
    try:
        with pytest.raises(SystemExit) as ended:
            app(["generate", str(tmp_path / "proxy.yaml"), "--input", rows, "--output", "-"])
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(writing)
    assert ended.value.code == 141
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "--output -: the program that reads it has ended; 0 rows were written"


class TestServersConnections:
    """A connection that ends without an answer is the row's, while the server is well."""

    async def ask(self, directory: Path, refuse: int, healthy: bool = True) -> dict:
        posts = 0

        async def serve(reader, writer) -> None:
            nonlocal posts
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            posts += head.startswith("POST")
            is_refused = posts <= refuse if head.startswith("POST") else not healthy
            if is_refused:
                writer.close()
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nConnection: close\r\n\r\n")
            writer.write(b'{"id": "x"}')
            await writer.drain()
            writer.close()

        path = directory / "socket"
        server = openai_batch.Server.__new__(openai_batch.Server)  # its process is none of this
        server.socket = str(path)
        async with await asyncio.start_unix_server(serve, path), server.session(2) as client:
            return await openai_batch._response(server, client, "/v1/completions", b"{}")

    def test_is_tried_again(self, tmp_path):
        found = asyncio.run(self.ask(tmp_path, refuse=1))
        assert found == {"status_code": 200, "request_id": "x", "body": {"id": "x"}}

    def test_is_an_error_of_the_row(self, tmp_path):
        with pytest.raises(ProxyConfigError, match="the server gave no answer"):
            asyncio.run(self.ask(tmp_path, refuse=2))

    def test_is_a_death_if_the_server_is_gone(self, tmp_path):
        with pytest.raises(EngineDiedError):
            asyncio.run(self.ask(tmp_path, refuse=2, healthy=False))


class OddEngine(FakeEngine):
    """Raises of one prompt what a tokenizer or a template might."""

    def enqueue(self, prompts, params, use_tqdm):
        if prompts[0]["prompt_token_ids"] == [7]:
            raise NotImplementedError("this prompt\nis too odd")
        return super().enqueue(prompts, params, use_tqdm)


def test_an_error_that_nobody_foresaw_is_the_rows(rows, tmp_path):
    run(rows, tmp_path / "out.jsonl", engine=OddEngine(), ordered=True)
    found = records(tmp_path / "out.jsonl")
    assert [index for index, record in enumerate(found) if "error" in record] == [7]
    assert "(NotImplementedError: this prompt is too odd)" in found[7]["error"]


def test_a_record_that_json_cannot_say_is_the_rows(tmp_path):
    with closing(Output(str(tmp_path / "out.jsonl"), {"format": 1}, 1)) as output:
        output.begin()
        written = output.write({"index": 0, "id": "a", "text": "", "kl": float("nan")})
    assert records(tmp_path / "out.jsonl") == [written]
    assert (written["index"], written["id"]) == (0, None)
    assert "its record cannot be written as JSON" in written["error"]


@pytest.mark.parametrize(
    ("ids", "column"),
    [
        ([1, -(2**63), None], [1, -(2**63), None]),
        ([1, 2**64, None], ["1", "18446744073709551616", None]),
        ([1, 10**4299, True], ["1", str(10**4299), "true"]),
    ],
    ids=["small", "large", "huge"],
)
def test_a_table_holds_whatever_ids_there_are(tmp_path, ids, column):
    rows = [{"prompt_token_ids": [5], "id": id_} for id_ in ids]
    run(write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "out.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet")["id"].to_pylist() == column
