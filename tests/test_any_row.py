"""No row stops a job: one line gives one record, whatever is in it, through kills and resumes."""

import json
import math
import tempfile
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.jobs import JOB_ENGINE
from support.odd_rows import lines, own_rows, tried, values
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.open import open_job

AT_ONCE = 20
"""Rows of a job: hypothesis makes them, and a job costs more than a row."""
TARGETS = st.sampled_from(["out.jsonl", "out.parquet"])


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def config(members) -> ProxyConfig:
    sampling = {"temperature": 0, "max_tokens": 1}
    return ProxyConfig.parse({**members, "engine": JOB_ENGINE, "sampling": sampling}, "test")


def strict(line: bytes) -> dict:
    """Read a record as a reader without Python's extensions of JSON does."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads(line, parse_constant=refuse)
    assert all(math.isfinite(v) for v in record.values() if isinstance(v, float))
    return record


def answer(llm, config, source: Path, out: Path, kill_after: int, torn: int) -> None:
    """Answer a job that is killed after some records, in the middle of a line; then go on."""

    def kill(summary) -> None:
        if summary.rows == kill_after:
            raise Killed

    journal = Path(f"{out}.partial.jsonl") if out.suffix == ".parquet" else out
    with open_job(config, str(source), str(out)) as job:
        with suppress(Killed):
            job.run(llm, kill)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    kept = journal.read_bytes()
    last = kept.rfind(b"\n", 0, -1) + 1
    kept = kept[: max(last, len(kept) - torn)]
    journal.write_bytes(kept)
    with open_job(config, str(source), str(out)) as job:
        assert job.done == kept.count(b"\n")
        if not job.finished:
            job.run(llm)
        assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
        job.output.finish()
    with open_job(config, str(source), str(out)) as job:
        assert job.finished


def read(out: Path) -> list[dict]:
    """Return a job's records in the order of their rows; each is one, and has what it must."""
    if out.suffix == ".parquet":
        found = pyarrow.parquet.read_table(out).to_pylist()
    else:
        found = [strict(line) for line in out.read_bytes().split(b"\n")[:-1]]
    for record in found:
        has = record.get("error") is None, record.get("token_ids") is None
        assert has in ((True, False), (False, True)), record
    return sorted(found, key=lambda record: record["index"])


def id_of(line: bytes) -> object:
    """Return the id of a row, if it has one that a record can repeat; else None."""
    try:
        found = json.loads(line)["id"]
        json.dumps(found, allow_nan=False)
    except (LookupError, RecursionError, TypeError, ValueError):
        return None
    return found if max(map(abs, depths(line.decode())), default=0) <= 200 else None


def depths(text: str) -> list[int]:
    depth, found = 0, []
    for character in text:
        depth += (character in "[{") - (character in "]}")
        found.append(depth)
    return found


# A table has a column of integers where all ids of a job are, of 64 bits.
SMALL = st.integers(-(2**63), 2**63 - 1)
LARGE = SMALL | st.sampled_from([2**63, -(2**63) - 1, 2**64, 10**300])
ROWS_OF_A_JOB = st.sampled_from([values, SMALL.map(str), LARGE.map(str)]).flatmap(
    lambda ids: st.lists(lines(own_rows(ids)), min_size=AT_ONCE, max_size=AT_ONCE, unique=True)
)


@tried(1000, AT_ONCE)
@given(
    ROWS_OF_A_JOB,
    TARGETS,
    st.integers(1, AT_ONCE),
    st.integers(0, 40),
)
def test_lines(proxy_llm, config, data, target, kill_after, torn):
    with tempfile.TemporaryDirectory() as directory:
        source, out = Path(directory, "rows.jsonl"), Path(directory, target)
        source.write_bytes(b"\n".join([b'{"prompt": "a"}', *data]))
        answer(proxy_llm, config, source, out, kill_after, torn)
        rows = [line for line in source.read_bytes().split(b"\n") if line.strip()]
        found = read(out)
        assert [record["index"] for record in found] == list(range(len(rows)))
        assert found[0]["completion_tokens"] == 1
        for line, record in zip(rows, found, strict=True):
            expected = id_of(line)
            if record.get("error") is None and out.suffix == ".jsonl":
                assert repr(record["id"]) == repr(expected), line


@st.composite
def tables(draw) -> pyarrow.Table:
    """A table whose columns are of types that rows need, and of others."""
    count = AT_ONCE

    def column(values: st.SearchStrategy, kind: pyarrow.DataType) -> pyarrow.Array:
        some = st.lists(st.none() | values, min_size=count, max_size=count)
        return pyarrow.array(draw(some), kind)

    def unchecked(array: pyarrow.Array) -> pyarrow.Array:
        """The bytes of a column as if they were its text, which other writers do not check."""
        return pyarrow.StringArray.from_buffers(
            len(array), *array.buffers()[1:], array.buffers()[0]
        )

    text = st.text(max_size=8)
    ids = {
        "int64": lambda: column(st.integers(-(2**63), 2**63 - 1), pyarrow.int64()),
        "uint64": lambda: column(st.integers(0, 2**64 - 1), pyarrow.uint64()),
        "double": lambda: column(st.floats(), pyarrow.float64()),
        "text": lambda: column(text, pyarrow.utf8()),
        "no text": lambda: unchecked(column(st.binary(max_size=4), pyarrow.binary())),
        "bytes": lambda: column(st.binary(max_size=4), pyarrow.binary()),
        "list": lambda: column(st.lists(st.floats(), max_size=2), pyarrow.list_(pyarrow.float64())),
        "time": lambda: column(st.integers(-(2**62), 2**62), pyarrow.int64()).cast(
            pyarrow.timestamp("us")
        ),
        "date": lambda: column(st.dates(), pyarrow.date32()),
        "decimal": lambda: column(st.decimals(-9, 9, places=2), pyarrow.decimal128(5, 2)),
    }
    prompts = unchecked(
        column(st.just(b"The large model") | st.binary(max_size=9), pyarrow.binary())
    )
    columns = {"id": ids[draw(st.sampled_from(sorted(ids)))](), "prompt": prompts}
    if draw(st.booleans()):
        columns["alpha"] = column(st.floats(), pyarrow.float64())
    if draw(st.booleans()):
        columns["prompt_token_ids"] = column(
            st.lists(st.integers(-1, 600), max_size=3), pyarrow.list_(pyarrow.int64())
        )
    return pyarrow.table(columns)


@tried(400, AT_ONCE)
@given(tables(), TARGETS, st.integers(1, AT_ONCE), st.integers(0, 40))
def test_tables(proxy_llm, config, table, target, kill_after, torn):
    with tempfile.TemporaryDirectory() as directory:
        source, out = Path(directory, "rows.parquet"), Path(directory, target)
        pyarrow.parquet.write_table(table, source)
        answer(proxy_llm, config, source, out, kill_after, torn)
        assert [record["index"] for record in read(out)] == list(range(AT_ONCE))
