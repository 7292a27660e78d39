"""Files behind https:// addresses, with a guard against requests into this machine's own network.

A name is resolved once, every address that it has must be public, and the connection goes to
exactly an address that was checked: a name that resolves differently a moment later (DNS
rebinding) changes nothing. Redirects are followed by hand with the same check.
Not covered: what a public server itself fetches on our behalf.
"""

import ipaddress
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import httpx

from studio.errors import InputError, MachineError
from studio.intake.transfer import Fetched, Progress, SourceRules, save

MAX_REDIRECTS = 5
TIMEOUT = httpx.Timeout(30.0, connect=10.0)
BLOCK_BYTES = 2**20
_REDIRECTS = (301, 302, 303, 307, 308)
# IPv6 that carries IPv4: NAT64, https://datatracker.ietf.org/doc/html/rfc6052
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str, int], list[str]]
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name, as the system's resolver knows them.

    Raises:
        OSError: It knows none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def download(
    source: str, folder: Path, *, rules: SourceRules, progress: Progress, resolver: Resolve = resolve
) -> Fetched:  # fmt: skip
    """Download what an address names.

    Args:
        source: The address, `https://...`; its query and password are secrets.
        folder: Where the file goes.
        rules: What is allowed.
        progress: Called with the share that has arrived, when the server tells a size.
        resolver: Resolves names.

    Raises:
        InputError: The address is not allowed, or does not give a file.
        MachineError: The server cannot be reached, or the disk is full.
    """
    url = _parsed(source)
    target = folder / "download"
    for _ in range(MAX_REDIRECTS + 1):
        # A client for each step: a connection is never used for another name than its own.
        with _answers(url), _client(rules) as client:
            response = _opened(client, url, rules, resolver)
            if response.status_code not in _REDIRECTS:
                _check(response, url)
                blocks, size = response.iter_bytes(BLOCK_BYTES), _announced(response)
                save(blocks, target, expected=size, rules=rules, progress=progress)
                origin = {"kind": "url", "source": without_secrets(url)}
                return Fetched(paths=(target,), name=_name(url), origin=origin)
        url = _joined(url, response.headers.get("location", ""))
    raise InputError(
        f"The server redirects more than {MAX_REDIRECTS} times.", "Give the file's own address."
    )


def without_secrets(url: httpx.URL) -> str:
    """Return an address without user, password, query and fragment."""
    host = f"[{url.host}]" if ":" in url.host else url.host
    return f"{url.scheme}://{host}{f':{url.port}' if url.port else ''}{url.path}"


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet, also when it is wrapped in IPv6."""
    found: _Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        wrapped = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            wrapped = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if found.teredo is not None:
            return False
        found = wrapped or found
    return found.is_global and not (found.is_multicast or found.is_reserved)


def _parsed(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text.strip())
    except (httpx.InvalidURL, UnicodeError) as error:
        raise InputError(
            "This is not an address that can be read.", "Give one like https://host/file.jsonl."
        ) from error
    if not url.host:
        raise InputError(
            f"The address {without_secrets(url)!r} names no host.",
            "Give one like https://host/file.jsonl.",
        )
    return url


def _joined(url: httpx.URL, location: str) -> httpx.URL:
    try:
        return _parsed(str(url.join(location)))
    except (httpx.InvalidURL, UnicodeError) as error:
        raise InputError(
            "The server redirects to something that is no address.", "Give the file's own address."
        ) from error


def _client(rules: SourceRules) -> httpx.Client:
    # trust_env: proxies and certificates of the environment would go around the guard.
    headers = {"User-Agent": "delta-studio", "Accept": "*/*", "Accept-Encoding": "identity"}
    return httpx.Client(
        headers=headers,
        timeout=TIMEOUT,
        trust_env=False,
        follow_redirects=False,
        proxy=rules.proxy or None,
    )


def _opened(
    client: httpx.Client, url: httpx.URL, rules: SourceRules, resolver: Resolve
) -> httpx.Response:
    """Send a request in a URL's own name to its checked addresses; the first that answers counts."""
    addresses = _allowed(url, rules, resolver)
    for number, address in enumerate(addresses, start=1):
        request = client.build_request(
            "GET",
            url.copy_with(host=address.partition("%")[0], fragment=None),
            headers={"Host": url.netloc.decode("ascii")},
            # The certificate is checked against the name, not the address.
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        try:
            return client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if number == len(addresses):
                raise
    raise AssertionError("no address was allowed")


def _allowed(url: httpx.URL, rules: SourceRules, resolver: Resolve) -> list[str]:
    """Return the addresses of a URL's host.

    Raises:
        InputError: The rules do not allow one of them, or the protocol.
        MachineError: There are none.
    """
    if url.scheme != "https" and not (url.scheme == "http" and rules.allow_http):
        raise InputError(
            f"{without_secrets(url)} is not an https:// address.",
            "Use https://, or allow http:// with STUDIO_ALLOW_HTTP=1.",
        )
    try:
        addresses = resolver(url.host, url.port or (443 if url.scheme == "https" else 80))
    except (OSError, UnicodeError) as error:
        raise MachineError(
            f"There is no host {url.host!r}, or this machine has no network.",
            "Check the address; a file on this machine may be given by its path.",
        ) from error
    hidden = [address for address in addresses if not is_public(address)]
    if hidden and not rules.allow_private_urls:
        raise InputError(
            f"{url.host} leads to {', '.join(hidden)}, which is not on the public internet.",
            "Use a public address, or allow private ones with STUDIO_ALLOW_PRIVATE_URLS=1.",
        )
    return addresses


@contextmanager
def _answers(url: httpx.URL) -> Iterator[None]:
    """Translate what httpx raises; its own texts may quote the address with its secrets."""
    started = time.monotonic()
    try:
        yield
    except httpx.TimeoutException as error:
        raise MachineError(
            f"{url.host} did not answer; given up after {time.monotonic() - started:.0f} s.",
            "Try again later.",
        ) from error
    except httpx.DecodingError as error:
        raise InputError(
            f"{url.host} sent something else than it announced.", "Try again, or another address."
        ) from error
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise InputError(
                f"The certificate of {url.host} is not valid for it.",
                "Check the address; the studio does not talk to servers that cannot prove who "
                "they are.",
            ) from error
        raise MachineError(
            f"The connection to {url.host} failed ({type(error).__name__}).", "Try again later."
        ) from error


def _check(response: httpx.Response, url: httpx.URL) -> None:
    """See that an answer is a file.

    Raises:
        InputError: It is not.
    """
    status, place = response.status_code, without_secrets(url)
    if status in (401, 403):
        raise InputError(
            f"{url.host} does not let the studio read {place} ({status}).",
            "Make it public, or give an address with its signature or password in it.",
        )
    if status in (404, 410):
        raise InputError(f"There is no file at {place} ({status}).", "Check the address.")
    if status != 200:
        raise InputError(f"{url.host} answered {status} instead of a file.", "Try again later.")
    if response.headers.get("content-type", "").startswith("text/html"):
        raise InputError(
            f"{place} is a web page, not a file.",
            "Give the address behind its download button (on GitHub: Raw).",
        )


def _announced(response: httpx.Response) -> int | None:
    """Return the size of what will be written, unless the server packs it on the way."""
    text = response.headers.get("content-length", "")
    packed = response.headers.get("content-encoding", "identity") != "identity"
    return int(text) if text.isdecimal() and not packed else None


def _name(url: httpx.URL) -> str:
    return unquote(PurePosixPath(url.path).name) or url.host
