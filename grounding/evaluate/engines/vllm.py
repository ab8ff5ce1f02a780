"""vLLM: one copy of the model a GPU behind one port, 0.9 of the memory; on a CPU one copy in float32."""

from __future__ import annotations

from grounding.evaluate.engines.base import Engine, ServeOptions, all_fields

_DRAIN_S = 30


def command(model: str, options: ServeOptions) -> list[str]:
    """The argv of vLLM's server."""
    copies = [
        *("--data-parallel-size", str(options.gpus), "--tensor-parallel-size", "1", "--gpu-memory-utilization", "0.9"),
    ]
    return [
        *("python", "-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *("--served-model-name", options.served_name or model),
        *("--host", options.host, "--port", str(options.port)),
        *(copies if options.gpus else ("--dtype", "float32", "--enforce-eager")),
        # without a length vLLM plans its cache for the model's 262,144 tokens
        *("--max-model-len", str(options.max_length)),
        *("--limit-mm-per-prompt", '{"image":1}', "--trust-remote-code"),
        # each answer says how much of its prompt was cached; SIGTERM lets requests in flight end
        *("--enable-prompt-tokens-details", "--shutdown-timeout", str(_DRAIN_S)),
    ]


ENGINE = Engine(
    name="vllm",
    command=command,
    env={},
    cpu_env={"VLLM_CPU_KVCACHE_SPACE": "1"},  # GiB
    readiness="/health",
    request_extras=all_fields,
    rank_header="X-data-parallel-rank",
    metric_names={
        "running": "vllm:num_requests_running",
        "queued": "vllm:num_requests_waiting",
        "kv_use": "vllm:kv_cache_usage_perc",
        "prompt_tokens": "vllm:prompt_tokens_total",
        "cached_tokens": "vllm:prefix_cache_hits_total",
        "generated_tokens": "vllm:generation_tokens_total",
        "image_hits": "vllm:mm_cache_hits_total",
        "image_queries": "vllm:mm_cache_queries_total",
    },
    grace_s=_DRAIN_S + 10.0,
)
