"""Choose the members of a zip that are read, and refuse a zip that is hostile or none at all."""

import stat
import zipfile

from studio.domain.validation import short
from studio.errors import InputError

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_NOISE = ("__MACOSX", "Thumbs.db", "desktop.ini")
# Files that are zip archives inside, by a member that each of them has.
_DISGUISED = (
    ("xl/workbook.xml", "an Excel workbook", "Save the sheet as CSV in UTF-8 and upload that."),
    ("xl/workbook.bin", "an Excel workbook", "Save the sheet as CSV in UTF-8 and upload that."),
    ("word/document.xml", "a Word document", "Save it as plain text in UTF-8 and upload that."),
    ("ppt/presentation.xml", "a PowerPoint file", "Save its text in UTF-8 and upload that."),
    ("content.xml", "an OpenDocument file", "Save it as CSV or plain text in UTF-8."),
    ("META-INF/container.xml", "an e-book", "Save it as plain text in UTF-8 and upload that."),
)


def wanted_members(archive: zipfile.ZipFile, max_members: int) -> list[zipfile.ZipInfo]:
    """Return the files of a zip that are data, without those that systems add.

    Raises:
        InputError: The zip is something else inside, holds none or too many, or one is refused.
    """
    members = [member for member in archive.infolist() if not member.is_dir()]
    names = {member.filename for member in members}
    for inside, what, hint in _DISGUISED:
        if inside in names:
            raise InputError(f"The file is {what}.", hint)
    if any(name.endswith("/data.pkl") for name in names):
        raise InputError("The file is a PyTorch checkpoint, not data.", "Upload the data.")
    wanted = [member for member in members if not _is_noise(member.filename)]
    if not wanted:
        raise InputError("The zip holds no files.", "Pack the data files and try again.")
    if len(wanted) > max_members:
        raise InputError(
            f"The zip holds {len(wanted):,} files; at most {max_members:,} are read.",
            "Join them into fewer files.",
        )
    for member in wanted:
        _check_member(member)
    _check_overlap(wanted)
    return wanted


def _is_noise(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return hidden or parts[0] in _NOISE or parts[-1] in _NOISE


def _check_member(member: zipfile.ZipInfo) -> None:
    # zipfile replaces what the system's own separator is; orig_filename is what the archive says.
    name, shown_name = member.orig_filename, short(member.orig_filename)
    if (
        name.startswith("/")
        or "\\" in name
        or name[1:2] == ":"
        or "\0" in name
        or ".." in name.split("/")
    ):
        raise InputError(
            f"The zip names a file outside of itself: {shown_name}.",
            "Do not use this archive if you did not make it; otherwise pack it with plain names.",
        )
    if stat.S_ISLNK(member.external_attr >> 16):
        raise InputError(
            f"In the zip, {shown_name} is a link to another file.", "Pack the file itself."
        )
    if member.flag_bits & 0x1:
        raise InputError(f"In the zip, {shown_name} is encrypted.", "Pack it without a password.")
    if member.compress_type not in _METHODS:
        raise InputError(
            f"In the zip, {shown_name} is packed by method {member.compress_type}, which is not "
            "read here.",
            "Pack it as an ordinary zip (deflate).",
        )


def _check_overlap(members: list[zipfile.ZipInfo]) -> None:
    """Refuse members that share bytes, the trick of https://www.bamsoftware.com/hacks/zipbomb/."""
    end = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.header_offset < end:
            raise InputError(
                f"In the zip, {short(member.filename, 200)} overlaps another file, as in a zip bomb.",
                "Upload the files unpacked.",
            )
        # A local header has 30 bytes before the name.
        end = member.header_offset + 30 + len(member.orig_filename) + member.compress_size
