"""`egm ask` with a real server: the request equals the evaluation's, the box is in pixels, and refusals are sentences."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from grounding.cli import run as egm
from grounding.errors import Failure, UserError
from grounding.evaluate.ask import Asker, split_thought
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Sampling, get_engine


def picture(path: Path, width: int = 400, height: int = 200) -> Path:
    Image.new("RGB", (width, height), (10, 20, 30)).save(path)
    return path


def reply(content: object, **message: object) -> dict[str, object]:
    body = {"role": "assistant", "content": content, **message}
    return {"model": "m", "choices": [{"message": body, "finish_reason": "stop"}], "usage": {"completion_tokens": 5}}


def asked(server, tmp_path: Path, **more):
    data = picture(tmp_path / "p.png").read_bytes()
    request = Request("m", "qwen3", get_engine("sglang").request_extras(Sampling()))
    return Asker(server.url).ask(data, "the man in red", request, **more)


def test_the_request_is_the_evaluations_and_the_box_is_in_pixels(server, tmp_path: Path) -> None:
    server.plan = lambda n, body: reply('[{"bbox_2d": [100, 250, 500, 750], "label": "man"}]')
    found = asked(server, tmp_path)
    assert found.box == (40.0, 50.0, 200.0, 150.0) and (found.width, found.height) == (400, 200)
    assert (found.model, found.tokens, found.finish_reason, found.thought) == ("m", 5, "stop", "")
    [body] = server.bodies
    content = body["messages"][0]["content"]
    assert content[1]["text"] == "Locate the man in red, output its bbox coordinates using JSON format"
    url = content[0]["image_url"]["url"]
    assert base64.b64decode(url.partition("base64,")[2]) == (tmp_path / "p.png").read_bytes()
    assert body["max_tokens"] == 4096 and body["top_k"] == 20 and body["model"] == "m"
    drawn = found.drawn()
    assert drawn.width == 400 and drawn.height > 200  # the expression is written below the picture


@pytest.mark.parametrize(("message", "thought"), [
    (reply("<think>left of it</think>[1, 2, 3, 4]"), "left of it"),
    (reply("left of it</think>[1, 2, 3, 4]"), "left of it"),
    (reply("[1, 2, 3, 4]", reasoning_content="left of it"), "left of it"),
    (reply("[1, 2, 3, 4]"), ""),
])  # fmt: skip
def test_the_thought_is_told_apart(server, tmp_path: Path, message, thought: str) -> None:
    server.plan = lambda n, body: message
    assert asked(server, tmp_path).thought == thought


def test_a_thought_without_an_end_is_the_answer_itself() -> None:
    assert split_thought("<think>on and on", None) == ""


def test_an_answer_without_a_box(server, tmp_path: Path) -> None:
    server.plan = lambda n, body: "unparsed"
    found = asked(server, tmp_path)
    assert found.box is None and found.text == "no idea" and found.drawn().width == 400


def test_what_goes_wrong_is_a_sentence(server, tmp_path: Path) -> None:
    server.plan = lambda n, body: 404
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+: answers 404: no"):
        asked(server, tmp_path)
    server.plan = lambda n, body: 500
    with pytest.raises(Failure, match="answers 500"):
        asked(server, tmp_path)
    server.plan = lambda n, body: "garbage"
    with pytest.raises(Failure, match="not JSON"):
        asked(server, tmp_path)
    with pytest.raises(Failure, match="does not answer"):
        Asker("http://127.0.0.1:9").ask(picture(tmp_path / "q.png").read_bytes(), "x", Request(None, "qwen3"))
    with pytest.raises(UserError, match="cannot be decoded"):
        Asker(server.url).ask(b"text", "x", Request(None, "qwen3"))
    with pytest.raises(UserError, match="unknown scoring profile"):
        asked(server, tmp_path, scoring="none")


def test_the_command_writes_the_picture_and_prints_box_and_thought(
    server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plan = lambda n, body: reply("<think>\x1b[31mred\x1b[0m is left</think>[100, 250, 500, 750]")
    monkeypatch.chdir(tmp_path)
    source = str(picture(tmp_path / "street.jpg"))
    base = ["ask", source, "the man in red", "--endpoint", server.url, "--model", "m"]
    assert egm(base) == 0
    out = capsys.readouterr().out
    assert "box: (40, 50) to (200, 150) of 400 x 200 pixels" in out and "picture: street-box.png" in out
    assert "red" in out and "\x1b" not in out
    with Image.open("street-box.png") as image:
        assert image.width == 400
    Path("street-box.png").unlink()
    assert egm([*base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["box"] == [40.0, 50.0, 200.0, 150.0]
    assert not Path("street-box.png").exists()
    assert egm([*base, "--out", str(tmp_path / "no" / "x.png")]) == 2
    assert egm(["ask", str(tmp_path / "none.png"), "x", "--endpoint", server.url]) == 2
    assert "none.png" in capsys.readouterr().err


def test_without_a_model_the_newest_of_the_runs_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert egm(["ask", str(picture(tmp_path / "p.png")), "x", "--runs", str(tmp_path / "runs")]) == 2
    assert "found no trained model" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["none.png", "x"], "none.png: no such file or folder"),
    (["text.png", "x"], "text.png: the picture cannot be decoded: not a known image format"),
    (["p.png", "x", "--out", "no/x.png"], "no: --out: there is no such folder"),
    (["p.png", "x", "--out", "x.txt"], "x.txt: --out: not the name of a picture"),
    (["p.png", "x", "--out", "."], ".: --out: this is a folder"),
    (["p.png", "x", "--prompt", "none", "--model", "m"], "unknown prompt"),
    (["p.png", "x", "--scoring", "none", "--model", "m"], "unknown scoring profile"),
])  # fmt: skip
def test_mistakes_are_reported_before_a_model_is_looked_for(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(Path("p.png"))
    Path("text.png").write_text("text")
    monkeypatch.setattr("grounding.library.serve", lambda *_, **__: pytest.fail("a server was started"))
    assert egm(["ask", *words]) == 2
    assert message in capsys.readouterr().err


def test_bytes_of_a_picture_with_an_orientation_are_sent_without_it(server, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (40, 20)).save(out, "JPEG", exif=exif)
    server.plan = lambda n, body: reply("[0, 0, 1000, 1000]")
    found = Asker(server.url).ask(out.getvalue(), "x", Request("m", "qwen3"))
    sent = base64.b64decode(server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].partition("base64,")[2])
    with Image.open(io.BytesIO(sent)) as image:
        assert image.getexif().get(0x0112, 1) == 1
    assert (found.width, found.height) == (
        40,
        20,
    ) and found.drawn().height > 40  # the picture is rotated as a viewer would show it
