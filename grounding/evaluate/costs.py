"""Compute the costs of an evaluation: tokens, time, operations, GPU-seconds, money. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from grounding.errors import UserError
from grounding.evaluate.client.request import fitting
from grounding.evaluate.flops import FORMULA, Shape, shape_of
from grounding.evaluate.method import Method
from grounding.evaluate.results.row import ResultRow, RowCosts
from grounding.evaluate.results.writer import Tallies
from grounding.evaluate.summary_model import Costs
from grounding.jsontypes import JsonObject


@dataclass(frozen=True)
class Hardware:
    """The servers' hardware and its price. A value is None if it is unknown."""

    gpus: int | None = None
    """Number of GPUs of all servers together; 0 if they run on CPUs"""
    price_per_gpu_hour: float | None = None
    currency: str = "USD"
    shape: Shape | None = None
    """The model's dimensions, for the formula of operations"""


def count(
    done: Tallies,
    method: Method,
    hardware: Hardware,
    concurrency: int,
    serving_seconds: float,
    latency_s: NDArray[np.float64] | None = None,
) -> Costs:
    """Return the costs of the answered rows. `latency_s` has the latencies in seconds that count and NaN for the others; if it is None, all
    measured ones count.
    """
    rows = done.answered
    generated, thought = done.tokens[rows].astype(float), done.thought[rows].astype(float)
    prompt, latency = done.prompt[rows].astype(float), (done.latency_s if latency_s is None else latency_s)[rows]
    generated[generated < 0], thought[thought < 0], prompt[prompt < 0] = np.nan, np.nan, np.nan
    latency = latency[~np.isnan(latency)]
    gpu_seconds = None if hardware.gpus is None else hardware.gpus * serving_seconds
    questions, price = int(rows.sum()), hardware.price_per_gpu_hour
    spent = None if gpu_seconds is None or price is None else gpu_seconds / 3600 * price
    shape = hardware.shape
    return Costs(
        questions=questions,
        prompt_tokens=_mean(prompt),
        thought_tokens=_mean(thought),
        answer_tokens=_mean(generated - thought),
        generated_tokens=_mean(generated),
        flops=None if shape is None else _mean(_flops(shape, method, done, rows, prompt, generated)),
        flops_formula=None if shape is None else FORMULA,
        parameters=None if shape is None else shape.parameters,
        latency_mean=_mean(latency),
        latency_p50=_quantile(latency, 0.5),
        latency_p90=_quantile(latency, 0.9),
        latency_p99=_quantile(latency, 0.99),
        concurrency=concurrency,
        serving_seconds=round(serving_seconds, 3),
        gpu_seconds=gpu_seconds,
        gpu_seconds_per_question=gpu_seconds / questions if gpu_seconds is not None and questions else None,
        money=spent,
        currency=None if spent is None else hardware.currency,
    )


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _quantile(values: NDArray[np.float64], share: float) -> float | None:
    return float(np.quantile(values, share)) if len(values) else None


@dataclass(frozen=True)
class Shares:
    """Divides the costs among the questions for the table of rows: `flops` by formula, `gpu_seconds` in proportion to the time in flight."""

    shape: Shape | None
    method: Method
    gpu_seconds_per_second: float | None
    """GPU-seconds per second in flight: the sum over all questions divided by the sum of their seconds in flight"""

    @property
    def known(self) -> bool:
        """Return whether any cost of a question is known."""
        return self.shape is not None or self.gpu_seconds_per_second is not None

    def of(self, row: ResultRow) -> RowCosts:
        """Return the costs of a stored row; None for unknown costs and failed requests."""
        latency, answered = row.get("latency_s"), row.get("error") is None
        gpu = self.gpu_seconds_per_second
        shared = gpu * latency if gpu is not None and latency is not None and answered else None
        prompt, generated = row.get("prompt_tokens"), row.get("completion_tokens")
        if self.shape is None or prompt is None or generated is None or not answered:
            return {"flops": None, "gpu_seconds": shared}
        size = (row["width"], row["height"])
        return {"flops": question(self.shape, self.method, prompt, generated, size), "gpu_seconds": shared}


def shares(done: Tallies, method: Method, hardware: Hardware, costs: Costs | None) -> Shares:
    """Return the object that divides the costs of an evaluation among its rows. `costs` are those of its summary; None if it has none."""
    latency = done.latency_s[done.answered]
    under_way = float(latency[~np.isnan(latency)].sum())
    spent = None if costs is None else costs.gpu_seconds
    return Shares(hardware.shape, method, spent / under_way if spent is not None and under_way else None)


def question(shape: Shape, method: Method, prompt: int, generated: float, size: tuple[int, int]) -> float:
    """Return the operations of a question with a picture of `size` (width, height). All its answers are assumed to be equally long."""
    picture = shape.picture(*fitting(size, method.max_pixels, method.min_pixels))
    return shape.prompt(prompt) + method.samples * shape.generated(prompt, generated / method.samples) + picture


def _flops(
    shape: Shape,
    method: Method,
    done: Tallies,
    rows: NDArray[np.bool_],
    prompt: NDArray[np.float64],
    generated: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the operations of each question; NaN if its tokens are unknown. All answers of a question are assumed to be equally long."""
    found = np.full(len(prompt), np.nan)
    sizes = done.size[rows]
    for i in np.flatnonzero(~np.isnan(prompt) & ~np.isnan(generated)):
        size = (int(sizes[i, 0]), int(sizes[i, 1]))
        found[i] = question(shape, method, int(prompt[i]), float(generated[i]), size)
    return found


CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")
"""Files of a model's folder from which its dimensions are read; one of the last two is enough"""


def read_shape(folder: Path) -> Shape:
    """Return the dimensions of the model in a folder or of a config.json. Raises `UserError` if they cannot be read."""
    path = folder if folder.is_file() else folder / "config.json"
    config = _object(path)
    for name in CONFIGS[1:]:
        if (beside := path.parent / name).is_file():
            return shape_of(config, _object(beside))
    return shape_of(config)


def _object(path: Path) -> JsonObject:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise UserError(f"cannot be read: {error}", file=path, field="--model-config") from None
    if not isinstance(value, dict):
        raise UserError("expected a JSON object", file=path, field="--model-config")
    return value
