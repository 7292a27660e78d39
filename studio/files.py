"""The files of a home folder, exchanged through an object store by machines that share no folder.

With STUDIO_FILES_URL each machine has a home folder of its own, and what another one needs is
copied there and back: Datasets before a run, checkpoints and reports while it works, adapters and
merges after. Without it nothing is copied: all workers see one home folder.

A file appears whole on both sides. What is copied again is what has changed, by size and version.
"""

import logging
import posixpath
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studio.disk import Home
from studio.errors import MachineError, disk_errors

logger = logging.getLogger(__name__)


def _always() -> None:
    """Allow whatever is asked."""


_HINT = "See that STUDIO_FILES_URL can be reached from here, with the rights to read and write."


class Files:
    """The way of a home folder's files to other machines.

    Args:
        home: The home folder of this machine.
        url: A folder as fsspec names it, as s3://bucket/studio or file:///mnt/studio; empty where
            all machines share the home folder.
        options: Of fsspec's file system.
    """

    def __init__(self, home: Home, url: str = "", options: Mapping[str, Any] | None = None) -> None:
        self._home, self._url, self._options = home, url, dict(options or {})
        self._pushed: dict[str, tuple[int, int]] = {}
        self._pulled: dict[str, str] = {}
        self._opened: tuple[Any, str] | None = None

    @property
    def is_on(self) -> bool:
        """Whether anything is copied."""
        return bool(self._url)

    def push(self, *paths: Path, may: Callable[[], None] = _always) -> None:
        """Copy files and folders of the home folder to the store; what is not there is left out.

        Args:
            paths: Of the home folder.
            may: Called before each file; raises when this process may not write there any more.

        Raises:
            MachineError: The store cannot be written.
        """
        if not self.is_on:
            return
        for path in paths:
            for file in _files(path):
                may()
                with self._errors("written"):
                    self._push_file(file)

    def pull(self, *paths: Path, is_flat: bool = False) -> None:
        """Copy files and folders from the store into the home folder; what is not there stays out.

        Args:
            paths: Of the home folder.
            is_flat: Whether folders within the folders are left out.

        Raises:
            MachineError: The store cannot be read, or the disk is full.
        """
        if not self.is_on:
            return
        with self._errors("read"), disk_errors("copying files from the store"):
            for path in paths:
                for remote, info in self._listed(path, is_flat=is_flat).items():
                    self._pull_file(remote, info, within=path)

    def has(self, path: Path) -> bool:
        """Tell whether a file or folder of the home folder is in the store.

        Raises:
            MachineError: The store cannot be read.
        """
        if not self.is_on:
            return False
        with self._errors("read"):
            system, _ = self._open()
            system.invalidate_cache()
            return bool(system.exists(self._remote(path)))

    def forget(self, folder: Path, keep: Iterable[str], may: Callable[[], None] = _always) -> None:
        """Remove from the store what was copied from or to a folder and is not named.

        Args:
            folder: Of the home folder.
            keep: Names of what stays; what others have put there stays, too.
            may: Called before each removal; raises when this process may not write there any more.

        Raises:
            MachineError: The store cannot be written.
        """
        if not self.is_on:
            return
        with self._errors("written"):
            system, _ = self._open()
            remote = self._remote(folder)
        inside = [name for name in self._pushed if name.startswith(f"{remote}/")]
        known = {name[len(remote) + 1 :].split("/")[0] for name in inside}
        for name in sorted(known - set(keep)):
            may()
            with self._errors("written"):
                if system.exists(f"{remote}/{name}"):
                    system.rm(f"{remote}/{name}", recursive=True)
            for file in inside:
                if file.startswith(f"{remote}/{name}/"):
                    del self._pushed[file]

    def _push_file(self, file: Path) -> None:
        state = file.stat()
        version = (state.st_size, state.st_mtime_ns)
        remote = self._remote(file)
        if self._pushed.get(remote) == version:
            return
        system, _ = self._open()
        if _protocols(system) & {"file", "local"}:
            # An object store shows a file when it is whole; a folder shows it at once.
            part = f"{remote}.{uuid.uuid4().hex}.part"
            system.makedirs(posixpath.dirname(remote), exist_ok=True)
            system.put_file(str(file), part)
            system.mv(part, remote)
        else:
            system.put_file(str(file), remote)
        self._pushed[remote] = version

    def _pull_file(self, remote: str, info: Mapping[str, Any], *, within: Path) -> None:
        system, root = self._open()
        version = str(system.ukey(remote))
        local = self._home.path / posixpath.relpath(remote, root)
        if not local.resolve().is_relative_to(within.resolve()):
            raise ValueError(f"{remote} lies outside of {within.name}")
        if self._pulled.get(remote) == version and local.exists():
            return
        local.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = local.with_name(f".{local.name}.{uuid.uuid4().hex}.part")
        try:
            system.get_file(remote, str(part))
            if part.stat().st_size != int(info["size"]):
                return  # it was written anew meanwhile: the next look takes it whole
            part.rename(local)
        finally:
            part.unlink(missing_ok=True)
        self._pulled[remote] = version
        state = local.stat()
        self._pushed[remote] = (state.st_size, state.st_mtime_ns)

    def _listed(self, path: Path, *, is_flat: bool) -> dict[str, Mapping[str, Any]]:
        system, _ = self._open()
        remote = self._remote(path)
        system.invalidate_cache()
        if not system.exists(remote):
            return {}
        found = system.find(remote, maxdepth=1 if is_flat else None, detail=True)
        whole = {name: info for name, info in found.items() if not name.endswith(".part")}
        # A manifest says that the rest is there: it comes last.
        return dict(sorted(whole.items(), key=lambda item: item[0].endswith("manifest.json")))

    def _remote(self, path: Path) -> str:
        _, root = self._open()
        return posixpath.join(root, path.relative_to(self._home.path).as_posix())

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            import fsspec  # 0.13 s, only for those who use it

            system, root = fsspec.core.url_to_fs(self._url, **self._options)
            self._opened = (system, str(root).rstrip("/"))
        return self._opened

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except MachineError:
            raise
        except ImportError as error:
            raise MachineError(
                f"{self._url.partition('://')[0]}:// needs a package that is not installed: "
                f"{error}.",
                "Install delta-studio with the extra s3, gcs or azure.",
            ) from error
        # What an object store raises is its library's own: none share a base but Exception.
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise MachineError(f"The store of files cannot be {what}: {reason}.", _HINT) from error


def _protocols(system: Any) -> frozenset[str]:
    named = system.protocol
    return frozenset({named} if isinstance(named, str) else named)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        inside = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
        shown = [f for f in inside if not any(p.startswith(".") for p in f.relative_to(path).parts)]
        return sorted(shown, key=lambda file: (file.name == "manifest.json", str(file)))
    return [path] if path.is_file() and not path.is_symlink() else []
