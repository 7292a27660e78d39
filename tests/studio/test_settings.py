"""Settings come from the environment, and a wrong one is named."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from studio.settings import Settings


def test_without_an_environment_the_page_listens_on_loopback_only() -> None:
    settings = Settings(_env_file=None)
    assert settings.host == "127.0.0.1"


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path / "h"))
    monkeypatch.setenv("STUDIO_PORT", "8123")
    settings = Settings()
    assert (settings.home, settings.port) == (tmp_path / "h", 8123)


def test_what_is_given_by_hand_wins_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STUDIO_PORT", "8123")
    assert Settings(port=8124).port == 8124


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "", "7860.5"])
def test_a_wrong_port_is_named(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("STUDIO_PORT", port)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert [error["loc"] for error in caught.value.errors()] == [("port",)]


def test_variables_of_later_versions_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIO_SOMETHING_NEW", "1")
    assert Settings().port >= 1


def test_the_home_folder_is_absolute_and_its_tilde_is_expanded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings(home=Path("~/h")).resolved_home() == tmp_path.resolve() / "h"
    assert Settings(home=Path("h")).resolved_home() == Path.cwd() / "h"


def test_settings_do_not_change_once_read() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("host", "allowed", "expected"),
    [
        ("127.0.0.1", None, True),
        ("::1", None, True),
        ("0.0.0.0", None, False),
        ("0.0.0.0", "1", True),
        ("127.0.0.1", "0", False),
    ],
)
def test_paths_of_this_machine_are_read_only_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, host: str, allowed: str | None, expected: bool
) -> None:
    if allowed is not None:
        monkeypatch.setenv("STUDIO_ALLOW_SERVER_PATHS", allowed)
    assert Settings(host=host).server_paths_allowed is expected


def test_folders_are_separated_as_in_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIO_SERVER_PATH_ROOTS", "/data:~/chats:")
    assert Settings().server_path_roots == (Path("/data"), Path("~/chats"))
    monkeypatch.setenv("STUDIO_SERVER_PATH_ROOTS", "data")
    with pytest.raises(ValidationError, match="not absolute"):
        Settings()


def test_what_reaches_into_the_network_of_this_machine_is_off_unless_set() -> None:
    settings = Settings()
    assert not settings.allow_private_urls
    assert not settings.allow_http
    assert settings.proxy == ""


@pytest.mark.parametrize(
    "url",
    [
        "",
        "redis://localhost",
        "redis://localhost/",
        "redis://:p%2Fw@redis:6379/0",
        "rediss://user:word@redis.example:6380/1?ssl_ca_certs=/etc/ca.pem",
        "redis://[::1]:6379",
    ],
)
def test_the_broker_is_a_folder_or_a_redis(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("STUDIO_BROKER_URL", url)
    assert Settings().broker_url == url


@pytest.mark.parametrize(
    "url",
    [
        "amqp://guest:s3cret@host",
        "filesystem://",
        "redis+socket:///s3cret",
        "redis",
        "redis://",
        "redis:///0",
        "redis://:s3cret@",
        "redis://:s3cret@host:0",
        "redis://:s3cret@host:66000",
        "redis://:s3cret@host:6379/name",
        "redis://:s3c#ret@host:6379/0",
        "redis://:s3c/ret@host:6379/0",
        "redis://:a@one:6379/0;redis://:s3cret@two:6379/0",
        "redis://[::1",
        "http://host\ns3cret",
    ],
)
def test_another_broker_is_refused_without_saying_its_password(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("STUDIO_BROKER_URL", url)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert [error["loc"] for error in caught.value.errors()] == [("broker_url",)]
    assert "must begin with redis:// or rediss://" in str(caught.value)
    assert "s3c" not in str(caught.value)


def test_the_password_of_the_broker_is_not_shown_with_the_settings() -> None:
    assert "s3cret" not in repr(Settings(broker_url="redis://:s3cret@host"))


def test_every_setting_says_what_it_is_for() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


# ---- with Redis and PostgreSQL ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://redis:6379/0", "redis://:s%2F%40cret@redis:6379/0"),
        ("redis://bell@redis:6379/0", "redis://bell:s%2F%40cret@redis:6379/0"),
        ("", ""),
    ],
)
def test_a_password_comes_from_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, expected: str
) -> None:
    file = tmp_path / "password"
    file.write_text("s/@cret\n")
    monkeypatch.setenv("STUDIO_BROKER_URL", url)
    monkeypatch.setenv("STUDIO_BROKER_PASSWORD_FILE", str(file))
    settings = Settings()
    assert settings.broker_url == expected
    assert "cret" not in repr(settings)


@pytest.mark.parametrize(
    ("url", "content", "words"),
    [
        ("postgresql+psycopg://studio@db/studio", None, "cannot be read"),
        ("postgresql+psycopg://studio@db/studio", "\n", "is empty"),
        ("postgresql+psycopg://studio:other@db/studio", "x", "in the URL already"),
    ],
)
def test_a_password_that_cannot_be_had_is_said(
    tmp_path: Path, url: str, content: str | None, words: str
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValidationError, match=words) as caught:
        Settings(database_url=url, database_password_file=file)
    assert str(file) in str(caught.value)
    assert "other@" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "set_by_hand", "expected"),
    [
        ("", None, True),
        ("redis://redis/0", None, False),
        ("redis://redis/0", True, True),
        ("", False, False),
    ],
)
def test_a_worker_is_started_where_no_broker_is_named(
    url: str, set_by_hand: bool | None, expected: bool
) -> None:
    assert Settings(broker_url=url, embedded_worker=set_by_hand).starts_worker is expected
