"""Rows from Parquet and records to Parquet, both a part at a time. Needs pyarrow when used."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_proxy.errors import ProxyConfigError

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
def _reading(path: str) -> Iterator["pyarrow.parquet.ParquetFile"]:
    require_pyarrow(f"--input {path!r}")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield file
    except ArrowException as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ProxyConfigError(
            f"--input {path!r}: no Parquet file, or a truncated one ({reason}); get it again"
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
    with _reading(path) as file:
        return file.metadata.num_rows


def read_lines(path: str) -> Iterator[bytes]:
    """Yield every row as a JSON object: what is null in it is left out."""
    with _reading(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                yield json.dumps(_without_nulls(row), default=str).encode()


def _without_nulls(value: Any) -> Any:
    """A struct has every field of its column, null where the row gave none."""
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def read_indices(path: str) -> Iterator[tuple[int, bool]]:
    """Yield index and whether it is an error of every record. Raises `ProxyConfigError`."""
    with _reading(path) as file:
        for batch in file.iter_batches(columns=["index", "error"]):
            for row in batch.to_pylist():
                yield row["index"], row["error"] is not None


class Columns:
    """What the columns of a file of records must hold, found out by looking at every record."""

    def __init__(self) -> None:
        self._ids: set[type] = set()
        self._alphas: set[type] = set()
        self._keys: set[str] = set()

    def see(self, record: dict[str, Any]) -> None:
        """Take *record* into account."""
        self._ids.add(type(record["id"]))
        self._alphas.add(type(record.get("alpha")))
        self._keys |= record.keys()

    def schema(self) -> "pyarrow.Schema":
        """Return the schema of a file of all records seen.

        Ids are integers if all are, else text: what is neither is written as JSON. So is a
        strength that is no number, if there is one.
        """
        import pyarrow as pa

        none = type(None)
        top = pa.struct([("token_id", pa.int64()), ("logprob", pa.float64()), ("token", pa.utf8())])
        logprobs = pa.list_(
            pa.struct([("token_id", pa.int64()), ("logprob", pa.float64()), ("top", pa.list_(top))])
        )
        fields = {
            "index": pa.int64(),
            "id": pa.int64() if self._ids - {none} == {int} else pa.utf8(),
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


def write_records(lines: Iterable[bytes], path: str, columns: Columns) -> None:
    """Write records, given as JSON lines in the order of the file.

    Args:
        lines: the records that *columns* has seen.
        path: of the file; replaced if it is there.
        columns: what they hold.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema = columns.schema()
    texts = [name for name in ("id", "alpha") if schema.field(name).type == pa.utf8()]
    with ParquetWriter(path, schema, compression="zstd") as writer:
        group: list[dict[str, Any]] = []
        size = 0

        def flush() -> None:
            nonlocal size
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            group.clear()
            size = 0

        for line in lines:
            record = json.loads(line)
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
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode(errors="backslashreplace").decode()  # of a lone surrogate
