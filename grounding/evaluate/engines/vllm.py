"""vLLM: one or more copies of the model behind one port, with 0.9 of the GPUs' memory; on a CPU, one copy in float32."""

from __future__ import annotations

from grounding.evaluate.engines.base import Engine, Pages, ServeOptions, all_fields
from grounding.evaluate.served import ServedModel, listed, text_of
from grounding.runtime.flashinfer import NO_FUSED_ALL_REDUCE

_DRAIN_S = 30


def command(model: str, options: ServeOptions) -> list[str]:
    """Return the argv of vLLM's server."""
    copies = [
        *("--data-parallel-size", str(options.copies), "--tensor-parallel-size", str(options.tensor_parallel)),
        *(("--pipeline-parallel-size", str(options.pipeline_parallel)) if options.pipeline_parallel > 1 else ()),
        *(("--enable-expert-parallel",) if options.expert_parallel else ()),
        *("--gpu-memory-utilization", "0.9"),
        *(("--compilation-config", NO_FUSED_ALL_REDUCE) if options.tensor_parallel > 1 else ()),
    ]
    return [
        *("python", "-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *("--served-model-name", options.served_name or model),
        *("--host", options.host, "--port", str(options.port)),
        *(copies if options.gpus else ("--dtype", "float32", "--enforce-eager")),
        # without a length, vLLM plans its cache for the model's 262,144 tokens
        *("--max-model-len", str(options.max_length)),
        *("--limit-mm-per-prompt", '{"image":1}'),
        *(["--trust-remote-code"] if options.trust_remote_code else []),
        # vLLM's own key protects only /v1, although /invocations answers the same requests
        *(["--middleware", "egm_require_key.RequireKey"] if options.keyed else []),
        # report the cached part of the prompt with each answer; let requests in flight end after SIGTERM
        *("--enable-prompt-tokens-details", "--shutdown-timeout", str(_DRAIN_S)),
    ]


def served(pages: Pages, asked_as: str | None) -> ServedModel:
    """Return the model's name and path, and vLLM's version."""
    about = pages.get("version")
    version = text_of(about.get("version")) if isinstance(about, dict) else None
    return listed(pages.get("models"), asked_as)._replace(version=version)


ENGINE = Engine(
    name="vllm",
    command=command,
    env={},
    cpu_env={"VLLM_CPU_KVCACHE_SPACE": "1"},  # GiB
    readiness="/health",
    continues={"continue_final_message": True, "add_generation_prompt": False},
    keeps_stop={"include_stop_str_in_output": True},
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
    packages=("vllm",),
    lock="images/infer-vllm/requirements.txt",
    info_pages={"models": ("/v1/models",), "version": ("/version",)},
    served=served,
    grace_s=_DRAIN_S + 10.0,
)
