"""Copy bitsandbytes' wheel with its library for one CUDA alone: 3.4 MiB instead of 41.

    python benchmarks/gpu/slim_wheel.py bitsandbytes-0.50.2-*.whl SLIM_FOLDER [--cuda 130]

The library for CPUs stays too. What a machine without a network is sent is limited.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

_LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(\w+)\.(so|dll|dylib)$")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the copy; return 1 when the wheel has no library for that CUDA."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cuda", default="130", help="as in 130 for CUDA 13.0")
    given = parser.parse_args(argv)
    wanted = {f"cuda{given.cuda}", "cpu"}
    given.folder.mkdir(parents=True, exist_ok=True)
    with ZipFile(given.wheel) as source:
        libraries = {m[1] for name in source.namelist() if (m := _LIBRARY.match(name))}
        if not wanted <= libraries:
            print(f"{given.wheel} has libraries for {', '.join(sorted(libraries))} only.")
            return 1
        with ZipFile(given.folder / given.wheel.name, "w", ZIP_DEFLATED) as target:
            for name in source.namelist():
                if _is_kept(name, wanted):
                    target.writestr(name, _content(source, name, wanted))
    return 0


def _is_kept(name: str, wanted: set[str]) -> bool:
    library = _LIBRARY.match(name)
    return library is None or library[1] in wanted


def _content(source: ZipFile, name: str, wanted: set[str]) -> bytes:
    content = source.read(name)
    if not name.endswith(".dist-info/RECORD"):
        return content
    lines = content.decode().splitlines(keepends=True)
    return "".join(line for line in lines if _is_kept(line.split(",")[0], wanted)).encode()


if __name__ == "__main__":
    sys.exit(main())
