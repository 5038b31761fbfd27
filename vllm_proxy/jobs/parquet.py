"""Rows from Parquet and records to Parquet, both a part at a time. Needs pyarrow when used."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.jobs.records import decode

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 256
_GROUP_BYTES = 2**25
"""JSON of the records that are written as one row group: what is held in memory."""
_OPTIONAL = ("weights", "logprobs", "prompt_logprobs")
"""Columns that only records of jobs that ask for them have."""


def is_name(path: str) -> bool:
    """Return whether a file of this name is taken for Parquet."""
    return path.endswith((".parquet", ".pq"))


@contextmanager
def _reading(path: str, option: str) -> Iterator["pyarrow.parquet.ParquetFile"]:
    require_pyarrow(f"{option} {path!r}")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield file
    except (ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ProxyConfigError(
            f"{option} {path!r}: no Parquet file, or a truncated one ({reason}); get it again"
        ) from None


def require_pyarrow(what: str) -> None:
    """Raise `ProxyConfigError` if *what*, an option and its value, asks for what is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError:
        raise ProxyConfigError(
            f"{what}: Parquet needs pyarrow; pip install 'vllm-proxy[parquet]'"
        ) from None


def count_rows(path: str) -> int:
    """Return the number of rows that the file says it has. Raises `ProxyConfigError`."""
    with _reading(path, "--input") as file:
        return file.metadata.num_rows


def read_lines(path: str) -> Iterator[tuple[bytes, str]]:
    """Yield every row as a JSON object, and why it could not be read.

    What is null in a row is left out.

    Raises:
        ProxyConfigError: the file is no table.
    """
    with _reading(path, "--input") as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for index in range(batch.num_rows):
                yield _line(batch.slice(index, 1))


def _line(batch: "pyarrow.RecordBatch") -> tuple[bytes, str]:
    try:
        (row,) = batch.to_pylist()
        return json.dumps(_without_nulls(row), default=_plain).encode(), ""
    except (ArithmeticError, TypeError, ValueError) as error:
        # A value that Python has no type for, or text that is not UTF-8.
        reason = " ".join(str(error).split())
        return b"", f"the row of the table cannot be read ({reason}); change it"


def _plain(value: Any) -> str:
    """Return as text what JSON has no type for: bytes, dates, decimals."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _without_nulls(value: Any) -> Any:
    """A struct has every field of its column, null where the row gave none."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def read_indices(path: str) -> Iterator[tuple[int, bool]]:
    """Yield index and whether it is an error of every record. Raises `ProxyConfigError`."""
    with _reading(path, "--output") as file:
        if not {"index", "error"} <= set(file.schema_arrow.names):
            raise ProxyConfigError(
                f"--output {path!r} is no table of records; add --overwrite to replace it"
            )
        for batch in file.iter_batches(columns=["index", "error"]):
            for row in batch.to_pylist():
                yield row["index"], row["error"] is not None


class Columns:
    """What the columns of a file of records must hold, found out by looking at every record."""

    def __init__(self) -> None:
        self._has_ids, self._ids_are_integers = False, True
        self._alphas: set[type] = set()
        self._keys: set[str] = set()

    def see(self, record: dict[str, Any]) -> None:
        """Take *record* into account."""
        id_ = record.get("id")
        is_integer = type(id_) is int and -(2**63) <= id_ < 2**63
        self._ids_are_integers = self._ids_are_integers and (id_ is None or is_integer)
        self._has_ids = self._has_ids or id_ is not None
        self._alphas.add(type(record.get("alpha")))
        self._keys |= record.keys()

    def schema(self) -> "pyarrow.Schema":
        """Return the schema of a file of all records seen.

        Ids are integers if all are, of 64 bits; else they are text, and what is neither is written
        as JSON. So is a strength that is no number, if there is one.
        """
        import pyarrow as pa

        none = type(None)
        top = pa.struct([("token_id", pa.int64()), ("logprob", pa.float64()), ("token", pa.utf8())])
        logprobs = pa.list_(
            pa.struct([("token_id", pa.int64()), ("logprob", pa.float64()), ("top", pa.list_(top))])
        )
        fields = {
            "index": pa.int64(),
            "id": pa.int64() if self._has_ids and self._ids_are_integers else pa.utf8(),
            "text": pa.utf8(),
            "token_ids": pa.list_(pa.int32()),
            "finish_reason": pa.utf8(),
            "prompt_tokens": pa.int32(),
            "completion_tokens": pa.int32(),
            "alpha": pa.float64() if self._alphas <= {none, int, float} else pa.utf8(),
            "weights": pa.list_(pa.float64()),
            "logprobs": logprobs,
            "prompt_logprobs": logprobs,
            "error": pa.utf8(),
        }
        return pa.schema({k: v for k, v in fields.items() if k not in _OPTIONAL or k in self._keys})


def write_records(lines: Iterable[bytes], file: BinaryIO, columns: Columns) -> None:
    """Write records, given as JSON lines in the order of the file.

    Args:
        lines: the records that *columns* has seen.
        file: where the table goes.
        columns: what they hold.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema = columns.schema()
    texts = [field.name for field in schema if field.type == pa.utf8()]
    with ParquetWriter(file, schema, compression="zstd") as writer:
        group: list[dict[str, Any]] = []
        size = 0

        def flush() -> None:
            nonlocal size
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            group.clear()
            size = 0

        for line in lines:
            record = decode(line)
            for name in texts:
                record[name] = _as_text(record.get(name))
            group.append(record)
            size += len(line)
            if size >= _GROUP_BYTES:
                flush()
        flush()


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except RecursionError:  # an id, written by an earlier version
        text = "nested too deep"
    return text.encode(errors="backslashreplace").decode()  # of a lone surrogate
