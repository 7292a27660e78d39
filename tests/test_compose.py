"""docker-compose.yml and the Dockerfile: what Compose's own schema says, and what we promise."""

import copy
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from studio.settings import Settings
from tests.compose import COMPOSE, OURS, ROOT, faults, instructions, plain, read_compose
from workers.launcher import STOP_GRACE_SECONDS


def by_schema(file: Path) -> subprocess.CompletedProcess[str]:
    """Check a file against the Compose schema that check-jsonschema brings along."""
    tool = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*tool, str(file)], capture_output=True, text=True, check=False)


def project() -> dict[str, Any]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return dict(tomllib.loads(text)["project"])


# ---- Compose's own rules ----------------------------------------------------------------------


def test_the_file_keeps_the_schema_of_compose() -> None:
    done = by_schema(COMPOSE)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("service", "key", "value"),
    [
        ("web", "comand", ["studio"]),
        ("web", "depends_on", {"redis": {"condition": "service_well"}}),
        ("worker", "stop_grace_period", 120),
        ("redis", "healthcheck", {"test": {"CMD": "redis-cli"}}),
        ("postgres", "cap_drop", "ALL"),
    ],
)
def test_the_schema_tells_a_wrong_file(
    tmp_path: Path, service: str, key: str, value: object
) -> None:
    compose = read_compose()
    compose["services"][service][key] = value
    file = tmp_path / "docker-compose.yml"
    file.write_text(yaml.safe_dump(compose))
    assert by_schema(file).returncode == 1


def test_docker_itself_reads_the_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("docker is not installed here")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("this docker has no compose")
    done = subprocess.run(
        [docker, "compose", "--file", str(COMPOSE), "config", "--quiet"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- our rules --------------------------------------------------------------------------------


def test_the_file_keeps_our_rules() -> None:
    assert faults(read_compose()) == []


REDIS_URL = "redis://:hunter2@redis:6379/0"


@pytest.mark.parametrize(
    ("service", "changes", "fault"),
    [
        ("web", {"user": None}, "is root"),
        ("worker", {"user": "0:0"}, "is root"),
        ("redis", {"user": "root"}, "is root"),
        ("web", {"cap_drop": []}, "keeps capabilities"),
        ("web", {"cap_add": ["SYS_ADMIN"]}, "keeps capabilities"),
        ("web", {"security_opt": []}, "may gain privileges"),
        ("postgres", {"read_only": False}, "writes to its root file system"),
        ("worker", {"privileged": True}, "sets privileged"),
        ("worker", {"network_mode": "host"}, "sets network_mode"),
        ("redis", {"healthcheck": {}}, "has no health check"),
        ("web", {"healthcheck": {"test": ["NONE"]}}, "has no health check"),
        ("web", {"depends_on": {"redis": {"condition": "service_started"}}}, "until redis is well"),
        ("worker", {"depends_on": {}}, "does not wait for Redis and PostgreSQL"),
        ("redis", {"image": "redis:latest"}, "takes whatever redis:latest is today"),
        ("redis", {"image": "redis"}, "takes whatever redis is today"),
        ("postgres", {"image": "postgres:17"}, "takes whatever postgres:17 is today"),
        ("redis", {"ports": ["127.0.0.1:6379:6379"]}, "is published"),
        ("web", {"ports": ["7860:7860"]}, "is published beyond loopback"),
        ("web", {"ports": ["0.0.0.0:7860:7860"]}, "says that it is behind loopback, and is not"),
        ("web", {"ports": [{"target": 7860, "published": 7860}]}, "is published beyond loopback"),
        ("redis", {"networks": ["inside", "outside"]}, "is on a network that leads outside"),
        ("postgres", {"networks": None}, "is on a network that leads outside"),
        ("postgres", {"environment": {"POSTGRES_PASSWORD": "hunter2"}}, "POSTGRES_PASSWORD"),
        ("web", {"environment": {"STUDIO_BROKER_URL": REDIS_URL}}, "has a password in a URL"),
        ("redis", {"command": ["redis-server", "--requirepass", "x"]}, "password in its command"),
        ("redis", {"command": ["sh", "-c", "echo requirepass x"]}, "password in its command"),
        ("web", {"secrets": []}, "other secrets than it reads"),
        ("web", {"env_file": ".env"}, "reads an env_file"),
        ("worker", {"stop_grace_period": None}, "has no time to end in order"),
        ("web", {"restart": "no"}, "stays down"),
        ("worker", {"init": False}, "leaves dead processes behind"),
        ("worker", {"deploy": {}}, "does not reserve the GPUs"),
        ("worker", {"shm_size": None}, "has no room in /dev/shm"),
        ("worker", {"volumes": ["cache:/data"]}, "worker does not see the home folder"),
        ("web", {"volumes": ["/:/host"]}, "is no volume of the file"),
        ("redis", {"volumes": []}, "redis keeps nothing"),
        ("postgres", {"volumes": ["home:/var/lib/postgresql/data"]}, "postgres keeps nothing"),
    ],
)
def test_each_rule_can_be_broken(service: str, changes: dict[str, Any], fault: str) -> None:
    compose = copy.deepcopy(read_compose())
    for key, value in changes.items():
        if value is None:
            del compose["services"][service][key]
        elif key == "environment":
            compose["services"][service][key].update(value)
        else:
            compose["services"][service][key] = value
    assert any(fault in found for found in faults(compose))


def test_a_secret_comes_from_a_file_that_git_and_docker_leave_alone() -> None:
    compose = read_compose()
    compose["secrets"]["redis_password"] = {"environment": "REDIS_PASSWORD"}
    assert any("redis_password does not come from a file" in found for found in faults(compose))
    assert "/secrets/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert [line for line in sent if line and line[0] not in "#!"] == ["*", "**/__pycache__"]


def test_a_worker_has_longer_than_a_trainer_to_end() -> None:
    grace = read_compose()["services"]["worker"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) >= STOP_GRACE_SECONDS + 30


# ---- what the services are given --------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OURS))
def test_each_variable_of_ours_is_a_setting(name: str) -> None:
    given = read_compose()["services"][name]["environment"]
    ours = {key.removeprefix("STUDIO_").lower() for key in given if key.startswith("STUDIO_")}
    assert ours - set(Settings.model_fields) == set()


def test_the_settings_of_a_service_have_the_passwords_of_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("redis_password", "postgres_password"):
        (tmp_path / name).write_text(f"hunter/{name}\n")
    for key, value in read_compose()["services"]["worker"]["environment"].items():
        monkeypatch.setenv(key, plain(value).replace("/run/secrets", str(tmp_path)))
    settings = Settings()
    assert settings.broker_url == "redis://:hunter%2Fredis_password@redis:6379/0"
    assert settings.database_url == (
        "postgresql+psycopg://studio:hunter%2Fpostgres_password@postgres:5432/studio"
    )
    assert "hunter" not in repr(settings)
    assert not settings.starts_worker


def test_make_secrets_makes_what_the_services_read_and_nobody_else_does(tmp_path: Path) -> None:
    command = ["make", "--silent", "--file", str(ROOT / "Makefile"), "secrets"]
    subprocess.run(command, cwd=tmp_path, check=True)
    files = [tmp_path / secret["file"] for secret in read_compose()["secrets"].values()]
    first = [file.read_text() for file in files]
    assert all(re.fullmatch(r"[0-9a-f]{48}", password) for password in first)
    assert len(set(first)) == len(files)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o444}
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    subprocess.run(command, cwd=tmp_path, check=True)
    assert [file.read_text() for file in files] == first


# ---- the Dockerfile ---------------------------------------------------------------------------


def arguments_of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_the_base_is_pinned_and_of_the_python_that_is_tested() -> None:
    (base,) = arguments_of("FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)


def test_the_image_ends_as_a_user_that_is_not_root_and_is_composes() -> None:
    users = arguments_of("USER")
    assert len(users) == 1
    assert users[0].split(":")[0] != "0"
    compose = read_compose()
    assert {compose["services"][name]["user"] for name in OURS} == set(users)


def test_whatever_is_copied_is_there_and_not_left_out() -> None:
    sent = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    copied = {source.rstrip("/") for rest in arguments_of("COPY") for source in rest.split()[:-1]}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert copied == sent


def test_the_image_has_all_that_a_service_names() -> None:
    declared = {rest.split("=")[0] for rest in arguments_of("ARG")}
    runs = " ".join(arguments_of("RUN"))
    for name in OURS:
        service = read_compose()["services"][name]
        build = service["build"]
        given = build["args"] if isinstance(build, dict) else {}
        assert set(given) <= declared
        extras = set(filter(None, given.get("EXTRAS", "").split(",")))
        assert extras <= set(project()["optional-dependencies"])
        for volume in service["volumes"]:
            # A new volume is its owner's only where the image has the folder already.
            assert re.search(rf"--owner=studio .* {volume.split(':')[1]}\b", runs)


def test_nothing_is_written_outside_of_the_volumes() -> None:
    pairs = dict(pair.split("=") for rest in arguments_of("ENV") for pair in rest.split())
    places = {key: value for key, value in pairs.items() if value.startswith("/")}
    assert {"STUDIO_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TMPDIR"} <= set(places)
    assert all(value.startswith(("/data", "/cache")) for value in places.values())


def test_the_versions_of_the_image_are_those_that_are_tested() -> None:
    installs = re.findall(r"pip install [^&]*", " && ".join(arguments_of("RUN")))
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in step or "--no-deps" in step for step in installs)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==", constraints, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(OURS))
def test_the_commands_of_our_services_exist(name: str) -> None:
    service = read_compose()["services"][name]
    for command in (service["command"], service["healthcheck"]["test"][1:]):
        program, *rest = command
        if program == "python":
            assert rest[0] == "-m"
            module = importlib.util.find_spec(rest[1])
            assert module is not None
            if module.submodule_search_locations is not None:
                assert importlib.util.find_spec(f"{rest[1]}.__main__") is not None
        else:
            assert program in project()["scripts"]
