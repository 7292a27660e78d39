"""docker-compose.yml and the Dockerfile as tests read them, and the rules that they must keep."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
COMPOSE, DOCKERFILE = ROOT / "docker-compose.yml", ROOT / "Dockerfile"
OURS, SERVERS = {"web", "worker"}, {"redis", "postgres"}
SECRETS_FOLDER = "/run/secrets/"

_VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}")
_PASSWORD_IN_URL = re.compile(r"://[^/\s@]*:[^/\s@]+@")
_SECRET_NAME = re.compile(r"PASSW|SECRET|TOKEN|CREDENTIAL|API_?KEY", re.IGNORECASE)
_PINNED = re.compile(r"[\w./-]+:\d+\.\d+[\w.]*-[\w-]+(@sha256:[0-9a-f]{64})?")

Values = dict[str, Any]


def read_compose() -> Values:
    """Return docker-compose.yml, merge keys resolved, variables left as they are."""
    found = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def plain(text: str) -> str:
    """Return a text as a container sees it, where no variable is set outside."""
    halves = [_VARIABLE.sub(lambda m: m[2] or "", half) for half in text.split("$$")]
    return "$".join(halves)


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile as pairs of instruction and what follows it."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    return [(name, rest) for name, rest in pairs]


def faults(compose: Values) -> list[str]:
    """Return what breaks a rule, each as `service: what`."""
    found = [
        f"{name}: {fault}"
        for name, service in compose["services"].items()
        for rule in (_rights, _health, _image, _ports, _place, _secrets, _end)
        for fault in rule(name, service, compose)
    ]
    found += [f"worker: {fault}" for fault in _gpus(compose["services"]["worker"])]
    found += [f"volumes: {fault}" for fault in _volumes(compose)]
    found += [
        f"secrets: {name} does not come from a file under ./secrets/"
        for name, secret in compose["secrets"].items()
        if list(secret) != ["file"] or not secret["file"].startswith("./secrets/")
    ]
    return found


def _rights(_name: str, service: Values, _compose: Values) -> Iterator[str]:
    user = str(service.get("user", "root")).split(":")
    if len(user) != 2 or not all(part.isdecimal() and int(part) > 0 for part in user):
        yield "is root, or somebody with a name that the image decides on"
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add"):
        yield "keeps capabilities"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "may gain privileges"
    if not service.get("read_only"):
        yield "writes to its root file system"
    for key in ("privileged", "devices", "network_mode", "pid", "ipc", "userns_mode", "cgroup"):
        if service.get(key):
            yield f"sets {key}"


def _health(_name: str, service: Values, compose: Values) -> Iterator[str]:
    check = service.get("healthcheck", {})
    if not check.get("test") or check.get("disable") or "NONE" in check["test"]:
        yield "has no health check"
    if not {"interval", "timeout", "retries"} <= set(check):
        yield "leaves the times of its health check open"
    for other, how in service.get("depends_on", {}).items():
        if other not in compose["services"] or how.get("condition") != "service_healthy":
            yield f"does not wait until {other} is well"


def _image(_name: str, service: Values, _compose: Values) -> Iterator[str]:
    if "build" not in service and not _PINNED.fullmatch(service["image"]):
        yield f"takes whatever {service['image']} is today"


def _ports(name: str, service: Values, _compose: Values) -> Iterator[str]:
    ports = service.get("ports", [])
    if ports and name != "web":
        yield "is published"
    if service.get("expose"):
        yield "is exposed"
    is_beyond = any(not str(port).startswith("127.0.0.1:") for port in ports)
    if is_beyond:
        yield "is published beyond loopback"
    if "STUDIO_BEHIND_LOOPBACK" in service.get("environment", {}) and (is_beyond or not ports):
        yield "says that it is behind loopback, and is not"


def _place(name: str, service: Values, compose: Values) -> Iterator[str]:
    networks = set(service.get("networks", ["default"]))
    if name in SERVERS and any(
        not (compose["networks"].get(network) or {}).get("internal") for network in networks
    ):
        yield "is on a network that leads outside"
    if name in OURS and set(service.get("depends_on", {})) != SERVERS:
        yield "does not wait for Redis and PostgreSQL"


def _secrets(_name: str, service: Values, _compose: Values) -> Iterator[str]:
    environment = service.get("environment", {})
    for key, value in environment.items():
        if _SECRET_NAME.search(key) and not (
            key.endswith("_FILE") and str(value).startswith(SECRETS_FOLDER)
        ):
            yield f"has a secret in {key}"
    text = yaml.safe_dump(service, width=10_000)
    if _PASSWORD_IN_URL.search(text):
        yield "has a password in a URL"
    if text.count("requirepass") != text.count(f"requirepass $$(cat {SECRETS_FOLDER}"):
        yield "has a password in its command"
    used = set(re.findall(rf"{SECRETS_FOLDER}(\w+)", text))
    if used != set(service.get("secrets", [])):
        yield "is given other secrets than it reads"
    if service.get("env_file"):
        yield "reads an env_file"


def _end(_name: str, service: Values, _compose: Values) -> Iterator[str]:
    if not re.fullmatch(r"\d+s", str(service.get("stop_grace_period"))):
        yield "has no time to end in order"
    if service.get("restart") != "unless-stopped":
        yield "stays down"
    if "build" in service and not service.get("init"):
        yield "leaves dead processes behind"


def _gpus(worker: Values) -> Iterator[str]:
    try:
        devices = worker["deploy"]["resources"]["reservations"]["devices"]
    except KeyError:
        devices = []
    if devices != [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]:
        yield "does not reserve the GPUs"
    if not worker.get("shm_size"):
        yield "has no room in /dev/shm"


def _volumes(compose: Values) -> Iterator[str]:
    mounts = {
        name: dict(str(volume).split(":", maxsplit=1)[::-1] for volume in service["volumes"])
        for name, service in compose["services"].items()
    }
    for name, places in mounts.items():
        for source in places.values():
            if source not in compose["volumes"]:
                yield f"{name} mounts {source}, which is no volume of the file"
    for name in OURS:
        if mounts[name].get("/data") != "home":
            yield f"{name} does not see the home folder"
        if compose["services"][name]["environment"].get("STUDIO_HOME") != "/data":
            yield f"{name} takes another home folder"
    for name, place in {"redis": "/data", "postgres": "/var/lib/postgresql/data"}.items():
        if place not in mounts[name] or mounts[name][place] in mounts["web"].values():
            yield f"{name} keeps nothing"
