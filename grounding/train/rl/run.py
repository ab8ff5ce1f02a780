"""Reinforcement learning: run verl's `main_ppo` as a child process, write its metrics as progress lines and its last model as a folder.

Without a GPU, verl runs through `verl/cpu.py`; on several nodes, on the Ray cluster of `ray_cluster.py`. A run that was killed continues
from the newest complete checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import orjson

from grounding.api import RlJob
from grounding.api.hyperparameters import RolloutEngine
from grounding.api.validation import best_figure
from grounding.data.jobdata import JobData
from grounding.errors import Failure, UserError
from grounding.files import atomic_write, is_published
from grounding.models import PACKED_ROWS, families
from grounding.models import folder as model_folder
from grounding.progress import ProgressWriter, new_lines, parse_lines
from grounding.runtime import flashinfer
from grounding.runtime.environment import BEGUN, RlEnvironment
from grounding.runtime.grace import Stop
from grounding.runtime.ranks import rank_of
from grounding.scoring import own_reward
from grounding.storage import fetch
from grounding.train import devices, identity, initial, loopback, rank0
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints import upload as uploads
from grounding.train.checkpoints.export import export
from grounding.train.checkpoints.own_disks import (
    FINISHED_S,
    OwnDisks,
    is_late,
    no_rank_of,
    output_of,
    refuse_other_content,
    uploading,
)
from grounding.train.checkpoints.safe_loading import require_safe
from grounding.train.monitoring import tracking
from grounding.train.rl import guard, problem, ray_cluster, rendezvous, reward
from grounding.train.rl import resume as attempts
from grounding.train.rl.overrides import overrides
from grounding.train.rl.stopping import SAVE_NOW, Doing, Verdict, judge

END_S = 5.0
"""Seconds that verl and its Ray have to end if there is nothing left to save"""


def environment(
    job: RlJob,
    out: Path,
    metrics_file: Path,
    *,
    cpu: bool,
    validation_rows: int,
    nodes: int = 1,
    disks: OwnDisks | None = None,
) -> dict[str, str]:
    """Return the environment of verl's processes, which Ray passes on to its workers. On several nodes, each pod starts its Ray node with it."""
    h = job.spec.hyperparameters
    # several rollout servers share a step's requests in varying parts, so each only waits briefly before it answers
    awaited = cpu and nodes == 1
    own = RlEnvironment(
        keep_checkpoints=h.keep_checkpoints,
        keep_best=best_figure(job) or "",
        seed=job.spec.seed,
        freeze_vision=h.freeze_vision,
        stop_file=stop_file(out),
        shared_output=disks.uri if disks else "",
        rollouts_a_step=h.batch_size * h.rollouts if awaited else 0,
        rollouts_a_validation=validation_rows if awaited else 0,
    )
    env = {
        "VERL_FILE_LOGGER_PATH": str(metrics_file),
        **own.as_environ(),
        "TOKENIZERS_PARALLELISM": "false",
        "HYDRA_FULL_ERROR": "1",
        "VERL_USE_EXTERNAL_MODULES": "grounding.train.verl.plugin",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONUNBUFFERED": "1",
    }
    env |= flashinfer.environment(os.environ)
    plugin = ",grounding.train.verl.plugin_internvl" if job.spec.model.family_name == "internvl" else ""
    env["VERL_USE_EXTERNAL_MODULES"] += plugin
    if not cpu and "OMP_NUM_THREADS" not in os.environ:
        # verl's eight agents prepare pictures at the same time; by default, each would use a thread per core
        env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // 8))
    if cpu:
        env |= {
            "VERL_USE_EXTERNAL_MODULES": f"grounding.train.verl.plugin_cpu{plugin}",
            "VERL_PLATFORM": "cpu",
            "VERL_ENGINE_DEVICE": "cuda",
            # rollout and update alternate, so each may use both cores; busy waiting would slow down the other processes
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",
            "RAY_worker_niceness": "0",  # with Ray's 15, other programs on the machine would starve the training
        }
    return env


def stop_file(out: Path) -> Path:
    """Return the path of the file that asks verl's trainer to save. The trainer writes its reports to the same folder."""
    return out / attempts.VERL / "stop"


def _own_ray(env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` with settings that restrict the Ray that verl starts itself to this machine, and with a token for it.

    Without a token, Ray would write one into the home folder, which may be missing in a pod.
    """
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **loopback.environment(env), **env}


def _has_flash_attention() -> bool:
    """Return whether verl's default attention (FlashAttention 2) is installed. Not every image has it, because it has no wheels."""
    return importlib.util.find_spec("flash_attn") is not None


def _attention(cpu: bool) -> str | None:
    """Return transformers' name of the attention of the trained model and its reference; None for verl's default, FlashAttention 2."""
    if cpu:
        return "sdpa"
    return None if _has_flash_attention() else PACKED_ROWS


def _rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.ParquetFile(path).metadata.num_rows)


def _prompts(path: Path) -> list[str]:
    """Return the first questions of the prepared rows."""
    import pyarrow.parquet as pq

    found = next(pq.ParquetFile(path).iter_batches(2000, columns=["prompt"])).to_pylist()
    return [str(message["content"]) for row in found for message in row["prompt"]]


def _total_steps(job: RlJob, rows: int, noted: tuple[int, int] | None = None) -> int:
    """Return the number of steps: the number recorded by verl in an earlier attempt, else computed from all rows."""
    h = job.spec.hyperparameters
    epoch = noted[1] if noted else max(1, rows // h.batch_size)
    steps = epoch * h.epochs
    if h.max_steps is None:
        return steps
    return min(h.max_steps, steps) if noted else h.max_steps


def train(
    job: RlJob,
    data: JobData,
    model: str,
    out: Path,
    log: tracking.Log = tracking.nowhere,
    stop: Stop | None = None,
    disks: OwnDisks | None = None,
    who: identity.Identity | None = None,
) -> int:
    """Train to the end or until SIGTERM, and write `out/model`. Return verl's exit code, or 143 if stopped. `log` gets verl's metrics of each
    step.

    On several nodes, every pod calls this: rank 0 trains, and the others provide their Ray node and return rank 0's result. `disks`: the pods
    share no folder; then `who` is what this pod trains.
    """
    import torch

    stop = stop if stop is not None else Stop.of_process()
    cpu = not torch.cuda.is_available()
    pods = rendezvous.from_environment(os.environ)
    if pods and pods.rank and disks is None:
        return _follow(job, pods, out, cpu, stop)
    if data.train_parquet is None or data.val_parquet is None:
        raise UserError("an RL job needs training and validation data", field="spec.data")
    if pods and pods.rank and disks is not None:
        initial.local(model, job.spec.model.family_name, job.spec.seed, out, partial(_prompts, data.train_parquet))
        _own_reward(job, data.train_parquet, out)
        return _follow(job, pods, out, cpu, stop, disks, who)
    if is_published(out / "model"):
        if pods:
            rendezvous.dismiss(pods, 60.0)
        return 0
    model = initial.local(model, job.spec.model.family_name, job.spec.seed, out, partial(_prompts, data.train_parquet))
    families.check(job.spec.model.family_name, model)
    rows = _rows(data.train_parquet)
    batch = job.spec.hyperparameters.batch_size
    if rows < batch:
        raise UserError(
            f"{rows} training rows are fewer than batchSize {batch}",
            field="spec.hyperparameters.batchSize",
            file=data.train_parquet,
        )
    total = _total_steps(job, rows, attempts.steps_noted(out / attempts.VERL))
    start = attempts.start(job, out, total, (pods.nodes if pods else 1) * _node(job, cpu).gpus)
    identity.refuse_steps_beyond(start.checkpoint, total)
    if start.unlogged:
        log(start.done, start.unlogged)
    if start.done < total or start.validate:
        code = _train(job, data, model, out, cpu, pods, total, start, log, stop, disks, who)
        if code and (pods or code == 143 or start.validate != "only"):
            return code
        if code:
            sys.stderr.write(
                f"rl: the last validation failed (verl's exit code {code}); the model is exported without it\n"
            )
    else:
        ProgressWriter(out / "progress.jsonl", "rl", total, start.done, known=start.known).close()
        if pods:
            rendezvous.dismiss(pods, 60.0)
    checkpoint = checkpoints.newest(out / "checkpoints")
    noted = attempts.steps_noted(out / attempts.VERL)
    if noted is not None and noted[0] < total:
        steps = "1 step" if noted[0] == 1 else f"{noted[0]} steps"
        reason = "it dropped rows whose prompts are too long"
        print(f"rl: verl trained {steps}, not {total}, because {reason}", flush=True)  # noqa: T201
        total = noted[0]
    if checkpoint is None or checkpoint.step < total:
        raise Failure(
            "verl ended without the last checkpoint", hint="Its log above shows the reason.", file=out / "checkpoints"
        )
    chosen = checkpoints.chosen(out / "checkpoints", best_figure(job), checkpoint)
    if disks is not None and not disks.bring(chosen, stop):
        return 143
    export(chosen.path, out / "model", Path(model), identity.facts(out))
    return 0


def _train(
    job: RlJob,
    data: JobData,
    model: str,
    out: Path,
    cpu: bool,
    pods: rendezvous.Pods | None,
    total: int,
    start: attempts.Start,
    track: tracking.Log,
    stop: Stop,
    disks: OwnDisks | None,
    who: identity.Identity | None,
) -> int:
    """Run verl from `start` on; return its exit code."""
    assert data.train_parquet and data.val_parquet
    nodes, done, checkpoint = pods.nodes if pods else 1, start.done, start.checkpoint
    node = _node(job, cpu)
    if checkpoint:
        checkpoints.refuse_other_world(checkpoint, nodes * node.gpus)
        require_safe(checkpoint.path)
    log = attempts.metrics_file(out / attempts.VERL, done)  # a new file, because verl truncates its file at every start
    log.parent.mkdir(parents=True, exist_ok=True)
    own = _own_reward(job, data.train_parquet, out)
    arguments = overrides(
        job,
        train_file=data.train_parquet,
        validation_file=data.val_parquet,
        model=model,
        out=out,
        reward_file=Path(reward.__file__).resolve(),
        own_reward=own,
        cpu=cpu,
        resume_from=checkpoint.path if checkpoint else None,
        validate=start.validate,
        nodes=nodes,
        attention=_attention(cpu),
        cpu_slots=node.cpus,
    )
    rows = _rows(data.val_parquet)
    env = os.environ | environment(job, out, log, cpu=cpu, validation_rows=rows, nodes=nodes, disks=disks)
    how = f"resuming after step {done}" if checkpoint else "starting"
    if start.validate:
        how += ", its validation first" if start.validate == "first" else ", only for its validation"
    print(f"rl: {_rows(data.train_parquet)} rows, {total} steps, {how}; verl's metrics: {log}", flush=True)  # noqa: T201
    writer = ProgressWriter(out / "progress.jsonl", "rl", total, done, known=start.known)
    if pods is None:
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments]
        return _run(command, _own_ray(env), out, log, writer, track, stop)
    env = rendezvous.environment_of_jobs(env)
    command = [sys.executable, "-m", "grounding.train.verl.runner", *arguments]

    def drive(address: str, lost: Callable[[], str]) -> int:
        where = ray_cluster.ray_environment(pods, "") | {"RAY_ADDRESS": address}
        code = 1
        try:
            code = _run(command, env | where, out, log, writer, track, stop, lost)
        finally:
            if disks is not None:  # before the other pods are dismissed, because they upload their files
                code = _settle(disks, code, stop, lost)
        return code

    if disks is None:
        return ray_cluster.lead(pods, node, env, _deadline(job), drive, stop)
    resume = orjson.dumps(disks.chosen.document()).decode() if disks.chosen else ""

    def compare(contents: list[str]) -> None:
        refuse_other_content([who, *(identity.Identity.parse(content.encode()) for content in contents)])

    return ray_cluster.lead(pods, node, env, _deadline(job), drive, stop, resume, compare)


def _settle(disks: OwnDisks, code: int, stop: Stop, lost: Callable[[], str]) -> int:
    """Wait until all pods have uploaded their files of the last checkpoint, and return the exit code.

    If files of a finished run are missing then, return 143 after a request to stop; otherwise raise `Failure`.
    """
    patience_s = FINISHED_S if code == 0 else uploads.UPLOAD_SHARE * stop.left()
    settled = disks.settle(patience_s, lambda: lost() or is_late(stop))
    if code == 0 and not settled:
        if stop.asked:
            return 143
        why = lost() or (disks.uploader.problem if disks.uploader else "") or "files of other pods are missing"
        raise Failure(
            f"the last checkpoint is not complete in {disks.uri}: {why}",
            hint="The job restarts from its newest checkpoint there.",
        )
    return code


def _own_reward(job: RlJob, rows: Path, out: Path) -> Path | None:
    """Copy `spec.reward.file` to the job's folder, the same on all pods, test it on the first row, and return the copy's path.

    Return None if the job has no such file. Raises `UserError` if the file cannot score the row, before any step is trained.
    """
    import pyarrow.parquet as pq

    source = job.spec.reward.file
    if source is None:
        return None
    file, name = fetch(source), job.spec.reward.entry_point
    own_reward.inspect(file, name)
    row = next(pq.ParquetFile(rows).iter_batches(1)).to_pylist()[0]
    own_reward.try_on(file, name, row["data_source"], row["reward_model"]["ground_truth"], row["extra_info"])
    copy = out / attempts.VERL / "own_reward.py"
    copy.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(copy) as written:
        written.write(file.read_bytes())
    return copy


def _follow(
    job: RlJob,
    pods: rendezvous.Pods,
    out: Path,
    cpu: bool,
    stop: Stop,
    disks: OwnDisks | None = None,
    who: identity.Identity | None = None,
) -> int:
    env = environment(job, out, Path("/dev/null"), cpu=cpu, validation_rows=0, nodes=pods.nodes, disks=disks)
    env = rendezvous.environment_of_jobs(os.environ | env)
    if disks is None:
        return ray_cluster.follow(pods, _node(job, cpu), env, _deadline(job), stop)
    if who is not None:
        pods = replace(pods, content=orjson.dumps(who.document()).decode())

    def restore(resume: str) -> None:
        disks.follow(out / "checkpoints", uploads.StoredCheckpoint.parse(resume.encode()))

    return ray_cluster.follow(pods, _node(job, cpu), env, _deadline(job), stop, restore)


def _node(job: RlJob, cpu: bool) -> ray_cluster.Node:
    gpus = 1 if cpu else job.spec.resources.gpus_per_node
    return ray_cluster.Node(gpus, ray_cluster.cpu_slots(len(os.sched_getaffinity(0)), gpus))


_START_S = 1800.0
"""Seconds that the pods wait for each other if the job sets no deadline"""


def _deadline(job: RlJob) -> float:
    """Return the seconds that the pods wait for each other."""
    given = job.spec.start_deadline_seconds
    return _START_S if given is None else float(given)


def _run(
    command: list[str],
    env: dict[str, str],
    out: Path,
    log: Path,
    writer: ProgressWriter,
    track: tracking.Log,
    stop: Stop,
    lost: Callable[[], str] = lambda: "",
) -> int:
    """Run verl and turn its metrics into progress lines. If a stop is requested, let verl save what it can (`stopping.py`), then end it.

    verl gets a share of the grace period (`Stop.training_is_late`). Steps that it has not saved by then are lost, because the rest of the
    period is for the upload. `lost` returns why the run cannot continue (a lost node), or an empty text; without it, verl might wait for a
    lost rank for ten minutes.
    """
    request = stop_file(out)
    request.unlink(missing_ok=True)
    problem.forget(request)
    begun = request.with_name(BEGUN)
    begun.unlink(missing_ok=True)
    child = subprocess.Popen(command, env=env, cwd=out, start_new_session=True)
    offset, why, spoiled = 0, "", ""
    before: int | None = None
    said: tuple[str, Doing | None] = ("", None)
    recent: list[tuple[int, dict[str, float]]] = []
    try:
        while True:
            ended = child.poll() is not None
            offset, lines = new_lines(log, offset)
            for step, metrics in attempts.logged(parse_lines(lines)):
                if noted := attempts.steps_noted(log.parent):  # verl writes it before its first step
                    writer.total_steps = noted[0]
                found = attempts.metrics(metrics)
                writer.step(step, found)
                track(step, metrics)
                recent = [*recent, (step, found)][-guard.WINDOW :]
                spoiled = spoiled or guard.too_many_failed([m for _, m in recent]) or guard.not_finite(recent)
            if ended or (spoiled and not stop.asked):
                break
            if not stop.asked and (why := lost()):
                break
            if stop.asked:
                newest = checkpoints.peek(out / "checkpoints")
                saved = newest.step if newest else 0
                if before is None:
                    before = saved
                    request.touch()
                doing = Doing.read(begun)
                verdict = judge(doing, saved, [found for _, found in recent], stop.left_for_training(), time.time())
                if saved > before:
                    verdict = Verdict("end", f"saved step {saved}")
                elif verdict.action != "end" and stop.training_is_late():
                    last = f"the last saved step is {saved}" if saved else "no step is saved"
                    what = f"step {doing.step} was" if doing else "nothing was"
                    verdict = Verdict("end", f"{what} not saved in time; {last}")
                if (verdict.action, doing) != said:
                    said = (verdict.action, doing)
                    _notice(stop, verdict.text)
                    if verdict.action == "save":
                        request.write_text(SAVE_NOW)
                if verdict.action == "end":
                    _signal_group(child, signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(min(END_S, 0.5 * stop.left()))
                    break
            time.sleep(0.1 if stop.asked else 0.5)
    finally:
        writer.close()
        _signal_group(child, signal.SIGKILL)  # Ray's processes, if any outlive their driver
        child.wait()
        request.unlink(missing_ok=True)
    if stop.asked:
        if said[0] != "end":  # verl has ended without being told to
            newest = checkpoints.peek(out / "checkpoints")
            last = f"the last saved step is {newest.step}" if newest else "no step is saved"
            told = problem.read(request)
            _notice(stop, "; ".join(filter(None, (told.message if told else "", last))))
        return 143
    if spoiled:
        raise Failure(spoiled, hint=guard.HINT)
    if why or (child.returncode and (why := lost())):
        raise Failure(why, hint="The job restarts from its newest checkpoint.")
    if child.returncode and (told := problem.read(request)):
        told.hint = told.hint or "The same command continues from the newest checkpoint."
        raise told
    return child.returncode


def _notice(stop: Stop, text: str) -> None:
    """Report in the log, in `/progress` and in the termination message what is done about the request to stop."""
    stop.notice = text
    print(f"rl: stopping; {text}", flush=True)  # noqa: T201


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass


def require_engine(engine: RolloutEngine, installed: Callable[[str], bool]) -> None:
    """Raise `UserError` with the installed engines if the rollout engine is not installed."""
    if installed(engine):
        return
    here = [name for name in get_args(RolloutEngine) if installed(name)]
    raise UserError(
        f"{engine} is not installed in this image",
        field="spec.hyperparameters.rolloutEngine",
        hint=f"Installed here: {', '.join(here) or 'none'}. Choose one of these, or set an image with {engine} in spec.podTemplate.",
    )


def main(job: RlJob, data: JobData, model: str, out: Path) -> None:
    """Entry point of `egm role rl`."""
    import torch

    devices.require(job, model)
    if torch.cuda.is_available():
        require_engine(job.spec.hyperparameters.rollout_engine, lambda name: importlib.util.find_spec(name) is not None)
    gpus = job.spec.resources.gpus_per_node * job.spec.resources.nodes if torch.cuda.is_available() else 0
    model = uploads.local_model(model)
    if not is_published(out / "model"):
        model_folder.require_trainable(model, job.spec.model.family_name)
    stop = Stop.of_process()
    first, pods = rank_of(os.environ) == 0, rendezvous.from_environment(os.environ)
    uri = output_of(job, pods.nodes if pods else 1)
    disks = OwnDisks(uri, no_rank_of) if uri else None
    if first:
        who = identity.identify(job, data, model)
        with rank0.surrounded(job, out, gpus, stop, who, disks) as log:
            code = train(job, data, model, out, log, stop, disks, who)
    elif disks is not None:
        who = identity.identify(job, data, model)
        with uploading(out, disks):
            code = train(job, data, model, out, stop=stop, disks=disks, who=who)
    else:
        code = train(job, data, model, out, stop=stop)
    if code == 143:
        sys.stderr.write("rl: stopped; the same command continues from the newest checkpoint\n")
    elif code and not first:
        raise Failure(
            "the run failed on rank 0", hint="Its log shows the reason; the job restarts from its newest checkpoint."
        )
    elif code:
        raise Failure(
            f"verl ended with exit code {code}", hint="Its log above shows the reason; the same command continues."
        )
    raise SystemExit(code)
