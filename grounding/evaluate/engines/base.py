"""The interface of an engine: how to start, watch and query its server. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from grounding.evaluate.engines.metrics import Metrics, read_metrics
from grounding.evaluate.served import UNKNOWN, ServedModel
from grounding.jsontypes import Document
from grounding.runtime import flashinfer
from grounding.sampling import Sampling


@dataclass(frozen=True)
class ServeOptions:
    """How to serve a model. `served_name` is the model's name in requests.

    `gpus` GPUs have room for `gpus / (tensor_parallel x pipeline_parallel)` copies of the model; with 0 GPUs, one copy runs on the CPU.
    `max_length` is the limit of a request's prompt and answer together, in tokens. `expert_parallel` places whole experts on each GPU of a
    copy. `trust_remote_code` lets the engine run Python code from the model's folder. If `keyed` is set, requests must carry the key that
    the server finds in `$EGM_API_KEY`.
    """

    host: str = "127.0.0.1"
    port: int = 30000
    served_name: str = ""
    gpus: int = 1
    max_length: int = 32768
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False
    trust_remote_code: bool = False
    keyed: bool = False

    @property
    def copies(self) -> int:
        """Return the number of copies of the model that the server runs."""
        return self.gpus // (self.tensor_parallel * self.pipeline_parallel)


@dataclass(frozen=True)
class Routing:
    """How a request selects one of several copies of the model behind a server (data parallelism).

    `field` is a field of the body, `header` a header. If both are empty, a request cannot select a copy.
    """

    copies: int = 1
    field: str = ""
    header: str = ""


Pages = Mapping[str, Any]
"""A server's information pages as JSON, keyed as in `Engine.info_pages`; pages that the server lacks are absent"""


def says_nothing(pages: Pages, asked_as: str | None) -> ServedModel:
    """Return an unknown model, for servers that have no information pages."""
    return UNKNOWN


def no_slots(pages: Pages) -> int | None:
    """Return None, for engines that do not report how many requests they work on at once."""
    return None


@dataclass(frozen=True)
class Engine:
    """A kind of server.

    - `command(model, options)` is the argv; its first word is `python` or a program beside the interpreter.
    - `env` and, without a GPU, `cpu_env` are added to the process's environment.
    - `readiness` is a path that returns 200 once the model answers.
    - `request_extras(sampling)` returns the request's fields.
    - `names_model` says whether requests contain a model name.
    - `rank_field` and `rank_header` select the data-parallel copy that answers a request.
    - `packages` are the packages that the server's environment needs, `lock` is the lock file with their versions.
    - `metric_names` maps fields of `Metrics` to samples of `/metrics`; empty if there are none.
    - `info_pages` maps names to paths of the information pages; the first path that answers counts. `served(pages, asked_as)` reads them.

    SIGTERM stops every server. It may take up to `grace_s` seconds to answer the requests in flight; then the caller kills it.
    """

    name: str
    command: Callable[[str, ServeOptions], list[str]]
    env: dict[str, str]
    readiness: str
    request_extras: Callable[[Sampling], Document]
    names_model: bool = True
    takes_n: bool = True
    """Whether one request may ask for several answers (`n`)"""
    continues: Mapping[str, Any] = field(default_factory=dict)
    """Fields that make a request continue its last message, which is the assistant's; empty if not supported"""
    keeps_stop: Mapping[str, Any] = field(default_factory=dict)
    """Fields that keep the stop text in an answer; without it, a stopped answer looks like a finished one"""
    limit_field: str = "max_tokens"
    rank_field: str = ""
    rank_header: str = ""
    cpu_env: dict[str, str] = field(default_factory=dict)
    metric_names: dict[str, str] = field(default_factory=dict)
    info_pages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    served: Callable[[Pages, str | None], ServedModel] = says_nothing
    slots: Callable[[Pages], int | None] = no_slots
    """Reads from these pages how many requests the server works on at once, over all copies of the model; None if they do not say"""
    grace_s: float = 30.0
    packages: tuple[str, ...] = ()
    lock: str = ""

    def environment(self, environ: Mapping[str, str], *, gpus: int) -> dict[str, str]:
        """Return the variables to add to `environ` for the server. Values that the user has set are kept. FlashInfer is off unless
        `EGM_FLASHINFER=1`.
        """
        wanted = (self.env if gpus else self.env | self.cpu_env) | flashinfer.environment(environ)
        return {name: value for name, value in wanted.items() if name not in environ}

    def metrics(self, text: str) -> Metrics:
        """Parse the text of `/metrics`. Raises `ValueError` if it has another format."""
        return read_metrics(text, self.metric_names)

    def routing(self, copies: int) -> Routing:
        """Return how a request selects one of `copies` copies of the model behind an endpoint."""
        return Routing(copies, self.rank_field, self.rank_header)


def all_fields(sampling: Sampling) -> Document:
    """Return every sampling field, for servers that support all of them."""
    return {name: value for name, value in asdict(sampling).items() if value is not None}
