"""Tell how a content is laid out: by its first bytes, and by its name where they leave a doubt."""

import codecs
import csv
import io
import json
import re
from enum import Enum

from studio.errors import InputError
from studio.intake.formats import KNOWN_FIELDS
from studio.intake.names import LINES, TABLES, TEXTS, suffix_of

# What is looked at; the rest of a content is of one piece with it.
HEAD_BYTES = 2**16
_AS_DATA = "Save it as JSON lines or CSV in UTF-8 and upload that."
_UNPACK = "Unpack it and upload what is inside, or pack it as gzip or zip."
_PICTURE = "Upload the file with the conversations; pictures are named in it by reference."
_MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF", "a PDF", "Save its text in UTF-8 and upload that."),
    (b"{\\rtf", "a rich text document (RTF)", "Save it as plain text in UTF-8 and upload that."),
    (b"\xd0\xcf\x11\xe0", "a document of an old Office (xls, doc)", _AS_DATA),
    (b"PK\x03\x04", "a zip archive inside another archive", _UNPACK),
    (b"\x1f\x8b", "a gzip inside another archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "an LZ4 archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"SQLite format 3\0", "a SQLite database", _AS_DATA),
    (b"PARE", "an encrypted Parquet file", "Save it without encryption."),
    (b"ARROW1", "an Arrow file (Feather)", "Save it as Parquet and upload that."),
    (b"\xff\xff\xff\xff", "an Arrow stream", "Save it as Parquet and upload that."),
    (b"ORC", "an ORC file", "Save it as Parquet and upload that."),
    (b"Obj\x01", "an Avro file", "Save it as Parquet and upload that."),
    (b"\x89HDF", "an HDF5 file", _AS_DATA),
    (b"\x93NUMPY", "a NumPy array", _AS_DATA),
    (b"\x80\x04\x95", "a Python pickle", _AS_DATA),
    (b"\x80\x05\x95", "a Python pickle", _AS_DATA),
    (b"GGUF", "a model in GGUF", "Upload the data to train on."),
    (b"\x89PNG", "a picture (PNG)", _PICTURE),
    (b"\xff\xd8\xff", "a picture (JPEG)", _PICTURE),
    (b"GIF8", "a picture (GIF)", _PICTURE),
    (b"\x7fELF", "a program", "Upload the data to train on."),
    (b"MZ\x90", "a program", "Upload the data to train on."),
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file itself",
        "Get the file with `git lfs pull` and upload that.",
    ),
)
# UTF-32 before UTF-16: the little-endian mark of the one begins with that of the other.
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_ZEROES = (
    (re.compile(rb"[^\0]\0\0\0[^\0]\0\0\0"), "UTF-32"),
    (re.compile(rb"\0\0\0[^\0]\0\0\0[^\0]"), "UTF-32"),
    (re.compile(rb"([^\0]\0){4}"), "UTF-16"),
    (re.compile(rb"(\0[^\0]){4}"), "UTF-16"),
)
_WEB_PAGE = re.compile(rb"<(!doctype html|html|head|\?xml)[\s>]", re.IGNORECASE)
# Bytes that no text holds: what is left of the control characters without tab, line ends, form
# feed and escape.
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_NAME = re.compile(r"[^\W\d][\w .\-/()#]{0,63}")
_WORD = re.compile(r"[\w.\-]+")
DELIMITERS = ",\t;|"


class Layout(Enum):
    """How the records stand in a content."""

    JSON_LINES = "json_lines"
    JSON_ARRAY = "json_array"
    JSON_VALUES = "json_values"
    PARQUET = "parquet"
    CSV = "csv"
    TEXT = "text"

    @property
    def title(self) -> str:
        """What a page calls it."""
        return _TITLES[self]


_TITLES = {
    Layout.JSON_LINES: "JSON lines",
    Layout.JSON_ARRAY: "JSON array",
    Layout.JSON_VALUES: "JSON objects over several lines",
    Layout.PARQUET: "Parquet",
    Layout.CSV: "CSV",
    Layout.TEXT: "text",
}


def sniff(head: bytes, name: str = "") -> Layout:
    """Tell how a content is laid out.

    Any content is a text, so that only one whose name says so is taken for it.

    Args:
        head: Its first bytes, up to `HEAD_BYTES`; fewer only where it is shorter.
        name: Name of its file, empty where it has none that says anything.

    Returns:
        The Layout; JSON_LINES for one that is empty.

    Raises:
        InputError: It is something that is not read; the message names what.
    """
    head = head[:HEAD_BYTES]
    if head.startswith(b"PAR1"):
        return Layout.PARQUET
    _refuse_encoding(head)
    _refuse_foreign(head)
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"{"):
        return _objects(text)
    if text.startswith(b"["):
        return _array(text)
    if b"\0" in text or len(_BINARY.findall(text)) > max(8, len(text) / 100):
        raise InputError("The file is binary, of a kind not known here.", _AS_DATA)
    _refuse_old_line_ends(text)
    return _by_name(text, suffix_of(name), is_whole=len(head) < HEAD_BYTES)


def _by_name(text: bytes, suffix: str, *, is_whole: bool) -> Layout:
    """Tell the layout of a text that does not begin as JSON does."""
    if not text or suffix in LINES:
        return Layout.JSON_LINES
    if suffix in TABLES:
        return Layout.CSV
    if _is_json_lines(text):
        return Layout.JSON_LINES
    if delimiter(text.decode("utf-8", errors="replace"), is_whole):
        return Layout.CSV
    if suffix in TEXTS:
        return Layout.TEXT
    raise InputError(
        "The file is neither JSON, nor a table (CSV, TSV), nor Parquet.",
        "Save the data as one of these. If it is plain text for continued pre-training, "
        "rename it to end with .txt.",
    )


def delimiter(text: str, is_whole: bool, is_table: bool = False) -> str | None:
    """Return what separates the columns of a table, None where the text is no table.

    Args:
        text: The beginning of the text.
        is_whole: Whether that is all of it; otherwise its last line may be cut.
        is_table: Whether it is known to be a table, so that its columns may have any names.
    """
    found = [
        (num_columns, mark)
        for mark in DELIMITERS
        if (num_columns := _columns(text, mark, is_whole=is_whole, is_table=is_table))
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _columns(text: str, mark: str, *, is_whole: bool, is_table: bool) -> int:
    """Return the number of columns, 0 where the text is no table with this delimiter."""
    lines = list(io.StringIO(text, newline=""))
    rows: list[list[str]] = []
    reader = csv.reader(lines, delimiter=mark)
    for row in reader:
        if any(row):
            rows.append(row)
        if len(rows) > 20:
            break
    if not is_whole and reader.line_num >= len(lines):
        rows = rows[:-1] or rows
    if not rows:
        return 0
    header, body = rows[0], rows[1:]
    if len(header) == 1:
        return int(header[0].strip().lower() == "text" and mark == "," and bool(body))
    # Known names make a table, whatever is wrong with what follows.
    if len(KNOWN_FIELDS.intersection(name.strip().lower() for name in header)) > 1:
        return len(header)
    if not body:
        return len(header) if is_table or all(map(_WORD.fullmatch, header)) else 0
    fitting = sum(len(row) == len(header) for row in body)
    is_named = is_table or _are_names(header, text)
    return len(header) if is_named and fitting * 2 > len(body) else 0


def _are_names(header: list[str], text: str) -> bool:
    # The first may be missing: pandas writes its index so.
    names = header[1:] if not header[0].strip() else header
    return all(_NAME.fullmatch(name.strip()) or _is_quoted(name, text) for name in names)


def _is_quoted(name: str, text: str) -> bool:
    """Whether a name stands in quotes as a whole, as that of a column; speech in prose does not."""
    return bool(name.strip()) and '"{}"'.format(name.replace('"', '""')) in text


def _refuse_encoding(head: bytes) -> None:
    for mark, name in _ENCODINGS:
        if head.startswith(mark):
            _refuse_utf(name, f" (it begins with {mark.hex(' ').upper()})")
    for pattern, name in _ZEROES:
        if pattern.match(head):
            _refuse_utf(name, "")


def _refuse_utf(name: str, why: str) -> None:
    raise InputError(f"The text is encoded as {name}{why}.", "Save it as UTF-8.")


def _refuse_foreign(head: bytes) -> None:
    for magic, name, hint in _MAGICS:
        if head.startswith(magic):
            raise InputError(f"The file is {name}.", hint)
    # https://www.gnu.org/software/tar/manual/html_node/Standard.html
    if head[257:262] == b"ustar":
        raise InputError("The file is a tar archive.", _UNPACK)
    if head[8:9] == b"{" and head[4:8] == b"\0\0\0\0":
        raise InputError("The file is a model in safetensors.", "Upload the data to train on.")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        raise InputError("The file is a picture (WebP).", _PICTURE)
    if _WEB_PAGE.match(head.removeprefix(codecs.BOM_UTF8).lstrip()):
        raise InputError(
            "The file is a web page (HTML or XML), perhaps the error page of a download.",
            "Download the data itself and upload that.",
        )


def _refuse_old_line_ends(text: bytes) -> None:
    if b"\n" not in text and re.search(rb"\r[^\r\n]", text):
        raise InputError(
            "The file has no line feeds: its lines end with a carriage return only.",
            "Save it with line ends of Unix or Windows.",
        )


def _objects(text: bytes) -> Layout:
    first, feed, _ = text.partition(b"\n")
    # A record of JSON lines ends with its line; a cut one rarely ends just behind a mark.
    if feed and first.rstrip().endswith((b"{", b"[", b",", b":")):
        return Layout.JSON_VALUES
    if re.search(rb"\}\s*\r[\r\s]*\{", first):
        _refuse_old_line_ends(text)
    return Layout.JSON_LINES


def _array(text: bytes) -> Layout:
    """Tell an array over the whole content from lines that each hold one."""
    first, _, rest = text.partition(b"\n")
    if first.rstrip().endswith(b"]") and rest.lstrip().startswith((b"[", b"{")):
        return Layout.JSON_LINES
    return Layout.JSON_ARRAY


def _is_json_lines(text: bytes) -> bool:
    """Whether most lines are objects, or all are other JSON values."""
    lines = [line.strip() for line in text.split(b"\n")[:20] if line.strip()]
    objects = sum(line.startswith(b"{") and line.endswith(b"}") for line in lines)
    return objects * 2 >= len(lines) or all(map(_is_value, lines))


def _is_value(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    # The name of the column in a table of one.
    return line != b'"text"'
