"""An upload is read as a stream, whatever it is packed in, and nothing hostile gets through."""

import gzip
import io
import os
import stat
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from studio.errors import InputError
from studio.intake import archive
from studio.intake.archive import Limits, open_parts

LINES = b'{"messages": []}\n' * 3
LIMITS = Limits()


def contents(path: Path, limits: Limits = LIMITS) -> dict[str, bytes]:
    return {part.name: part.stream.read() for part in open_parts(path, limits=limits)}


def refusal(path: Path, limits: Limits = LIMITS) -> str:
    with pytest.raises(InputError) as caught:
        contents(path, limits)
    assert caught.value.hint
    return caught.value.message


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def exhaust(path: Path, limits: Limits = LIMITS) -> None:
    for part in open_parts(path, limits=limits):
        while part.stream.read(2**20):
            continue


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return path


# ---- plain files ------------------------------------------------------------------------------


def test_a_plain_file_is_one_part_without_a_name(tmp_path: Path) -> None:
    (part,) = open_parts(write(tmp_path / "a.zip", LINES), limits=LIMITS)
    assert (part.name, part.size) == ("", len(LINES))


def test_an_empty_file_is_one_empty_part(tmp_path: Path) -> None:
    assert contents(write(tmp_path / "a", b"")) == {"": b""}


def test_a_plain_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", LINES)
    assert refusal(path, Limits(max_bytes=10)) == "The file has 51 bytes; at most 10 are read."


def test_only_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == f"{tmp_path / 'pipe'} is not a file."
    assert refusal(tmp_path) == f"The folder {tmp_path.name} holds no files."
    missing = refusal(tmp_path / "missing")
    assert missing == f"The file {tmp_path / 'missing'} cannot be read: no such file or directory."
    assert refusal(Path("a\0b")).endswith("cannot be read: embedded null byte.")


def test_the_file_on_disk_tells_how_far_reading_has_come(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gz", gzip.compress(os.urandom(3 * 2**20)))
    (part,) = open_parts(path, limits=LIMITS)
    parts = open_parts(path, limits=LIMITS)
    part = next(parts)
    part.stream.read(2**20)
    assert 0 < part.file.tell() < path.stat().st_size
    part.stream.read()
    assert part.file.tell() == path.stat().st_size


# ---- gzip -------------------------------------------------------------------------------------


def test_a_gzip_is_told_by_its_content(tmp_path: Path) -> None:
    assert contents(write(tmp_path / "a.jsonl", gzip.compress(LINES))) == {"": LINES}


def test_a_gzip_of_several_members_and_padding_is_one_content(tmp_path: Path) -> None:
    packed = gzip.compress(LINES) + gzip.compress(b"") + gzip.compress(LINES) + b"\0" * 100
    assert contents(write(tmp_path / "a.gz", packed)) == {"": LINES * 2}


GOOD_GZIP = gzip.compress(os.urandom(50_000) + LINES)
BAD_GZIPS = {
    "cut off": (GOOD_GZIP[:-20], "The gzip file is cut off: its end is missing."),
    "cut in its head": (GOOD_GZIP[:5], "The gzip file is cut off: its end is missing."),
    "wrong checksum": (
        GOOD_GZIP[:-8] + b"\0\0\0\0" + GOOD_GZIP[-4:],
        "The gzip file is damaged: its checksum does not fit its content.",
    ),
    "wrong length": (
        GOOD_GZIP[:-4] + struct.pack("<I", 7),
        "The gzip file is damaged: it states another length than its content has.",
    ),
    "garbage behind it": (
        GOOD_GZIP + b"garbage",
        "The gzip file goes on after its end with something that is not gzip.",
    ),
    "damaged inside": (
        gzip.compress(LINES * 99)[:14] + b"\xff" * 40,
        "The gzip file is damaged: its packed data makes no sense.",
    ),
    "unknown method": (
        b"\x1f\x8b\x07" + GOOD_GZIP[3:],
        "The gzip file is damaged (Unknown compression method).",
    ),
    "gzip in gzip": (
        gzip.compress(gzip.compress(LINES)),
        "In the upload, what is in the gzip file is an archive again.",
    ),
}


@pytest.mark.parametrize("name", BAD_GZIPS)
def test_a_bad_gzip_is_refused(tmp_path: Path, name: str) -> None:
    content, sentence = BAD_GZIPS[name]
    assert refusal(write(tmp_path / "a.gz", content)) == sentence


def test_what_is_good_before_a_damaged_place_is_read(tmp_path: Path) -> None:
    content = bytes(range(256)) * 100
    path = write(tmp_path / "a.gz", gzip.compress(content)[:-8])
    parts = open_parts(path, limits=LIMITS)
    part = next(parts)
    assert part.stream.read(20_000) == content[:20_000]
    assert part.stream.read(5_600) == content[20_000:]
    with pytest.raises(InputError, match="cut off"):
        part.stream.read(1)


def test_a_head_is_whole_however_small_the_pieces_of_a_gzip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gz", b"".join(gzip.compress(b"%d\n" % n) for n in range(100_000)))
    parts = open_parts(path, limits=LIMITS)
    stream = next(parts).stream
    assert isinstance(stream, io.BufferedReader)
    assert len(stream.peek(2**16)) >= 2**16


def test_a_gzip_bomb_stops_at_the_limit_in_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(400):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(InputError) as caught:
        exhaust(path, Limits(max_bytes=50 * 2**20))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.message == "The gzip file unpacks to more than 52,428,800 bytes."
    assert peak_bytes < 8 * 2**20
    sentence = "The gzip file unpacks to more than 500 times its size, as no real data does."
    with pytest.raises(InputError, match=sentence):
        exhaust(path)


# ---- zip --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_its_members_in_any_folder(tmp_path: Path, method: int) -> None:
    members = {"a.jsonl": LINES, "deep/er/b.csv": b"a,b\n", "../.x": b"1", ".DS_Store": b"1"}
    noise = {"__MACOSX/a.jsonl": b"1", "deep/Thumbs.db": b"1", ".git/c": b"1"}
    path = zipped(tmp_path / "a.jsonl", members | noise, method)
    with zipfile.ZipFile(path, "a") as packed:
        packed.mkdir("folder")
    assert contents(path) == {"a.jsonl": LINES, "deep/er/b.csv": b"a,b\n"}
    sizes = [part.size for part in open_parts(path, limits=LIMITS)]
    assert sizes == [len(LINES), 4]


def test_nothing_is_written_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "a.zip", {"a.jsonl": LINES})
    monkeypatch.chdir(tmp_path)
    contents(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "C:\\evil", "C:evil", "a\\..\\evil"]
)
def test_a_name_outside_of_the_zip_is_refused(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "a.zip", {"good.jsonl": LINES, name: LINES})
    assert refusal(path) == f"The zip names a file outside of itself: {name}."
    assert not (tmp_path.parent / "evil").exists()


def test_names_are_shown_with_what_cannot_be_printed_escaped(tmp_path: Path) -> None:
    names = ["\N{PARTY POPPER}.jsonl", "\u05d0.jsonl", "a\u202eb", "a\x1b[31mb\n", "\x85"]
    path = zipped(tmp_path / "a.zip", dict.fromkeys(names, LINES))
    shown_names = ["\N{PARTY POPPER}.jsonl", "\u05d0.jsonl", "a\\u202eb", "a\\x1b[31mb\\n", "\\x85"]
    assert list(contents(path)) == shown_names


def special(tmp_path: Path, **fields: int) -> Path:
    """Write a zip with fields of its entry changed after it was packed."""
    path = zipped(tmp_path / "a.zip", {"a.jsonl": LINES})
    with zipfile.ZipFile(path) as packed:
        start = packed.start_dir
    content = bytearray(path.read_bytes())
    offsets = {"flags": (8, "<H"), "method": (10, "<H"), "size": (24, "<I"), "mode": (38, "<I")}
    for name, value in fields.items():
        offset, form = offsets[name]
        struct.pack_into(form, content, start + offset, value)
    return write(path, bytes(content))


def test_links_encryption_and_other_methods_are_refused(tmp_path: Path) -> None:
    link = special(tmp_path, mode=(stat.S_IFLNK | 0o777) << 16)
    assert refusal(link) == "In the zip, a.jsonl is a link to another file."
    assert refusal(special(tmp_path, flags=1)) == "In the zip, a.jsonl is encrypted."
    packed = zipped(tmp_path / "b.zip", {"a.jsonl": LINES}, zipfile.ZIP_LZMA)
    assert refusal(packed) == "In the zip, a.jsonl is packed by method 14, which is not read here."


def test_a_size_that_lies_is_found(tmp_path: Path) -> None:
    shorter = refusal(special(tmp_path, size=10))
    assert shorter == "a.jsonl in the zip is damaged: its checksum does not fit its content."
    longer = refusal(special(tmp_path, size=1000))
    sentence = "a.jsonl in the zip is damaged: it states another length than its content has."
    assert longer == sentence


def test_damaged_members_are_named(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"a.jsonl": b"0123456789"}, zipfile.ZIP_STORED)
    content = path.read_bytes()
    changed = write(tmp_path / "b.zip", content.replace(b"0123456789", b"0123456780"))
    sentence = "a.jsonl in the zip is damaged: its checksum does not fit its content."
    assert refusal(changed) == sentence
    # The name before the content differs from the one in the table of contents.
    renamed = write(tmp_path / "c.zip", content.replace(b"a.jsonl", b"b.jsonl", 1))
    assert refusal(renamed).startswith("a.jsonl in the zip is damaged (file name in directory")
    packed = zipped(tmp_path / "d.zip", {"a.jsonl": LINES}).read_bytes()
    broken = write(tmp_path / "e.zip", packed[:37] + b"\xff" * 8 + packed[45:])
    assert refusal(broken) == "a.jsonl in the zip is damaged: its packed data makes no sense."


def test_a_zip_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    content = zipped(tmp_path / "a.zip", {"a.jsonl": LINES}).read_bytes()
    sentence = "The zip is damaged or cut off (file is not a zip file)."
    assert refusal(write(tmp_path / "b.zip", content[:-30])) == sentence


def test_an_empty_zip_is_refused(tmp_path: Path) -> None:
    assert refusal(zipped(tmp_path / "a.zip", {})) == "The zip holds no files."
    assert refusal(zipped(tmp_path / "b.zip", {".x": b""})) == "The zip holds no files."


def test_archives_in_a_zip_are_refused(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", {"a": LINES}).read_bytes()
    for name, content in {"x": inner, "y": gzip.compress(LINES)}.items():
        path = zipped(tmp_path / f"{name}.zip", {name: content})
        assert refusal(path) == f"In the upload, {name} in the zip is an archive again."


def test_many_members_are_read_up_to_the_limit(tmp_path: Path) -> None:
    members = {f"{number}.txt": b"x" for number in range(10_000)}
    path = zipped(tmp_path / "a.zip", members, zipfile.ZIP_STORED)
    assert len(contents(path)) == 10_000
    sentence = "The zip holds 10,000 files; at most 9,999 are read."
    assert refusal(path, Limits(max_members=9_999)) == sentence


def test_a_huge_table_of_contents_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {f"{number:0200}.txt": b"" for number in range(1_000)}
    path = zipped(tmp_path / "a.zip", members)
    monkeypatch.setattr(archive, "BUFFER_BYTES", 2**17)
    message = refusal(path, Limits(max_members=10))
    assert message == "The zip states a table of contents of 250,000 bytes."


def test_a_zip_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    members = {f"{number}": bytes(2**20) for number in range(20)}
    path = zipped(tmp_path / "a.zip", members)
    message = refusal(path, Limits(max_bytes=10 * 2**20))
    assert message.endswith("in the zip unpacks to more than 10,485,760 bytes.")


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """The trick of the densest zip bombs: many names for one compressed block."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("a", LINES)
        packed.writestr("b", LINES)
        packed.infolist()[1].header_offset = 0
    assert refusal(path) == "In the zip, b overlaps another file, as in a zip bomb."


@pytest.mark.parametrize(
    ("member", "sentence"),
    [
        ("xl/workbook.xml", "The file is an Excel workbook."),
        ("word/document.xml", "The file is a Word document."),
        ("content.xml", "The file is an OpenDocument file."),
        ("model/data.pkl", "The file is a PyTorch checkpoint, not data."),
    ],
)
def test_documents_that_are_zips_inside_are_named(
    tmp_path: Path, member: str, sentence: str
) -> None:
    path = zipped(tmp_path / "a.jsonl", {"[Content_Types].xml": b"<", member: b"<"})
    assert refusal(path) == sentence
