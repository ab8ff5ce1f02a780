"""The tables of docs/benchmarks.md: what the recorded results of `make bench` give. test_generated.py compares the page with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from by_path import module

ROOT = Path(__file__).resolve().parents[2]
bench = module(ROOT / "bench" / "side_by_side.py")
tables = module(ROOT / "hack" / "docs" / "benchmarks.py")
FACTS = {
    "began": "2026-11-30T22:00:00Z",
    "seconds": 62.4,
    "load": {"before": 0.34, "after": 1.96},
    "commit": "0123456789abcdef",
    "machine": {"processor": "A CPU", "cores": 2, "memory_gib": 23.4, "python": "3.11.7"},
}


def _record(folder: Path, name: str, result: object, **changes: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**FACTS, "name": name, "result": result, **changes}))


def test_a_recorded_result_becomes_lines(tmp_path: Path) -> None:
    store = {"seconds": 9.0, "cpu": 3.0}
    both = {"ours": store, "boto3_transfer_manager": {"seconds": 18.0, "cpu": 4.0}}
    _record(tmp_path, "storage", {"files": 2000, "bytes": 160_000, **both}, commit="0123456789abcdef+changes")
    client = {"delay_s": 0.7, "in_flight": 1024, "requests_per_core_second": 3106, "ratio": 0.825}
    _record(tmp_path, "client", {"client": [client | {"bare_requests_per_core_second": 3766}]})
    assert tables.results(tmp_path).splitlines()[2:] == [
        "| downloads from S3 | 2,000 files of 160 kB | seconds | 9.00 | 18.0 | 2.00 |",
        "| downloads from S3 | 2,000 files of 160 kB | CPU seconds | 3.00 | 4.00 | 1.33 |",
        "| evaluation client | server takes 700 ms, 1,024 in flight | requests per CPU second | 3,106 | 3,766 | 0.82 |",
    ]
    machine = "A CPU, 2 cores, 23 GiB, Python 3.11.7"
    assert tables.conditions(tmp_path).splitlines()[2:] == [
        "| downloads from S3 | boto3's transfer manager, ten threads | 2026-11-30 | 0123456 with changes | 62 s "
        f"| 0.3 to 2.0 | {machine} |",
        f"| evaluation client | a bare loop of aiohttp posts | 2026-11-30 | 0123456 | 62 s | 0.3 to 2.0 | {machine} |",
    ]


def test_every_comparison_has_a_table_and_a_recorded_result() -> None:
    recorded = {path.stem for path in tables.RESULTS.glob("*.json")}
    assert set(tables.COMPARISONS) == set(bench.COMPARISONS) == recorded


def test_the_page_has_the_tables_that_the_script_writes() -> None:
    sys.path.insert(0, str(ROOT / "hack" / "docs"))
    try:
        reference = module(ROOT / "hack" / "docs" / "reference.py")
    finally:
        sys.path.pop(0)
    page = reference.DOCS / "benchmarks.md"
    assert page.read_text() == reference.pages()[page]
    for table in (tables.results(), tables.conditions()):
        assert len(table.splitlines()) > 6 and table in page.read_text()
