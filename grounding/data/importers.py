"""Convert public formats of grounding data to rows of this project, for `egm data import`.

Each reader yields `Expression`s: an expression with one box, xyxy in pixels. The format of a file is recognised by its first row. Some
formats fix the space of their boxes; for the others the user has to declare it, because the numbers do not show it.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from grounding import boxes
from grounding.api.base import ROW_SUFFIXES
from grounding.data import cocoa
from grounding.data.embedded import embedded_sources
from grounding.data.image_source import clean_name
from grounding.data.images import ImageStore, open_images
from grounding.data.records import Box, Expression, file_stem, parse_expression, read_row_objects, unquote
from grounding.data.rows import EvaluationRow, TrainingDocument, Turn
from grounding.data.spaces import to_pixels
from grounding.errors import UserError
from grounding.files import atomic_write, read_json
from grounding.jsontypes import JsonObject
from grounding.prompts import render

Format = Literal["evaluation", "swift", "llama-factory", "lmms", "refer", "vlm-r1", "cocoa"]
Space = Literal["pixels", "pixels-xywh", "0..1000", "0..1"]
Target = Literal["evaluation", "rl", "sft"]
_WRITTEN: dict[Space, boxes.Space] = {
    "pixels": "xyxy",
    "pixels-xywh": "xywh",
    "0..1000": "relative",
    "0..1": "fraction",
}
"""Name of a space in `--boxes` -> its name in `data/spaces.py`"""

_PICKLES = (".p", ".pkl", ".pickle")
_QWEN_REF = re.compile(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>|<ref>(.*?)</ref>", re.DOTALL)
_N = r"\s*(-?\d+(?:\.\d+)?)\s*"
_QWEN_BOX = re.compile(
    rf"<\|box_start\|>\s*\({_N},{_N}\)\s*,\s*\({_N},{_N}\)\s*<\|box_end\|>"
    rf'|"bbox_2d"\s*:\s*\[{_N},{_N},{_N},{_N}\]|<box>\s*\[{_N},{_N},{_N},{_N}\]\s*</box>',
)
_LOCATE = re.compile(
    r"^\s*(?:<image>\s*)*(?:locate|find|detect|point to|ground)\s+(.+?)(?:[,.]?\s*(?:output|return|report)\b.*)?[.?]?\s*$",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class _Found:
    """An expression found in a foreign row. `split` names the output file; `size` is (width, height) in pixels, None if the row does not
    give it.
    """

    number: int
    image: str
    sent: str
    box: Box
    space: Space
    size: tuple[int, int] | None
    split: str = ""
    amodal: Box | None = None
    """Box of the whole object, in the same space, if the row has two boxes; `box` is then the box of the visible part"""


@dataclass(frozen=True)
class Imported:
    """The result of an import: the number of rows of each file, and the number of pictures."""

    files: dict[Path, int]
    pictures: int


def _fail(path: Path, number: int, field: str, text: str, hint: str = "") -> UserError:
    return UserError(text, file=path, line=number, field=field, hint=hint)


def _box(value: object, path: Path, number: int, field: str) -> Box:
    if isinstance(value, list | tuple) and len(value) == 4:
        numbers = [v for v in value if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
        if len(numbers) == 4:
            a, b, c, d = map(float, numbers)
            return a, b, c, d
    raise _fail(path, number, field, f"expected four numbers, found {str(value)[:60]}")


def _text(value: object, path: Path, number: int, field: str) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise _fail(path, number, field, f"expected a text, found {str(value)[:60]!r}")


def _size(row: JsonObject) -> tuple[int, int] | None:
    width, height = row.get("width"), row.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    return None


def _name(value: object, path: Path, number: int, field: str = "image") -> str:
    """Return the name of a picture, given as a text or as an object with a `path`."""
    if isinstance(value, dict):
        value = value.get("path")
    return clean_name(_text(value, path, number, field))


def _first_image(row: JsonObject, path: Path, number: int) -> str:
    images = row.get("images", row.get("image"))
    if isinstance(images, list):
        if len(images) != 1:
            raise _fail(path, number, "images", f"expected one picture, found {len(images)}")
        images = images[0]
    return _name(images, path, number, "images")


def _turns(row: JsonObject, path: Path, number: int) -> tuple[str, str]:
    """Return the question and the answer from `messages` or `conversations`."""
    turns = row.get("messages", row.get("conversations"))
    texts = []
    for turn in turns if isinstance(turns, list) else []:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if role != "system":
            texts.append(str(turn.get("content", turn.get("value"))) if isinstance(turn, dict) else "")
    if len(texts) != 2:
        raise _fail(path, number, "messages", f"expected a question and an answer, found {len(texts)} turns")
    return texts[0], texts[1]


def _evaluation(path: Path, space: Space | None) -> Iterator[_Found]:
    for number, row in read_row_objects(path):
        e = parse_expression(row, path, number)
        in_pixels = any(row.get(n) is not None for n in ("bbox", "modal_bbox"))
        yield _Found(number, e.image, e.sent, e.bbox, space if space and in_pixels else "pixels", (e.width, e.height))


def _vlm_r1(path: Path, space: Space | None) -> Iterator[_Found]:
    for number, row in read_row_objects(path):
        sent = row.get("normal_caption")
        if not isinstance(sent, str) or not sent.strip():
            sent = row.get("problem")
        box = _box(row.get("solution"), path, number, "solution")
        image = _name(row.get("image"), path, number)
        yield _Found(number, image, _text(sent, path, number, "normal_caption"), box, space or "pixels", _size(row))


def _lmms(path: Path, space: Space | None) -> Iterator[_Found]:
    for number, row in read_row_objects(path):
        answer = row["answer"]
        box = _box(row.get("bbox"), path, number, "bbox")
        image = _name(row.get("image") or row.get("file_name"), path, number)
        for sent in answer if isinstance(answer, list) else [answer]:
            yield _Found(number, image, _text(sent, path, number, "answer"), box, space or "pixels-xywh", _size(row))


def _swift(path: Path, space: Space | None) -> Iterator[_Found]:
    for number, row in read_row_objects(path):
        objects = row.get("objects")
        if not isinstance(objects, dict):
            raise _fail(path, number, "objects", "expected an object with `ref` and `bbox`")
        refs, boxes = objects.get("ref"), objects.get("bbox")
        if not isinstance(refs, list) or not isinstance(boxes, list) or len(refs) != len(boxes):
            raise _fail(path, number, "objects", "expected as many boxes in `bbox` as expressions in `ref`")
        stated = {None: "pixels", "real": "pixels", "norm1": "0..1", "norm1000": "0..1000"}.get(
            objects.get("bbox_type")
        )
        if stated is None:
            raise _fail(
                path, number, "objects.bbox_type", f"expected real or norm1, found {objects.get('bbox_type')!r}"
            )
        kind: Any = space or stated
        image = _first_image(row, path, number)
        for ref, box in zip(refs, boxes, strict=True):
            sent = _text(ref, path, number, "objects.ref")
            yield _Found(number, image, sent, _box(box, path, number, "objects.bbox"), kind, _size(row))


def _llama_factory(path: Path, space: Space | None) -> Iterator[_Found]:
    if space is None:
        raise UserError(
            "these rows do not say in which space their boxes are",
            file=path,
            field="--boxes",
            hint="Add --boxes pixels (Qwen2.5-VL's data) or --boxes 0..1000 (Qwen2-VL's and Qwen3-VL's).",
        )
    for number, row in read_row_objects(path):
        question, answer = _turns(row, path, number)
        boxes = _QWEN_BOX.findall(answer)
        refs = [a or b for a, b in _QWEN_REF.findall(question)]
        if not refs and (plain := _LOCATE.match(question)):
            refs = [plain[1]]
        if len(boxes) != 1 or len(refs) != 1:
            raise _fail(
                path, number, "messages",
                f"expected one expression and one box, found {len(refs)} and {len(boxes)}",
                "The expression is read from <|object_ref_start|>…<|object_ref_end|>, <ref>…</ref> or `Locate …`, the box from "
                "<|box_start|>(x1,y1),(x2,y2)<|box_end|>, `bbox_2d` or <box>[…]</box>.",
            )  # fmt: skip
        numbers = [float(v) for v in boxes[0] if v]
        box = _box(numbers, path, number, "messages")
        yield _Found(number, _first_image(row, path, number), unquote(refs[0]), box, space, _size(row))


class _Plain(pickle.Unpickler):
    """Read only containers, numbers and texts. A pickle that refers to a class or function is refused before it can be called."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it uses {module}.{name}")


def load_plain_pickle(path: Path) -> object:
    """Read a pickle of plain values. Raises `UserError` for any other pickle, because reading it may run arbitrary code."""
    data = path.read_bytes()
    error: Exception | None = None
    for encoding in ("utf-8", "latin-1"):  # texts of Python 2 carry no encoding
        try:
            return _Plain(io.BytesIO(data), encoding=encoding).load()
        except UnicodeDecodeError as e:
            error = e
        except Exception as e:
            error = e
            break
    raise UserError(
        f"cannot be read as a pickle of plain values: {error}",
        file=path,
        hint="Only dictionaries, lists, numbers and texts are read, because a pickle can run code.",
    )


def _entries(value: object, path: Path, field: str) -> list[JsonObject]:
    if isinstance(value, list | tuple) and all(isinstance(v, dict) for v in value):
        return list(value)
    raise UserError("expected a list of objects", file=path, field=field)


def _by_id(instances: JsonObject, field: str, path: Path) -> dict[object, JsonObject]:
    return {entry.get("id"): entry for entry in _entries(instances.get(field), path, field)}


def _refer(path: Path, space: Space | None) -> Iterator[_Found]:
    refs = _entries(load_plain_pickle(path), path, "")
    beside = path.with_name("instances.json")
    if not beside.is_file():
        raise UserError("no such file", file=beside, hint="The boxes are in instances.json, next to the references.")
    instances = read_json(beside)
    if not isinstance(instances, dict):
        raise UserError("expected an object with `images` and `annotations`", file=beside)
    images, boxes = _by_id(instances, "images", beside), _by_id(instances, "annotations", beside)
    for number, ref in enumerate(refs, 1):
        image, annotation = images.get(ref.get("image_id")), boxes.get(ref.get("ann_id"))
        if image is None or annotation is None:
            raise _fail(path, number, "image_id", f"{beside.name} has no picture or box of this reference")
        box = _box(annotation.get("bbox"), path, number, "bbox")
        name = _name(image.get("file_name"), path, number, "file_name")
        split = _text(ref.get("split"), path, number, "split")
        for sentence in _entries(ref.get("sentences"), path, f"{number}: sentences"):
            sent = _text(sentence.get("sent"), path, number, "sentences")
            yield _Found(number, name, sent, box, space or "pixels-xywh", _size(image), split)


def _cocoa(path: Path, space: Space | None) -> Iterator[_Found]:
    value = read_json(path)
    if not cocoa.looks_like(value):
        raise UserError("expected `images` and `annotations` with regions or two boxes each", file=path)
    for region in cocoa.read(value, path):
        name = clean_name(region.image)
        yield _Found(region.number, name, region.name, region.visible, "pixels", region.size, amodal=region.amodal)


_READERS: dict[Format, Callable[[Path, Space | None], Iterator[_Found]]] = {
    "evaluation": _evaluation,
    "swift": _swift,
    "llama-factory": _llama_factory,
    "lmms": _lmms,
    "refer": _refer,
    "vlm-r1": _vlm_r1,
    "cocoa": _cocoa,
}
assert set(_READERS) == set(get_args(Format))


def is_object(path: Path) -> bool:
    """Return whether a JSON file holds one object instead of a list or lines of rows."""
    with path.open("rb") as f:
        start = f.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    return start.startswith(b"{") and (b'"images"' in start or b'"annotations"' in start or b'"info"' in start)


def recognise(path: Path) -> Format:
    """Return the format of a file, determined by its name and its first row. Raises `UserError` if the format is unknown."""
    if path.suffix in _PICKLES:
        return "refer"
    if path.suffix == ".json" and is_object(path) and cocoa.looks_like(read_json(path)):
        return "cocoa"
    row = next((row for _, row in read_row_objects(path)), None)
    if row is None:
        raise UserError("the file holds no rows", file=path)
    tests: tuple[tuple[Format, bool], ...] = (
        ("swift", isinstance(row.get("objects"), dict) and "bbox" in row["objects"]),
        ("llama-factory", "images" in row and ("messages" in row or "conversations" in row)),
        ("vlm-r1", "solution" in row and ("normal_caption" in row or "problem" in row)),
        ("lmms", "answer" in row and "bbox" in row),
        ("evaluation", "image" in row and ("sent" in row or "conversations" in row)),
    )
    found = next((name for name, holds in tests if holds), None)
    if found is None:
        raise UserError(
            f"the format of these rows is unknown; the first row has {', '.join(sorted(map(str, row))[:12])}",
            file=path,
            hint=f"Known formats: {', '.join(get_args(Format))}; see docs/data.md.",
        )
    return found


def read_foreign(
    path: Path, store: ImageStore, form: Format | None = None, space: Space | None = None
) -> Iterator[tuple[str, Expression]]:
    """Yield (split, expression) for every expression of a foreign file; the split is empty if the file has no splits.

    `space` declares the space of the boxes. The size of a picture is taken from the row if it has one, otherwise from the picture.
    Raises `UserError` with file, line and field.
    """
    reader = _READERS[form or recognise(path)]
    for found in reader(path, space):
        size = found.size
        if size is None:
            try:
                size = store.size(found.image)
            except UserError as error:
                raise _fail(path, found.number, "image", error.message, "Add --images with the pictures.") from None
        box = to_pixels(found.box, size, _WRITTEN[found.space])
        if box[0] >= size[0] or box[1] >= size[1] or box[2] > 2 * size[0] or box[3] > 2 * size[1]:
            raise _fail(
                path, found.number, "bbox",
                f"the box {list(found.box)}, read as {found.space}, is outside the picture of {size[0]} x {size[1]}",
                f"Declare the space with --boxes {' | '.join(get_args(Space))}.",
            )  # fmt: skip
        both = () if found.amodal is None else (box, to_pixels(found.amodal, size, _WRITTEN[found.space]))
        yield found.split, Expression(file_stem(path), found.number, found.image, found.sent, box, *size, *both)


def evaluation_row(e: Expression) -> EvaluationRow:
    """Return the expression as a row of an evaluation file."""
    row: EvaluationRow = {"image": e.image, "sent": e.sent, "bbox": list(e.bbox), "height": e.height, "width": e.width}
    if e.visible is None or e.amodal is None:
        return row
    row["modal_bbox"], row["amodal_bbox"] = list(e.visible), list(e.amodal)
    return row


def _relative(e: Expression, amodal: bool) -> list[int]:
    x1, y1, x2, y2 = e.amodal if amodal and e.amodal is not None else e.bbox
    scaled = (x1 * 1000 / e.width, y1 * 1000 / e.height, x2 * 1000 / e.width, y2 * 1000 / e.height)
    return [min(1000, max(0, round(v))) for v in scaled]


def rl_row(e: Expression, number: int, *, amodal: bool = False) -> TrainingDocument:
    """Return a row for `egm data prepare` and `egm data reasoning`. Its box is in 0..1000; with `amodal` it is the box of the whole object."""
    human = "<image>\n" + render("amodal" if amodal else "grounding", e.sent).rstrip()
    return _training_row(e, number, human, f"<box>{_relative(e, amodal)}</box>")


def sft_row(e: Expression, number: int, *, amodal: bool = False) -> TrainingDocument:
    """Return an SFT row whose answer is the box, without reasoning."""
    listing = f'{{"bbox_2d": {_relative(e, amodal)}, "label": {orjson.dumps(e.sent).decode()}}}'
    human = "<image>\n" + render("qwen3_amodal" if amodal else "qwen3", e.sent) + "."
    return _training_row(e, number, human, f"```json\n[\n\t{listing}\n]\n```")


def _training_row(e: Expression, number: int, human: str, answer: str) -> TrainingDocument:
    turns: list[Turn] = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return {
        "id": number,
        "image": e.image,
        "sent": e.sent,
        "height": e.height,
        "width": e.width,
        "conversations": turns,
    }


_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def _whole_files(files: Sequence[Path]) -> list[list[Path]]:
    """Return the given files and those in the given folders, with the shards of one file grouped in order. Raises `UserError` if there are
    none.
    """
    found: dict[Path, list[Path]] = {}
    for given in files:
        inside = sorted(p for p in given.rglob("*") if p.suffix in ROW_SUFFIXES) if given.is_dir() else [given]
        if not inside or not given.exists():
            raise UserError("no such file" if not given.exists() else "the folder has no files of rows", file=given)
        for path in inside:
            whole = path.with_name(_SHARD.sub("", file_stem(path)) + path.suffix)
            found.setdefault(whole, []).append(path)
    return [sorted(dict.fromkeys(paths)) for paths in found.values()]


def import_files(
    files: Sequence[Path],
    images: Sequence[Path],
    out: Path,
    *,
    form: Format | None = None,
    space: Space | None = None,
    target: Target = "evaluation",
    name: str = "",
    amodal: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Imported:
    """Write `out`/<name>.jsonl for each file, or <name>_<split>.jsonl for each of its splits, and embedded pictures to `out`/images.

    Shards (`val-00000-of-00002.parquet`) are treated as one file, `val`. For a folder, all files of rows in it are imported.

    With `amodal`, training rows ask for the whole object and have its box; evaluation rows have both boxes. The default name is that of the
    file, or that of the folder for files of references (`refs(unc).p`). Nothing is written if any row is wrong.
    """
    whole = _whole_files(files)
    inside = embedded_sources([path for paths in whole for path in paths])
    store, embedded = open_images(*images, *inside), open_images(*inside)
    written: dict[Path, int] = {}
    pictures: set[str] = set()
    for paths in whole:
        path = paths[0]
        lines: dict[str, bytearray] = defaultdict(bytearray)
        counts: dict[str, int] = defaultdict(int)
        for part in paths:
            for split, found in read_foreign(part, store, form, space):
                counts[split] += 1
                if amodal and found.amodal is None:
                    raise _fail(
                        part, found.line, "bbox", "the row has no box of the whole object", "Leave --amodal out."
                    )
                row = _target_row(found, counts[split], target, amodal=amodal)
                lines[split] += orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
                if inside and found.image in embedded:
                    pictures.add(found.image)
                advance(1)
        if not lines:
            raise UserError("the file holds no rows", file=path)
        stem = name or (path.absolute().parent.name if path.suffix in _PICKLES else _SHARD.sub("", file_stem(path)))
        for split, data in lines.items():
            place = out / f"{stem}_{split}.jsonl" if split else out / f"{stem}.jsonl"
            if place in written:
                raise UserError(
                    f"would be written twice, also from {path}", file=place, hint="Import the files one by one."
                )
            with atomic_write(place) as f:
                f.write(data)
            written[place] = counts[split]
    for picture in sorted(pictures):
        with atomic_write(out / "images" / picture) as f:
            f.write(embedded.read(picture))
    return Imported(written, len(pictures))


def _target_row(e: Expression, number: int, target: Target, *, amodal: bool) -> EvaluationRow | TrainingDocument:
    if target == "evaluation":
        return evaluation_row(e)
    return rl_row(e, number, amodal=amodal) if target == "rl" else sft_row(e, number, amodal=amodal)
