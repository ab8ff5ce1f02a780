"""`results.parquet` contains the stored rows, however they are read."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from grounding.evaluate.engines import Sampling
from grounding.evaluate.reply import Reply
from grounding.evaluate.results import parquet
from grounding.evaluate.results.parquet import schema, table_of, write_parquet
from grounding.evaluate.results.writer import Results, read_rows, score_row
from grounding.evaluate.worklist import read_worklist, settings_digest
from grounding.scoring import get_profile

ROWS = 5
PROFILE = get_profile("egm")
BOX = '[{"bbox_2d": [100, 100, 500, 600]}]'


@pytest.fixture(scope="module")
def worklist(tmp_path_factory):
    path = tmp_path_factory.mktemp("work") / "refcoco_val.jsonl"
    row = {"image": "a.jpg", "bbox": [1, 2, 3, 4], "width": 1000, "height": 1000}
    path.write_text("".join(json.dumps({**row, "sent": f"thing {i} \u00e9\U0001f600"}) + "\n" for i in range(ROWS)))
    return read_worklist([path], settings_digest("m", "qwen3", Sampling()))


texts = st.sampled_from([BOX, "", "no box", "[1e400, -0.0, 1e-300, 2.5]", '"\\\0\n\u2028\U0001f600']) | st.text(
    max_size=9
)
count = st.none() | st.integers(0, 2**31 - 1)
answers = st.builds(
    lambda text, reason, tokens, seconds, thought, model: Reply(
        text, reason, tokens, tokens, seconds, reasoning=thought, served_model=model
    ),
    texts,
    st.sampled_from(["stop", "length"]),
    count,
    st.none() | st.floats(0, 1e6),
    st.none() | texts,
    st.none() | st.just("m"),
)
failures = st.builds(
    lambda error, reason, partial: Reply(None, reason, error=error, partial=partial),
    texts,
    st.none() | st.just("abort"),
    st.none() | texts,
)
replies = answers | failures
several = st.lists(replies, min_size=2, max_size=2).map(
    lambda all_: Reply("", "stop", samples=tuple(r._replace(text=r.text or "", error=None) for r in all_))
)


def results_of(worklist, out, came):
    """Return `Results` to which rows of (number, reply) were added in the order of `came`."""
    with Results(out, worklist, PROFILE.name) as results:
        for number, reply in came:
            expression = worklist.expression(number)
            results.add(number, score_row(worklist.key(number), expression, reply, "m", "qwen3", PROFILE, "abc"))
    return results


@given(came=st.lists(st.tuples(st.integers(0, ROWS - 1), replies | several), max_size=12), batch=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_the_table_holds_the_stored_rows_that_count(worklist, tmp_path_factory, came, batch):
    out = tmp_path_factory.mktemp("out")
    results = results_of(worklist, out, came)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_BATCH", batch)
        own = pq.read_table(write_parquet(out, worklist, None, results.last, own=results.own))
        (out / "results.parquet").unlink()  # the file is written again only if it is missing
        checked = pq.read_table(write_parquet(out, worklist))
        costs = pq.read_table(write_parquet(out, worklist, lambda _: {"flops": 2.0}, results.last, own=results.own))
    assert results.own and own.equals(checked)
    assert own.schema.equals(schema())
    assert costs.drop_columns("flops").equals(own.drop_columns("flops"))
    assert costs["flops"].to_pylist() == [2.0] * len(own) and own["flops"].null_count == len(own)
    last = {row["key"]: position for position, row in enumerate(read_rows(out))}
    rows = [row for position, row in enumerate(read_rows(out)) if last[row["key"]] == position]
    for name in own.column_names:
        assert own[name].to_pylist() == [row.get(name) for row in rows], name


def test_what_a_crash_has_cut_short_is_no_row(worklist, tmp_path):
    results = results_of(worklist, tmp_path, [(0, Reply(BOX, "stop")), (1, Reply(BOX, "stop"))])
    (part,) = (tmp_path / "results").glob("part-*.jsonl")
    part.write_bytes(part.read_bytes()[:-1])
    for own in (True, False):
        (tmp_path / "results.parquet").unlink(missing_ok=True)
        assert pq.read_table(write_parquet(tmp_path, worklist, None, results.last, own=own)).num_rows == 1


def test_a_table_is_made_again_only_if_what_it_is_made_from_has_changed(worklist, tmp_path):
    def written(*added, costs=""):
        return write_parquet(tmp_path, worklist, *added, costs=costs).stat().st_ino, pq.read_table(path)

    path = tmp_path / "results.parquet"
    results_of(worklist, tmp_path, [(0, Reply(BOX, "stop"))])
    first, table = written()
    again, same = written()
    assert first == again and same.equals(table)
    results_of(worklist, tmp_path, [(0, Reply("other", "stop"))])
    second, table = written()
    assert second != first and table["text"].to_pylist() == ["other"]
    third, table = written(lambda _: {"flops": 2.0}, costs="two")
    assert third != second and table["flops"].to_pylist() == [2.0]
    assert written(lambda _: {"flops": 3.0}, costs="two")[0] == third
    fourth, table = written(lambda _: {"flops": 3.0}, costs="three")
    assert fourth != third and table["flops"].to_pylist() == [3.0]
    path.write_bytes(path.read_bytes()[:-20])
    assert written()[1]["flops"].to_pylist() == [None]


def test_large_rows_are_read_in_pieces(worklist, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BYTES", 1000)
    results = results_of(worklist, tmp_path, [(i, Reply("x" * 5000, "stop")) for i in range(ROWS)])
    table = pq.read_table(write_parquet(tmp_path, worklist, None, results.last, own=True))
    assert table["text"].to_pylist() == ["x" * 5000] * ROWS


def test_a_table_of_rows_has_every_column_and_null_for_what_a_row_lacks():
    table = table_of([{"key": "a", "bbox": [1, 2.5, 3, 4], "unknown": 1}, {}])
    assert table.schema.equals(schema())
    assert table["key"].to_pylist() == ["a", None] and table["bbox"].to_pylist() == [[1.0, 2.5, 3.0, 4.0], None]
    assert table["samples"].null_count == 2
