"""Apply reports and the final summary of a client: counts, speed and accuracy in the status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from egm_operator.status import StatusBuilder, seconds_left
from grounding.api.base import read_known
from grounding.api.report import EvalReport, ReportedAccuracy, ReportedCosts, ReportedSetting
from grounding.api.status import Accuracy, EvalCosts, EvalStatus, FileAccuracy, SettingStatus
from grounding.errors import printable

_URI = 512
SETTINGS = 256
"""Maximum number of settings in the status"""
NOTES, NOTE = 8, 512
"""Maximum number of notes in the status, and maximum characters of each; limited because a client repeats texts of servers"""


def apply_report(status: StatusBuilder[EvalStatus], body: Mapping[str, Any]) -> None:
    """Apply a report. Ignore invalid values, and leave the status unchanged for missing ones."""
    report, fields = read_known(EvalReport, body), status.fields
    if report.done is not None:
        fields.done = report.done
    if report.total is not None:
        fields.total = report.total
    if (left := seconds_left(report.eta_seconds)) is not None:
        fields.eta_seconds = left
    if report.requests_per_second is not None:
        fields.requests_per_second = round(report.requests_per_second, 3)
    if report.report is not None:
        fields.report = report.report[:_URI]
    if report.costs is not None:
        fields.costs = _costs(report.costs)
    if report.settings is not None:
        fields.settings = _settings([] if fields.settings is None else fields.settings, report.settings)
    if report.accuracy is not None:
        fields.accuracy = _accuracy(report.accuracy)
        notes = [] if report.notes is None else report.notes[:NOTES]
        fields.notes = [printable(note)[:NOTE] for note in notes] if notes else None


def _costs(report: ReportedCosts) -> EvalCosts:
    return EvalCosts(**report.model_dump())


def _settings(known: Sequence[SettingStatus], report: Sequence[ReportedSetting]) -> list[SettingStatus]:
    """Return the known settings updated by the report; values that it lacks stay unchanged."""
    found = {(s.model, s.name): s for s in known}
    for new in report:
        old = found.get((new.model, new.name))
        said = {name: value for name, value in new if value is not None and name != "costs"}
        costs = _costs(new.costs) if new.costs is not None else old.costs if old is not None else None
        found[new.model, new.name] = SettingStatus(**{**({} if old is None else dict(old)), **said, "costs": costs})
    return list(found.values())[:SETTINGS]


def _accuracy(report: ReportedAccuracy) -> Accuracy:
    files = [
        FileAccuracy(name=f.name, n=f.n, acc=f.acc, mean_iou=f.mean_iou, errors=f.errors, unparsed=f.unparsed)
        for f in report.files
    ]
    return Accuracy(macro=report.macro, micro=report.micro, ci95=report.ci95, files=files if files else None)
