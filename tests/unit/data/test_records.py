from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grounding.data.records import (
    last_reference,
    parse_expression,
    parse_training_row,
    read_expressions,
    read_rows,
    unquote,
)
from grounding.errors import UserError

FILE = Path("refcoco+_val.jsonl")
GOOD: dict[str, Any] = {"image": "/a/b.jpg", "sent": "left man", "bbox": [1, 2.5, 3, 4], "height": 480, "width": 640}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": t} for i, t in enumerate(texts)]


def test_the_plain_row() -> None:
    e = parse_expression(GOOD, FILE, 7)
    assert (e.file, e.line, e.image, e.sent) == ("refcoco+_val", 7, "a/b.jpg", "left man")
    assert e.bbox == (1.0, 2.5, 3.0, 4.0) and (e.width, e.height) == (640, 480)


def test_without_sent_the_last_reference_counts() -> None:
    row = {k: v for k, v in GOOD.items() if k != "sent"}
    row["conversations"] = turns("<ref>first</ref> or <ref>'the dog'</ref>", "ok")
    assert parse_expression(row, FILE, 1).sent == "the dog"


def test_without_bbox_modal_bbox_then_the_last_box_scaled_to_pixels() -> None:
    row = {k: v for k, v in GOOD.items() if k != "bbox"}
    row["conversations"] = turns("q", "<box>[0, 0, 1, 1]</box> no, <box>[100,200,500,1000]</box>")
    assert parse_expression(row, FILE, 1).bbox == (64.0, 96.0, 320.0, 480.0)
    assert parse_expression({**row, "modal_bbox": [5, 6, 7, 8]}, FILE, 1).bbox == (5, 6, 7, 8)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"image": None}, "image"),
        ({"image": ""}, "image"),
        ({"image": "../../etc/passwd"}, "image"),
        ({"image": 3}, "image"),
        ({"sent": None}, "sent"),
        ({"sent": "  "}, "sent"),
        ({"sent": 5}, "sent"),
        ({"bbox": [1, 2, 3]}, "bbox"),
        ({"bbox": [1, 2, 3, "4"]}, "bbox"),
        ({"bbox": [1, 2, 3, True]}, "bbox"),
        ({"bbox": "1,2,3,4"}, "bbox"),
        ({"bbox": None}, "bbox"),
        ({"bbox": None, "conversations": turns("q", "<box>[1,2,3]</box>")}, "bbox"),
        ({"bbox": None, "conversations": turns("q", "<box>[a,b,c,d]</box>")}, "bbox"),
        ({"bbox": None, "conversations": [3]}, "conversations"),
        ({"width": 0}, "width"),
        ({"width": 3.5}, "width"),
        ({"height": None}, "height"),
        ({"height": float("inf")}, "height"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_expression({**GOOD, **change}, FILE, 12)
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(FILE), 12, field)


def test_a_file_streams_and_stops_at_the_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "refcocog_test.jsonl"
    path.write_bytes(orjson.dumps(GOOD) + b"\n\n" + orjson.dumps(GOOD) + b"\n{oops\n")
    rows = read_expressions(path)
    assert [next(rows).line, next(rows).line] == [1, 3]
    with pytest.raises(UserError, match=r"refcocog_test\.jsonl:4"):
        next(rows)


@pytest.mark.parametrize(
    ("text", "plain"),
    [('"a dog"', "a dog"), ("'a dog'", "a dog"), ("“a dog”", "a dog"), ('"a', '"a'), ("dog's", "dog's"), (" x ", "x")],
)
def test_one_pair_of_quotes_is_dropped(text: str, plain: str) -> None:
    assert unquote(text) == plain
    assert last_reference([f"<ref>{text}</ref>"]) == plain


def test_training_rows(tmp_path: Path) -> None:
    row = {"image": "a.jpg", "id": 5, "conversations": turns("<image>\nfind", "it is <box>[1, 2, 3, 4]</box>")}
    parsed = parse_training_row(row, FILE, 3)
    assert (parsed.id, parsed.box, parsed.sent, parsed.width) == ("5", (1, 2, 3, 4), None, None)
    sft = {
        **row,
        "conversations": turns("q", 'so\n</think>\n\n```json\n[{"bbox_2d": [9, 8, 10, 11], "label": "x"}]\n```'),
    }
    assert parse_training_row(sft, FILE, 1).box == (9, 8, 10, 11)
    for broken in ([], "x", {**row, "conversations": turns("one")}, {**row, "conversations": turns("q", "no box")}):
        with pytest.raises(UserError):
            parse_training_row(broken, FILE, 1)


def test_rows_of_lists_and_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}]')
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_rows(tmp_path / "a.json")) == [(1, {"a": 1}), (2, {"a": 2})]
    assert list(read_rows(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (3, {"a": 2})]
    (tmp_path / "b.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="list"):
        list(read_rows(tmp_path / "b.json"))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(["image", "sent", "bbox", "modal_bbox", "width", "height", "conversations"]), JSON),
    st.sets(st.sampled_from(sorted(GOOD))),
)
def test_anything_is_a_row_or_an_error_for_people(noise: dict[str, Any], keep: set[str]) -> None:
    row = {**noise, **{k: GOOD[k] for k in keep}}
    for parse in (parse_expression, parse_training_row):
        try:
            parse(row, FILE, 1)
        except UserError as e:
            assert e.line == 1 and e.field
