"""SGLang: one copy of the model a GPU behind one port, 0.8 of the memory; on a CPU one copy in float32."""

from __future__ import annotations

from grounding.evaluate.engines.base import Engine, ServeOptions, all_fields


def command(model: str, options: ServeOptions) -> list[str]:
    """The argv of SGLang's server."""
    place = ["--dp-size", str(options.gpus), "--tp-size", "1"]
    if not options.gpus:  # a share of a machine's memory would be all of it
        place = ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", str(max(65536, 2 * options.max_length))]
    return [
        *("python", "-m", "sglang.launch_server", "--model-path", model),
        *("--served-model-name", options.served_name or model),
        *("--host", options.host, "--port", str(options.port)),
        *place,
        *("--mem-fraction-static", "0.8", "--context-length", str(options.max_length)),
        # the cache report makes each answer say how much of its prompt was cached
        *("--trust-remote-code", "--enable-metrics", "--enable-cache-report"),
    ]


ENGINE = Engine(
    name="sglang",
    command=command,
    # not SGL_FORCE_SHUTDOWN: it drops the requests in flight. A request that SGLang lost track of (0.5.12 does, of an image that
    # cannot be decoded, which the client never sends) holds its end up no longer than the grace period.
    # its one event loop copies picture features with a thread a core, which cost a fifth of all requests (docs/benchmarks.md)
    env={"OMP_NUM_THREADS": "4"},
    cpu_env={"SGLANG_USE_CPU_ENGINE": "1"},
    readiness="/health",  # /v1/models answers before the warm-up is done
    request_extras=all_fields,
    rank_field="routed_dp_rank",
    metric_names={
        "running": "sglang:num_running_reqs",
        "queued": "sglang:num_queue_reqs",
        "kv_use": "sglang:token_usage",
        "prompt_tokens": "sglang:prompt_tokens_total",
        "cached_tokens": "sglang:cached_tokens_total",
        "generated_tokens": "sglang:generation_tokens_total",
    },
    grace_s=40.0,  # it looks for SIGTERM and for the end of its requests every 5 s
)
