"""Create a synthetic grounding set of coloured shapes on white, for demos and tests. The seed determines every byte.

The set has the layout and the row formats of the real data (SFT JSON, RL JSON, the eight evaluation files), so everything that runs on it
also runs on RefCOCO. A model of a million parameters learns it in minutes on a CPU: by default a picture holds one shape, and the
expressions use a dozen words. Evaluation pictures come from other random streams than training pictures.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
from PIL import Image, ImageDraw

from grounding.data.rows import EvaluationRow, TrainingDocument
from grounding.errors import UserError
from grounding.files import (
    MANIFEST,
    files_below,
    fsync_folder,
    is_published,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)

EIGHT_FILES = (
    "refcoco_val",
    "refcoco_testA",
    "refcoco_testB",
    "refcoco+_val",
    "refcoco+_testA",
    "refcoco+_testB",
    "refcocog_val",
    "refcocog_test",
)
"""Stems of the evaluation files, in the order of the published table."""

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (235, 200, 30)}
SHAPES = ("circle", "square", "triangle")
_FORMS = ("the {colour} {shape}", "{colour} {shape}", "the {shape} that is {colour}")
_VERSION = 1  # part of the digest: raise it whenever the bytes of the set change

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class ShapeSet:
    """The parameters of the set. `size` and `sides` are in pixels; `train` and `per_file` count expressions."""

    seed: int = 7
    train: int = 6000
    per_file: int = 40
    size: int = 224
    shapes_per_image: int = 1
    reasoning: bool = False
    """Whether SFT answers have the reference's long form (reasoning, `</think>`, a fenced JSON list)"""

    @property
    def sides(self) -> tuple[int, int]:
        """Return the smallest and the largest side of a shape, in pixels."""
        return self.size // 4, self.size // 2

    @property
    def digest(self) -> str:
        """Return 12 hex digits that identify the set: equal digests mean equal bytes."""
        text = orjson.dumps({**asdict(self), "version": _VERSION}, option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(text).hexdigest()[:12]


@dataclass(frozen=True)
class Shape:
    """A drawn shape. `box` is xyxy in pixels; its right and lower edges are exclusive."""

    colour: str
    name: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """A picture and its expressions: pairs of a sentence and the shape that it refers to."""

    image: str
    shapes: tuple[Shape, ...]
    expressions: tuple[tuple[str, Shape], ...]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _place(rng: random.Random, spec: ShapeSet) -> tuple[Shape, ...]:
    """Return shapes that differ in colour or form and do not overlap: at least one, and fewer than requested if they do not fit."""
    low, high = spec.sides
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    placed: list[Shape] = []
    for colour, name in rng.sample(kinds, spec.shapes_per_image):
        for _ in range(50):
            side = rng.randint(low, high)
            x, y = rng.randint(0, spec.size - side), rng.randint(0, spec.size - side)
            box = (x, y, x + side, y + side)
            if not any(_overlap(box, other.box) for other in placed):
                placed.append(Shape(colour, name, box))
                break
    return tuple(placed)


def scenes(spec: ShapeSet, stream: str, expressions: int, per_image: int, forms: tuple[int, ...]) -> Iterator[Scene]:
    """Yield scenes of one random stream until there are `expressions` expressions, `per_image` for each picture. Names of images have no
    folder and start at the number that `stream` implies, so they are unique only within one stream.
    """
    rng = random.Random(f"{spec.seed}/{stream}/{_VERSION}")
    number = 0
    while expressions > 0:
        shapes = _place(rng, spec)
        choices = [(_FORMS[f].format(colour=s.colour, shape=s.name), s) for s in shapes for f in forms]
        asked = tuple(rng.sample(choices, min(per_image, expressions, len(choices))))
        yield Scene(f"{number:06d}.png", shapes, asked)
        number += 1
        expressions -= len(asked)


def draw(spec: ShapeSet, shapes: tuple[Shape, ...]) -> bytes:
    """Return the picture as an RGB PNG of `size` x `size` pixels."""
    image = Image.new("RGB", (spec.size, spec.size), "white")
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        x1, y1, x2, y2 = shape.box
        inside = (x1, y1, x2 - 1, y2 - 1)  # Pillow also paints the last pixel
        fill = COLOURS[shape.colour]
        if shape.name == "circle":
            pen.ellipse(inside, fill=fill)
        elif shape.name == "square":
            pen.rectangle(inside, fill=fill)
        else:
            pen.polygon([(x1, y2 - 1), (x2 - 1, y2 - 1), ((x1 + x2 - 1) // 2, y1)], fill=fill)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def relative_box(box: Box, size: int) -> list[int]:
    """Convert a box in pixels xyxy to integers 0..1000, for a square picture of `size` x `size` pixels."""
    return [round(v * 1000 / size) for v in box]


def answer(shape: Shape, size: int, *, reasoning: bool = False) -> str:
    """Return the answer that a model should give for this shape: a JSON list with the box in 0..1000; with `reasoning`, in the long form."""
    label = f"{shape.colour} {shape.name}"
    listing = f'[{{"bbox_2d": {relative_box(shape.box, size)}, "label": "{label}"}}]'
    if not reasoning:
        return listing
    x, y = (shape.box[0] + shape.box[2]) / 2, (shape.box[1] + shape.box[3]) / 2
    where = f"{'upper' if y < size / 2 else 'lower'} {'left' if x < size / 2 else 'right'}"
    return f"The {label} is in the {where} part of the image.\n</think>\n\n```json\n{listing}\n```"


def sft_row(spec: ShapeSet, number: int, image: str, sent: str, shape: Shape) -> TrainingDocument:
    """Return an SFT row. The short form has exactly the question of RL and evaluation, because a tiny model cannot handle another wording.
    The question of the long form ends in a full stop, as in the reference's SFT data.
    """
    stop = "." if spec.reasoning else ""
    human = f"<image>\nLocate {sent}, output its bbox coordinates using JSON format{stop}"
    return {
        "id": number,
        "image": image,
        "height": spec.size,
        "width": spec.size,
        "conversations": [
            {"from": "human", "value": human},
            {"from": "gpt", "value": answer(shape, spec.size, reasoning=spec.reasoning)},
        ],
    }


def rl_row(spec: ShapeSet, number: int, image: str, sent: str, shape: Shape) -> TrainingDocument:
    """Return an RL row, with the expression in `<ref>` and the box in `<box>`, 0..1000."""
    question = f"Please provide the bounding box coordinate of the region this sentence describes: <ref>{sent}</ref>"
    return {
        "id": number,
        "image": image,
        "sent": sent,
        "height": spec.size,
        "width": spec.size,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": f"<box>{relative_box(shape.box, spec.size)}</box>"},
        ],
    }


def eval_row(spec: ShapeSet, image: str, sent: str, shape: Shape) -> EvaluationRow:
    """Return a row of an evaluation file; `bbox` is in pixels."""
    box = [float(v) for v in shape.box]
    return {"image": image, "sent": sent, "bbox": box, "height": spec.size, "width": spec.size}


def check(spec: ShapeSet) -> None:
    """Raise `UserError` if the set cannot be drawn."""
    if spec.train < 1 or spec.per_file < 1:
        raise UserError("a synthetic set needs at least one training expression and one in each evaluation file")
    if not 32 <= spec.size <= 4096:
        raise UserError(f"pictures of {spec.size} pixels cannot be drawn; give 32 to 4096", field="size")
    if not 1 <= spec.shapes_per_image <= len(COLOURS) * len(SHAPES):
        raise UserError(f"{spec.shapes_per_image} shapes a picture: give 1 to {len(COLOURS) * len(SHAPES)}")


def _write(folder: Path, spec: ShapeSet, advance: Callable[[int], None]) -> None:
    """Write everything except `done.json`. The order of files, and therefore every byte, depends only on `spec`."""
    for sub in ("images/train", "images/eval", "train_data", "eval_data"):
        (folder / sub).mkdir(parents=True)
    images = folder / "images"

    sft: list[TrainingDocument] = []
    rl: list[TrainingDocument] = []
    # one expression for each training picture: for an untrained model, more pictures help more than more wordings
    for scene in scenes(spec, "train", spec.train, 1, (0, 1, 2)):
        name = f"train/{scene.image}"
        (images / name).write_bytes(draw(spec, scene.shapes))
        for sent, shape in scene.expressions:
            sft.append(sft_row(spec, len(sft), name, sent, shape))
            rl.append(rl_row(spec, len(rl), name, sent, shape))
        advance(len(scene.expressions))
    write_json(folder / "train_data/sft.json", sft)
    write_json(folder / "train_data/rl.json", rl)

    first = 0
    for stem in EIGHT_FILES:
        lines, pictures = [], 0
        forms = (0, 2) if stem.startswith("refcocog") else (0, 1)
        # two expressions for each picture, so that statistics that group by picture can be tested
        for scene in scenes(spec, stem, spec.per_file, 2, forms):
            name = f"eval/{first + pictures:06d}.png"
            (images / name).write_bytes(draw(spec, scene.shapes))
            lines += [orjson.dumps(eval_row(spec, name, sent, shape)) + b"\n" for sent, shape in scene.expressions]
            pictures += 1
            advance(len(scene.expressions))
        (folder / f"eval_data/{stem}.jsonl").write_bytes(b"".join(lines))
        first += pictures


def is_done(out: Path, spec: ShapeSet) -> bool:
    """Return whether `out` holds exactly this set and is complete; a power cut may have left empty files."""
    return _is_own(out, spec) and (is_published(out) or not _broken(out))


def is_synthetic(file: Path) -> bool:
    """Return whether an evaluation file belongs to a set that `generate` created."""
    done = file.resolve().parent.parent / "done.json"
    try:
        return file.resolve().parent.name == "eval_data" and done.is_file() and "set" in read_json(done)
    except (OSError, UserError, TypeError):
        return False


def _is_own(out: Path, spec: ShapeSet) -> bool:
    done = out / "done.json"
    return done.is_file() and read_json(done).get("digest") == spec.digest


def _broken(out: Path) -> bool:
    """Return whether a file is absent or truncated. A set of an older version has no manifest to compare with."""
    return read_manifest(out) is not None or any(not p.stat().st_size for p in files_below(out).values())


def _refuse_foreign(out: Path) -> None:
    """Raise `UserError` if a broken set holds a file that is not part of any set, so that it is not deleted with the set."""
    manifest = read_manifest(out)
    for name in files_below(out):
        own = name.split("/")[0] in _TOP if manifest is None else name in manifest.files or name in _TOP
        if not own:
            raise UserError(
                f"the set is damaged and cannot be created again, because its folder holds a file that is not part of it ({name})",
                file=out,
                hint="Move that file elsewhere, or choose another folder.",
            )


_TOP = frozenset({"images", "train_data", "eval_data", "done.json", MANIFEST})
"""The entries of a set's folder"""


def generate(out: Path, spec: ShapeSet, advance: Callable[[int], None] = lambda _: None) -> bool:
    """Create the set in `out`; return False if it exists already. `advance` is called with the number of new expressions, after every few.

    The set is written to a temporary folder next to `out` and renamed, so `out` is never incomplete. Raises `UserError` if `out` holds
    anything else.
    """
    check(spec)
    out = out.absolute()
    if is_done(out, spec):
        return False
    broken = out.is_dir() and _is_own(out, spec)  # the same set, damaged by a power cut, is replaced
    if not broken and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("the folder is not empty and holds something else", file=out, hint="Choose another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, spec, advance)
        write_manifest(temporary)
        write_json(temporary / "done.json", {"digest": spec.digest, "set": asdict(spec)})
        if broken:
            _refuse_foreign(out)
            shutil.rmtree(out)
        try:
            temporary.replace(out)
        except OSError:
            if not is_done(out, spec):  # if it is complete, another process created the same set
                raise
            return False
        fsync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True
