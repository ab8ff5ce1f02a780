"""The server of the live page: allowed requests, served content, and updates that contain only changed parts."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
import samples
from rich.console import Console

from grounding.cli import run as egm
from grounding.errors import Failure, UserError
from grounding.local.command import Order
from grounding.report.page import SECTIONS
from grounding.view.server import Server, host_of
from grounding.view.shown import Pages

Ask = Callable[..., tuple[int, dict[str, str], bytes]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    samples.run(tmp_path / "runs" / "demo", samples.pictures(tmp_path / "pictures"))
    (tmp_path / "secret.txt").write_text("secret")
    one = Server(tmp_path / "runs")
    one.start()
    yield one
    one.stop()


@pytest.fixture
def ask(server: Server) -> Ask:
    def ask(path: str, host: str = "", method: str = "GET", token: str = "") -> tuple[int, dict[str, str], bytes]:
        address, port = server.server_address[:2]
        connection = http.client.HTTPConnection(str(address), int(port), timeout=60)
        try:
            headers = {"Host": host or f"127.0.0.1:{port}"}
            connection.request(method, f"/{token or server.token}/{path}", headers=headers)
            reply = connection.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            connection.close()

    return ask


def news(ask: Ask, since: int = 0) -> dict[str, object]:
    """Request the changed parts until the first rendering exists, and return them."""
    while True:
        found: dict[str, object] = json.loads(ask(f"news?run=demo&since={since}")[2])
        if found["revision"]:
            return found


def test_the_page_is_small_asks_nothing_of_others_and_names_its_script(ask: Ask) -> None:
    status, headers, body = ask("")
    assert status == 200 and headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"
    text = body.decode()
    assert (
        "connect-src &#39;self&#39;" in text
        and "unsafe" not in text
        and "http://" not in text.replace("http://www.w3.org", "")
    )
    parts = news(ask)["parts"]
    assert isinstance(parts, dict) and set(parts) == {"jobs", *SECTIONS}
    assert len(body) + sum(len(p) for p in parts.values()) < 300_000


def test_only_what_has_changed_is_sent(ask: Ask, server: Server, tmp_path: Path) -> None:
    first = news(ask)
    again = json.loads(ask(f"news?run=demo&shown=demo&since={first['revision']}")[2])
    assert again["parts"] == {} and again["revision"] == first["revision"]
    with (tmp_path / "runs" / "demo" / "rl" / "progress.jsonl").open("ab") as f:
        f.write(
            orjson.dumps({"time": 2.0, "stage": "rl", "step": 11, "totalSteps": 20, "metrics": {"score": 0.9}}) + b"\n"
        )
    server.pages.draw(("demo",))
    later = json.loads(ask(f"news?run=demo&shown=demo&since={first['revision']}")[2])
    assert "curves" in later["parts"] and "tables" not in later["parts"]


def test_a_run_that_has_not_begun_says_so_and_then_shows_only_its_own_parts(
    ask: Ask, server: Server, tmp_path: Path
) -> None:
    before = json.loads(ask("news?run=next&since=0")[2])
    while not before["revision"]:
        before = json.loads(ask("news?run=next&since=0")[2])
    assert before["runs"] == ["next"] and before["title"].startswith("next ·") and "demo" not in str(before)
    assert before["pulse"].startswith("next has not begun.") and "No job has begun" in before["parts"]["jobs"]
    status, _, body = ask("?run=next")
    assert status == 200 and b"<h1>next</h1>" in body
    samples.run(tmp_path / "runs" / "next", samples.pictures(tmp_path / "pictures"))
    server.pages.draw(("next",))
    later = json.loads(ask(f"news?run=next&shown=next&since={before['revision']}")[2])
    assert later["runs"] == ["next"] and set(later["parts"]) == {"jobs", *SECTIONS}


def test_every_part_is_sent_if_the_page_turns_to_another_run(ask: Ask, server: Server, tmp_path: Path) -> None:
    assert json.loads(ask("news?since=0")[2])["runs"] == ["demo"]
    server.pages.draw(("demo",))
    first = json.loads(ask("news?shown=demo&since=0")[2])
    samples.run(tmp_path / "runs" / "next", samples.pictures(tmp_path / "pictures"))
    newer = (tmp_path / "runs" / "demo" / "run.json").stat().st_mtime + 10
    os.utime(tmp_path / "runs" / "next" / "run.json", (newer, newer))
    server.pages.draw(("next",))
    later = json.loads(ask(f"news?shown=demo&since={first['revision']}")[2])
    assert later["runs"] == ["next"] and set(later["parts"]) == {"jobs", *SECTIONS}
    again = json.loads(ask(f"news?shown=next&since={later['revision']}")[2])
    assert again["parts"] == {} and again["runs"] == ["next"]


def test_pictures_are_those_of_the_page_and_no_others(ask: Ask) -> None:
    boxes = str(news(ask)["parts"]["boxes"])  # type: ignore[index]
    addresses = {part.split('"')[0] for part in boxes.split('href="')[1:]}
    assert addresses and all(a.startswith("picture/") for a in addresses)
    for address in addresses:
        status, headers, body = ask(address)
        assert status == 200 and headers["Content-Type"] == "image/png" and body.startswith(b"\x89PNG")
        assert ask(f"{address}?large=1")[0] == 200
    for wrong in ("999", "-1", "../../secret.txt", "0/../1", "", "%D9%A3", "9" * 30):
        assert ask(f"picture/{wrong}")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "..%2fsecret.txt",
        "%2e%2e/secret.txt",
        "/etc/passwd",
        "secret.txt",
        "report/index.html",
        "..\\x.html",
        "x%00.html",
        "news/",
    ],
)
def test_no_file_is_reached_by_its_path(ask: Ask, path: str) -> None:
    status, _, body = ask(path)
    assert status == 404 and b"secret" not in body


def test_a_wrong_secret_or_a_foreign_name_gets_nothing(ask: Ask) -> None:
    for token in ("nonsense", "%F0%9F", "x" * 5000):
        assert ask("", token=token)[0] == 404
    for host in (
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[",
        "a@127.0.0.1@evil",
    ):
        status, _, body = ask("", host=host)
        assert status == 403 and b"demo" not in body
    for host in ("localhost", "LOCALHOST:9", "127.0.0.1:1", "[::1]:5"):
        assert ask("", host=host)[0] == 200
    assert host_of("") == "" and host_of("[") == ""
    assert ask("", method="HEAD")[2] == b"" and ask("", method="POST")[0] == 501


def test_the_frozen_page_is_the_report(ask: Ask) -> None:
    status, _, body = ask("report?run=demo")
    assert status == 200 and b'id="data"' in body and b"Side by side" in body


def test_a_sweep_has_its_page(tmp_path: Path) -> None:
    images = samples.pictures(tmp_path / "pictures")
    folder = samples.sweep(tmp_path / "runs" / "demo" / "my sweep", images)
    (folder / "state.json").write_bytes(b"{}")
    (tmp_path / "runs" / "demo" / "run.json").write_bytes(b'{"jobs": []}')
    one = Server(tmp_path / "runs")
    one.start()
    try:
        host, port = one.server_address[:2]
        connection = http.client.HTTPConnection(str(host), int(port), timeout=60)
        connection.request("GET", f"/{one.token}/my%20sweep.html")
        reply = connection.getresponse()
        assert reply.status == 200 and b"my sweep" in reply.read()
    finally:
        one.stop()


def test_hostile_names_and_answers_stay_text(tmp_path: Path) -> None:
    images = samples.pictures(tmp_path / "pictures")
    folder = samples.evaluation(tmp_path / "x", images, 5, file=samples.NASTY, model=samples.NASTY)
    one = Server(folder)
    try:
        one.pages.draw(("x",))
        parts = one.pages.news(("x",), 0, patience_s=0).parts
        assert parts["boxes"].count("<article") >= 8
        for part in parts.values():
            assert "<script" not in part and "<img" not in part and "<svg onload" not in part
    finally:
        one.server_close()


def test_a_port_in_use_and_a_missing_folder_are_the_user_s_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be used"):
            Server(tmp_path, port=taken.getsockname()[1])
    assert egm(["view", str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err


# ---- beside a run ----
def test_a_page_that_is_open_gets_the_final_state_before_the_server_ends(ask: Ask, server: Server) -> None:
    first = news(ask)
    assert first["over"] is False
    got: list[dict[str, object]] = []

    def browser() -> None:
        while not (got and got[-1]["over"]):
            got.append(json.loads(ask(f"news?run=demo&shown=demo&since={first['revision']}")[2]))

    page = threading.Thread(target=browser)
    page.start()
    server.pages.last_look("The run has ended.", patience_s=60)
    server.stop()
    page.join(60)
    assert str(got[-1]["pulse"]).endswith("The run has ended.")


def test_a_page_gets_the_pictures_of_the_final_state_too(
    ask: Ask, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grounding.view.shown.QUIET_S", 5.0)
    news(ask)
    loaded = threading.Event()

    def browser() -> None:
        while not json.loads(ask("news?run=demo&shown=demo&since=1")[2])["over"]:
            pass
        time.sleep(0.2)
        ask("picture/0")
        loaded.set()

    page = threading.Thread(target=browser)
    page.start()
    server.pages.last_look("The run has ended.", patience_s=60)
    assert loaded.is_set()
    page.join(60)


def test_nobody_is_waited_for_if_no_page_is_open(server: Server) -> None:
    server.pages.last_look("The run has ended.", patience_s=1e6)


def test_files_that_cannot_be_read_do_not_end_the_page(
    server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(names: tuple[str, ...]) -> None:
        raise OSError(116, "Stale file handle")

    def says(text: str) -> bool:
        time.sleep(0.02)
        return text in json.loads(ask("news?run=demo&since=1")[2])["pulse"]

    news(ask)
    monkeypatch.setattr("grounding.view.shown.INTERVAL_S", 0.02)
    with monkeypatch.context() as patch:
        patch.setattr(server.pages, "draw", broken)
        while not says("Stale file handle"):
            pass
    while says("Stale file handle"):
        pass


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), Failure("Stale file handle")])
def test_files_that_cannot_be_read_do_not_fail_a_run_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(names: tuple[str, ...]) -> None:
        raise error

    samples.run(tmp_path / "runs" / "demo", samples.pictures(tmp_path / "pictures"))
    pages = Pages(tmp_path / "runs")
    pages.draw(("demo",))
    pages.news(("demo",), 0)
    monkeypatch.setattr(pages, "draw", broken)
    pages.last_look("The run has ended.", patience_s=0)
    last = pages.news(("demo",), 0)
    assert last.over and last.pulse == f"The files cannot be read: {error} The run has ended."


@pytest.mark.parametrize("port", ["0", "8000"])
def test_a_port_without_a_page_is_the_user_s_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], port: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text((Path(__file__).parents[3] / "jobs" / "demo.yaml").read_text())
    assert egm(["run", "-f", "job.yaml", "--no-preflight", "--view-port", port]) == 2
    assert "--view-port: there is no page without --view" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(60)
def test_a_run_with_a_page_on_a_port_in_use_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text((Path(__file__).parents[3] / "jobs" / "demo.yaml").read_text())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert egm(["run", "-f", "job.yaml", "--no-preflight", "--view", "--view-port", port]) == 2
    assert "--view-port" in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("code", [0, 1, 130])
def test_the_page_stays_after_a_run_on_a_terminal_and_the_exit_code_is_the_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, terminal: bool
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def run(order: Order, works: object, out: Console, err: Console) -> int:
        address = str(re.search(r"Live page: (\S+)", capsys.readouterr().out)[1])  # type: ignore[index]
        with urllib.request.urlopen(address) as reply:
            assert reply.status == 200
        out._force_terminal = terminal
        return code

    monkeypatch.setattr("grounding.cli.pages.until_interrupted", interrupt)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grounding.local.command.execute", run)
    (tmp_path / "job.yaml").write_text((Path(__file__).parents[3] / "jobs" / "demo.yaml").read_text())
    assert egm(["run", "-f", "job.yaml", "--no-preflight", "--view"]) == code
    assert ("Ctrl-C ends it" in capsys.readouterr().err) is (terminal and code < 128)


def test_open_asks_the_browser_for_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import webbrowser

    samples.run(tmp_path / "demo", samples.pictures(tmp_path / "pictures"))
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert egm(["report", str(tmp_path / "demo"), "--open"]) == 0
    page = (tmp_path / "demo" / "report" / "index.html").as_uri()
    assert opened == [] and page in capsys.readouterr().err
    monkeypatch.setenv("DISPLAY", ":0")
    assert egm(["report", str(tmp_path / "demo"), "--open"]) == 0
    assert opened == [page]


@pytest.mark.timeout(300)
def test_the_page_of_all_published_questions_is_small_and_its_server_answers_while_it_reads(tmp_path: Path) -> None:
    """All eight files have 57,457 expressions. Neither the page nor an update grows with them, and no request waits for the reading."""
    images = samples.pictures(tmp_path / "pictures")
    folder = samples.evaluation(tmp_path / "runs" / "demo" / "after", images, 7, rows=57_457)
    (folder.parent / "run.json").write_bytes(orjson.dumps({"jobs": ["after"]}))
    server = Server(tmp_path / "runs")
    server.start()

    def get(path: str) -> tuple[bytes, float]:
        began = time.monotonic()
        with urllib.request.urlopen(server.url + path) as reply:
            return reply.read(), time.monotonic() - began

    try:
        received, waits, found = 0, [], {"revision": 0}
        while not found["revision"]:
            for path in ("", "news?run=demo&since=0"):
                body, seconds = get(path)
                received, found = received + len(body), found if not path else json.loads(body)
                waits.append(seconds)
        assert "57,457 answers" in found["parts"]["headline"] and len(found["parts"]) > 3
        assert received < 1_000_000, received
        assert max(waits) < 10, waits  # a request of news waits up to a second for the first rendering

        with (folder / "results" / "part-0001.jsonl").open("ab") as part:
            part.write(orjson.dumps({"key": "torn"}) + b"\n")
        watch = server.pages._watch
        before = sum(tail.bytes_read for rows in watch._rows.values() for tail in rows.tails)
        server.pages.draw(("demo",))
        assert sum(tail.bytes_read for rows in watch._rows.values() for tail in rows.tails) - before < 100
        assert len(get(f"news?run=demo&shown=demo&since={found['revision']}")[0]) < 300_000
    finally:
        server.stop()
