"""SGLang: one copy of the model a GPU behind one port, 0.8 of the memory."""

from __future__ import annotations

from grounding.evaluate.engines.base import Engine, ServeOptions, all_fields


def command(model: str, options: ServeOptions) -> list[str]:
    """The argv of SGLang's server."""
    return [
        *("python", "-m", "sglang.launch_server", "--model-path", model),
        *("--served-model-name", options.served_name or model),
        *("--host", options.host, "--port", str(options.port)),
        *("--dp-size", str(max(1, options.gpus)), "--tp-size", "1", "--mem-fraction-static", "0.8"),
        *("--trust-remote-code", "--enable-metrics"),
    ]


ENGINE = Engine(
    name="sglang",
    command=command,
    # FlashInfer's kernels fail on the reference's machines; a request that SGLang lost track of must not block its end
    env={"SGLANG_IS_FLASHINFER_AVAILABLE": "false", "SGL_FORCE_SHUTDOWN": "1"},
    readiness="/health",  # /v1/models answers before the warm-up is done
    request_extras=all_fields,
    rank_field="routed_dp_rank",
)
