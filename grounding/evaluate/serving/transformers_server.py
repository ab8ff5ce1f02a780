"""Run `transformers serve` with features that other servers have: it continues the last message, it samples, and a seed makes answers
repeatable.

This script imports only transformers and `egm_require_key`, because the engine may run in an environment without this package. Its
arguments are those of `transformers serve`.

| feature | why it is needed | can be removed when |
|---|---|---|
| `continue_final_message` | a thought is closed by continuing the assistant's message | `transformers serve` accepts the field |
| a temperature above 0 samples | 5.9 does not set `do_sample` with the temperature, so answers stay greedy | it sets `do_sample` |
| `seed` is set right before sampling | 5.9 sets it when a request arrives, so concurrent requests change each other's answers | it does so too |
| a key is required if `$EGM_API_KEY` is set | 5.9 answers everyone and loads any requested model | it supports a key |
| `/v1/models` lists the model of the command line | 5.9 lists the hub's cache instead, and answers 500 if there is none | it lists the loaded model |
| `stop` | 5.9 checks stop texts with the processor, which has no vocabulary, and answers 500 | it uses the tokenizer |
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from egm_require_key import VARIABLE, RequireKey

FIELDS = frozenset({"continue_final_message", "add_generation_prompt", "top_k"})
"""Fields of a request that are accepted in addition to those of `transformers serve`"""
_continues: ContextVar[bool] = ContextVar("continues", default=False)
_seed: ContextVar[int | None] = ContextVar("seed", default=None)


def extend() -> None:
    """Add the fields to the handler of chat completions. Raises `RuntimeError` if this version of transformers lacks what is extended."""
    from transformers.cli.serving import chat_completion, model_manager, utils
    from transformers.processing_utils import ProcessorMixin

    base: Any = chat_completion.ChatCompletionHandler
    for owner, name in (
        (base, "handle_request"),
        (base, "_validate_request"),
        (base, "_build_generation_config"),
        (ProcessorMixin, "apply_chat_template"),
        (utils.GenerateManager, "generate_non_streaming"),
        (model_manager.ModelManager, "get_gen_models"),
    ):
        if not hasattr(owner, name):
            raise RuntimeError(f"this version of transformers has no {owner.__name__}.{name}; 5.9.0 has")
    render, generate = ProcessorMixin.apply_chat_template, utils.GenerateManager.async_submit

    def apply_chat_template(self: Any, conversation: Any, **kwargs: Any) -> Any:
        if _continues.get():
            kwargs |= {"add_generation_prompt": False, "continue_final_message": True}
        return render(self, conversation, **kwargs)

    def async_submit(self: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if "tokenizer" in kwargs:
            kwargs["tokenizer"] = getattr(kwargs["tokenizer"], "tokenizer", kwargs["tokenizer"])
        seed = _seed.get()

        def seeded(*inner: Any, **named: Any) -> Any:  # runs on the only thread that samples
            if seed is not None:
                import torch

                torch.manual_seed(seed)
            return function(*inner, **named)

        return generate(self, seeded, *args, **kwargs)

    started = int(time.time())

    def get_gen_models(self: Any, cache_dir: str | None = None) -> list[dict[str, object]]:
        if self.force_model is None:
            return []
        return [{"id": self.force_model, "object": "model", "created": started, "owned_by": "transformers"}]

    class Handler(base):  # type: ignore[misc]  # its type is known only at run time
        """Chat completions that may continue a message and that sample."""

        async def handle_request(self, body: Mapping[str, Any], request_id: str) -> Any:
            """Answer one request."""
            token = _continues.set(bool(body.get("continue_final_message")))
            seed = _seed.set(body.get("seed"))
            try:
                return await super().handle_request(body, request_id)
            finally:
                _continues.reset(token)
                _seed.reset(seed)

        def _validate_request(self, body: Mapping[str, Any]) -> None:
            super()._validate_request({k: v for k, v in body.items() if k not in FIELDS})

        def _build_generation_config(self, body: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            unseeded = {k: v for k, v in body.items() if k != "seed"}  # another request may be sampling now
            config = super()._build_generation_config(unseeded, *args, **kwargs)
            if float(body.get("temperature") or 0.0) > 0.0:
                config.do_sample = True
            if body.get("top_k") is not None:
                config.top_k = max(0, int(body["top_k"]))
            return config

    model_manager.ModelManager.get_gen_models = get_gen_models
    ProcessorMixin.apply_chat_template = apply_chat_template
    utils.GenerateManager.async_submit = async_submit
    chat_completion.ChatCompletionHandler = Handler


def require_key() -> None:
    """Make the server require the key. Raises `RuntimeError` if this version of transformers lacks what is extended."""
    from transformers.cli.serving import server

    build: Any = getattr(server, "build_server", None)
    if build is None:
        raise RuntimeError("this version of transformers has no serving.server.build_server; 5.9.0 has")

    def build_server(*args: Any, **named: Any) -> Any:
        app = build(*args, **named)
        app.add_middleware(RequireKey)
        return app

    server.build_server = build_server


def main() -> None:
    """Run `transformers serve` with this process's arguments."""
    extend()
    if os.environ.get(VARIABLE, "").strip():
        require_key()
    from transformers.cli.transformers import main as cli

    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    cli()


if __name__ == "__main__":
    main()
