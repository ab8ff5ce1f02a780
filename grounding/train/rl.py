"""Reinforcement learning: verl's own `main_ppo` as a child process, its metrics as progress lines, its last model as a folder.

On a machine without a GPU it runs through `verl_cpu.py`; on several nodes over the Ray of `ray_cluster.py`. A run that was killed continues from the
newest complete checkpoint.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grounding import flashinfer
from grounding.api import GroundingTrainJob
from grounding.data.jobdata import JobData
from grounding.errors import Failure, UserError
from grounding.train import attempts, checkpoints, families, gang, rank0, ray_cluster, reward, tracking, uploads
from grounding.train.export import export
from grounding.train.progress import ProgressWriter, new_lines, parse_lines
from grounding.train.verl_overrides import freezes_vision, overrides


def environment(
    job: GroundingTrainJob, out: Path, metrics_file: Path, *, cpu: bool, validation_rows: int, nodes: int = 1
) -> dict[str, str]:
    """Environment of the verl processes; Ray hands it on to its workers. On several nodes each starts its Ray with it."""
    h = job.spec.hyperparameters
    env = {
        "VERL_FILE_LOGGER_PATH": str(metrics_file),
        "EGM_KEEP_CHECKPOINTS": str(h.keep_checkpoints or 3),
        "EGM_SEED": str(job.spec.seed),
        "EGM_FREEZE_VISION": str(int(freezes_vision(job))),
        "TOKENIZERS_PARALLELISM": "false",
        "HYDRA_FULL_ERROR": "1",
        "VERL_USE_EXTERNAL_MODULES": "grounding.train.verl_fixes",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONUNBUFFERED": "1",
    }
    env |= flashinfer.environment(os.environ)
    plugin = ",grounding.train.verl_internvl" if job.spec.model.family_name == "internvl" else ""
    env["VERL_USE_EXTERNAL_MODULES"] += plugin
    if not cpu and "OMP_NUM_THREADS" not in os.environ:
        # verl's eight agents prepare pictures at the same time; left alone, each does so with a thread a core
        env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // 8))
    if cpu:
        env |= {
            "VERL_USE_EXTERNAL_MODULES": f"grounding.train.verl_cpu{plugin}",  # and with it verl_fixes
            "VERL_PLATFORM": "cpu",
            "VERL_ENGINE_DEVICE": "cuda",
            # several rollout servers share a step's requests in no fixed way: each answers what it has after a moment
            "EGM_ROLLOUTS_A_STEP": str((h.batch_size or 256) * (h.rollouts or 16) if nodes == 1 else 0),
            "EGM_ROLLOUTS_A_VALIDATION": str(validation_rows if nodes == 1 else 0),
            # rollout and update take turns, so both cores are free for each; busy waiting would cost the other processes
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",
            "RAY_worker_niceness": "0",  # Ray's 15 lets anything else on the machine starve the training
        }
    return env


def _own_ray(env: Mapping[str, str]) -> dict[str, str]:
    """`env` with a token for the Ray that verl starts itself: left alone, Ray writes one into the home folder, which a pod may not have."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **env}


def _has_flash_attention() -> bool:
    """Whether what verl trains with by default is installed; it comes without wheels, so not every image has it."""
    return importlib.util.find_spec("flash_attn") is not None


def _rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.ParquetFile(path).metadata.num_rows)


def _total_steps(job: GroundingTrainJob, rows: int) -> int:
    h = job.spec.hyperparameters
    return h.max_steps or max(1, rows // (h.batch_size or 256)) * (h.epochs or 3)


def train(job: GroundingTrainJob, data: JobData, model: str, out: Path, log: tracking.Log = tracking.nowhere) -> int:
    """Run to the end or to SIGTERM; leaves `out/model`. Returns verl's exit code, 143 when stopped. `log` gets verl's metrics of each step.

    On several nodes every pod calls it: rank 0 trains, the others lend it their Ray node and return what it came to.
    """
    import torch

    cpu = not torch.cuda.is_available()
    pods = gang.from_environment(os.environ)
    if pods and pods.rank:
        return _follow(job, pods, out, cpu)
    if data.train_parquet is None or data.val_parquet is None:
        raise UserError("an RL job needs training and validation data", field="spec.data")
    if (out / "model" / "config.json").exists():
        if pods:
            gang.dismiss(pods, 60.0)
        return 0
    families.check(job.spec.model.family_name, model)
    rows = _rows(data.train_parquet)
    batch = job.spec.hyperparameters.batch_size or 256
    if rows < batch:
        raise UserError(
            f"{rows} training rows are fewer than batchSize {batch}",
            field="spec.hyperparameters.batchSize",
            file=data.train_parquet,
        )
    total = _total_steps(job, rows)
    start = attempts.start(job, out, total, (pods.nodes if pods else 1) * _node(job, cpu).gpus)
    if start.unlogged:
        log(start.done, start.unlogged)
    if start.done < total or start.validate:
        code = _train(job, data, model, out, cpu, pods, total, start, log)
        if code and (pods or code == 143 or start.validate != "only"):
            return code
        if code:
            sys.stderr.write(
                f"rl: the last validation failed (verl's exit code {code}); the model is exported without it\n"
            )
    else:
        ProgressWriter(out / "progress.jsonl", "rl", total, start.done, known=start.known).close()
        if pods:
            gang.dismiss(pods, 60.0)
    checkpoint = checkpoints.newest(out / "checkpoints")
    if checkpoint is None or checkpoint.step < total:
        raise Failure(
            "verl ended without the last checkpoint", hint="Its log above says why.", file=out / "checkpoints"
        )
    export(checkpoint.path, out / "model", Path(model))
    return 0


def _train(
    job: GroundingTrainJob,
    data: JobData,
    model: str,
    out: Path,
    cpu: bool,
    pods: gang.Pods | None,
    total: int,
    start: attempts.Start,
    track: tracking.Log,
) -> int:
    """Run verl from `start` on; its exit code."""
    assert data.train_parquet and data.val_parquet
    nodes, done, checkpoint = pods.nodes if pods else 1, start.done, start.checkpoint
    node = _node(job, cpu)
    if checkpoint:
        checkpoints.refuse_other_world(checkpoint, nodes * node.gpus)
    attempt = time.strftime("%Y%m%dT%H%M%S")
    log = out / attempts.VERL / f"metrics-{attempt}-from-{done}.jsonl"  # verl truncates its file at every start
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = overrides(
        job,
        train_file=data.train_parquet,
        validation_file=data.val_parquet,
        model=model,
        out=out,
        reward_file=Path(reward.__file__).resolve(),
        cpu=cpu,
        resume_from=checkpoint.path if checkpoint else None,
        validate=start.validate,
        nodes=nodes,
        attention=None if _has_flash_attention() and not cpu else "sdpa",
        cpu_slots=node.cpus,
    )
    env = os.environ | environment(job, out, log, cpu=cpu, validation_rows=_rows(data.val_parquet), nodes=nodes)
    how = f"resuming after step {done}" if checkpoint else "starting"
    if start.validate:
        how += ", its validation first" if start.validate == "first" else ", for its validation alone"
    print(f"rl: {_rows(data.train_parquet)} rows, {total} steps, {how}; verl's metrics: {log}", flush=True)  # noqa: T201
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments]
    if pods is not None:  # verl's runner may land on any pod, whose own environment knows another file or none
        command.append(f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={log}")
    writer = ProgressWriter(out / "progress.jsonl", "rl", total, done, known=start.known)
    if pods is None:
        return _run(command, _own_ray(env), out, log, writer, track)
    env = gang.environment_of_jobs(env)

    def drive(address: str, lost: Callable[[], str]) -> int:
        where = ray_cluster.ray_environment(pods, "") | {"RAY_ADDRESS": address}
        return _run(command, env | where, out, log, writer, track, lost)

    return ray_cluster.lead(pods, node, env, _deadline(job), drive)


def _follow(job: GroundingTrainJob, pods: gang.Pods, out: Path, cpu: bool) -> int:
    env = environment(job, out, Path("/dev/null"), cpu=cpu, validation_rows=0, nodes=pods.nodes)
    return ray_cluster.follow(pods, _node(job, cpu), gang.environment_of_jobs(os.environ | env), _deadline(job))


def _node(job: GroundingTrainJob, cpu: bool) -> ray_cluster.Node:
    gpus = 1 if cpu else job.spec.resources.gpus_per_node
    return ray_cluster.Node(gpus, ray_cluster.cpu_slots(len(os.sched_getaffinity(0)), gpus))


def _deadline(job: GroundingTrainJob) -> float:
    return float(job.spec.start_deadline_seconds or 1800)


def _run(
    command: list[str],
    env: dict[str, str],
    out: Path,
    log: Path,
    writer: ProgressWriter,
    track: tracking.Log,
    lost: Callable[[], str] = lambda: "",
) -> int:
    """Run verl, turn its metrics into progress lines, pass SIGTERM and SIGINT on; what has not ended after most of the grace period is killed.

    `lost` says why the run cannot go on (a node is gone), else nothing: verl may wait for a lost rank for ten minutes.
    """
    stopped: list[float] = []
    child = subprocess.Popen(command, env=env, cwd=out, start_new_session=True)

    def stop(number: int, _: Any) -> None:
        stopped.append(time.monotonic())
        _signal_group(child, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    patience = 0.6 * float(os.environ.get("EGM_GRACE_SECONDS") or 30)
    offset, why = 0, ""
    try:
        while True:
            ended = child.poll() is not None
            offset, lines = new_lines(log, offset)
            for step, metrics in attempts.logged(parse_lines(lines)):
                writer.step(step, attempts.metrics(metrics))
                track(step, metrics)
            if ended or (stopped and time.monotonic() - stopped[0] > patience):
                break
            if not stopped and (why := lost()):
                break
            time.sleep(0.5)
    finally:
        writer.close()
        _signal_group(child, signal.SIGKILL)  # Ray's processes, should any outlive their driver
        child.wait()
    if stopped:
        return 143
    if why or (child.returncode and (why := lost())):
        raise Failure(why, hint="The job starts again from its newest checkpoint.")
    return child.returncode


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass


def main(job: GroundingTrainJob, data: JobData, model: str, out: Path) -> None:
    """Entry point of `egm role rl`."""
    import torch

    gpus = job.spec.resources.gpus_per_node * job.spec.resources.nodes if torch.cuda.is_available() else 0
    model = uploads.local_model(model)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        with rank0.surrounded(job, out, gpus) as log:
            code = train(job, data, model, out, log)
    else:
        code = train(job, data, model, out)
    if code == 143:
        sys.stderr.write("rl: stopped; the same command continues from the newest checkpoint\n")
    elif code and not first:
        raise Failure(
            "the run failed on rank 0", hint="Its log says why; the job starts again from its newest checkpoint."
        )
    elif code:
        raise Failure(f"verl ended with exit code {code}", hint="Its log above says why; the same command continues.")
    raise SystemExit(code)
