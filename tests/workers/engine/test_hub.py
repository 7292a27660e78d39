"""Weights of a hub: refused before they are fetched where the list of files tells, else checked."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from studio.domain.spec import ModelRef
from studio.errors import InputError, MachineError, NotFoundError, StudioError
from tests.serving import serve
from tests.workers.engine.checkpoints import write_checkpoint
from workers.engine.hub import download

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The few endpoints that a model's download asks for.

    Attributes:
        folder: What the one repository, org/model, holds.
        sizes: Sizes that are told instead of the real ones.
        sent: Names of the files that were sent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: dict[str, int] = {}
        self.sent: list[str] = []
        self.app = Starlette(
            routes=[
                Route("/api/models/org/model", self._info),
                Route("/api/models/org/model/revision/{revision}", self._info),
                Route("/api/models/org/model/tree/{revision}", self._tree),
                Route("/org/model/resolve/{revision}/{name:path}", self._file),
                Route("/{rest:path}", self._unknown),
            ]
        )

    def _files(self) -> list[tuple[str, int]]:
        found = sorted(path for path in self.folder.iterdir() if path.is_file())
        return [(path.name, self.sizes.get(path.name, path.stat().st_size)) for path in found]

    def _info(self, request: Request) -> Response:
        if request.path_params.get("revision", "main") not in ("main", SHA):
            return Response(status_code=404, headers={"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name, "size": size} for name, size in self._files()]
        return JSONResponse({"id": "org/model", "sha": SHA, "siblings": siblings})

    def _tree(self, _: Request) -> Response:
        return JSONResponse(
            [
                {"type": "file", "path": name, "size": size, "oid": self._etag(name)}
                for name, size in self._files()
            ]
        )

    def _etag(self, name: str) -> str:
        return hashlib.sha1((self.folder / name).read_bytes()).hexdigest()

    def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        path = self.folder / name
        if not path.is_file():
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{self._etag(name)}"', "X-Repo-Commit": SHA}
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(path.stat().st_size)})
        self.sent.append(name)
        return Response(path.read_bytes(), headers=headers)

    def _unknown(self, _: Request) -> Response:
        return Response(status_code=401, headers={"X-Error-Code": "RepoNotFound"})


@pytest.fixture
def hub(
    tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Hub, str]]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = write_checkpoint("qwen3_5_text", tmp_path / "published", bases["qwen3.5"])
    (folder / "modeling.py").write_text("raise SystemExit('this ran')")
    (folder / "README.md").write_text("# Card")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    hub = Hub(folder)
    for address in serve(hub.app):
        yield hub, address


def refused(hub: tuple[Hub, str], kind: type[StudioError], match: str, **ref: Any) -> StudioError:
    with pytest.raises(kind, match=match) as caught:
        download(ModelRef(**{"id": "org/model", **ref}), hub[1])
    assert caught.value.hint
    assert not any(name.endswith(".safetensors") for name in hub[0].sent)
    return caught.value


def test_weights_come_whole_and_once_without_code_and_pickles(hub: tuple[Hub, str]) -> None:
    there, address = hub
    folder = download(ModelRef(id="org/model"), address)
    names = {path.name for path in folder.iterdir()}
    published = {path.name for path in there.folder.iterdir()}
    assert published - names == {"modeling.py", "README.md", "pytorch_model.bin"}
    assert all((folder / name).read_bytes() == (there.folder / name).read_bytes() for name in names)
    there.sent.clear()
    assert download(ModelRef(id="org/model", revision=SHA), address) == folder
    assert there.sent == []


def test_weights_that_are_here_need_no_network(hub: tuple[Hub, str]) -> None:
    folder = download(ModelRef(id="org/model"), hub[1])
    assert download(ModelRef(id="org/model"), "http://127.0.0.1:9") == folder


def test_pickles_are_refused_before_anything_large_is_fetched(hub: tuple[Hub, str]) -> None:
    for shard in hub[0].folder.glob("*.safetensors*"):
        shard.unlink()
    refused(hub, InputError, "pickle files, which can run code")
    assert hub[0].sent == ["config.json"]


def test_a_disk_without_room_is_told_before(hub: tuple[Hub, str]) -> None:
    hub[0].sizes["model-00001-of-00004.safetensors"] = 2**60
    free = shutil.disk_usage("/").free
    assert free < 2**60
    error = refused(hub, MachineError, r"needs 1,073,741,8\d\d\.\d GiB on the disk")
    assert "HF_HOME" in error.hint


def test_another_architecture_costs_one_small_file(hub: tuple[Hub, str]) -> None:
    (hub[0].folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(hub, InputError, "'llama'")
    assert hub[0].sent == ["config.json"]


def test_what_came_is_checked(hub: tuple[Hub, str]) -> None:
    shard = min(hub[0].folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(InputError, match="but its header says"):
        download(ModelRef(id="org/model"), hub[1])


def test_unknown_repositories_and_revisions_are_named(hub: tuple[Hub, str]) -> None:
    refused(hub, NotFoundError, "no model 'org/other'", id="org/other")
    refused(hub, NotFoundError, "no revision 'v9'", revision="v9")
