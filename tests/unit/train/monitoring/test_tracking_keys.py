"""Which servers a tracking key may be sent to."""

from __future__ import annotations

import pytest

from grounding.train.monitoring.tracking_keys import keeps_mlflow_key, keeps_wandb_key, may_have_it

HOME = "https://w.example"


@pytest.mark.parametrize(
    ("url", "allowed", "may"),
    [
        ("https://w.example", [], True),
        ("https://W.Example./team", [], True),
        ("https://w.example:443", [], True),
        ("https://w.example:444", [], False),
        ("https://w.example:444", ["w.example"], True),
        ("https://w.example:444", ["w.example:444"], True),
        ("https://w.example:444", ["w.example:445"], False),
        ("http://w.example", [], False),
        ("https://evil.example", [], False),
        ("https://evil.example", ["Evil.Example"], True),
        ("https://evil.example", ["example"], False),
        ("https://x.evil.example", ["evil.example"], False),
        ("https://w.example@evil.example", [], False),
        ("https://w.example@evil.example", ["w.example"], False),
        ("https://evil.example#@w.example", ["w.example"], False),
        ("https://evil.example?w.example", ["w.example"], False),
        ("https://w.example:port", ["w.example"], False),
        ("https://[::1", ["w.example"], False),
        ("https://[::1]:8080", ["::1"], True),
        ("https://", [""], False),
        ("w.example", ["w.example"], False),
        ("", [""], False),
    ],
)
def test_a_key_goes_home_or_where_it_is_allowed(url: str, allowed: list[str], may: bool) -> None:
    assert may_have_it(url, HOME, allowed) is may


def test_without_a_key_nothing_is_kept() -> None:
    assert keeps_wandb_key("https://evil.example", {}, []) == ""
    assert keeps_mlflow_key("https://evil.example", {}, False, []) == ""


@pytest.mark.parametrize("store", ["file:///tmp/mlruns", "/tmp/mlruns", "sqlite:///x.db", "databricks"])
def test_a_store_that_is_no_server_gets_no_key(store: str) -> None:
    assert keeps_mlflow_key(store, {"MLFLOW_TRACKING_TOKEN": "secret"}, True, []) == ""


@pytest.mark.parametrize("name", ["TOKEN", "USERNAME", "PASSWORD", "AUTH", "AWS_SIGV4"])
def test_each_credential_of_mlflow_has_a_home(name: str) -> None:
    environ = {f"MLFLOW_TRACKING_{name}": "secret"}
    why = keeps_mlflow_key("https://evil.example", environ, False, [])
    assert f"MLFLOW_TRACKING_{name}" in why and "secret" not in why
    assert keeps_mlflow_key(HOME, environ | {"MLFLOW_TRACKING_URI": HOME}, False, []) == ""
    assert keeps_mlflow_key("https://evil.example", environ | {"MLFLOW_TRACKING_URI": HOME}, False, [])
    assert keeps_mlflow_key("https://evil.example", environ, False, ["evil.example"]) == ""


def test_mlflow_s_own_file_is_a_credential() -> None:
    assert "file of credentials" in keeps_mlflow_key("https://evil.example", {}, True, [])
