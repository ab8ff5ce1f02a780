"""vLLM: one copy of the model a GPU behind one port, 0.9 of the memory."""

from __future__ import annotations

from grounding.evaluate.engines.base import Engine, ServeOptions, all_fields


def command(model: str, options: ServeOptions) -> list[str]:
    """The argv of vLLM's server."""
    return [
        *("python", "-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *("--served-model-name", options.served_name or model),
        *("--host", options.host, "--port", str(options.port)),
        *("--data-parallel-size", str(max(1, options.gpus)), "--tensor-parallel-size", "1"),
        # without a length vLLM plans its cache for the model's 262,144 tokens
        *("--gpu-memory-utilization", "0.9", "--max-model-len", "32768"),
        *("--limit-mm-per-prompt", '{"image":1}', "--trust-remote-code", "--shutdown-timeout", "60"),
    ]


ENGINE = Engine(
    name="vllm",
    command=command,
    env={"VLLM_USE_FLASHINFER_SAMPLER": "0"},
    readiness="/health",
    request_extras=all_fields,
    rank_header="X-data-parallel-rank",
)
