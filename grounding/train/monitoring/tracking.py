"""Send metrics to trackers in addition to the progress lines: TensorBoard, Weights & Biases, MLflow.

One thread of rank 0's role writes to all of them, in SFT and RL, so that they cannot stop or delay a run. verl's own loggers raise
exceptions in its trainer if a server disappears. If a backend fails, one message names it, and it is then left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import netrc
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast
from urllib.parse import urlsplit

from grounding.api import ResolvedTrainJob
from grounding.api.redaction import without_secrets
from grounding.errors import UserError
from grounding.files import is_published
from grounding.runtime.environment import Environment, of_process
from grounding.storage import destination
from grounding.train.monitoring import tracking_keys

Log = Callable[[int, Mapping[str, Any]], None]
"""Called with a step and its metrics; values that are not numbers are skipped"""


def nowhere(step: int, metrics: Mapping[str, Any]) -> None:
    """Track nothing; a `Log` for jobs without tracking."""


class Backend(Protocol):
    """A tool that receives metrics. Its exceptions disable the tool and do not affect the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self, ok: bool) -> None: ...


class Tracker:
    """Passes metrics to backends in a separate thread. `makers`: name -> function that opens the backend, which may be slow or fail."""

    def __init__(self, makers: Mapping[str, Callable[[], Backend]], say: Callable[[str], None]) -> None:
        self._makers, self._say = dict(makers), say
        self._queue: queue.SimpleQueue[tuple[int, dict[str, float]] | bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        if self._makers:
            self._thread.start()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Queue the metrics of a step; returns at once."""
        if self._makers:
            numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
            self._queue.put((step, numbers))

    def close(self, ok: bool, patience_s: float = 60.0) -> None:
        """Wait at most `patience_s` seconds for the backends to finish."""
        if self._thread.is_alive():
            self._queue.put(ok)
            self._thread.join(patience_s)
            if self._thread.is_alive():
                self._say("tracking: the backends have not finished in time; the run ends without waiting for them")

    def _run(self) -> None:
        opened: dict[str, Backend] = {}
        for name, make in self._makers.items():
            with self._spared(name, opened):
                opened[name] = make()
        while isinstance(item := self._queue.get(), tuple):
            for name in list(opened):
                with self._spared(name, opened):
                    opened[name].log(*item)
        for name in list(opened):
            with self._spared(name, opened):
                opened[name].close(bool(item))

    @contextlib.contextmanager
    def _spared(self, name: str, opened: dict[str, Backend]) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # some backends raise SystemExit
            opened.pop(name, None)
            text = str(error).strip().splitlines() or [type(error).__name__]
            self._say(f"tracking: {name} receives no more metrics: {text[0]}")


class _Tensorboard:
    def __init__(self, folder: Path) -> None:
        from tensorboard.summary import Writer  # from its own package, without torch

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = Writer(str(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, ok: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, job: ResolvedTrainJob, out: Path, run_id: str, say: Callable[[str], None]) -> None:
        import wandb

        wanted = job.spec.tracking.wandb
        assert wanted is not None
        url = os.environ.get("WANDB_BASE_URL") or wanted.base_url or tracking_keys.PUBLIC_WANDB
        mode, why = wandb_mode(url, os.environ, reachable, of_process().tracking_hosts)
        project = os.environ.get("WANDB_PROJECT") or wanted.project
        config = without_secrets(job.spec.model_dump(mode="json", by_alias=True, exclude_none=True))

        def begin(mode: str) -> Any:
            settings = wandb.Settings(
                base_url=url, console="off", disable_git=True, init_timeout=60.0, finish_timeout=45.0
            )
            return wandb.init(
                project=project,
                name=job.metadata.name,
                id=run_id,
                dir=str(out),
                config=config,
                job_type=job.spec.method,
                mode=cast(Literal["online", "offline", "disabled", "shared"], mode),  # wandb refuses any other value
                resume="allow" if mode == "online" else None,
                settings=settings,
            )

        try:
            self._run = begin(mode)
        except Exception as error:
            if mode != "online":
                raise
            mode, why = "offline", str(error).strip().splitlines()[0]
            self._run = begin(mode)
        if why:
            say(
                f"tracking: Weights & Biases is offline ({why}); `wandb sync {out / 'wandb'}/offline-run-*` uploads it later"
            )
        # log our own step, because a resumed run repeats steps, and wandb refuses a repeated step of its own
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def close(self, ok: bool) -> None:
        import wandb

        self._run.finish(exit_code=0 if ok else 1)
        wandb.teardown()  # wandb's own process writes the file of an offline run, and `finish` does not wait for it


class _Mlflow:
    def __init__(self, job: ResolvedTrainJob, run_id: str) -> None:
        wanted = job.spec.tracking.mlflow
        assert wanted is not None
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default, each call can take minutes
        uri = os.environ.get("MLFLOW_TRACKING_URI") or wanted.tracking_uri
        has_file = (Path.home() / ".mlflow" / "credentials").exists()
        if why := tracking_keys.keeps_mlflow_key(uri, os.environ, has_file, of_process().tracking_hosts):
            raise UserError(why, field="spec.tracking.mlflow.trackingUri")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(uri)
        known = self._client.get_experiment_by_name(wanted.experiment)
        experiment = known.experiment_id if known else self._client.create_experiment(wanted.experiment)
        found = self._client.search_runs([experiment], f"tags.`egm.run` = '{run_id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            run = self._client.create_run(experiment, run_name=job.metadata.name, tags={"egm.run": run_id})
            self._id = run.info.run_id
            for name, value in job.spec.hyperparameters.model_dump(by_alias=True, exclude_none=True).items():
                self._client.log_param(self._id, name, str(value)[:500])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        # MLflow allows fewer characters in names than verl uses: val-core/grounding/acc/mean@1
        batch = [Metric(re.sub(r"[^\w./ -]", "_", name), value, now, step) for name, value in metrics.items()]
        for start in range(0, len(batch), 500):
            self._client.log_batch(self._id, metrics=batch[start : start + 500])

    def close(self, ok: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if ok else "FAILED")


def reachable(url: str, timeout_s: float = 5.0) -> bool:
    """Return whether a server listens at the URL. With a proxy, return True, because only the proxy can find out."""
    parts = urlsplit(url)
    if os.environ.get(f"{parts.scheme}_proxy") or os.environ.get(f"{parts.scheme.upper()}_PROXY"):
        return True
    try:
        port = parts.port or {"http": 80}.get(parts.scheme, 443)
        with socket.create_connection((parts.hostname or "", port), timeout_s):
            return True
    except (OSError, ValueError):
        return False


def wandb_mode(
    url: str, environ: Mapping[str, str], reachable: Callable[[str], bool], allowed: Collection[str] = ()
) -> tuple[str, str]:
    """Return wandb's mode, and the reason if it is offline: the value of `$WANDB_MODE`, else online if a key and a server are available.

    A key from the environment is only sent to the environment's server and to `allowed` hosts, not to any server in a manifest.
    """
    mode = environ.get("WANDB_MODE", "")
    if mode and mode not in _ONLINE:
        return mode, ""
    if why := tracking_keys.keeps_wandb_key(url, environ, allowed):
        return "offline", why
    if mode:
        return mode, ""
    if not environ.get("WANDB_API_KEY") and not _in_netrc(urlsplit(url).hostname or "", environ):
        return "offline", "there is no key: set WANDB_API_KEY, or apiKeySecret on a cluster"
    if not reachable(url):
        return "offline", f"{url} cannot be reached"
    return "online", ""


_ONLINE = ("online", "run", "shared")
"""The modes of wandb that contact a server"""


def _in_netrc(host: str, environ: Mapping[str, str]) -> bool:
    try:
        return netrc.netrc(environ.get("NETRC") or str(Path.home() / ".netrc")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(job: ResolvedTrainJob, out: Path, environ: Mapping[str, str]) -> str:
    """Return the name of the tracked run that all attempts of a job share: the same for the same job with the same output."""
    where = destination(job.spec.output, environ) or Environment.from_environ(environ).job or str(out)
    return hashlib.sha256(f"{where}\n{job.metadata.name}".encode()).hexdigest()[:16]


def open_tracker(job: ResolvedTrainJob, out: Path, say: Callable[[str], None]) -> Tracker:
    """Return the tracker of a job's `spec.tracking`."""
    wanted, name = job.spec.tracking, run_id(job, out, os.environ)
    makers: dict[str, Callable[[], Backend]] = {}
    if wanted.tensorboard:
        makers["TensorBoard"] = lambda: _Tensorboard(out / "tensorboard")
    if wanted.wandb is not None:
        makers["Weights & Biases"] = lambda: _Wandb(job, out, name, say)
    if wanted.mlflow is not None:
        makers["MLflow"] = lambda: _Mlflow(job, name)
    return Tracker(makers, say)


@contextlib.contextmanager
def tracked(job: ResolvedTrainJob, out: Path) -> Iterator[Log]:
    """Yield a `Log` for rank 0's training, and close it at the end. After an error or a stop by a signal, the tracked run ends as failed."""
    tracker = open_tracker(job, out, lambda text: print(text, flush=True))  # noqa: T201 - the role's log
    ok = False
    try:
        yield tracker.log
        ok = is_published(out / "model")
    finally:
        tracker.close(ok, 60.0 if ok else 10.0)
