"""Read a Parquet file in small batches, and only the columns that a format reads."""

import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from studio.domain.validation import Issue
from studio.errors import InputError
from studio.intake.archive import Part
from studio.intake.elements import MAX_RECORD_BYTES
from studio.intake.formats import KNOWN_FIELDS, LISTS, Mapping, UnknownFormatError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

# What rows in memory take on average, and what they take where each is the longest of its column.
BATCH_BYTES = 4 * 2**20
MAX_BATCH_BYTES = 32 * 2**20
MAX_BATCH_ROWS = 1024
# Parquet is read from its end, so one in a gzip or zip has to be held.
MAX_PACKED_BYTES = 64 * 2**20
_DAMAGED = "Save it again, or upload it again if it was cut off."


def read_parquet(part: Part, mapping: Mapping | None) -> Iterator[tuple[int, object] | Issue]:
    """Yield the number of each row from 1, and its values by the names of the columns.

    A null in a struct is taken for a field that is absent, as Parquet gives every struct of a
    column the fields of all of them: role, content, tool_calls, and every argument of any call.
    An argument that was null by intent is lost with them; a note says so.

    Raises:
        InputError: The file is damaged, or a column is of a type that no format has.
        UnknownFormatError: It has no column of a known name.
    """
    # Loading pyarrow takes 0.13 s and 50 MiB (measured), and most files are JSON lines.
    import pyarrow as pa
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(_seekable(part), buffer_size=2**20) as file:
            columns = _columns(file.schema_arrow, mapping)
            if _merges_arguments(file.schema_arrow, columns):
                yield Issue(line=0, kind="nulls", severity="note", reason=_MERGED)
            for batch in file.iter_batches(_batch_rows(file), columns=columns, use_threads=False):
                part.spend(batch.nbytes)
                yield from _read_batch(batch, row)
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        at = f" behind row {row}" if row else ""
        reason = _sentence(str(error))
        raise InputError(f"The Parquet file is damaged{at}: {reason}.", _DAMAGED) from error


_MERGED = (
    "Parquet gives each call the arguments of all calls; those that are null were left out "
    "(write arguments as JSON text to keep a null)"
)


def _sentence(message: str) -> str:
    if "magic bytes not found in footer" in message:
        return "its end is missing"
    if "too deeply nested" in message:
        return "its columns are nested more than 100 levels deep"
    return " ".join(message.split())[:120].rstrip(".")


def _seekable(part: Part) -> Any:
    if part.stream.seekable():
        return part.stream
    content = part.stream.read(MAX_PACKED_BYTES + 1)
    if len(content) > MAX_PACKED_BYTES:
        raise InputError(
            "A Parquet file of more than 64 MiB is packed in an archive.",
            "Upload the Parquet file itself; it is compressed already.",
        )
    return io.BytesIO(content)


def _batch_rows(file: "parquet.ParquetFile") -> int:
    """Return how many rows to read at once.

    A long text that stands in every row is stored once, in a dictionary, and is as long in memory
    as it says for each row: one value may be as large as the dictionary. The footer tells the sizes;
    one that lies about them is not found out.
    """
    metadata = file.metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    row_bytes = max(
        (group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0
    )
    longest_bytes = max(map(_dictionary_bytes, groups), default=0)
    by_size = min(BATCH_BYTES // max(row_bytes, 1), MAX_BATCH_BYTES // max(longest_bytes, 1))
    return max(1, min(MAX_BATCH_ROWS, by_size))


def _dictionary_bytes(group: "parquet.RowGroupMetaData") -> int:
    """Return about how large the largest dictionary of a row group is without compression."""
    largest = 0
    for index in range(group.num_columns):
        column = group.column(index)
        if column.has_dictionary_page:
            packed = max(0, column.data_page_offset - (column.dictionary_page_offset or 0))
            ratio = column.total_uncompressed_size / max(column.total_compressed_size, 1)
            largest = max(largest, int(packed * ratio))
    return largest


# ---- columns ----------------------------------------------------------------------------------


def _columns(schema: "pa.Schema", mapping: Mapping | None) -> list[str]:
    chosen = mapping.columns if mapping is not None else ()
    missing = [name for name in chosen if name not in schema.names]
    if missing:
        raise UnknownFormatError.of_columns(schema.names, missing)
    columns = [name for name in schema.names if name in KNOWN_FIELDS or name in chosen]
    if not columns:
        raise UnknownFormatError.of_columns(schema.names)
    for name in columns:
        if name in LISTS and not _is_listlike(schema.field(name).type):
            raise InputError(
                f"The column {name} of the Parquet file is of type {schema.field(name).type}.",
                "It should be a list of structs, or text that is JSON.",
            )
    return columns


def _is_listlike(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return any(
        is_kind(kind)
        for is_kind in (
            types.is_list,
            types.is_large_list,
            types.is_fixed_size_list,
            types.is_string,
            types.is_large_string,
            types.is_binary,
            types.is_large_binary,
            types.is_null,
            types.is_dictionary,
        )
    )


def _inner(kind: "pa.DataType") -> "list[pa.Field]":
    return [kind.field(index) for index in range(kind.num_fields)]


def _merges_arguments(schema: "pa.Schema", columns: list[str]) -> bool:
    """Whether arguments of calls are structs, which have the fields of all calls."""
    from pyarrow import types

    level = [schema.field(name) for name in columns]
    while level:
        if any(field.name == "arguments" and types.is_struct(field.type) for field in level):
            return True
        level = [inner for field in level for inner in _inner(field.type)]
    return False


# ---- values -----------------------------------------------------------------------------------


def _read_batch(batch: "pa.RecordBatch", row: int) -> Iterator[tuple[int, object] | Issue]:
    """Yield the rows of a batch; where one cannot be read, each is tried by itself."""
    try:
        columns = {name: _values(batch.column(name)) for name in batch.schema.names}
    except ValueError as error:
        if batch.num_rows > 1:
            for index in range(batch.num_rows):
                yield from _read_batch(batch.slice(index, 1), row + index)
        elif isinstance(error, UnicodeDecodeError):
            reason = "a text of the row is not UTF-8"
            value = hex(error.object[error.start])
            yield Issue(line=row + 1, kind="encoding", value=value, reason=reason)
        else:
            yield Issue(line=row + 1, kind="json", reason=str(error))
        return
    is_large = batch.nbytes > MAX_RECORD_BYTES
    for index in range(batch.num_rows):
        if is_large and batch.slice(index, 1).nbytes > MAX_RECORD_BYTES:
            reason = "the record is longer than 16 MiB"
            yield Issue(line=row + index + 1, kind="too_long", reason=reason)
            continue
        values = {name: column[index] for name, column in columns.items()}
        yield row + index + 1, {key: value for key, value in values.items() if value is not None}


def _values(array: "pa.Array") -> list[Any]:
    """Return what the elements are in JSON.

    pyarrow's own `to_pylist` takes 2 to 4 times as long for nested columns (measured), and keeps
    the nulls of structs.

    Raises:
        ValueError: A text is not UTF-8 or a number infinite.
    """
    from pyarrow import types

    kind = array.type
    if types.is_struct(kind):
        return _structs(array)
    if types.is_map(kind):
        return _maps(array)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _lists(array)
    if types.is_dictionary(kind):
        return _values(array.dictionary_decode())
    values: list[Any] = array.to_pylist()
    if types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind):
        return values
    if types.is_boolean(kind) or types.is_integer(kind):
        return values
    if types.is_floating(kind):
        return [_number(value) for value in values]
    if types.is_binary(kind) or types.is_large_binary(kind):
        return [None if value is None else value.decode("utf-8") for value in values]
    return [None if value is None else str(value) for value in values]


def _structs(array: "pa.StructArray") -> list[dict[str, Any] | None]:
    names = [field.name for field in _inner(array.type)]
    columns = [_values(column) for column in array.flatten()]
    rows: list[dict[str, Any] | None] = [
        {name: value for name, value in zip(names, values, strict=True) if value is not None}
        for values in zip(*columns, strict=True)
    ]
    if array.null_count:
        valid = array.is_valid().to_pylist()
        rows = [row if is_valid else None for row, is_valid in zip(rows, valid, strict=True)]
    return rows


def _lists(array: "pa.ListArray") -> list[list[Any] | None]:
    from pyarrow import compute

    flat = _values(array.flatten())
    rows: list[list[Any] | None] = []
    at = 0
    for length in compute.list_value_length(array).to_pylist():
        rows.append(None if length is None else flat[at : at + length])
        at += length or 0
    return rows


def _maps(array: "pa.MapArray") -> list[dict[str, Any] | None]:
    import pyarrow as pa

    kind = array.type
    pairs = pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)]))
    return [
        None if row is None else {str(pair["key"]): pair["value"] for pair in row if len(pair) == 2}
        for row in _lists(array.cast(pairs))
    ]


def _number(value: float | None) -> float | None:
    # pandas writes NaN where a number is missing.
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        raise ValueError("a number of the row is infinite, which JSON cannot hold")
    return value
