"""The description of an evaluation: what to evaluate, how, and where to store the results."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from grounding import defaults
from grounding.errors import UserError
from grounding.evaluate.client.client import Identify
from grounding.evaluate.client.options import Options
from grounding.evaluate.costs import Hardware
from grounding.evaluate.engines import Sampling, get_engine
from grounding.evaluate.guard import Truths
from grounding.evaluate.identify import LIMIT_S, identify
from grounding.evaluate.served import ServerFacts

MODES = ("throughput", "latency")


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, and where to store the results. `model` is the model's name in rows; `client.request.model` is its name in
    requests.
    """

    files: tuple[Path, ...]
    images: tuple[Path, ...]
    out: Path
    model: str
    client: Options
    sampling: Sampling = field(default_factory=Sampling)
    scoring: str = defaults.SCORING
    limit: int | None = None
    retry_errors: bool = False
    rescore: bool = False
    mode: str = defaults.MODE
    """throughput: as fast as the endpoints allow. latency: a fixed concurrency after a warm-up; only this mode reports latencies"""
    remote: str = ""
    """URI of a copy of `out`, s3://bucket/prefix; empty: no copy"""
    replicate_every_s: float = 30.0
    """Maximum age of that copy in seconds"""
    max_errors: int = 0
    """Maximum number of failed rows that count as wrong answers; with more, there is no mean"""
    engine: str = ""
    """Engine of the endpoints, which decides the pages for metrics and the model that are read; empty: no pages are read"""
    hardware: Hardware = field(default_factory=Hardware)
    """The hardware of the servers, for computing costs"""
    one_source: bool = False
    """Whether a job started all endpoints from one source; then the folders of their models may differ"""
    truths: Truths = field(default_factory=Truths)
    """How the true boxes are written, and how unusable rows are handled"""
    retry_truncated: int = 0
    """If not 0, ask only the questions with truncated answers again, with this token limit; 0: ask the questions without an answer"""

    def _check_retry(self) -> None:
        limit, field_name = (
            self.sampling.max_tokens,
            get_engine(self.engine).limit_field if self.engine else "max_tokens",
        )
        if self.retry_truncated <= limit:
            text = f"{self.retry_truncated} tokens are not more than the {limit} of --max-tokens"
            raise UserError(text, field="--retry-truncated", hint="Give a limit above that of the stored answers.")
        if field_name in self.client.request.body:
            raise UserError(f"--extra-body says {field_name} already", field="--retry-truncated")
        if self.rescore:
            raise UserError(
                "--retry-truncated has no effect with --rescore, which asks no questions", field="--retry-truncated"
            )

    def __post_init__(self) -> None:
        if self.retry_truncated:
            self._check_retry()
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r}", field="--mode", hint=f"Known: {', '.join(MODES)}.")


def identify_of(evaluation: Evaluation) -> Identify | None:
    """Return the function that asks an endpoint for its model and capacity; None if its engine is unknown."""
    if not evaluation.engine:
        return None
    engine, client = get_engine(evaluation.engine), evaluation.client
    limit_s = min(LIMIT_S, client.timeout_s)

    async def ask(endpoint: str) -> ServerFacts:
        found = await identify(engine, endpoint, client.request.model, client.access, limit_s)
        return found._replace(served=found.served._replace(path=None)) if evaluation.one_source else found

    return ask


def client_options(evaluation: Evaluation) -> Options:
    """Return the client's options for the mode: in latency mode, concurrency is fixed and answers of a warm-up are not measured."""
    options = evaluation.client
    if evaluation.retry_truncated:
        field_name = get_engine(evaluation.engine).limit_field if evaluation.engine else "max_tokens"
        more = {**options.request.extras, field_name: evaluation.retry_truncated}
        options = replace(options, request=replace(options.request, extras=more))
    if evaluation.mode == "latency":
        options = replace(options, fixed=True, warm_up=max(16, 2 * options.concurrency))
    return options
