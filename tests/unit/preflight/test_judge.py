"""Findings compared with the needs of jobs: each fault is noticed, has a remedy, and gives the right exit code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.errors import Failure, UserError
from grounding.preflight import judge
from grounding.preflight.facts import (
    Absent,
    Disk,
    Gpu,
    Gpus,
    Interpreter,
    Machine,
    Memory,
    Network,
    Port,
    Remote,
)
from grounding.preflight.needs import Needs, Stack
from grounding.runtime.verdicts import Verdict, as_text, exit_code, raise_failures

GIB = 1 << 30
H200 = Gpu(0, "NVIDIA H200", 140 * GIB, 0)
OWN = Interpreter(Path("/own/python"), {"torch": "2.11.0", "transformers": "5.9.0"}, (13, 0))
WELL = Machine(
    Gpus("580.1", (13, 0), (H200,), ("0",)),
    Memory(256 * GIB, 200 * GIB),
    16 * GIB,
    (Disk("runs", Path("runs"), 900 * GIB, True), Disk("cache", Path("cache"), 900 * GIB, True)),
    (Port(30000),),
    OWN,
    dataclasses.replace(OWN, packages={"sglang": "0.5.12"}),
)
SERVER = Stack("server", "spec.engine", ("sglang",), True, "make the environment")
ONE = Needs("eval", 1, (SERVER,))


def states(machine: Machine, *needs: Needs, **more: bool) -> dict[str, str]:
    return {v.subject: v.state for v in judge.local(machine, needs, **more) if v.state not in ("ok", "note")}


def test_a_machine_with_all_of_it_is_well() -> None:
    assert states(WELL, ONE, serves=True) == {}
    assert states(WELL) == {}


def test_a_missing_engine_comes_first_and_says_where_it_was_looked_for() -> None:
    verdicts = judge.local(dataclasses.replace(WELL, engine=OWN, gpus=Gpus()), [ONE])
    assert verdicts[0] == Verdict(
        "packages of server",
        "failed",
        "sglang is not installed for /own/python (spec.engine)",
        "make the environment",
    )
    assert [v.subject for v in verdicts if v.state == "failed"] == ["packages of server", "driver", "GPUs"]
    assert exit_code(verdicts) == 2


def test_an_interpreter_that_does_not_answer_is_named() -> None:
    broken = Interpreter(Path("/gone"), problem="No such file")
    found = judge.stack(SERVER, OWN, broken)
    assert found.state == "failed" and "/gone cannot be run: No such file" in found.message
    assert "EGM_ENGINE_PYTHON" in found.cure


@pytest.mark.parametrize(("found", "wanted", "driver", "count"), [
    (Gpus(), 0, "note", "note"),
    (Gpus(), 1, "failed", "failed"),
    (Gpus(problem="NVML: driver/library version mismatch"), 0, "warning", "note"),
    (Gpus(problem="NVML: driver/library version mismatch"), 1, "failed", "failed"),
    (Gpus("580.1", (13, 0), (H200,), ("0",)), 1, "ok", "ok"),
    (Gpus("580.1", (13, 0), (H200,), ("0",)), 2, "ok", "failed"),
    (Gpus("580.1", (13, 0), (dataclasses.replace(H200, used=60 * GIB),), ("0",)), 1, "ok", "warning"),
    (Gpus("580.1", (13, 0), (dataclasses.replace(H200, used=60 * GIB),), ()), 0, "ok", "note"),
])  # fmt: skip
def test_driver_and_gpus(found: Gpus, wanted: int, driver: str, count: str) -> None:
    assert (judge.driver(found, wanted).state, judge.gpus(found, wanted).state) == (driver, count)


@pytest.mark.parametrize(("built", "most", "wanted", "state"), [
    ((12, 8), (13, 0), 1, "ok"),
    ((12, 8), (12, 8), 1, "ok"),
    ((12, 8), (12, 4), 1, "warning"),  # a newer minor version mostly works
    ((13, 0), (12, 9), 1, "failed"),
    ((13, 0), (12, 9), 0, "warning"),
    (None, (13, 0), 1, "failed"),
    (None, (13, 0), 0, "note"),
    ((13, 0), None, 0, "note"),
])  # fmt: skip
def test_torchs_cuda_against_the_drivers(
    built: tuple[int, int] | None, most: tuple[int, int] | None, wanted: int, state: str
) -> None:
    found = judge.cuda(Gpus("x", most), dataclasses.replace(OWN, cuda=built), wanted)
    assert found.state == state


@pytest.mark.parametrize(("holds", "wanted", "least", "state"), [
    (64 << 20, 1, None, "failed"), (64 << 20, 0, None, "ok"), (GIB, 1, None, "ok"), (None, 1, None, "failed"),
    (64 << 20, 1, 0, "ok"), (2 * GIB, 0, 4 * GIB, "failed"),
])  # fmt: skip
def test_shared_memory(holds: int | None, wanted: int, least: int | None, state: str) -> None:
    assert judge.shared_memory(holds, wanted, least).state == state


def test_what_is_to_be_fetched_must_fit_on_the_disk_of_the_cache() -> None:
    small = (Disk("runs", Path("runs"), 900 * GIB, True), Disk("cache", Path("/c"), 12 * GIB, True))
    big = Network((Remote("hf://a/b", "spec.model.source", 17_000_000_000),))
    verdicts = judge.remotes(big, small)
    assert [(v.subject, v.state) for v in verdicts] == [("hub", "ok"), ("disk of cache", "failed")]
    assert "17.0 GB to download" in verdicts[0].message and "EGM_CACHE" in verdicts[1].cure
    assert [v.state for v in judge.remotes(Network((Remote("hf://a/b"),)), small)] == ["ok"]


def test_a_hub_that_is_down_is_nobodys_mistake_and_no_matter_if_all_is_in_the_cache() -> None:
    down = Remote("hf://a/b", "spec.data.files[0]", problem="no answer", cure="Check the network.", mistake=False)
    verdicts = judge.remotes(Network((down,)), ())
    assert verdicts[0].state == "failed" and exit_code(verdicts) == 1
    with pytest.raises(Failure, match="no answer"):
        raise_failures(verdicts, "job.yaml", "")
    assert judge.remote(dataclasses.replace(down, cached=True)).state == "warning"
    wrong = dataclasses.replace(down, mistake=True, cached=True, problem="closed to you")
    assert judge.remote(wrong).state == "failed" and exit_code([judge.remote(wrong)]) == 2


def test_ports_and_paths() -> None:
    taken = dataclasses.replace(WELL, ports=(Port(30000, "port 30000 is already in use by python (process 7)"),))
    assert states(taken, ONE, serves=True) == {"ports": "failed"} and states(taken) == {"ports": "warning"}
    gone = dataclasses.replace(WELL, absent=(Absent(Path("/d/coco.tar"), "spec.data.images[0]"),))
    assert states(gone, ONE) == {"files": "failed"}
    read_only = dataclasses.replace(WELL, disks=(Disk("output", Path("/o"), 900 * GIB, False),))
    assert states(read_only, ONE) == {"disk of output": "failed"}


def test_all_failures_are_one_error_with_their_cures() -> None:
    with pytest.raises(UserError) as error:
        raise_failures(judge.local(dataclasses.replace(WELL, engine=OWN, gpus=Gpus()), [ONE]), "a.yaml", "See doctor.")
    text = str(error.value)
    assert text.startswith("a.yaml cannot start here:\nFAILED   packages of server  sglang is not installed")
    assert "make the environment" in text and text.endswith("See doctor.")
    raise_failures(judge.local(WELL, [ONE]), "a.yaml", "")


gpus = st.builds(
    Gpus,
    st.sampled_from(["", "580.1"]),
    st.sampled_from([None, (12, 4), (13, 0)]),
    st.lists(st.builds(Gpu, st.integers(0, 7), st.just("G"), st.just(GIB), st.integers(0, GIB)), max_size=3).map(tuple),
    st.lists(st.sampled_from("01234567"), max_size=8, unique=True).map(tuple),
    st.sampled_from(["", "broken"]),
)
machines = st.builds(
    Machine,
    gpus,
    st.builds(Memory, st.just(64 * GIB), st.integers(0, 64 * GIB)),
    st.none() | st.integers(0, 2 * GIB),
    st.lists(st.builds(Disk, st.sampled_from(["runs", "cache", "output"]), st.just(Path("d")),
                       st.integers(0, 99 * GIB), st.booleans()), max_size=3).map(tuple),
    st.lists(st.builds(Port, st.just(1), st.sampled_from(["", "in use"])), max_size=2).map(tuple),
    st.just(OWN),
    st.builds(Interpreter, st.just(Path("e")), st.sampled_from([{}, {"sglang": "1"}]), st.sampled_from([None, (13, 0)]),
              st.sampled_from(["", "gone"])),
)  # fmt: skip


@given(machines, st.lists(st.builds(Needs, st.just("j"), st.integers(0, 9), st.just((SERVER,))), max_size=3))
def test_whatever_is_found_every_fault_has_a_cure_and_the_text_shows_it(machine: Machine, needs: list[Needs]) -> None:
    verdicts = judge.local(machine, needs)
    for v in verdicts:
        assert v.message and (v.cure or v.state in ("ok", "note"))
        assert v.state != "failed" or v.cure.splitlines()[0] in as_text([v])
    if not needs:  # no job needs anything: only faults that would stop every run
        assert all(v.subject.startswith(("disk", "shared")) for v in verdicts if v.state == "failed")


def test_the_same_failure_of_several_files_is_one_finding() -> None:
    down = [
        Remote(f"hf://a/b/{n}", f"spec.data.files[{n}]", problem="no route", cure="x", mistake=False) for n in range(3)
    ]
    bucket = Remote("s3://bucket/x", "spec.output", problem="no route", cure="x", mistake=False)
    other = Remote("hf://a/c", problem="there is no such repository", cure="y")
    verdicts = judge.remotes(Network((*down, other, Remote("hf://a/d"), Remote("hf://a/e")), (bucket,)), ())
    assert [v.state for v in verdicts] == ["failed", "failed", "ok", "ok", "failed"]
    assert verdicts[0].message == "hf://a/b/0 (spec.data.files[0]) and 2 others: no route"
    assert (verdicts[1].message, verdicts[4].subject) == ("hf://a/c: there is no such repository", "S3")
    assert judge.remotes(Network(tuple(down[:2]), ()), ())[0].message.startswith(
        f"{down[0].uri} (spec.data.files[0]) and another one:"
    )
