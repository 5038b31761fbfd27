"""Rows from Parquet and records to Parquet, both in parts. Imports pyarrow only when used."""

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
"""Bytes of JSON per row group: the part of the records that is held in memory."""
_OPTIONAL = ("weights", "logprobs", "prompt_logprobs")
"""Columns that a file has only if some record has them."""


def is_name(path: str) -> bool:
    """Return whether a file of this name is read and written as Parquet."""
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
            f"it is not a Parquet file, or it is truncated ({reason})",
            field=f"{option} {path!r}",
            remedy="get the file again",
        ) from None


def require_pyarrow(field: str) -> None:
    """Raise `ProxyConfigError` for *field*, an option and its path, if pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError:
        raise ProxyConfigError(
            "Parquet needs pyarrow", field=field, remedy="pip install 'vllm-proxy[parquet]'"
        ) from None


def count_rows(path: str) -> int:
    """Return the number of rows in the file's metadata. Raises `ProxyConfigError`."""
    with _reading(path, "--input") as file:
        return file.metadata.num_rows


def read_lines(path: str) -> Iterator[tuple[bytes, str]]:
    """Yield every row as a JSON object, and the reason if it cannot be read.

    Nulls in a row are left out.

    Raises:
        ProxyConfigError: the file is not a Parquet file.
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
        # A value without a Python type, or text that is not UTF-8.
        reason = " ".join(str(error).split())
        return b"", f"the row of the table cannot be read ({reason}); change it"


def _plain(value: Any) -> str:
    """Return bytes, dates and decimals as text: JSON has no type for them."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _without_nulls(value: Any) -> Any:
    """Remove the nulls that a struct has for each of its column's fields that a row lacks."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def read_indices(path: str) -> Iterator[tuple[int, bool]]:
    """Yield the index of every record, and whether it is an error. Raises `ProxyConfigError`."""
    with _reading(path, "--output") as file:
        if not {"index", "error"} <= set(file.schema_arrow.names):
            raise ProxyConfigError(
                "the table does not hold records",
                field=f"--output {path!r}",
                remedy="add --overwrite to replace it",
            )
        for batch in file.iter_batches(columns=["index", "error"]):
            for row in batch.to_pylist():
                yield row["index"], row["error"] is not None


class Columns:
    """The columns that a file of records needs, collected from every record."""

    def __init__(self) -> None:
        self._has_ids = False
        self._ids_are_integers = True
        self._alphas: set[type] = set()
        self._keys: set[str] = set()

    def add(self, record: dict[str, Any]) -> None:
        """Take *record* into account."""
        id_ = record.get("id")
        is_integer = type(id_) is int and -(2**63) <= id_ < 2**63
        self._ids_are_integers = self._ids_are_integers and (id_ is None or is_integer)
        self._has_ids = self._has_ids or id_ is not None
        self._alphas.add(type(record.get("alpha")))
        self._keys |= record.keys()

    def schema(self) -> "pyarrow.Schema":
        """Return the schema of a file that holds all records added.

        Ids are 64-bit integers if every id is one; otherwise they are text, and an id that is not
        text is written as JSON. The strengths are text likewise if one of them is not a number.
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
    """Write records as a Parquet file, one row group at a time.

    Args:
        lines: the records as JSON lines, in the order of the file.
        file: to write to.
        columns: to which all of these records were added.
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
    except RecursionError:  # an id that an earlier version has written
        text = "nested too deep"
    return text.encode(errors="backslashreplace").decode()  # for lone surrogates
