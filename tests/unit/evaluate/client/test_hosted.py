"""Keys, headers, certificates and base paths of hosted servers, and the places where a key must never appear."""

import asyncio
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trustme
from aiohttp import web

from grounding.cli import run
from grounding.errors import UserError
from grounding.runtime.access import HIDDEN, Access, access_of

KEY = "sk-secret-0123456789"
ANSWER = {
    "choices": [
        {"message": {"role": "assistant", "content": '[{"bbox_2d": [100, 100, 500, 600]}]'}, "finish_reason": "stop"}
    ]
}


@contextmanager
def hosted(authority, refused=()):
    """An https server with a base path that requires a key and refuses the request fields in `refused`."""
    bodies, loop, ready, found = [], asyncio.new_event_loop(), threading.Event(), {}

    async def answer(request):
        given = request.headers.get("Authorization", ""), request.headers.get("X-Team", "")
        if given != (f"Bearer {KEY}", "vision"):
            return web.json_response({"error": f"wrong key: {given[0]}"}, status=401)
        body = await request.json()
        bodies.append(body)
        if odd := set(refused) & body.keys():
            return web.json_response({"error": f"unknown: {sorted(odd)}"}, status=400)
        return web.json_response(ANSWER)

    async def up():
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/gateway/v1/chat/completions", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        site = web.TCPSite(runner, "localhost", 0, ssl_context=context)
        await site.start()
        found["url"], found["runner"] = f"https://localhost:{site._server.sockets[0].getsockname()[1]}/gateway", runner
        ready.set()

    def serve():
        loop.run_until_complete(up())
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield found["url"], bodies
    finally:
        asyncio.run_coroutine_threadsafe(found["runner"].cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture
def authority(tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return authority


def ask(dataset, url, *more):
    words = ["eval", "--files", str(dataset / "refcoco_val.jsonl"), "--images", str(dataset / "images"), "--model", "m"]
    words += ["--endpoint", url, "--out", str(dataset / "out"), "--attempts", "1"]
    return run([*words, "--ca-file", str(dataset / "ca.pem"), "--header-env", "X-Team=MY_TEAM", *more])


@pytest.mark.parametrize("suffix", ["", "/v1", "/v1/", "/v1/chat/completions"])
def test_a_hosted_server_is_asked_and_its_key_is_in_no_file(dataset, authority, monkeypatch, capsys, suffix):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MY_TEAM", "vision")
    body = '{"top_k": null, "thinking": {"budget": 512}}'
    with hosted(authority, refused=["max_tokens", "top_k", "repetition_penalty"]) as (url, bodies):
        code = ask(
            dataset, url + suffix, "--engine", "openai", "--seed", "7", "--system", "Be brief.", "--extra-body", body
        )
    assert code == 0 and len(bodies) == 24
    asked = bodies[0]
    assert asked["seed"] == 7 and asked["thinking"] == {"budget": 512} and asked["max_completion_tokens"] == 4096
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."} and asked["messages"][1]["role"] == "user"
    assert json.loads((dataset / "out" / "summary.json").read_text())["macro"] is not None
    written = b"".join(p.read_bytes() for p in (dataset / "out").rglob("*") if p.is_file())
    assert KEY.encode() not in written and KEY not in "".join(capsys.readouterr())


def test_a_key_that_the_server_repeats_is_hidden(dataset, authority, monkeypatch, capsys):
    wrong = KEY[:-1] + "x"
    monkeypatch.setenv("OTHER_KEY", wrong)
    monkeypatch.setenv("MY_TEAM", "vision")
    with hosted(authority) as (url, bodies):
        assert ask(dataset, url, "--api-key-env", "OTHER_KEY") == 1
    said = "".join(capsys.readouterr())
    assert not bodies and f"wrong key: Bearer {HIDDEN}" in said and wrong not in said
    assert wrong.encode() not in b"".join(p.read_bytes() for p in (dataset / "out").rglob("*") if p.is_file())


def test_other_settings_are_other_answers(dataset, authority, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MY_TEAM", "vision")
    with hosted(authority) as (url, bodies):
        for more in (
            [],
            [],
            ["--system", "x"],
            ["--extra-body", '{"a": 1}'],
            ["--temperature", "0.5"],
            ["--prompt", "Find {sent}!"],
        ):
            assert ask(dataset, url, *more) == 0
    assert len(bodies) == 24 * 5  # the second run equals the first and asks nothing
    assert bodies[-1]["messages"][0]["content"][1]["text"].startswith("Find thing ")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--header-env", "X-Org"], "NAME=VARIABLE"),
        (["--header-env", "X-Org=NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE is not set"),
        (["--extra-body", "[1]"], "a JSON object"),
        (["--extra-body", "{"], "not JSON"),
        (["--extra-body", '{"messages": []}'], "the evaluation writes them"),
        (["--prompt", "Where is it?"], "{sent}"),
    ],
)
def test_a_mistake_is_named_before_anything_is_sent(dataset, authority, monkeypatch, capsys, more, words):
    monkeypatch.setenv("MY_TEAM", "vision")
    assert ask(dataset, "https://localhost:1", *more) == 2
    assert words in capsys.readouterr().err


def test_values_that_are_no_header_are_refused(tmp_path):
    with pytest.raises(UserError, match="characters"):
        access_of({"KEY": "a\r\nX: b"}, "KEY")
    assert access_of({"KEY": " \n"}, "KEY") == Access()
    (tmp_path / "no.pem").write_text("nothing")
    with pytest.raises(UserError, match="no certificates"):
        Access(ca_file=tmp_path / "no.pem").context()
    assert KEY not in repr(access_of({"KEY": KEY}, "KEY"))


JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: hosted}
spec:
  model: {source: gpt-x}
  engine: openai
  endpoints: [URL/v1]
  apiKeySecret: {name: keys, key: openai}
  headerSecrets: [{header: X-Team, name: keys, key: team}]
  caConfigMap: {name: authority, key: root.pem}
  prompt: "Where is {sent}?"
  boxRemap: keep
  data: {files: [FILES], images: [IMAGES]}
  concurrency: 2
"""
REASONING = {
    "choices": [
        {"message": {"role": "assistant", "content": "It is on the left of the table."}, "finish_reason": "stop"}
    ]
}


def _seen(pid):
    """Return what anyone on this machine can see of a process: its command line and those of its children."""
    found = b""
    for each in [pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]:
        with suppress(OSError):
            found += Path(f"/proc/{each}/cmdline").read_bytes()
    return found


def _run(words, environment, out):
    """Run `egm`; return its exit code, its output, and the command lines that were visible while it ran."""
    command = [sys.executable, "-m", "grounding.cli", *map(str, words)]
    with (out / "said").open("wb") as said:
        child = subprocess.Popen(command, env=os.environ | environment, stdout=said, stderr=subprocess.STDOUT)
        shown = b""
        while child.poll() is None:
            with suppress(OSError):
                shown += _seen(child.pid)
            time.sleep(0.01)
    return child.returncode, (out / "said").read_bytes(), shown


def _written(folder):
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_a_job_asks_a_hosted_service_and_its_key_is_nowhere(dataset, authority):
    out = dataset / "out"
    out.mkdir()
    environment = {"EGM_API_KEY": KEY, "EGM_HEADER_X_TEAM": "vision", "EGM_CA_FILE": str(dataset / "ca.pem")}
    with hosted(authority, refused=["max_tokens", "top_k"]) as (url, bodies):
        text = JOB.replace("URL", url).replace("FILES", str(dataset / "refcoco_val.jsonl"))
        (dataset / "job.yaml").write_text(text.replace("IMAGES", str(dataset / "images")))
        words = ["role", "evaluate", "--job", dataset / "job.yaml", "--data", dataset / "data", "--out", out]
        # both back ends pass the endpoints in the same variable as the servers that they start
        code, said, shown = _run(words, environment | {"EGM_ENDPOINTS": url}, dataset)
        assert code == 0 and len(bodies) == 24, said
    assert bodies[0]["messages"][-1]["content"][1]["text"].startswith("Where is thing ")
    assert bodies[0]["model"] == "gpt-x"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["scoring"] == "egm-eval-pixels" and summary["done"] == 24
    assert b"evaluate" in shown and KEY.encode() not in shown + said + _written(out)


@pytest.mark.parametrize("suffix", ["/v1", "/v1/", "/v1/chat/completions"])
def test_reasoning_is_asked_of_a_hosted_service(dataset, authority, suffix, monkeypatch):
    monkeypatch.setitem(ANSWER, "choices", REASONING["choices"])
    rows = [
        {"id": i, "image": f"{i % 6}.jpg", "width": 100, "height": 80, "conversations": [
            {"from": "human", "value": f"<image>\nWhere is <ref>thing {i}</ref>?"},
            {"from": "gpt", "value": "<box>[100, 100, 500, 600]</box>"}]}
        for i in range(4)
    ]  # fmt: skip
    (dataset / "rl.json").write_text(json.dumps(rows))
    words = ["data", "reasoning", dataset / "rl.json", "--images", dataset / "images", "--model", "m"]
    words += ["--out", dataset / "a.jsonl", "--ca-file", dataset / "ca.pem", "--header-env", "X-Team=MY_TEAM"]
    with hosted(authority) as (url, bodies):
        code, said, shown = _run(
            [*words, "--endpoint", url + suffix], {"OPENAI_API_KEY": KEY, "MY_TEAM": "vision"}, dataset
        )
        assert code == 0 and len(bodies) == 4, said
        wrong = KEY[:-1] + "x"
        (dataset / "a.jsonl").unlink()
        code, refused, _ = _run(
            [*words, "--endpoint", url + suffix], {"OPENAI_API_KEY": wrong, "MY_TEAM": "vision"}, dataset
        )
    assert code == 2 and wrong.encode() not in refused and HIDDEN.encode() in refused
    assert len(json.loads((dataset / "a.sft.json").read_text())) == 4
    assert KEY.encode() not in shown + said + _written(dataset)
