"""Requests to an API server with temporary faults are repeated at once, unless it asks for a pause or refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import egm_operator.kube.client
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from egm_operator.kube.client import Api, ApiError, missing_kubeconfig
from kubernetes.aio import client


async def _ask(answers: list[int], retry: bool) -> int:
    """Return the number of requests if the server gives these answers and then repeats the last one. Raises `ApiError`."""
    asked = 0

    async def handle(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        code = answers[min(asked, len(answers)) - 1]
        if code == 0:
            assert request.transport is not None
            request.transport.close()
        return web.json_response({"code": code, "asked": asked}, status=code or 200)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    async with TestServer(app) as server:
        configuration = client.Configuration()
        configuration.host = str(server.make_url("")).rstrip("/")
        api = Api(configuration)
        try:
            found = await api.request("POST", "/api", retry=retry)  # aiohttp also repeats a GET
            assert found["asked"] == asked
        except ApiError as error:
            error.args = (asked,)
            raise
        finally:
            await api.close()
    return asked


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egm_operator.kube.client, "_STUMBLES", (0.001, 0.002))


@pytest.mark.parametrize("answers", [[200], [500, 200], [503, 502, 200], [0, 504, 200]])
def test_what_is_over_in_a_moment_is_not_seen(answers: list[int]) -> None:
    assert asyncio.run(_ask(answers, True)) == len(answers)


@pytest.mark.parametrize(
    ("answers", "retry", "asked"),
    [([500], True, 3), ([0], True, 3), ([500, 200], False, 1), *(([c, 200], True, 1) for c in (404, 409, 422, 429))],
)
def test_what_stays_is_told(answers: list[int], retry: bool, asked: int) -> None:
    with pytest.raises(ApiError) as told:
        asyncio.run(_ask(answers, retry))
    assert told.value.args == (asked,) and told.value.status == answers[0]


def test_a_kubeconfig_that_is_not_there_is_named(tmp_path: Path) -> None:
    (there := tmp_path / "config").touch()
    assert missing_kubeconfig(f"{tmp_path}/none:{there}") == ""
    assert missing_kubeconfig(f"{tmp_path}/none") == f"{tmp_path}/none: no such file"
    assert missing_kubeconfig("") == "$KUBECONFIG is empty"
