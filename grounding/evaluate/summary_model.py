"""The models of `summary.json`. The run writes it; the live view, telemetry, the job's status, the report and exports read it.

Accuracies and IoU are fractions (0..1), latencies are in seconds. Every field of `Summary` has a default, because summaries of earlier
releases lack some. `read_summary` keeps valid fields and drops the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from grounding.api.base import read_known
from grounding.api.report import Count, Number
from grounding.evaluate.engines.metrics import Metrics
from grounding.evaluate.served import ServedModel, text_of
from grounding.scoring.doctor import Diagnosis

FILE = "summary.json"
Share = Annotated[Number, Field(ge=0, le=1)]
Ends = tuple[Number, Number]
"""Low and high end of a 95 % interval"""
Said = Annotated[str | None, BeforeValidator(text_of)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Intervals(_Part):
    """The 95 % intervals of both means."""

    macro: Ends
    micro: Ends | None = None


class FileSummary(_Part):
    """The answers to one evaluation file so far."""

    name: str = ""
    n: Count = 0
    """Number of answers"""
    total: Count | None = None
    """Number of questions; None if the summary does not contain it"""
    acc: Number | None = None
    acc75: Number | None = None
    acc90: Number | None = None
    mean_iou: Number | None = None
    errors: Count = 0
    unparsed: Count = 0
    truncated: Count = 0
    empty: Count = 0
    tokens_mean: Number | None = None
    latency_mean: Number | None = None
    latency_p50: Number | None = None
    latency_p90: Number | None = None
    remark: str | None = None
    """Remark that must be shown with the file's name (`sets.remark`); None in a summary of an earlier release"""


class Problem(_Part):
    """A reason for failures, and the number of rows with it."""

    what: str = ""
    rows: Count = 0


class Ending(_Part):
    """A finish reason of aborted requests; `share` is their share of all requests, 0..1."""

    finish_reason: str = ""
    rows: Count = 0
    share: Share = 0.0


class ExtentFigures(_Part):
    """A file's results measured against one of the two true boxes."""

    acc: Share
    mean_iou: Share


class ExtentMeans(_Part):
    """The means over all files, measured against one of the two true boxes."""

    macro: Share
    micro: Share
    mean_iou: Share


class FileExtents(_Part):
    """The results of a file whose rows have two true boxes; `n` is the number of their answers."""

    name: str
    n: Count
    visible: ExtentFigures
    amodal: ExtentFigures


Asked = Literal["visible", "amodal"]


class ExtentsSummary(_Part):
    """The accuracy measured against the visible box and against the whole box; `asked` is the one that the prompt asks for."""

    asked: Asked = "visible"
    n: Count
    visible: ExtentMeans
    amodal: ExtentMeans
    files: tuple[FileExtents, ...] = ()


class ServedAnswers(_Part):
    """A model as its servers describe it, and the number of its answers."""

    reply: Said = None
    id: Said = None
    path: Said = None
    weight_version: Said = None
    version: Said = None
    answers: Count = 0

    @property
    def model(self) -> ServedModel:
        """Return the known facts about the model."""
        return ServedModel(self.reply, self.id, self.path, self.weight_version, self.version)


class EndpointFacts(_Part):
    """One endpoint of the run: the client's counts, and the server's last metrics (counted since the server's start)."""

    endpoint: str = ""
    answered: Count = 0
    failed: Count = 0
    prompt_tokens: Count = 0
    cached_tokens: Count = 0
    served: ServedModel = ServedModel()
    metrics: Metrics | None = None


class VoteMean(_Part):
    """The macro mean of a vote, with its interval."""

    macro: Number
    ci95: Ends | None = None


class VotesOf(_Part):
    """The results of each vote among `n` answers to a question."""

    n: Count
    medoid: VoteMean
    mean: VoteMean
    first: VoteMean
    oracle: VoteMean


class SamplesSummary(_Part):
    """The votes of an evaluation with several answers to each question, for every number of answers up to `count`."""

    count: Count
    accuracy_at_1: Number | None = None
    by_number: Annotated[tuple[VotesOf, ...], Field(min_length=1)]
    oracle_is: str = "an upper bound: it takes a correct answer if there is one, which no method can know"


@dataclass(frozen=True)
class Costs:
    """Costs of the answered questions. Tokens and operations are means over questions. None: unknown.

    Means of tokens are over the questions whose server has reported token counts.
    """

    questions: int
    prompt_tokens: float | None
    """Tokens of the question with its picture, counted once for any number of answers"""
    thought_tokens: float | None
    """Tokens of thought; None if a server does not count them separately"""
    answer_tokens: float | None
    generated_tokens: float | None
    """Tokens of thought and answer, over all samples"""
    flops: float | None
    flops_formula: str | None
    parameters: float | None
    """Number of parameters of the language model that a token uses"""
    latency_mean: float | None
    """Mean seconds from the first byte of a question's first request to the last byte of its answer, at `concurrency`"""
    latency_p50: float | None
    latency_p90: float | None
    latency_p99: float | None
    concurrency: int
    serving_seconds: float
    """Wall time in seconds during which the servers were in use; in a sweep, this setting's share of it"""
    gpu_seconds: float | None
    """GPU-seconds of all GPUs in that time"""
    gpu_seconds_per_question: float | None
    money: float | None
    """GPU-hours times the given price per GPU-hour, in `currency`"""
    currency: str | None


class SettingSummary(_Part):
    """One setting of a sweep."""

    model: str | None = None
    """The model's name; None unless the sweep is over several models"""
    name: str = ""
    macro: Number | None = None
    ci95: Ends | None = None
    done: Count = 0
    total: Count = 0
    costs: Costs | None = None


class Summary(_Part):
    """The result of an evaluation so far. While a row has failed or is missing, there is no macro, micro or interval, and `reason` explains
    why.
    """

    total: Count = 0
    done: Count = 0
    errors: Count = 0
    errors_as_wrong: Count = 0
    problems: tuple[Problem, ...] = ()
    endings: tuple[Ending, ...] = ()
    served_models: tuple[str, ...] = ()
    served: tuple[ServedAnswers, ...] = ()
    from_reasoning: Count = 0
    doctor: Diagnosis | None = None
    """The findings of the doctor"""
    left_out: Count = 0
    notes: tuple[str, ...] = ()
    """What a reader of the results must know"""
    empty: Count = 0
    unparsed: Count = 0
    truncated: Count = 0
    macro: Number | None = None
    micro: Number | None = None
    ci95: Intervals | None = None
    reason: str | None = None
    """Why there is no mean; empty or None if there is one"""
    files: tuple[FileSummary, ...] = ()
    samples: SamplesSummary | None = None
    extents: ExtentsSummary | None = None
    settings: tuple[SettingSummary, ...] | None = None
    """The settings of a sweep; a sweep's summary has no files"""
    model: str | None = None
    prompt: str | None = None
    scoring: str | None = None
    mode: str | None = None
    requests_per_second: Number | None = None
    """Replies per second; None in latency mode, where the rate is not a result"""
    wall_seconds: Number | None = None
    """Duration in seconds of all runs in the folder together"""
    loop_lag_p99: Number | None = None
    """Largest lag of the event loops that measured the latencies"""
    loop_lags: tuple[Number, ...] | None = None
    """Lag of each process of an earlier release, which did not store it in each row"""
    latency_refused: str | None = None
    """Why there are no latencies"""
    latencies_left_out: Count | None = None
    """Number of answers whose latency does not count, because the measuring process was late"""
    in_flight_mean: Number | None = None
    """Number of requests in flight while the latencies were measured"""
    servers: tuple[EndpointFacts, ...] | None = None
    costs: Costs | None = None

    def take_timing(self, earlier: Summary) -> None:
        """Copy the timing of earlier runs from an earlier summary of the same answers, as far as that has it."""
        for name in _TIMING & earlier.model_fields_set:
            setattr(self, name, getattr(earlier, name))

    def document(self) -> dict[str, object]:
        """Return the content of summary.json, without the parts that this evaluation does not have."""
        found = self.model_dump(mode="json")
        return {name: value for name, value in found.items() if value is not None or name not in _PARTS}


_TIMING = frozenset(
    (
        "mode",
        "servers",
        "requests_per_second",
        "wall_seconds",
        "costs",
    )
)
_PARTS = frozenset(
    (
        "samples",
        "extents",
        "settings",
        "loop_lag_p99",
        "loop_lags",
        "latency_refused",
        "latencies_left_out",
        "in_flight_mean",
        "servers",
        "costs",
        "doctor",
        "wall_seconds",
    )
)


def read_summary(folder: Path) -> Summary | None:
    """Return the summary of the evaluation in `folder`; None if there is none yet or the file is damaged."""
    try:
        found: Any = orjson.loads((folder / FILE).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return read_known(Summary, found) if isinstance(found, dict) else None


def summary_of(folder: Path) -> Summary:
    """Return the summary of the evaluation in `folder`, or an empty one if none can be read."""
    found = read_summary(folder)
    return Summary() if found is None else found
