"""Examine this machine, and ask the hub and stores. All input and output of the check is here; `judge` interprets the results."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import orjson

from grounding.data.tars import parts_of
from grounding.errors import EgmError, UserError
from grounding.local.gpus import machine_gpus
from grounding.local.process import claim_port
from grounding.models.folder import examine, of_source, sentence
from grounding.preflight import packages
from grounding.preflight.facts import (
    Absent,
    BrokenModel,
    Cuda,
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
from grounding.preflight.needs import Needs, Source
from grounding.runtime import environment, nvidia_smi
from grounding.runtime.startup import SHM
from grounding.storage import Transfer, cache_folder, in_cache, is_remote, local_path, open_store, outstanding

MIB = 1 << 20
PATIENCE_S = 10.0
"""Seconds to wait for an answer of the hub or a store"""
RETRY_S = PATIENCE_S / 2
"""Seconds for which one question is repeated; shorter, so that the reason is known when the waiting ends"""
HUB = "https://huggingface.co"


# ---- GPUs ----
def parse_devices(text: str) -> tuple[tuple[Gpu, ...], str]:
    """Parse nvidia-smi's lines `index, name, memory, used, driver` (MiB); return the GPUs and the driver's version. Pure."""
    devices, driver = [], ""
    for cells in nvidia_smi.cells(text):
        if len(cells) != 5 or not cells[0].isdigit():
            continue
        # for a GPU split by MIG, nvidia-smi prints [N/A] or [Insufficient Permissions]
        sizes = [int(c) * MIB if c.isdigit() else 0 for c in cells[2:4]]
        devices.append(Gpu(int(cells[0]), cells[1], sizes[0], sizes[1]))
        driver = cells[4]
    return tuple(devices), driver


def _cuda_of_driver() -> Cuda | None:
    """Return the newest CUDA that the driver supports; None without a driver. Does not initialise a GPU."""
    number = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)):
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def gpus() -> Gpus:
    """Ask nvidia-smi for the driver and the GPUs."""
    visible = tuple(machine_gpus())
    try:
        done = nvidia_smi.query("index", "name", "memory.total", "memory.used", "driver_version", timeout_s=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Gpus(cuda=_cuda_of_driver(), visible=visible, problem=f"nvidia-smi does not answer: {error}")
    if done is None:
        return Gpus(cuda=_cuda_of_driver(), visible=visible)
    devices, driver = parse_devices(done.stdout)
    words = (done.stdout + done.stderr).strip().splitlines()
    problem = (words[0] if words else f"exit code {done.returncode}") if done.returncode else ""
    return Gpus(driver, _cuda_of_driver(), devices, visible, problem)


# ---- memory and disks ----
def memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Read the machine's memory, or the container's limit if that is less."""
    found = {k: int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB", proc.read_text(), re.MULTILINE)}
    whole = Memory(found["MemTotal"] * 1024, found.get("MemAvailable", found["MemFree"]) * 1024)
    try:
        limit, used = (int((cgroup / f"memory.{n}").read_text()) for n in ("max", "current"))
    except (OSError, ValueError):  # without a limit, the file contains `max`
        return whole
    return Memory(min(whole.total, limit), min(whole.available, max(0, limit - used)))


def _shared_memory() -> int | None:
    try:
        found = os.statvfs(SHM)
    except OSError:
        return None
    return found.f_frsize * found.f_blocks


def disk(what: str, path: Path) -> Disk:
    """Examine the file system of `path`, which may not exist yet."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return Disk(what, path, shutil.disk_usage(there).free, os.access(there, os.W_OK | os.X_OK))


def port(number: int) -> Port:
    """Check whether a port is free by listening on it."""
    try:
        claim_port(number, "")
    except UserError as error:
        return Port(number, error.message)
    return Port(number)


# ---- environments of Python ----
def _cuda(text: str) -> Cuda | None:
    parts = re.fullmatch(r"(\d+)\.(\d+).*", text)
    return (int(parts[1]), int(parts[2])) if parts else None


def interpreter(path: Path, names: Sequence[str]) -> Interpreter:
    """Ask an interpreter which of the packages `names` its environment has."""
    if path == Path(sys.executable):
        found = packages.look(list(names))
        return Interpreter(path, found["packages"], _cuda(found["cuda"]))
    script = Path(packages.__file__).read_text(encoding="utf-8")
    try:
        done = subprocess.run([path, "-c", script, *names], capture_output=True, text=True, timeout=30, check=True)
        found = orjson.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        words = (error.stderr or "").strip().splitlines()
        return Interpreter(path, problem=words[-1] if words else f"it ended with exit code {error.returncode}")
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return Interpreter(path, problem=str(error))
    return Interpreter(path, found["packages"], _cuda(found["cuda"]))


def absent(sources: Iterable[Source]) -> tuple[Absent, ...]:
    """Return the paths of `sources` that do not exist."""
    missing = []
    for source in sources:
        if is_remote(source.uri):
            continue
        path = local_path(source.uri, source.field)
        if source.is_model and not path.is_absolute():
            continue  # may be a model's name, which the engine resolves
        if not path.exists() and not parts_of(path):
            missing.append(Absent(path, source.field))
    return tuple(missing)


def broken(needs: Iterable[Needs]) -> tuple[BrokenModel, ...]:
    """Return the local model folders of jobs that cannot be loaded."""
    found = []
    for need in needs:
        for source in need.sources:
            folder = of_source(source.uri) if source.is_model else None
            if folder is not None and folder.is_dir() and (problems := examine(folder, need.family).problems):
                text = f"{problems[0].file.name}: {sentence(problems)}"
                found.append(BrokenModel(folder, source.field, text, problems[0].remedy))
    return tuple(found)


def machine(needs: Sequence[Needs], names: Sequence[str], ports: Sequence[int], runs: Path) -> Machine:
    """Collect all facts that need no request to the hub or stores. `names`: packages whose versions are wanted."""
    own = interpreter(Path(sys.executable), names)
    given = environment.of_process().engine_python
    outputs = dict.fromkeys(n.output for n in needs if n.output and not is_remote(n.output))
    kept = [u for u in outputs if not u.startswith("pvc://")]  # claims exist only on clusters
    disks = [disk("runs", runs), disk("cache", cache_folder()), *(disk("output", local_path(u)) for u in kept)]
    return Machine(
        gpus(),
        memory(),
        _shared_memory(),
        tuple(disks),
        tuple(port(p) for p in ports),
        own,
        own if given is None else interpreter(given, names),
        absent(s for n in needs for s in n.sources),
        broken(needs),
    )


# ---- hub and stores ----
def _asked(uri: str, field: str, ask: Callable[[], int]) -> Remote:
    """Return the answer about one URI. `ask` returns the number of bytes to download, or raises `EgmError`."""
    try:
        return Remote(uri, field, ask())
    except EgmError as error:
        return Remote(uri, field, problem=error.message, cure=error.hint, mistake=error.exit_code == 2)


def _each(tasks: Sequence[tuple[Remote, Callable[[], Remote]]]) -> tuple[Remote, ...]:
    """Run all tasks at the same time in threads, for at most `PATIENCE_S` plus one second, because a name server may not answer for minutes."""
    done: queue.Queue[tuple[int, Remote]] = queue.Queue()
    found = [
        replace(silent, problem=f"no answer within {PATIENCE_S:.0f} s", cure="Check the network.", mistake=False)
        for silent, _ in tasks
    ]

    def work(number: int, task: Callable[[], Remote]) -> None:
        done.put((number, task()))

    for number, (_, task) in enumerate(tasks):
        threading.Thread(target=work, args=(number, task), daemon=True).start()
    try:
        for _ in tasks:
            number, remote = done.get(timeout=PATIENCE_S + 1)
            found[number] = remote
    except queue.Empty:
        pass
    return tuple(found)


def _source_task(source: Source) -> tuple[Remote, Callable[[], Remote]]:
    uri = source.uri.split(".part_")[0]
    cached = in_cache(uri)

    def task() -> Remote:
        ask = _asked(uri, source.field, lambda: outstanding(uri, transfer=Transfer(patience_s=RETRY_S)).missing)
        return replace(ask, cached=cached)

    return Remote(uri, source.field, cached=cached), task


def _output_task(uri: str) -> tuple[Remote, Callable[[], Remote]]:
    def ask() -> int:
        open_store(uri, Transfer(patience_s=RETRY_S)).check()
        return 0

    return Remote(uri, "spec.output"), lambda: _asked(uri, "spec.output", ask)


def inputs(needs: Sequence[Needs]) -> Network:
    """Ask the hub and stores about all URIs that the jobs read."""
    sources = {s.uri.split(".part_")[0]: s for n in needs for s in n.sources if is_remote(s.uri)}
    return Network(_each([_source_task(s) for s in sources.values()]), ())


def network(needs: Sequence[Needs]) -> Network:
    """Ask the hub and stores about all URIs that the jobs read and write."""
    sources = {s.uri.split(".part_")[0]: s for n in needs for s in n.sources if is_remote(s.uri)}
    # the engine's environment has it and downloads the model itself
    if importlib.util.find_spec("huggingface_hub") is None:
        sources = {u: s for u, s in sources.items() if not (u.startswith("hf://") and s.is_model)}
    outputs = dict.fromkeys(n.output for n in needs if n.output and is_remote(n.output))
    found = _each([_source_task(s) for s in sources.values()] + [_output_task(u) for u in outputs])
    return Network(found[: len(sources)], found[len(sources) :])


def hub() -> Remote:
    """Check whether the hub can be reached."""
    import urllib.error
    import urllib.request

    url = os.environ.get("HF_ENDPOINT") or HUB

    def task() -> Remote:
        try:
            # the user has set the address
            with urllib.request.urlopen(f"{url}/api/models?limit=1", timeout=PATIENCE_S):  # noqa: S310
                return Remote(url)
        except urllib.error.HTTPError:  # an error response also shows that the hub can be reached
            return Remote(url)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            cure = "Check the network and HF_ENDPOINT, or use local folders for data and models."
            return Remote(url, problem=f"cannot be reached: {reason}", cure=cure, mistake=False)

    return _each([(Remote(url), task)])[0]


def s3() -> Remote:
    """Look for S3 credentials. Of all services, only this machine's identity service may be asked."""
    uri = os.environ.get("AWS_ENDPOINT_URL_S3") or "s3://"

    def task() -> Remote:
        import boto3
        from botocore.exceptions import BotoCoreError

        try:
            found = boto3.Session().get_credentials()
        except BotoCoreError as error:
            return Remote(uri, problem=str(error), cure="Check AWS_PROFILE and the files in ~/.aws.")
        cure = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        return Remote(uri) if found is not None else Remote(uri, problem="there are no credentials", cure=cure)

    return _each([(Remote(uri), task)])[0]
