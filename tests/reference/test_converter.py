"""Our SFT answers equal those of the reference's converter for the same inputs.

See conftest.py for what it needs.
"""

import subprocess
import sys
from pathlib import Path

import orjson

from grounding.data.reasoning import Task, sft_row

TEXTS = (
    "It is the leftmost of the two dogs.",
    "Two sentences. The second one\nstarts a line.",
    "  Ünïcode: 猫 — “quoted” \\ 100 %",
    "{braces} and [brackets], a\ttab",
)


def test_rows_equal_those_of_the_reference_byte_for_byte(reference: Path, tmp_path: Path) -> None:
    expected, tasks = tmp_path / "out.jsonl", []
    (tmp_path / "answers").mkdir()
    for number in range(40):
        sent, text = f"dog {number}, näher am Tor", TEXTS[number % len(TEXTS)]
        box = [number, 2 * number, 500 + number, 999]
        tasks.append((Task(str(number), number, "-1", f"coco/{number}.jpg", sent, (*map(float, box),)), text))
        item = {"index": number, "question": sent, "image_path": f"coco/{number}.jpg", "gt_bbox_normalized": box,
                "image_height": 480, "image_width": 640, "gpt_analysis": text}  # fmt: skip
        (tmp_path / f"answers/analysis_{number:06d}.json").write_bytes(orjson.dumps(item))
    command = [
        sys.executable,
        str(reference / "sft/data_generation/convert_gpt_to_qwen3_sft.py"),
        "--gpt_answer_dir",
        str(tmp_path / "answers"),
        "--output_jsonl",
        str(expected),
    ]
    subprocess.run(command, check=True, capture_output=True)
    theirs = [orjson.loads(line) for line in expected.read_bytes().splitlines()]
    ours = [sft_row(task, text, 640, 480) for task, text in tasks]
    assert [r | {"id": -1} for r in ours] == theirs  # a row of ours keeps its id, the reference writes -1
