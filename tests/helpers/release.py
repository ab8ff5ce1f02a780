"""A miniature of the published data set (EGM_Datasets): its layout, formats and names, with pictures and rows of our own."""

import io
import tarfile
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from grounding.data.shapes import EIGHT_FILES

NAME = "COCO_train2014_{:012d}.jpg"
COUNT = 6
SIZE = (64, 48)


def picture(number: int, flipped: bool) -> bytes:
    """Return a picture with different left and right halves, so that a mirrored copy can be recognised."""
    image = Image.new("RGB", SIZE, (number * 20, 0, 255 if flipped else 0))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def is_flipped(data: bytes) -> bool:
    pixel: Any = Image.open(io.BytesIO(data)).convert("RGB").getpixel((5, 5))
    return bool(pixel[2] > 128)


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def prepared_row(image: str) -> dict[str, Any]:
    text = "<image>\nLocate dog, output its bbox coordinates using JSON format"
    return {
        "data_source": "grounding",
        "prompt": [{"role": "user", "content": text}],
        "images": [image],
        "ability": "grounding",
        "reward_model": {"style": "rule", "ground_truth": [100, 200, 500, 600]},
        "extra_info": {"split": "train", "index": 0, "id": -1, "height": SIZE[1], "width": SIZE[0], "question": text},
    }


def write_release(root: Path) -> Path:
    """Write `EGM_Datasets` in its layout on the hub: a split tar, a whole tar, JSON lines, parquet. Return the folder."""
    (root / "metadata/eval").mkdir(parents=True)
    (root / "processed_rl_data").mkdir()
    for stem, flipped in (("coco", False), ("coco_flip", True)):
        members = {f"{stem}/train2014/{NAME.format(i)}": picture(i, flipped) for i in range(COUNT)}
        tar(root / f"{stem}.tar", members)
    whole = (root / "coco.tar").read_bytes()
    (root / "coco.tar").unlink()
    for part, at in (("aa", 0), ("ab", 5000)):
        (root / f"coco.tar.part_{part}").write_bytes(whole[at : at + 5000 if part == "aa" else None])

    def names(i: int) -> str:
        return f"{'coco_flip' if i % 2 else 'coco'}/train2014/{NAME.format(i)}"

    size = {"width": SIZE[0], "height": SIZE[1]}
    answer = 'It is on the left.\n</think>\n\n```json\n[\n\t{"bbox_2d": [100, 200, 500, 600], "label": "dog"}\n]\n```'
    ask = "<image>\nLocate dog, output its bbox coordinates using JSON format."
    sft = [
        {
            "id": -1,
            "image": names(i),
            **size,
            "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}],
        }
        for i in range(COUNT)
    ]
    stem = "vanilla_grounding_reasoning_training_dataset"
    (root / f"{stem}_cot_subset.jsonl").write_bytes(lines(sft))
    words = (
        "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: <ref>dog {}</ref>"
    )
    raw = [
        {"id": i, "image": names(i), **size, "conversations": [
            {"from": "human", "value": words.format(i)}, {"from": "gpt", "value": "<box>[100, 200, 500, 600]</box>"}]}
        for i in range(COUNT)
    ]  # fmt: skip
    (root / f"{stem}_raw.jsonl").write_bytes(lines(raw))
    for file in EIGHT_FILES:
        rows = [
            {"image": f"data/coco/train2014/{NAME.format(i)}", "sent": f"cat {i}", "bbox": [6.4, 9.5, 32.5, 28], **size}
            for i in range(COUNT)
        ]
        (root / f"metadata/eval/{file}.jsonl").write_bytes(lines(rows))
    for split, prefix in (("train", ""), ("val", "/home/someone/EGM/data/")):
        table = pa.Table.from_pylist([prepared_row(prefix + names(i)) for i in range(COUNT)])
        pq.write_table(table, root / f"processed_rl_data/{split}_grounding.parquet")
    return root
