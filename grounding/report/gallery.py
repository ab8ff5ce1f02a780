"""Build the page's gallery: all rows as columns, with pictures and texts for some of them, up to a maximum number and size."""

from __future__ import annotations

import base64
import io
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grounding.data.images import ImageStore, open_images
from grounding.errors import EgmError
from grounding.evaluate.results.reader import Question
from grounding.jsontypes import Document
from grounding.report.collect import Evaluation
from grounding.report.slices import KINDS, kinds


@dataclass(frozen=True)
class Caps:
    """Maximum content of a page. `pictures` is a number of images; bytes are those of the page, including base64."""

    pictures: int = 600
    picture_bytes: int = 10_000_000
    text_bytes: int = 3_000_000
    text: int = 1500
    """Maximum characters of an answer; of a longer one, only the end is kept, because the box is there"""


SIDE = 320
"""Longer side of a thumbnail in pixels"""


def chosen(evaluations: Sequence[Evaluation], seed: int = 0) -> Iterator[Question]:
    """Yield the questions in the order in which they get a picture: each evaluation, file and kind in turn, worst and random ones
    alternating.
    """
    rng = random.Random(seed)
    queues: list[Iterator[Question]] = []
    for e in evaluations:
        groups: dict[tuple[int, int], list[tuple[float, Question]]] = defaultdict(list)
        iou, file, kind = np.nan_to_num(e.answers.iou).tolist(), e.answers.file.tolist(), kinds(e.answers).tolist()
        for i, q in enumerate(e.answers.questions):
            groups[file[i], kind[i]].append((iou[i], q))
        queues += [_alternating(groups[key], rng) for key in sorted(groups)]
    seen: set[Question] = set()
    while queues:
        for queue in queues[:]:
            question = next((q for q in queue if q not in seen), None)
            if question is None:
                queues.remove(queue)
            else:
                seen.add(question)
                yield question


def _alternating(rows: list[tuple[float, Question]], rng: random.Random) -> Iterator[Question]:
    worst, shuffled = sorted(rows), rows[:]
    rng.shuffle(shuffled)
    for a, b in zip(worst, shuffled, strict=True):
        yield a[1]
        yield b[1]


def thumbnail(data: bytes, side: int = SIDE) -> str:
    """Return `smaller`'s picture as a data URI."""
    kind, shown = smaller(data, side)
    return f"data:{kind};base64,{base64.b64encode(shown).decode()}"


def smaller(data: bytes, side: int = SIDE) -> tuple[str, bytes]:
    """Return the type and the bytes of a picture in its stored pixel grid, made smaller if it is larger than `side` pixels.

    A small picture keeps its bytes, unless it has an EXIF orientation: a browser would rotate it, and the boxes would not fit.
    """
    from PIL import Image

    from grounding.data.pictures import to_rgb, upright

    with Image.open(io.BytesIO(data)) as image:
        shown_by_browsers = image.format in ("PNG", "JPEG", "WEBP") and not image.mode.startswith("I")
        if max(image.size) <= side and len(data) < 20_000 and shown_by_browsers:
            return f"image/{str(image.format).lower()}", upright(data)
        image.draft("RGB", (side, side))  # a JPEG is decoded at a fraction of its size
        small = to_rgb(image)
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "WEBP", quality=70, method=2)
    return "image/webp", out.getvalue()


def picture_of(store: ImageStore | None, name: str, side: int = SIDE) -> tuple[str, bytes] | None:
    """Return the type and the bytes of a picture that is at most `side` pixels long; None if it cannot be read."""
    if store is None:
        return None
    try:
        return smaller(store.read(name), side)
    except (EgmError, OSError, KeyError, ValueError, SyntaxError):
        return None
    except Exception as e:  # Pillow's errors for huge and for damaged pictures have no common base class
        if type(e).__module__.startswith("PIL"):
            return None
        raise


def data_uri(store: ImageStore | None, name: str) -> str:
    """Return a picture as a data URI; empty if it cannot be read."""
    found = picture_of(store, name)
    return "" if found is None else f"data:{found[0]};base64,{base64.b64encode(found[1]).decode()}"


def open_pictures(images: tuple[Path, ...]) -> ImageStore | None:
    """Open the pictures of an evaluation; None if there are none."""
    try:
        return open_images(*images) if images else None
    except (EgmError, OSError):
        return None


def _pictures(evaluations: Sequence[Evaluation], order: Sequence[Question], caps: Caps) -> tuple[dict[str, str], int]:
    """Return the data URIs by image name, and the number of pictures that could not be read."""
    stores = {e.images: open_pictures(e.images) for e in evaluations}
    source: dict[str, ImageStore | None] = {}
    for e in evaluations:
        for name in e.answers.images:
            if source.get(name) is None:
                source[name] = stores[e.images]
    names = list(dict.fromkeys(q.image for q in order))[: caps.pictures]
    pictures: dict[str, str] = {}
    size = missing = 0
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(names), 64):
            block = names[start : start + 64]
            for name, uri in zip(block, pool.map(lambda n: data_uri(source.get(n), n), block), strict=True):
                if not uri:
                    missing += 1
                elif size + len(uri) <= caps.picture_bytes:
                    size += len(uri)
                    pictures[name] = uri
            if size > 0.98 * caps.picture_bytes:
                break
    return pictures, missing


def _texts(e: Evaluation, wanted: Sequence[tuple[int, int]], caps: Caps, budget: int) -> dict[str, str]:
    """Return answers, or the reasons of failures, by position on the page. `wanted` has (position, row) in the order of importance."""
    rank = {row: (number, place) for number, (place, row) in enumerate(wanted)}
    found: dict[int, tuple[int, str]] = {}
    for row, stored in e.answers.rows(rank):
        text = str(stored.get("error") or stored.get("text") or "")
        number, place = rank[row]
        found[number] = place, text if len(text) <= caps.text else "… " + text[-caps.text :]
    kept: dict[str, str] = {}
    for number in sorted(found):
        place, text = found[number]
        budget -= len(text.encode())
        if budget < 0:
            break
        kept[str(place)] = text
    return kept


def gallery(evaluations: Sequence[Evaluation], caps: Caps | None = None, only: set[Question] | None = None) -> Document:
    """Return the gallery's data: columns over all questions of the evaluations (or `only` these), in the paper's order.

    Boxes are whole pixels in columns x1, y1, x2 and y2. IoU is in thousandths. A missing value is null, or -1 in columns of numbers.
    """
    caps = caps or Caps()
    questions = list(dict.fromkeys(q for e in evaluations for q in e.answers.questions if only is None or q in only))
    files = list(dict.fromkeys(f for e in evaluations for f in e.answers.files))
    rank = {f: i for i, f in enumerate(files)}
    questions.sort(key=lambda q: (rank[q.file], q[1:]))
    images = {name: i for i, name in enumerate(dict.fromkeys(q.image for q in questions))}
    place = {q: i for i, q in enumerate(questions)}
    order = [q for q in chosen(evaluations) if q in place]
    pictures, missing = _pictures(evaluations, order, caps)
    sizes = [[1, 1] for _ in images]
    for e in evaluations:
        for q, size in zip(e.answers.questions, e.answers.size.tolist(), strict=True):
            if q in place:
                sizes[images[q.image]] = size
    shown = [place[q] for q in order if q.image in pictures] + [place[q] for q in order if q.image not in pictures][
        :500
    ]
    boxes = np.array([q.bbox for q in questions]).reshape(-1, 4)
    return {
        "names": [e.name for e in evaluations],
        "kinds": list(KINDS),
        "files": files,
        "images": list(images),
        "sizes": sizes,
        "pictures": {str(images[name]): uri for name, uri in pictures.items()},
        "missing": missing,
        "file": [rank[q.file] for q in questions],
        "line": [q.line for q in questions],
        "image": [images[q.image] for q in questions],
        "sent": [q.sent for q in questions],
        "truth": [_whole(column) for column in boxes.T],
        "answers": [_answers(e, place, shown, caps, len(evaluations)) for e in evaluations],
    }


def _whole(column: Any) -> list[int]:
    """Return a column as whole pixels that the page can draw, limited to ±1e6."""
    rounded: list[int] = np.clip(np.nan_to_num(np.round(column), nan=-1.0), -1e6, 1e6).astype(int).tolist()
    return rounded


def _answers(e: Evaluation, place: dict[Question, int], shown: list[int], caps: Caps, sides: int) -> Document:
    """Return one evaluation's columns over the page's rows. Kind -1 means that the evaluation does not have the question."""
    a, n = e.answers, len(place)
    at = np.array([place.get(q, -1) for q in a.questions], dtype=np.int64)
    here = np.flatnonzero(at >= 0)
    kind, iou, tokens = np.full(n, -1), np.full(n, -1), np.full(n, -1)
    box = np.full((n, 4), np.nan)
    kind[at[here]] = kinds(a)[here]
    iou[at[here]] = np.nan_to_num(np.round(1000 * a.iou[here]), nan=-1)
    tokens[at[here]] = np.clip(np.nan_to_num(a.tokens[here], nan=-1), -1, 2**31)
    box[at[here]] = a.box[here]
    row_of = {int(at[i]): int(i) for i in here}
    wanted = [(p, row_of[p]) for p in shown if p in row_of]
    return {
        "kind": kind.tolist(),
        "iou": iou.tolist(),
        "tokens": tokens.tolist(),
        "box": [_whole(column) for column in box.T],
        "texts": _texts(e, wanted, caps, caps.text_bytes // sides),
    }
