"""Sources: what is allowed arrives whole, and nothing leads into this machine's own network."""

import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from studio.errors import InputError, MachineError, NotFoundError, StudioError
from studio.intake import addresses, buckets
from studio.intake.sources import fetch
from studio.intake.transfer import Fetched, SourceRules

LINES = b'{"messages": []}\n' * 1000
SHA = "0123456789abcdef0123456789abcdef01234567"
CLOSED = SourceRules(max_bytes=10**6)
OPEN = SourceRules(
    max_bytes=10**6, allow_server_paths=True, allow_private_urls=True, allow_http=True
)
SECRET = "hunter2"

Answer = tuple[int, dict[str, str], bytes]
Site = Callable[[str, dict[str, str]], Answer]


@contextlib.contextmanager
def served(site: Site) -> Iterator[str]:
    """Serve a function of (path, headers) on loopback; yields `127.0.0.1:port`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = site(self.path, dict(self.headers))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                if self.command == "GET":
                    self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def file_site(path: str, headers: dict[str, str]) -> Answer:
    """A site with one file, and with what servers do wrong."""
    place, _, _ = path.partition("?")
    host = headers["Host"]
    fixed: dict[str, Answer] = {
        "/chats.jsonl": (200, {}, LINES),
        "/a%20b.jsonl": (200, {}, LINES),
        "/to": (302, {"Location": "/chats.jsonl"}, b""),
        "/loop": (302, {"Location": "/loop"}, b""),
        "/nowhere": (302, {}, b""),
        "/odd": (302, {"Location": "file:///etc/passwd"}, b""),
        "/metadata": (307, {"Location": "http://169.254.169.254/latest"}, b""),
        "/home": (
            301,
            {"Location": f"http://localhost:{host.rpartition(':')[2]}/chats.jsonl"},
            b"",
        ),
        "/page": (200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>"),
        "/closed": (403, {}, b""),
        "/fault": (500, {}, b""),
        "/empty": (200, {}, b""),
        "/packed": (200, {"Content-Encoding": "gzip"}, gzip.compress(LINES)),
        "/broken": (200, {"Content-Encoding": "gzip"}, b"no gzip at all"),
        "/bomb": (200, {"Content-Encoding": "gzip"}, gzip.compress(b"0" * 9_000_000)),
        "/short": (200, {"Content-Length": str(len(LINES) + 9), "Connection": "close"}, LINES),
        "/large": (200, {}, b"x" * 1_000_001),
        "/endless": (200, {"Content-Length": "", "Connection": "close"}, b"x" * 3_000_000),
    }
    return fixed.get(place, (404, {}, b""))


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with served(file_site) as address:
        yield address


def got(source: str, folder: Path, rules: SourceRules = OPEN) -> Fetched:
    shares: list[float] = []
    found = fetch(source, folder, rules=rules, progress=shares.append)
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)
    return found


def refusal(source: str, folder: Path, rules: SourceRules = OPEN) -> str:
    """Return the sentence that a source is refused with; it never holds a secret."""
    with pytest.raises(StudioError) as caught:
        got(source, folder, rules)
    assert caught.value.hint
    assert SECRET not in str(caught.value)
    return str(caught.value)


# ---- paths ------------------------------------------------------------------------------------


def test_a_file_of_this_machine_is_used_in_place(tmp_path: Path) -> None:
    path = tmp_path / "a\nb \U0001f600.jsonl"
    path.write_bytes(LINES)
    found = got(str(path), tmp_path / "unused")
    assert (found.path, found.name) == (path, path.name)
    assert found.origin == {"kind": "path", "source": str(path)}


def test_paths_are_read_only_when_they_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    assert "STUDIO_ALLOW_SERVER_PATHS" in refusal(str(path), tmp_path, CLOSED)


@pytest.mark.parametrize("way", ["direct", "dots", "link", "linked folder", "missing", "prefix"])
def test_nothing_outside_the_roots_is_read(tmp_path: Path, way: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-outside"
    root.mkdir()
    outside.mkdir()
    secret = outside / "secret.jsonl"
    secret.write_bytes(LINES)
    (root / "link").symlink_to(secret)
    (root / "folder").symlink_to(outside)
    source = {
        "direct": secret,
        "dots": f"{root}/../root-outside/secret.jsonl",
        "link": root / "link",
        "linked folder": root / "folder" / "secret.jsonl",
        "missing": outside / "missing.jsonl",
        "prefix": secret,
    }[way]
    rules = SourceRules(max_bytes=10**6, allow_server_paths=True, server_path_roots=(root,))
    assert "outside the folders that may be read" in refusal(str(source), tmp_path, rules)


def test_a_file_below_a_root_is_read_also_through_a_link_between_roots(tmp_path: Path) -> None:
    roots = (tmp_path / "a", tmp_path / "b")
    for root in roots:
        root.mkdir()
    (roots[0] / "x.jsonl").write_bytes(LINES)
    (roots[1] / "link").symlink_to(roots[0] / "x.jsonl")
    rules = SourceRules(max_bytes=10**6, allow_server_paths=True, server_path_roots=roots)
    assert got(str(roots[1] / "link"), tmp_path, rules).path == roots[0] / "x.jsonl"


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as line:
        line.bind(str(tmp_path / "socket"))
        for place in (tmp_path / "pipe", tmp_path / "socket", Path("/dev/zero")):
            assert "is no regular file" in refusal(str(place), tmp_path)
        # A folder is read, but what in it is no regular file is not.
        assert "is empty" in refusal(str(tmp_path), tmp_path)


def test_what_is_no_readable_path_is_said(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty").touch()
    assert "There is no file" in refusal(str(tmp_path / "none.jsonl"), tmp_path)
    assert "There is no file" in refusal(str(tmp_path / "empty" / "x"), tmp_path)
    assert "is empty" in refusal(str(tmp_path / "empty"), tmp_path)
    assert "is empty" in refusal("/proc/self/environ", tmp_path)
    for odd in (tmp_path / "loop", "/" + "x" * 300, "~nobodyhere/x"):
        assert "no path that can be opened" in refusal(str(odd), tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "", "   ", "chats.jsonl", "a/b/c", "./a", "../a", "file:///etc/passwd", "ftp://host/x",
        "memory://x", "simplecache::s3://bucket/x", "github://org:repo@/x", "javascript:alert(1)",
        "local://x", "gopher://x", "x" * 5000, "/a\x00b", "org/name@",
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused_with_the_ways_there_are(tmp_path: Path, source: str) -> None:
    assert "hf://datasets/org/name" in refusal(source, tmp_path)


# ---- addresses --------------------------------------------------------------------------------


def test_an_address_is_downloaded_whole(site: str, tmp_path: Path) -> None:
    found = got(f"http://{site}/a%20b.jsonl?token={SECRET}", tmp_path)
    assert found.path.read_bytes() == LINES
    assert found.path.parent == tmp_path
    assert found.name == "a b.jsonl"
    assert found.origin == {"kind": "url", "source": f"http://{site}/a%20b.jsonl"} or (
        found.origin == {"kind": "url", "source": f"http://{site}/a b.jsonl"}
    )


@pytest.mark.parametrize("place", ["to", "packed"])
def test_redirects_are_followed_and_packing_is_undone(
    site: str, tmp_path: Path, place: str
) -> None:
    assert got(f"http://{site}/{place}", tmp_path).path.read_bytes() == LINES


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0",
        "2130706433", "0177.0.0.1", "0x7f.0.0.1", "127.1", "[::]", "10.0.0.1", "192.168.1.1",
        "172.16.0.1", "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fc00::1]", "224.0.0.1",
        "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "255.255.255.255", "[::ffff:169.254.169.254]",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(site: str, tmp_path: Path, host: str) -> None:
    port = site.rpartition(":")[2]
    rules = SourceRules(max_bytes=10**6, allow_http=True)
    words = refusal(f"http://user:{SECRET}@{host}:{port}/chats.jsonl?k={SECRET}", tmp_path, rules)
    # httpx itself refuses octal hosts.
    assert "not on the public internet" in words or host == "0177.0.0.1"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_told_from_others(address: str) -> None:
    assert addresses.is_public(address)


def through(answers: list[list[str]], asked: list[str]) -> addresses.Resolve:
    """A resolver that answers differently each time."""

    def resolve(host: str, _: int) -> list[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    return resolve


def test_a_name_that_has_one_private_address_is_refused(tmp_path: Path) -> None:
    resolver = through([["8.8.8.8", "127.0.0.1"]], [])
    with pytest.raises(InputError, match=r"leads to 127\.0\.0\.1, which is not on the public"):
        addresses.download(
            "https://mixed.example/x", tmp_path, rules=CLOSED, progress=print, resolver=resolver
        )


def test_a_name_is_resolved_once_and_the_connection_goes_where_it_was_checked(
    tmp_path: Path,
) -> None:
    # A proxy sees where the connection shall go; a second question would lead to this machine.
    asked: list[str] = []
    seen: list[tuple[str, str]] = []

    def proxy(path: str, headers: dict[str, str]) -> Answer:
        seen.append((path, headers["Host"]))
        return 200, {}, LINES

    with served(proxy) as address:
        rules = SourceRules(max_bytes=10**6, allow_http=True, proxy=f"http://{address}")
        resolver = through([["8.8.8.8"], ["127.0.0.1"]], asked)
        url = "http://rebind.example:8080/chats.jsonl"
        found = addresses.download(
            url, tmp_path, rules=rules, progress=lambda _: None, resolver=resolver
        )
    assert found.path.read_bytes() == LINES
    assert asked == ["rebind.example"]
    assert seen == [("http://8.8.8.8:8080/chats.jsonl", "rebind.example:8080")]


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/chats.jsonl",
        "http://localhost:{port}/chats.jsonl",
        "//127.0.0.1:{port}/chats.jsonl",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:127.0.0.1]:{port}/chats.jsonl",
        "http://2130706433:{port}/chats.jsonl",
        "http://again.example/",
    ],
)
def test_a_redirect_into_the_own_network_is_refused(
    site: str, tmp_path: Path, location: str
) -> None:
    asked: list[str] = []
    target = location.format(port=site.rpartition(":")[2])

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        known = {"public.example": ["8.8.8.8"], "again.example": ["8.8.8.8", "10.0.0.1"]}
        return known.get(host) or addresses.resolve(host, port)

    with served(lambda _path, _headers: (302, {"Location": target}, b"")) as proxy:
        rules = SourceRules(max_bytes=10**6, allow_http=True, proxy=f"http://{proxy}")
        with pytest.raises(InputError, match="not on the public internet"):
            addresses.download(
                "http://public.example/x",
                tmp_path,
                rules=rules,
                progress=lambda _: None,
                resolver=resolve,
            )
    assert len(asked) == 2
    assert not list(tmp_path.iterdir())


def test_an_address_without_encryption_is_refused_unless_it_is_allowed(
    site: str, tmp_path: Path
) -> None:
    rules = SourceRules(max_bytes=10**6, allow_private_urls=True)
    assert "not an https:// address" in refusal(f"http://{site}/chats.jsonl", tmp_path, rules)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("loop", "redirects more than 5 times"),
        ("odd", "names no host"),
        ("nowhere", "redirects more than 5 times"),
        ("page", "is a web page, not a file"),
        ("closed", "does not let the studio read"),
        ("fault", "answered 500"),
        ("missing", "There is no file at"),
        ("empty", "is empty"),
        ("broken", "something else than it announced"),
        ("short", "failed"),
        ("large", "more than the 1 MiB"),
        ("endless", "more than the 1 MiB"),
        ("bomb", "more than the 1 MiB"),
    ],
)
def test_what_a_server_does_wrong_is_said(
    site: str, tmp_path: Path, place: str, words: str
) -> None:
    assert words in refusal(f"http://u:{SECRET}@{site}/{place}?k={SECRET}", tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("https://", "names no host"),
        ("https:///x", "names no host"),
        ("https://[::1", "not an address that can be read"),
        (f"https://u:{SECRET}@host:99999/x", "There is no host"),
        ("https://no-such-host.invalid/x", "There is no host"),
        ("https://a..b/x", ""),
    ],
)
def test_an_address_that_cannot_be_is_refused(tmp_path: Path, source: str, words: str) -> None:
    assert words in refusal(source, tmp_path)


def test_a_server_that_does_not_answer_is_said(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        assert "The connection to 127.0.0.1 failed" in refusal(
            f"http://127.0.0.1:{port}/x", tmp_path
        )


def test_a_server_that_cannot_prove_who_it_is_is_refused(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=name.example"
    where = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
    subprocess.run([openssl, *make.split(), *where], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    asked: list[str] = []
    context.sni_callback = lambda _line, name, _context: asked.append(name)

    def answer(line: socket.socket) -> None:
        with contextlib.suppress(ssl.SSLError):
            context.wrap_socket(line.accept()[0], server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as line:
        thread = threading.Thread(target=answer, args=(line,))
        thread.start()
        with pytest.raises(InputError, match=r"certificate of name\.example is not valid"):
            addresses.download(
                f"https://name.example:{line.getsockname()[1]}/x",
                tmp_path,
                rules=OPEN,
                progress=lambda _: None,
                resolver=lambda _host, _port: ["127.0.0.1"],
            )
        thread.join()
    assert asked == ["name.example"]


def test_proxies_of_the_environment_are_not_used(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert got(f"http://{site}/chats.jsonl", tmp_path).path.read_bytes() == LINES


def test_the_disk_keeps_room(site: str, tmp_path: Path) -> None:
    rules = SourceRules(
        max_bytes=10**6, min_free_bytes=2**60, allow_http=True, allow_private_urls=True
    )
    with pytest.raises(MachineError, match="GiB free"):
        got(f"http://{site}/chats.jsonl", tmp_path, rules)


# ---- buckets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "extra"), [("s3", "s3"), ("gs", "gcs"), ("az", "azure"), ("abfs", "azure")]
)
def test_a_missing_extra_is_named(tmp_path: Path, protocol: str, extra: str) -> None:
    if importlib.util.find_spec(buckets.STORES[protocol].package):
        pytest.skip("the extra is installed")
    words = refusal(f"{protocol}://bucket/x.jsonl", tmp_path)
    assert f'pip install "delta-studio[{extra}]"' in words


@pytest.mark.parametrize(
    "source", ["s3::file:///etc/passwd", "s3://a::file:///etc/passwd", f"s3://key:{SECRET}@b/x"]
)
def test_chained_protocols_and_passwords_are_refused(tmp_path: Path, source: str) -> None:
    assert refusal(source, tmp_path)


def test_an_object_is_copied_and_a_large_one_is_not(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/chats.jsonl", LINES)
    store.pipe("/bucket/large", b"x" * 1_000_001)

    def copied(name: str) -> Fetched:
        return buckets.copy(store, name, tmp_path, rules=CLOSED, progress=lambda _: None)

    found = copied("/bucket/chats.jsonl")
    assert (found.path.read_bytes(), found.name) == (LINES, "chats.jsonl")
    with pytest.raises(InputError, match="more than the 1 MiB"):
        copied("/bucket/large")
    with pytest.raises(InputError, match="is a folder"):
        copied("/bucket")


# ---- the hub ----------------------------------------------------------------------------------


def hub_site(files: dict[str, bytes], card: dict[str, Any] | None = None) -> Site:
    """The few endpoints of the hub that a dataset's download asks for."""

    def site(path: str, _: dict[str, str]) -> Answer:
        place = path.partition("?")[0]
        if place.startswith("/api/datasets/org/gated"):
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"gated {SECRET}"}, b""
        if place.startswith("/api/datasets/org/fault"):
            return 500, {"X-Error-Message": f"fault {SECRET}"}, b""
        if not place.startswith(("/api/datasets/org/name", "/datasets/org/name/resolve")):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if place.startswith("/api/"):
            if place not in ("/api/datasets/org/name", "/api/datasets/org/name/revision/v1"):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
            answer = {"id": "org/name", "sha": SHA, "siblings": siblings, "cardData": card}
            return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        name = place.removeprefix(f"/datasets/org/name/resolve/{SHA}/")
        body = files.get(name)
        if body is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": SHA}, body

    return site


def from_hub(
    source: str, folder: Path, files: dict[str, bytes], card: dict[str, Any] | None = None
) -> Fetched:
    with served(hub_site(files, card)) as address:
        rules = SourceRules(max_bytes=10**6, hub_endpoint=f"http://{address}")
        return got(source, folder, rules)


def hub_refusal(source: str, folder: Path, files: dict[str, bytes] | None = None) -> str:
    with pytest.raises(StudioError) as caught:
        from_hub(source, folder, files or {"train.jsonl": LINES})
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "source", ["org/name", "org/name@v1", "hf://datasets/org/name", "hf://datasets/org/name@v1"]
)
def test_the_training_files_come_at_a_commit(tmp_path: Path, source: str) -> None:
    files = {
        "README.md": b"# card",
        "name.py": b"raise SystemExit",
        ".gitattributes": b"",
        "dataset_infos.json": b"{}",
        "data/train-00000-of-00002.jsonl": LINES,
        "data/train-00001-of-00002.jsonl": LINES[:170],
        "data/test-00000-of-00001.jsonl": b"{}",
    }
    found = from_hub(source, tmp_path, files)
    assert [path.read_bytes() for path in found.paths] == [LINES, LINES[:170]]
    assert all(path.parent == tmp_path for path in found.paths)
    assert found.name == "name"
    assert found.origin == {
        "kind": "hub",
        "source": f"hf://datasets/org/name@{SHA}",
        "repository": "org/name",
        "revision": SHA,
        "files": "data/train-00000-of-00002.jsonl, data/train-00001-of-00002.jsonl",
    }


SPLITS = {"a/train.jsonl": LINES, "b/train.jsonl": b"b" * 9, "b/test-2.jsonl": b"t"}


@pytest.mark.parametrize(
    ("path", "chosen"),
    [
        ("a/train.jsonl", ["a/train.jsonl"]),
        ("b", ["b/test-2.jsonl", "b/train.jsonl"]),
        ("*/train.jsonl", ["a/train.jsonl", "b/train.jsonl"]),
    ],
)
def test_a_file_a_folder_or_a_pattern_may_be_named(
    tmp_path: Path, path: str, chosen: list[str]
) -> None:
    found = from_hub(f"hf://datasets/org/name/{path}@v1", tmp_path, SPLITS)
    assert found.origin["files"] == ", ".join(chosen)
    assert [each.read_bytes() for each in found.paths] == [SPLITS[name] for name in chosen]


def test_two_files_of_one_name_stay_two(tmp_path: Path) -> None:
    found = from_hub("hf://datasets/org/name/*/train.jsonl", tmp_path, SPLITS)
    assert [each.read_bytes() for each in found.paths] == [LINES, b"b" * 9]


def test_several_sets_are_listed_with_the_address_of_each(tmp_path: Path) -> None:
    words = hub_refusal("org/name", tmp_path, SPLITS)
    assert "3 sets of data" in words
    assert "a train: hf://datasets/org/name/a/train.jsonl" in words
    assert "b test: hf://datasets/org/name/b/test-2.jsonl" in words


def test_the_card_says_which_files_are_for_training(tmp_path: Path) -> None:
    card = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": "train", "path": ["part-*.jsonl"]},
                    {"split": "test", "path": "held.jsonl"},
                ],
            },
            "not a config",
        ]
    }
    files = {"part-1.jsonl": LINES, "part-2.jsonl": LINES, "held.jsonl": b"{}"}
    found = from_hub("org/name", tmp_path, files, card)
    assert found.origin["files"] == "part-1.jsonl, part-2.jsonl"


@pytest.mark.parametrize(
    "name", ["../evil.jsonl", "a/../../evil.jsonl", "/evil.jsonl", "a\\b.jsonl"]
)
def test_a_name_that_leads_out_of_the_folder_is_never_downloaded(tmp_path: Path, name: str) -> None:
    assert "no data files" in hub_refusal("org/name", tmp_path / "in", {name: LINES})
    found = from_hub("org/name", tmp_path, {name: b"evil", "train.jsonl": LINES})
    assert found.origin["files"] == "train.jsonl"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("org/none", "There is no dataset 'org/none'"),
        ("org/name@v2", "has no revision 'v2'"),
        ("org/gated", "accepted its terms"),
        ("org/fault", "refused org/fault (answer 500)"),
        ("hf://org/name", "no address of a dataset"),
        ("hf://datasets/org", "no address of a dataset"),
        ("hf://datasets/org/name/../x", "no name of a file"),
        ("hf://datasets/org/name/x.jsonl", "has no data file 'x.jsonl'"),
    ],
)
def test_what_the_hub_does_not_give_is_said(tmp_path: Path, source: str, words: str) -> None:
    assert words in hub_refusal(source, tmp_path)


def test_a_dataset_of_scripts_is_refused(tmp_path: Path) -> None:
    words = hub_refusal("org/name", tmp_path, {"name.py": b"raise SystemExit", "README.md": b""})
    assert "never runs a dataset's own script" in words


def test_a_dataset_that_is_too_large_is_refused_before_it_comes(tmp_path: Path) -> None:
    words = hub_refusal("org/name", tmp_path, {"train.jsonl": b"x" * 1_000_001})
    assert "more than the 1 MiB" in words
    assert not list(tmp_path.iterdir())


def test_a_hub_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        rules = SourceRules(
            max_bytes=10**6, hub_endpoint=f"http://127.0.0.1:{closed.getsockname()[1]}"
        )
        with pytest.raises(MachineError, match="cannot be reached"):
            got("org/name", tmp_path, rules)


def test_a_missing_path_is_not_found() -> None:
    with pytest.raises(NotFoundError):
        got("/no/such/file.jsonl", Path("/tmp"))
