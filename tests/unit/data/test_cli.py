"""The commands as a user types them."""

from pathlib import Path

import orjson
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from grounding.cli.data import register
from grounding.errors import Failure, UserError

app = typer.Typer()
register(app)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "set"
    result = run("shapes", "--out", out, "--train", 9, "--per-file", 4, "--size", 64)
    assert result == (0, f"{out}: 9 training expressions, 4 in each of 8 files")
    return out


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", *map(str, args)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output.strip()


def test_shapes_again(made: Path) -> None:
    code, text = run("shapes", "--out", made, "--train", 9, "--per-file", 4, "--size", 64)
    assert code == 0 and text.endswith("(there already)")


def test_prepare(made: Path, tmp_path: Path) -> None:
    files = [a for stem in ("refcoco_val", "refcocog_val") for a in ("--eval", made / f"eval_data/{stem}.jsonl")]
    args = (
        "--train",
        made / "train_data/rl.json",
        *files,
        "--images",
        made / "images",
        "--out",
        tmp_path,
        "--fraction",
        0.5,
    )
    assert run("prepare", *args) == (0, f"{tmp_path}: 9 training rows, 4 validation rows, 0 left out")
    code, text = run("prepare", *args, "--json")
    assert code == 0
    assert orjson.loads(text) == {"train": 9, "validation": 4, "leftOut": 0, "problems": 0, "out": str(tmp_path)}


def test_lint(made: Path, tmp_path: Path) -> None:
    good = [made / "train_data/rl.json", made / "train_data/sft.json", *sorted((made / "eval_data").iterdir())]
    code, text = run("lint", *good, "--images", made / "images")
    assert (code, text.splitlines()[-1]) == (0, "50 rows in 10 files: 0 errors, 0 warnings")

    bad = tmp_path / "bad.jsonl"
    row = orjson.loads((made / "eval_data/refcoco_val.jsonl").read_bytes().splitlines()[0])
    bad.write_bytes(orjson.dumps({**row, "bbox": [[1]]}) + b"\n" + orjson.dumps({**row, "image": "[red]x.png"}))
    code, text = run("lint", bad, "--images", made / "images")
    assert code == 1
    assert "bad.jsonl:1" in text and "broken-row" in text and "[red]x.png" in text
    code, text = run("lint", bad, "--images", made / "images", "--json")
    assert code == 1
    assert [orjson.loads(line)["kind"] for line in text.splitlines()] == ["broken-row", "missing-image"]


def test_flip(made: Path, tmp_path: Path) -> None:
    code, text = run("flip", made / "eval_data/refcoco_val.jsonl", "--images", made / "images", "--out", tmp_path)
    assert (code, text) == (0, f"{tmp_path}: 4 rows, 2 pictures under {tmp_path / 'images'}")
    flipped = tmp_path / "refcoco_val.jsonl"
    assert run("lint", flipped, "--images", tmp_path / "images")[0] == 0
    image = orjson.loads(flipped.read_bytes().splitlines()[0])["image"]
    assert Image.open(tmp_path / "images" / image).size == (64, 64)


def test_reasoning_says_what_is_needed(made: Path, tmp_path: Path) -> None:
    args = ("reasoning", made / "train_data/rl.json", "--images", made / "images", "--out", tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="--endpoint and --model"):
        run(*args)
    with pytest.raises(UserError, match="no answer"):
        run(*args, "--finish")
    with pytest.raises(UserError, match=r"\.jsonl"):
        run(*args[:-1], tmp_path / "a.json")


def test_reasoning_from_an_endpoint_that_is_not_there(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grounding.data import reasoning

    monkeypatch.setattr(reasoning.Endpoint.__init__, "__defaults__", (None, 800, 0.7, 64, 2, 0.001, 5.0))
    with pytest.raises(Failure, match=r"9 of 9 rows have no answer:\n  row 1: cannot connect to 127.0.0.1:9"):
        run("reasoning", made / "train_data/rl.json", "--images", made / "images", "--out", tmp_path / "a.jsonl",
            "--endpoint", "http://127.0.0.1:9/v1", "--model", "m")  # fmt: skip
