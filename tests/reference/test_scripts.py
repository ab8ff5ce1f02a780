"""Preparation, reward and evaluation give the results of the reference's scripts for the same inputs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from grounding.data.jobdata import materialise
from grounding.data.prepare import prepare
from grounding.data.shapes import EIGHT_FILES
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Sampling, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.plan import plan
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.run import run
from grounding.train.rl.reward import compute_score

Script = Callable[..., subprocess.CompletedProcess[str]]
IMAGES = ("coco.tar", "coco_flip.tar")
READ = ("data_source", "prompt", "images", "ability")


def _same(ours: Path, theirs: Path) -> int:
    """Compare the columns that verl reads in two prepared files, and pictures by their content. Return the number of rows."""
    found, expected = pq.read_table(ours).to_pylist(), pq.read_table(theirs).to_pylist()
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert {k: a[k] for k in READ if k != "images"} == {k: b[k] for k in READ if k != "images"}
        assert a["reward_model"]["style"] == b["reward_model"]["style"]
        assert [float(v) for v in a["reward_model"]["ground_truth"]] == [
            float(v) for v in b["reward_model"]["ground_truth"]
        ]
        facts = ("split", "index", "height", "width", "question")
        assert {k: a["extra_info"][k] for k in facts} == {k: b["extra_info"][k] for k in facts}
        [mine], [other] = a["images"], b["images"]
        assert Path(mine).read_bytes() == Path(other).read_bytes()
    return len(found)


@pytest.mark.parametrize(("form", "prompt"), [("default", "grounding"), ("qwen", "qwen3")])
def test_preparation(script: Script, release: Path, tmp_path: Path, form: str, prompt: str) -> None:
    raw = release / "vanilla_grounding_reasoning_training_dataset_raw.jsonl"
    rows = [orjson.loads(line) | {"sent": f"dog {i}"} for i, line in enumerate(raw.read_bytes().splitlines())]
    train = tmp_path / "train.jsonl"
    train.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    words = ("--output_dir", tmp_path / "theirs", "--num_workers", 1, "--format", form)
    base = {"BASE_IMG_PATH": tmp_path / "data"}
    script("verl/examples/data_preprocess/grounding_all.py", "--input_json", train, *words, **base)
    names = [f"{name}.jsonl" for name in EIGHT_FILES]
    # the reference opens BASE_IMG_PATH/image, and evaluation rows begin with data/
    (tmp_path / "data" / "data").symlink_to(tmp_path / "data")
    folder = release / "metadata/eval"
    script(
        "verl/examples/data_preprocess/grounding_val.py", "--input_dir", folder, "--test_files", *names, *words, **base
    )
    made = prepare(
        [train],
        [folder / name for name in names],
        [release / name for name in IMAGES],
        tmp_path / "ours",
        prompt=prompt,
    )
    assert (made.train, made.validation) == (len(rows), 8)
    assert _same(tmp_path / "ours/train.parquet", tmp_path / "theirs/train_grounding.parquet") == len(rows)
    assert _same(tmp_path / "ours/val.parquet", tmp_path / "theirs/val_grounding.parquet") == 8


def test_the_published_parquet_with_its_pictures_named_anew(script: Script, release: Path, tmp_path: Path) -> None:
    from grounding.api import parse

    job = {
        "apiVersion": "grounding.egm.dev/v1alpha1",
        "kind": "GroundingTrainJob",
        "metadata": {"name": "a"},
        "spec": {
            "preset": "egm-8b-rl",
            "data": {
                "prepared": str(release / "processed_rl_data/train_grounding.parquet"),
                "images": [str(release / name) for name in IMAGES],
            },
        },
    }
    found = materialise(parse(orjson.dumps(job).decode())[0], tmp_path / "ours")
    assert found.train_parquet is not None and found.val_parquet is not None
    for split, ours in (("train", found.train_parquet), ("val", found.val_parquet)):
        theirs = tmp_path / f"{split}.parquet"
        theirs.write_bytes((release / f"processed_rl_data/{split}_grounding.parquet").read_bytes())
        script("verl/scripts/replace_img_dir.py", "--parquet_path", theirs, "--base_img_root", tmp_path / "data")
        assert _same(ours, theirs) == 6


REWARD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("theirs", sys.argv[1])
theirs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theirs)
for line in sys.stdin:
    case = json.loads(line)
    print("reward", json.dumps(theirs.compute_score(**case)))  # marked, because the reference's function also prints some cases
"""


def _answers(number: int) -> list[str]:
    draw = random.Random(7)

    def box() -> str:
        low = draw.choice([-50, 0, 0, 0])
        numbers = [
            draw.choice([draw.randint(low, 1100), round(draw.uniform(0, 1000), 2)])
            for _ in range(draw.choice([3, 4, 4, 4, 4, 5]))
        ]
        return draw.choice(["[{}]", "({})", '{{"bbox_2d": [{}], "label": "a"}}', "<answer>[{}]</answer>"]).format(
            ", ".join(map(str, numbers))
        )

    words = [
        "",
        "It is left.\n</think>\n\n",
        "no box",
        "word " * 7,
        "far " * 600,
        '["a"] ',
        "5e1 ",
        "<answer>none</answer> ",
    ]
    return [draw.choice(words) + " ".join(box() for _ in range(draw.choice([0, 1, 1, 1, 2]))) + draw.choice(["", "", " tags [x]"])
            for _ in range(number)]  # fmt: skip


def test_rewards_bit_for_bit(reference: Path) -> None:
    cases = []
    draw = random.Random(11)
    for answer in _answers(3000):
        kind = draw.choice(["mix", "mix", "sigmoid", "normalized_exp", "penalty", "eval"])
        truth = [draw.uniform(0, 500), draw.uniform(0, 500), draw.uniform(500, 1000), draw.uniform(500, 1000)]
        info = {
            "width": draw.randint(1, 900),
            "height": draw.randint(1, 900),
            "split": draw.choice(["train", "train", "test"]),
        }
        cases.append({"solution_str": answer, "ground_truth": truth, "extra_info": info, "data_source": "grounding",
                      "reward_type": kind, "alpha": draw.choice([0.5, 0.3]), "threshold": draw.choice([0.5, 0.7])})  # fmt: skip
    python = os.environ.get("EGM_REFERENCE_PYTHON", sys.executable)
    file = reference / "verl/verl/utils/reward_score/grounding.py"
    given = "\n".join(json.dumps(case) for case in cases)
    done = subprocess.run(
        [python, "-c", REWARD, str(file)], input=given, capture_output=True, text=True, check=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("reward ")]
    theirs = [json.loads(line.removeprefix("reward ")) for line in lines]
    ours = [compute_score(**case)["score"] for case in cases]
    assert len(theirs) == 3000 and len({round(value, 3) for value in theirs}) > 50
    assert ours == theirs


def test_an_evaluation_asks_and_scores_alike(script: Script, release: Path, tmp_path: Path, server: Any) -> None:
    texts = [
        '[{"bbox_2d": [100, 200, 510, 590], "label": "cat"}]',
        'first [1, 2, 3, 4] then [{"bbox_2d": [99.5, 2e2, 500, 600]}]',
        "The cat is at 100 200 520 560",
        "[510, 590, 100, 200]",
        "nothing to see",
        "[100, 200, 500, 600, 7]",
    ]

    def answer(n: int, body: dict[str, Any]) -> dict[str, Any]:
        number = int("".join(c for c in body["messages"][0]["content"][1]["text"].split(",")[0] if c.isdigit()))
        message = {"role": "assistant", "content": texts[number]}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "m",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}}  # fmt: skip

    server.plan = answer
    name = "refcoco+_testA"
    file = release / f"metadata/eval/{name}.jsonl"
    words = ("--data_json", file, "--endpoint", server.url, "--model", "m", "--output_dir", tmp_path / "theirs")
    more = ("--max_tokens", 4096, "--concurrency", 2, "--prompt_template", "qwen3", "--box_remap", "scale")
    script("verl/scripts/sglang_infer.py", *words, *more, BASE_IMG_DIR=tmp_path)
    theirs = sorted(orjson.dumps(b, option=orjson.OPT_SORT_KEYS) for b in server.bodies)
    server.bodies.clear()

    request = Request("m", "qwen3", extras=get_engine("sglang").request_extras(Sampling()))
    evaluation = Evaluation(
        (file,),
        tuple(release / i for i in IMAGES),
        tmp_path / "ours",
        "m",
        Options((server.url,), request, concurrency=2),
    )
    summary = run(evaluation, plan(evaluation))
    assert sorted(orjson.dumps(b, option=orjson.OPT_SORT_KEYS) for b in server.bodies) == theirs
    expected = {int(k): v["v"] for k, v in json.loads((tmp_path / "theirs/iou_detail.json").read_text()).items()}
    assert {row["line"] - 1: row["iou"] for row in read_rows(tmp_path / "ours")} == expected
    stated = dict(line.split(": ") for line in (tmp_path / "theirs/iou.txt").read_text().splitlines()[1:])
    files = summary["files"] if isinstance(summary, dict) else [f.__dict__ for f in summary.files]
    assert f"{files[0]['acc']:.6f}" == stated["pass_rate@0.5"] and f"{files[0]['mean_iou']:.6f}" == stated["mean_iou"]
