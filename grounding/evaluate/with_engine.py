"""Add the settings of its engine to an evaluation, for `egm eval`, the role of a job and `grounding.library`."""

from __future__ import annotations

from dataclasses import replace

from grounding.evaluate.engines import get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.scoring import remapped


def with_engine(asked: Evaluation, copies: int = 1, box_remap: str = "", omit_name: bool = False) -> Evaluation:
    """Return the evaluation with the engine's request fields and routing, its sampling, and the scoring profile filled in.

    `copies` is the number of data-parallel copies of the model behind each endpoint. `omit_name` leaves the model's name out of requests if
    the engine does not need it. Raises `UserError` if the engine or the remap is unknown, or if the engine cannot sample as requested.
    """
    engine = get_engine(asked.engine)
    request = replace(
        asked.client.request,
        model=None if omit_name and not engine.names_model else asked.client.request.model,
        extras=engine.request_extras(asked.sampling),
        routing=engine.routing(copies),
    )
    client = replace(asked.client, request=request, served_by=engine, sampling=asked.sampling)
    return replace(asked, client=client, scoring=remapped(asked.scoring, box_remap))
