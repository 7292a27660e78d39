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


def test_every_setting_says_what_it_is_for() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
