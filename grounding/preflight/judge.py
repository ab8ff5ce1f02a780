"""Compare facts about the machine with the jobs' needs: one verdict per subject, with a cure if something is wrong. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from grounding.evaluate.engines import ENGINES
from grounding.local.command import WITHOUT_OUTPUT
from grounding.preflight.facts import Cuda, Disk, Gpus, Interpreter, Machine, Memory, Network, Port, Remote
from grounding.preflight.needs import RL, Needs, Stack, setup_of
from grounding.runtime.environment import Environment
from grounding.runtime.startup import SHM, SHM_WANTED, size
from grounding.runtime.verdicts import Verdict
from grounding.storage import in_words

GIB = 1 << 30
LITTLE_DISK = 10 * GIB
"""Free bytes of a disk below which a warning is given: one checkpoint of a model with 4 billion parameters is larger"""
LITTLE_MEMORY = {False: 4 * GIB, True: 32 * GIB}
"""Free bytes of memory below which a warning is given, without and with GPUs: a model with 8 billion parameters needs 16 GB of main
memory while it is loaded"""
IN_USE = 0.1
"""Share of a GPU's memory above which it counts as used by others: engines allocate a fixed share of the whole"""
NAMES = tuple(dict.fromkeys((*(p for e in ENGINES.values() for p in e.packages), *RL, "vllm", "huggingface_hub")))
"""Packages whose versions are read from an environment"""
DRIVER_CURE = (
    "Install or update NVIDIA's driver (`nvidia-smi` shows it); in a container, give it the GPUs (--gpus all)."
)


def gpus_wanted(needs: Iterable[Needs]) -> int:
    """Return the number of GPUs of the job that needs most."""
    return max((n.gpus for n in needs), default=0)


def dotted(version: Cuda) -> str:
    """Return a version as text, such as `13.0`."""
    return f"{version[0]}.{version[1]}"


# ---- GPUs ----
def driver(found: Gpus, wanted: int) -> Verdict:
    """Judge NVIDIA's driver."""
    if found.problem:
        return Verdict("driver", "failed" if wanted else "warning", found.problem, DRIVER_CURE)
    if not found.driver and found.cuda is None:
        return Verdict("driver", "failed" if wanted else "note", "there is no NVIDIA driver", DRIVER_CURE)
    newest = f", CUDA up to {dotted(found.cuda)}" if found.cuda else ""
    return Verdict("driver", "ok", f"{found.driver or 'version unknown'}{newest}")


def gpus(found: Gpus, wanted: int) -> Verdict:
    """Judge the number of GPUs and whether others use them."""
    free = len(found.visible)
    if free < wanted:
        cure = "Reduce the number of GPUs in the job, set CUDA_VISIBLE_DEVICES, or submit the job to a cluster."
        return Verdict("GPUs", "failed", f"the job needs {wanted}, but this process may use {free}", cure)
    if not free:
        return Verdict("GPUs", "note", "there are none; jobs run on the CPU (engine transformers, gpusPerNode: 0)")
    busy = [d for d in found.devices if str(d.index) in found.visible and d.memory and d.used / d.memory > IN_USE]
    kinds = groupby(sorted(f"{d.name}, {size(d.memory)}" for d in found.devices))
    names = "; ".join(f"{len(list(same))} x {kind}" for kind, same in kinds)
    text = f"{free} may be used" + (f" ({names})" if names else "")
    if busy:
        words = ", ".join(f"GPU {d.index} has {size(d.used)} of {size(d.memory)} in use" for d in busy)
        cure = (
            "Stop the processes that use them (`nvidia-smi` lists them), or exclude these GPUs by CUDA_VISIBLE_DEVICES."
        )
        return Verdict("GPUs", "warning", f"{text}; {words}", cure)
    return Verdict("GPUs", "ok", text)


def cuda(found: Gpus, environment: Interpreter, wanted: int) -> Verdict:
    """Judge whether torch's CUDA runs on the driver. A newer major version than the driver's fails; a newer minor version mostly works."""
    built, most = environment.cuda, found.cuda
    where = f"torch of {environment.path}"
    if built is None:
        wrong = wanted and "torch" in environment.packages
        text = f"{where} is absent or built for the CPU"
        return Verdict("CUDA", "failed" if wrong else "note", text, "Install torch's build for CUDA.")
    if most is None:
        return Verdict("CUDA", "note", f"{where} is built for {dotted(built)}; there is no driver")
    text = f"{where} is built for {dotted(built)}, the driver supports up to {dotted(most)}"
    if built[0] > most[0]:
        return Verdict("CUDA", "failed" if wanted else "warning", text, DRIVER_CURE)
    return Verdict("CUDA", "ok" if built <= most else "warning", text, DRIVER_CURE)


# ---- memory, disks, ports ----
def memory(found: Memory, wanted: int) -> Verdict:
    """Judge main memory."""
    text = f"{size(found.available)} of {size(found.total)} are free"
    if found.available < LITTLE_MEMORY[bool(wanted)]:
        return Verdict(
            "memory", "warning", text, "Stop other processes that use it; models are loaded into main memory first."
        )
    return Verdict("memory", "ok", text)


def shared_memory(found: int | None, wanted: int, least: int | None) -> Verdict:
    """Judge the size of /dev/shm by the rule of `runtime.startup`. `least`: the value of `$EGM_SHM_MIN_BYTES`."""
    need = least if least is not None else SHM_WANTED if wanted else 0
    held = 0 if found is None else found
    text = f"{SHM} has {size(held)}"
    if held < need:
        cure = f"Give the container at least {size(need)} (docker: --shm-size=16g)."
        return Verdict("shared memory", "failed", f"{text}, but roles on GPUs need {size(need)}", cure)
    return Verdict("shared memory", "ok", text)


def disk(found: Disk, missing: int) -> Verdict:
    """Judge a disk to which `missing` bytes will be downloaded."""
    subject, text = f"disk of {found.what}", f"{size(found.free)} are free at {found.path}"
    choose = {"runs": "Choose another with --runs.", "output": "Choose another spec.output."}
    elsewhere = choose.get(found.what, f"Choose another by {Environment.variable('cache')}.")
    if not found.writable:
        return Verdict(subject, "failed", f"{found.path} is not writable", elsewhere)
    if missing > found.free:
        text = f"{text}, but {in_words(missing)} must be downloaded"
        return Verdict(subject, "failed", text, f"Free some space. {elsewhere}")
    if found.free < LITTLE_DISK:
        return Verdict(subject, "warning", text, f"Free some space. {elsewhere}")
    return Verdict(subject, "ok", text)


def ports(found: Sequence[Port], wanted: bool) -> Verdict:
    """Judge the ports of servers."""
    taken = [p for p in found if p.problem]
    numbers = ", ".join(str(p.number) for p in found)
    if taken:
        cure = "Choose another (--port; 0 takes a free one), or stop the process that listens there."
        return Verdict("ports", "failed" if wanted else "warning", "; ".join(p.problem for p in taken), cure)
    return Verdict("ports", "ok", f"{numbers} free")


# ---- environments ----
def stack(need: Stack, own: Interpreter, engine: Interpreter) -> Verdict:
    """Judge whether a role's packages are installed."""
    environment = engine if need.engine else own
    subject = f"packages of {need.role}"
    if environment.problem:
        cure = f"Check {Environment.variable('engine_python')}. {need.cure}"
        return Verdict(subject, "failed", f"{environment.path} cannot be run: {environment.problem}", cure)
    lacking = [p for p in need.packages if p not in environment.packages]
    if lacking:
        verb = "is" if len(lacking) == 1 else "are"
        text = f"{', '.join(lacking)} {verb} not installed for {environment.path} ({need.field})"
        return Verdict(subject, "failed", text, need.cure)
    versions = ", ".join(f"{p} {environment.packages[p]}" for p in need.packages)
    return Verdict(subject, "ok", versions)


def engine(name: str, own: Interpreter, given: Interpreter) -> Verdict:
    """Judge whether an engine could be started; used if no job needs one."""
    chosen = ENGINES[name]
    subject = f"engine {name}"
    for environment in (given, own):
        if all(p in environment.packages for p in chosen.packages):
            return Verdict(subject, "ok", f"{environment.packages[chosen.packages[0]]} of {environment.path}")
    cure = f" `{setup_of(name)}` installs it." if chosen.lock else ""
    return Verdict(subject, "note", f"not installed.{cure}")


# ---- hub and stores ----
def _kind(uri: str) -> str:
    return "S3" if uri.startswith("s3:") else "hub"


def remote(found: Remote) -> Verdict:
    """Judge the answer of the hub or a store about a URI that a job reads or writes."""
    field = f" ({found.field})" if found.field else ""
    if not found.problem:
        amount = f"{in_words(found.missing)} to download" if found.missing else "nothing to download"
        return Verdict(_kind(found.uri), "ok", f"{found.uri}{field}: {'it answers' if _writes(found) else amount}")
    if found.cached and not found.mistake:
        text = f"{found.uri}{field}: {found.problem}; the files downloaded before will be used"
        return Verdict(_kind(found.uri), "warning", text, found.cure)
    return Verdict(_kind(found.uri), "failed", f"{found.uri}{field}: {found.problem}", found.cure, found.mistake)


def _writes(found: Remote) -> bool:
    return found.field == "spec.output"


def reachable(found: Remote, subject: str, absent: str) -> Verdict:
    """Judge the hub or S3 if no job needs them: an absent one is only a note."""
    if not found.problem:
        return Verdict(subject, "ok", absent)
    return Verdict(subject, "note" if found.mistake else "warning", f"{found.uri}: {found.problem}", found.cure)


def _together(found: Sequence[Remote]) -> list[Verdict]:
    """Judge all answers. If the same thing happened to several URIs, as with a hub that is down, there is one verdict for them."""
    alike: dict[tuple[str, str, str, bool, bool], list[Remote]] = {}
    for number, one in enumerate(found):
        what = one.problem or f"{number}"  # those that answered stay separate
        alike.setdefault((_kind(one.uri), what, one.cure, one.mistake, one.cached), []).append(one)
    verdicts = []
    for first, *more in alike.values():
        judged = remote(first)
        if more:
            others = "another one" if len(more) == 1 else f"{len(more)} others"
            field = f" ({first.field})" if first.field else ""
            judged = replace(
                judged, message=judged.message.replace(f"{first.uri}{field}:", f"{first.uri}{field} and {others}:", 1)
            )
        verdicts.append(judged)
    return verdicts


def output_unset(manifest: Path, output: str) -> Verdict:
    """Judge an `output` that is still the placeholder of an example."""
    text = f"{output} contains a placeholder of an example ({manifest}: spec.output)"
    return Verdict("output", "failed", text, f"Write the name of your bucket. {WITHOUT_OUTPUT}")


# ---- all subjects ----
def local(
    found: Machine, needs: Sequence[Needs], *, serves: bool = False, shm_least: int | None = None
) -> list[Verdict]:
    """Judge the facts about the machine, the environments of the roles first. `serves`: whether the ports are needed."""
    wanted = gpus_wanted(needs)
    stacks: Mapping[Stack, None] = dict.fromkeys(s for n in needs for s in n.stacks)
    verdicts = [stack(s, found.own, found.engine) for s in stacks]
    if not needs:
        verdicts += [engine(name, found.own, found.engine) for name, e in ENGINES.items() if e.packages]
    verdicts += [driver(found.gpus, wanted), gpus(found.gpus, wanted)]
    environments = {s.engine for s in stacks} or {False}
    for own in sorted(environments):
        verdicts.append(cuda(found.gpus, found.engine if own else found.own, wanted))
    verdicts += [memory(found.memory, wanted), shared_memory(found.shared_memory, wanted, shm_least)]
    verdicts += [disk(d, 0) for d in found.disks]
    if found.ports:
        verdicts.append(ports(found.ports, serves))
    for gone in found.absent:
        cure = "Check the path in the job, or download the files to it."
        verdicts.append(Verdict("files", "failed", f"{gone.path} does not exist ({gone.field})", cure))
    verdicts += [
        Verdict("model", "failed", f"{b.folder} cannot be loaded ({b.field}): {b.problem}", b.cure)
        for b in found.broken
    ]
    return list(dict.fromkeys(verdicts))


def remotes(found: Network, disks: Sequence[Disk]) -> list[Verdict]:
    """Judge the answers of the hub and stores, and whether the downloads fit on the cache's disk."""
    verdicts = _together((*found.remotes, *found.outputs))
    missing = sum(r.missing for r in found.remotes)
    if missing:
        verdicts += [disk(d, missing) for d in disks if d.what == "cache"]
    return verdicts
