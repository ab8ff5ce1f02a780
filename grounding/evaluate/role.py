"""The two roles of an evaluation job: serve a model, and ask the servers. Both back ends start them as `egm role ...`."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from grounding.errors import Failure, UserError
from grounding.evaluate.engines import Sampling, ServeOptions, get_engine
from grounding.files import read_json
from grounding.storage import destination, fetch, is_remote, locate


def _job(job_file: Path) -> Any:
    from grounding.api import load_job, resolve

    job = resolve(load_job(job_file))
    if job.kind != "GroundingEvalJob":
        raise UserError(f"expected a GroundingEvalJob, found a {job.kind}", file=job_file)
    return job


def program(argv: list[str]) -> list[str]:
    """The argv with its program beside this interpreter where it is there: the same environment, active or not.

    `$EGM_ENGINE_PYTHON` names the interpreter of another environment, since engines' pins exclude each other; the words of `$EGM_ENGINE_ARGS`
    are added at the end.
    """
    python = Path(os.environ.get("EGM_ENGINE_PYTHON") or sys.executable)
    if not python.is_file():
        raise UserError("no such interpreter", file=python, field="EGM_ENGINE_PYTHON")
    argv = [*argv, *shlex.split(os.environ.get("EGM_ENGINE_ARGS", ""))]
    if argv[0] == "python":
        return [str(python), *argv[1:]]
    beside = python.parent / argv[0]
    found = str(beside) if beside.is_file() else shutil.which(argv[0])
    if found is None:
        raise UserError(
            f"the program {argv[0]} is not installed",
            hint="Install the extra that holds it: pip install 'egm-grounding[cpu]'.",
        )
    return [found, *argv[1:]]


def server_port() -> int:
    """The port of `$EGM_PORT`."""
    value = os.environ.get("EGM_PORT", "")
    if not value.isdigit() or not 0 < int(value) < 65536:
        raise UserError(f"expected a port in $EGM_PORT, found {value!r}")
    return int(value)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the role's log


def _model_folder(model: str, family: str) -> str:
    """The folder of the model; `tiny://` is built on the spot."""
    if model.startswith("tiny://"):
        from grounding.train.tiny import build, demo_corpus

        folder = tempfile.mkdtemp(prefix="egm-tiny-")
        build(folder, demo_corpus(), family=family)
        return folder
    if is_remote(model):
        if model.startswith("hf://") and importlib.util.find_spec("huggingface_hub") is None:
            return model.removeprefix("hf://")  # the engine's environment has it, and fetches by itself
        return str(fetch(model, say=_say))
    model = str(locate(model).folder)
    path = Path(model)
    if path.is_absolute() and not (path / "config.json").is_file():
        raise UserError("no model is there: config.json is absent", file=path)
    return str(path.absolute()) if path.is_dir() else model


def serve_role(job_file: Path, data: Path, model: str) -> None:
    """Become the engine's server on `$EGM_PORT`, 127.0.0.1 unless `$EGM_HOST` says otherwise. Does not return."""
    job = _job(job_file)
    engine, port = get_engine(job.spec.engine), server_port()
    gpus = job.spec.server_gpus
    folder = _model_folder(model, job.spec.model.family_name)
    host, most = os.environ.get("EGM_HOST", "127.0.0.1"), _max_length(Path(folder))
    argv = program(engine.command(folder, ServeOptions(host, port, _model_name(job), gpus or 0, most)))
    env = dict(os.environ) | engine.environment(os.environ, gpus=gpus or 0)
    if not Path(folder).is_dir() and "HF_HUB_OFFLINE" not in os.environ:  # a model of the hub has to be fetched
        env.pop("HF_HUB_OFFLINE", None)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(argv[0], argv, env)  # noqa: S606  # no shell is meant: signals reach the server itself


def _max_length(folder: Path) -> int:
    """Tokens of a request at most: 32,768, or what a smaller model was made for."""
    try:
        config = read_json(folder / "config.json")
        known = config.get("text_config", config).get("max_position_embeddings")
    except (OSError, UserError, AttributeError):
        known = None
    return min(32768, known) if isinstance(known, int) else 32768


def _model_name(job: Any) -> str:
    """The model's name in requests and rows, the same on both sides."""
    ref = job.spec.model
    return str(ref.train_job or ref.source)


def evaluate_role(job_file: Path, data: Path, out: Path) -> None:
    """Ask the servers of `$EGM_ENDPOINTS`, or those the job names; leaves rows and summary under `out`.

    A copy is kept in the job's output (`storage.destination`), from which a new pod goes on; SIGTERM ends as Ctrl-C does, with the last rows sent.
    """
    from rich.console import Console

    from grounding.data.jobdata import bring
    from grounding.data.jobdata import locate as locate_data
    from grounding.evaluate.last_words import leave
    from grounding.evaluate.live import Live
    from grounding.evaluate.options import Options
    from grounding.evaluate.request import Request
    from grounding.evaluate.run import Evaluation, Progress, plan, run
    from grounding.evaluate.telemetry import serve

    job = _job(job_file)
    bring(job, say=_say)
    spec, where = job.spec, locate_data(job, data)
    given = [e for e in os.environ.get("EGM_ENDPOINTS", "").split(",") if e.strip()]
    endpoints = tuple(given or spec.endpoints or ())
    if not endpoints:
        raise UserError(
            "no server to ask: $EGM_ENDPOINTS is empty and the job names none", file=job_file, field="spec.endpoints"
        )
    engine = get_engine(spec.engine)
    names = Sampling.__dataclass_fields__
    chosen = {n: v for n in names if (v := getattr(spec.sampling, n, None)) is not None}
    sampling = Sampling(**chosen)
    model = _model_name(job)
    # only the pinned server that this job started does without a name
    sent = None if given and not engine.names_model else model
    # servers that the job started hold one copy a GPU; of others it knows nothing
    copies = max(1, spec.server_gpus or 1) if given else 1
    request = Request(sent, spec.prompt, engine.request_extras(sampling), routing=engine.routing(copies))
    wait = os.environ.get("EGM_WAIT_SECONDS", "0")
    if not wait.isdigit():
        raise UserError(f"expected whole seconds in $EGM_WAIT_SECONDS, found {wait!r}")
    client = Options(endpoints, request, spec.concurrency or 64, wait_s=float(wait))
    # errors of an earlier attempt are asked again: a job is started again in order to finish
    evaluation = Evaluation(
        where.eval_files,
        where.images,
        out,
        model,
        client,
        sampling,
        spec.scoring,
        retry_errors=True,
        mode=spec.mode,
        remote=destination(spec.output),
        engine=spec.engine,
    )
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it, and its children inherit that
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with (
        Live(Console(force_terminal=False, width=200), every_s=10.0) as live,
        serve(job.metadata.name, out) as (teller, _),
    ):

        def listen(progress: Progress) -> None:
            live(progress)
            teller(progress)

        summary = run(evaluation, plan(evaluation), listen)
    leave(summary)
    if summary["errors"]:
        raise Failure(
            summary["reason"], file=out, hint="Answers are kept; start the job again to ask the failed ones again."
        )
