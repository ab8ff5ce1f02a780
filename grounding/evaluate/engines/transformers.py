"""`transformers serve`: the server for machines without a GPU. It uses float32 and answers one request at a time.

A script of this project (`serving/transformers_server.py`) starts it and adds what thinking budgets and sampling need.

Its continuous batching supports only text models and falls back to one request at a time for images, so it is off.
"""

from __future__ import annotations

from grounding.evaluate.engines.base import Engine, ServeOptions
from grounding.evaluate.serving import FOLDER
from grounding.jsontypes import Document
from grounding.sampling import Sampling

SCRIPT = FOLDER / "transformers_server.py"


def command(model: str, options: ServeOptions) -> list[str]:
    """Return the argv of the server. The model is loaded at the start and pinned, so that no request can load another one. There are no
    metrics.
    """
    device = ["--device", "auto", "--dtype", "auto"] if options.gpus else ["--device", "cpu", "--dtype", "float32"]
    return [
        *("python", str(SCRIPT), model, "--host", options.host, "--port", str(options.port)),
        *device,
        *("--log-level", "error"),
    ]


def request_extras(sampling: Sampling) -> Document:
    """Return the fields that the server supports. It refuses `repetition_penalty` (422). `top_k` changes nothing at temperature 0."""
    fields: Document = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.temperature > 0:
        fields["top_k"] = sampling.top_k
    return fields if sampling.seed is None else fields | {"seed": sampling.seed}


ENGINE = Engine(
    name="transformers",
    command=command,
    # HF_HUB_OFFLINE: a folder needs no hub. Threads: on a small machine, two thread pools compete for the cores, which is ten times slower
    env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    readiness="/health",
    request_extras=request_extras,
    packages=("transformers", "torch", "fastapi", "uvicorn"),
    grace_s=10.0,
    takes_n=False,
    continues={"continue_final_message": True},
    names_model=False,  # a pinned model answers only under its folder's path, which a client need not know
)
