"""A short summary of an evaluation for the job's status. Kubernetes keeps 4096 bytes of it as the termination message."""

from __future__ import annotations

from grounding.api.report import EvalReport, ReportedAccuracy, ReportedCosts, ReportedFile, ReportedSetting
from grounding.evaluate.summary_model import Costs, Summary
from grounding.runtime import environment, termination
from grounding.runtime.termination import Document, fitting, without

_NOTE, _NOTES = 300, 8
"""Maximum length of a note in characters, and maximum number of notes"""


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _accuracy(summary: Summary) -> ReportedAccuracy:
    interval = None if summary.ci95 is None else summary.ci95.macro
    return ReportedAccuracy(
        macro=_rounded(summary.macro),
        micro=_rounded(summary.micro),
        ci95=[round(bound, 5) for bound in interval] if interval else None,
        files=[
            ReportedFile(
                name=f.name,
                n=f.n,
                acc=_rounded(f.acc),
                mean_iou=_rounded(f.mean_iou),
                errors=f.errors,
                unparsed=f.unparsed,
            )
            for f in summary.files
        ],
    )


def reported_costs(costs: Costs | None) -> ReportedCosts | None:
    """Return the costs of one question from a summary's costs."""
    if costs is None or not costs.questions:
        return None
    return ReportedCosts(
        prompt_tokens=_digits(costs.prompt_tokens),
        thought_tokens=_digits(costs.thought_tokens),
        answer_tokens=_digits(costs.answer_tokens),
        generated_tokens=_digits(costs.generated_tokens),
        flops=_digits(costs.flops),
        latency_seconds=_digits(costs.latency_p50),
        gpu_seconds=_digits(costs.gpu_seconds_per_question),
        money=_digits(None if costs.money is None else costs.money / costs.questions),
    )


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def settings_of(summary: Summary) -> list[ReportedSetting] | None:
    """Return the settings of a sweep's summary; None if the summary is not a sweep's."""
    if summary.settings is None:
        return None
    return [
        ReportedSetting(
            model=s.model,
            name=s.name,
            done=s.done,
            total=s.total,
            accuracy=_rounded(s.macro),
            ci95=None if s.ci95 is None else [round(bound, 5) for bound in s.ci95],
            costs=reported_costs(s.costs),
        )
        for s in summary.settings
    ]


def short(summary: Summary, results: str = "") -> bytes:
    """Return JSON of at most 4096 bytes: totals, accuracies (0..1), the macro mean's interval, notes, and a row for each file.

    If it does not fit, rows of files are dropped first, then costs of settings, settings, and notes.
    """
    notes = [note[:_NOTE] for note in summary.notes][:_NOTES]
    settings = settings_of(summary)
    report = EvalReport(
        done=summary.done,
        total=summary.total,
        accuracy=_accuracy(summary),
        requests_per_second=_rounded(summary.requests_per_second),
        report=results if results else None,
        costs=reported_costs(summary.costs),
        settings=settings,
        notes=notes if notes else None,
    )
    document = report.model_dump(mode="json", by_alias=True, exclude_none=True)
    return fitting(
        document, (without("accuracy", "files"), _settings_without_costs, without("settings"), *_FEWER_NOTES)
    )


def _settings_without_costs(document: Document) -> None:
    for setting in document.get("settings", ()):  # the progress reports have these fields
        setting.pop("costs", None)


def _last_note_less(document: Document) -> None:
    if document.get("notes"):
        document["notes"].pop()


_FEWER_NOTES = [_last_note_less] * _NOTES  # notes may be too long, because JSON may take six bytes for a character


def leave(summary: Summary) -> None:
    """Write the short summary as this process's termination message, with `$EGM_RESULTS` as the URI of the results."""
    termination.leave(lambda: short(summary, environment.of_process().results))
