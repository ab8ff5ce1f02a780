"""The two roles of an evaluation job: serving a model, and asking the servers. Both back ends start them as `egm role ...`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from grounding.api import ResolvedEvalJob
from grounding.api.families import tiny_kind
from grounding.errors import EgmError, Failure, UserError, from_checkout
from grounding.evaluate.costs import CONFIGS, Hardware, read_shape
from grounding.evaluate.engines import Sampling, ServeOptions, get_engine
from grounding.evaluate.flops import Shape
from grounding.evaluate.method import Method
from grounding.evaluate.serving import FOLDER
from grounding.evaluate.sweep import Axes
from grounding.evaluate.sweep_models import Part, Whole
from grounding.files import read_json
from grounding.models import folder as model_folder
from grounding.runtime import environment
from grounding.runtime.environment import EVERY_IPV4, Environment
from grounding.storage import destination, fetch, is_remote, locate, open_store


def _job(job_file: Path) -> Any:
    from grounding.api import load_job

    job = load_job(job_file)
    if job.kind != "GroundingEvalJob":
        raise UserError(f"expected a GroundingEvalJob, found a {job.kind}", file=job_file)
    return job


def program(argv: list[str]) -> list[str]:
    """Return the argv with the program from the folder of this interpreter, if it exists there, so that the environment need not be
    activated.

    If `$EGM_ENGINE_PYTHON` is set, it is the interpreter of another environment, because the engines need conflicting versions. The
    arguments in `$EGM_ENGINE_ARGS` are appended. Raises `UserError` if the program is not installed.
    """
    given = environment.of_process()
    python = given.engine_python if given.engine_python is not None else Path(sys.executable)
    if not python.is_file():
        raise UserError("the interpreter does not exist", file=python, field="EGM_ENGINE_PYTHON")
    argv = [*argv, *given.engine_args]
    if argv[0] == "python":
        return [str(python), *argv[1:]]
    beside = python.parent / argv[0]
    found = str(beside) if beside.is_file() else shutil.which(argv[0])
    if found is None:
        raise UserError(
            f"the program {argv[0]} is not installed",
            hint=from_checkout("cpu"),
        )
    return [found, *argv[1:]]


def server_port() -> int:
    """Return the port in `$EGM_PORT`. Raises `UserError` if it is not a port."""
    port = environment.of_process().port
    if not port:
        raise UserError("must be the port on which the server listens (1 to 65535)", field="EGM_PORT")
    return port


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the role's log


def _model_folder(model: str, family: str) -> str:
    """Return the folder of the model. A `tiny://` model is built first."""
    kind = tiny_kind(model, family)
    if kind is not None:
        from grounding.models.tiny import build, demo_corpus
        from grounding.models.tiny_parts import size_of

        folder = tempfile.mkdtemp(prefix="egm-tiny-")
        build(folder, demo_corpus(), size=size_of(model), kind=kind)
        return folder
    if is_remote(model):
        if model.startswith("hf://") and importlib.util.find_spec("huggingface_hub") is None:
            # the engine's environment has huggingface_hub, and the engine downloads the model itself
            return model.removeprefix("hf://")
        return str(fetch(model, say=_say))
    model = str(locate(model).folder)
    path = Path(model)
    if path.is_absolute() and not (path / "config.json").is_file():
        raise UserError("the folder has no model: config.json is absent", file=path)
    return str(path.absolute()) if path.is_dir() else model


def _of_one_model(job: Any, name: str, job_file: Path) -> Any:
    """Return the job with only the model that this process measures. Raises `UserError` if the job has no such model."""
    known = job.spec.several_models
    if name == "" and not known:
        return job
    if name not in known:
        what = f"the job has no model {name!r}" if name else "the job has several models"
        raise UserError(
            what,
            file=job_file,
            field="--only-model",
            hint=f"Its models: {', '.join(known) if known else 'one, without a name'}.",
        )
    return job.model_copy(update={"spec": job.spec.of_model(name)})


def serve_role(job_file: Path, data: Path, model: str, only: str = "") -> None:
    """Replace this process by the engine's server on `$EGM_HOST` (default 127.0.0.1) and `$EGM_PORT`. Does not return.

    If `$EGM_API_KEY` is set, the server refuses requests without that key.
    `only` is the name of the model to serve in a sweep over models.
    """
    job = _of_one_model(_job(job_file), only, job_file)
    engine, port = get_engine(job.spec.engine), server_port()
    folder = _model_folder(model, job.spec.model.family_name)
    if Path(folder).is_dir():
        model_folder.require(Path(folder), field="spec.model")
    variables, most = environment.of_process(), _max_length(Path(folder))
    remote_code = job.spec.model.trust_remote_code
    if not remote_code and _brings_code(Path(folder)):
        _say(
            "config.json refers to Python code in the model's folder (auto_map). The engine uses its own implementation of the model; "
            "if it has none, spec.model.trustRemoteCode: true allows it to run that code."
        )
    host = variables.every_address if variables.host == EVERY_IPV4 else variables.host
    options = replace(serve_options(job, host, port, most), keyed=bool(variables.api_key))
    argv = program(engine.command(folder, options))
    env = dict(os.environ) | engine.environment(os.environ, gpus=job.spec.server_gpus)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FOLDER), env.get("PYTHONPATH"))))
    # the engine must be able to download a model from the hub
    if not Path(folder).is_dir() and "HF_HUB_OFFLINE" not in os.environ:
        env.pop("HF_HUB_OFFLINE", None)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(argv[0], argv, env)  # noqa: S606  # without a shell, signals reach the server directly


def serve_options(job: ResolvedEvalJob, host: str, port: int, max_length: int) -> ServeOptions:
    """Return the options with which each server of a job serves its model."""
    spec = job.spec
    shared = (spec.tensor_parallel, spec.pipeline_parallel, spec.expert_parallel)
    remote_code = spec.model.trust_remote_code
    return ServeOptions(host, port, _model_name(job), spec.server_gpus, max_length, *shared, remote_code)


def _brings_code(folder: Path) -> bool:
    """Return whether a model's configuration refers to Python code in its folder."""
    try:
        return "auto_map" in read_json(folder / "config.json")
    except (OSError, UserError, TypeError):
        return False


def _max_length(folder: Path) -> int:
    """Return the maximum number of tokens of a request: 32,768, or the model's own limit if that is smaller."""
    try:
        config = read_json(folder / "config.json")
        known = config.get("text_config", config).get("max_position_embeddings")
    except (OSError, UserError, AttributeError):
        known = None
    return min(32768, known) if isinstance(known, int) else 32768


def _model_name(job: Any) -> str:
    """Return the model's name in requests and rows. Server and client use the same name."""
    return str(job.spec.model.name)


def _hardware(job: Any, served: str, started: bool) -> Hardware:
    """Return the hardware of the job's servers. It is unknown if the job did not start them."""
    spec = job.spec
    if not started:
        return Hardware(price_per_gpu_hour=spec.price_per_gpu_hour)
    return Hardware(spec.servers * spec.server_gpus, spec.price_per_gpu_hour, shape=_shape(served))


def _shape(served: str) -> Shape | None:
    """Return the dimensions of the model in a folder or a bucket; None if they cannot be read."""
    if served.startswith("s3://"):
        store = open_store(served)
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(EgmError):
            for name in CONFIGS:
                if store.find(name) is not None:
                    store.download(name, Path(folder, name))
            return read_shape(Path(folder))
        return None
    return read_shape(Path(served)) if "://" not in served and Path(served, "config.json").is_file() else None


def _methods(spec: Any, base: Method) -> tuple[Method, ...]:
    """Return the settings of a job's sweep."""
    sweep = spec.sweep
    if sweep.settings:
        return tuple(
            dict.fromkeys(Method(s.samples, s.thinking_budget, s.max_pixels, base.min_pixels) for s in sweep.settings)
        )
    axes = Axes(tuple(sweep.thinking_budgets), tuple(sweep.samples), tuple(sweep.max_pixels))
    return axes.methods(base)


def evaluate_role(job_file: Path, data: Path, out: Path, served: str = "", only: str = "") -> None:
    """Ask the servers in `$EGM_ENDPOINTS`, or those in the job, and write rows and summary under `out`.

    `served` is the path or URI of the model that the job's servers load; results of a model with other content are refused. `only` is the
    name of the model to measure in a sweep over models; its results are below `out/models`.

    A copy of the results is kept in the job's output (`storage.destination`), and a new pod continues from it. SIGTERM, like Ctrl-C,
    uploads the last rows and ends the role.
    """
    from rich.console import Console

    from grounding.data.jobdata import bring
    from grounding.data.jobdata import locate as locate_data
    from grounding.evaluate import ownership
    from grounding.evaluate.client.options import Options
    from grounding.evaluate.client.request import Request
    from grounding.evaluate.evaluation import Evaluation
    from grounding.evaluate.final_report import leave
    from grounding.evaluate.guard import Truths
    from grounding.evaluate.live import Live, why_not
    from grounding.evaluate.plan import plan
    from grounding.evaluate.progress import Progress
    from grounding.evaluate.run import run
    from grounding.evaluate.sweep import run_sweep
    from grounding.evaluate.telemetry import Beside, serve
    from grounding.evaluate.with_engine import with_engine
    from grounding.runtime.access import access_of, header_variable
    from grounding.storage.aside import restart_asked

    whole = _job(job_file)
    job = _of_one_model(whole, only, job_file)
    bring(job, say=_say)
    spec, where = job.spec, locate_data(job, data)
    variables = environment.of_process()
    started = not spec.endpoints  # both back ends use the same variable, whether or not the job starts the servers
    endpoints = variables.endpoints if variables.endpoints else tuple(spec.endpoints)
    if not endpoints:
        raise UserError(
            "there is no server to ask: $EGM_ENDPOINTS is empty and the job lists no endpoints",
            file=job_file,
            field="spec.endpoints",
        )
    names = Sampling.__dataclass_fields__
    chosen = {n: v for n in names if (v := getattr(spec.sampling, n, None)) is not None}
    sampling = Sampling(**chosen)
    model = _model_name(job)
    request = Request(model, spec.prompt, system=spec.system_prompt)
    headers = [f"{each.header}={header_variable(each.header)}" for each in spec.header_secrets]
    access = access_of(os.environ, Environment.variable("api_key"), headers, variables.ca_file)
    drawn = spec.sampling
    client = Options(
        endpoints,
        request,
        spec.concurrency,
        wait_s=float(variables.wait_seconds),
        access=access,
        method=Method(drawn.samples, drawn.thinking_budget, drawn.max_pixels, drawn.min_pixels),
    )
    remote, common, beside, folder = destination(spec.output), None, None, out
    if only:
        parts = [Part(n, m.name) for n, m in zip(whole.spec.several_models, whole.spec.models, strict=True)]
        part = next(p for p in parts if p.name == only)
        common = Whole(out, parts, remote)
        common.begin()
        beside = Beside(*common.beside(only))
        out, remote = out / part.folder, f"{remote.rstrip('/')}/{part.folder}" if remote else ""
    scoring = spec.scoring
    if spec.scoring_file is not None:
        scoring = f"{fetch(spec.scoring_file, say=_say)}:{spec.scoring_entry_point}"
    asked = Evaluation(
        where.eval_files,
        where.images,
        out,
        model,
        client,
        sampling,
        scoring,
        retry_errors=True,  # a job that is started again should finish
        mode=spec.mode,
        remote=remote,
        engine=spec.engine,
        truths=Truths(spec.data.truth, "spec.data.truth:", spec.data.skip_broken),
        one_source=started,
        max_errors=spec.max_errors,
        hardware=_hardware(job, served if served else model, started),
    )
    # servers that the job did not start need the model's name; only a pinned server that it started works without it
    evaluation = with_engine(
        asked,
        copies=spec.copies if started else 1,
        box_remap="" if spec.box_remap is None else spec.box_remap,
        omit_name=started,
    )
    token = restart_asked(job.metadata.annotations)
    for place in ownership.enter(out, evaluation.remote, ownership.owner(job, served), token):
        _say(f"the earlier results were set aside: {place}")
    # a shell's background jobs ignore SIGINT, and their children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with (
        Live(Console(force_terminal=False, width=200), every_s=10.0) as live,
        serve(job.metadata.name, folder, beside) as (exporter, _),
    ):

        def listen(progress: Progress) -> None:
            live(progress)
            exporter(progress)

        if spec.sweep is None:
            summary = run(evaluation, plan(evaluation), listen)
        else:
            published = (lambda: None) if common is None else common.publish
            summary = run_sweep(evaluation, _methods(spec, client.method), listen, published=published)
    leave(summary if common is None else common.finish())
    if summary.reason:
        raise Failure(
            why_not(summary.reason, summary.problems),
            file=out,
            hint="The answers are kept. Start the job again to ask the failed questions again.",
        )
