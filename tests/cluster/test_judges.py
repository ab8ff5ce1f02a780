"""The API server, `egm validate` and the operator refuse the same random manifests with the same messages."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.judges import disagreement
from tests.manifests import manifests

BATCH = 400


def drawn(count: int, start: int) -> list[dict[str, Any]]:
    """Return random manifests, which depend only on `start`."""
    found: list[dict[str, Any]] = []

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(manifests())
    def draw(manifest: dict[str, Any]) -> None:
        found.append({**manifest, "metadata": {"name": f"c{len(found)}"}})

    draw()
    return found


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder, at = json.JSONDecoder(), 0
    while (at := at + len(text[at:]) - len(text[at:].lstrip())) < len(text):
        found, at = decoder.raw_decode(text, at)
        yield from found.get("items", [found])


@pytest.fixture(scope="module")
def server(cluster: Any) -> Iterator[Any]:
    name = f"egm-test-{secrets.token_hex(4)}"
    cluster("create", "namespace", name)
    yield dataclasses.replace(cluster, namespace=name)
    cluster("delete", "namespace", name, "--wait=false")


@pytest.mark.parametrize("start", [1, 2])
def test_all_three_agree(server: Any, start: int) -> None:
    batch = drawn(BATCH, start)
    asked = "\n---\n".join(map(json.dumps, batch))
    done = server.run("create", "--dry-run=server", "-f", "-", "-o", "json", stdin=asked)
    taken = {item["metadata"]["name"]: item for item in _objects(done.stdout)}
    assert BATCH // 8 < len(taken) < BATCH, done.stderr[-2000:]
    wrong = [(m["spec"], why) for m in batch if (why := disagreement(m, taken.get(m["metadata"]["name"])))]
    wrong.sort(key=lambda each: len(json.dumps(each[0])))
    assert not wrong, f"{len(wrong)} of {len(batch)}, for example:\n" + "\n".join(f"{w}: {s}" for s, w in wrong[:12])
    assert "no such key" not in done.stderr and "evaluation" not in done.stderr, (
        "a CEL rule failed with an error instead of refusing"
    )
