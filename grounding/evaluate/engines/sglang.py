"""SGLang: one or more copies of the model behind one port, with 0.8 of the GPUs' memory; on a CPU, one copy in float32."""

from __future__ import annotations

from grounding.evaluate.engines.base import Engine, Pages, ServeOptions, all_fields
from grounding.evaluate.served import ServedModel, listed, text_of
from grounding.evaluate.serving import FOLDER

SCRIPT = FOLDER / "sglang_server.py"


def command(model: str, options: ServeOptions) -> list[str]:
    """Return the argv of SGLang's server."""
    place = ["--dp-size", str(options.copies), "--tp-size", str(options.tensor_parallel)]
    if options.pipeline_parallel > 1:
        place += ["--pp-size", str(options.pipeline_parallel)]
    if options.expert_parallel:
        place += ["--ep-size", str(options.tensor_parallel)]
    if not options.gpus:  # by default, SGLang would take all of the machine's memory
        place = ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", str(max(65536, 2 * options.max_length))]
    return [
        # SGLang accepts a key only on its command line, where everyone on the machine can read it
        *(("python", str(SCRIPT)) if options.keyed else ("python", "-m", "sglang.launch_server")),
        *("--model-path", model),
        *("--served-model-name", options.served_name or model),
        *("--host", options.host, "--port", str(options.port)),
        *place,
        *("--mem-fraction-static", "0.8", "--context-length", str(options.max_length)),
        # with the cache report, each answer says how much of its prompt was cached
        *("--enable-metrics", "--enable-cache-report"),
        *(["--trust-remote-code"] if options.trust_remote_code else []),
    ]


def served(pages: Pages, asked_as: str | None) -> ServedModel:
    """Return the model's name, path and weight version, and SGLang's version.

    A request may name an adapter as MODEL:ADAPTER. In `/v1/models`, only an adapter's root is a path; a model's root repeats its name.
    """
    base, _, adapter = (asked_as or "").partition(":")
    names, adapters = listed(pages.get("models"), base.strip()), listed(pages.get("models"), adapter.strip())
    model, server = (p if isinstance(p, dict) else {} for p in (pages.get("model"), pages.get("server")))
    path = text_of(model.get("model_path"))
    name = names.id
    if adapter and names.id == base.strip() and adapters.id == adapter.strip():
        name, path = asked_as, adapters.path
    return ServedModel(
        id=name,
        path=path,
        weight_version=text_of(model.get("weight_version")),
        version=text_of(server.get("version")),
    )


_LARGEST = 1 << 20


def slots(pages: Pages) -> int | None:
    """Return how many requests all copies of the model together work on at once; None if the server does not report it."""
    server = pages.get("server")
    states = server.get("internal_states") if isinstance(server, dict) else None
    total = 0
    for state in states if isinstance(states, list) else ():
        running = state.get("effective_max_running_requests_per_dp") if isinstance(state, dict) else None
        if type(running) is not int or not 0 < running < _LARGEST:
            return None
        total += running
    return total or None


ENGINE = Engine(
    name="sglang",
    command=command,
    # SGL_FORCE_SHUTDOWN is not set, because it drops the requests in flight. If SGLang lost track of a request (0.5.12 does so with an image
    # that cannot be decoded, which the client never sends), stopping takes at most the grace period.
    # SGLang's only event loop copies picture features. With one thread per core, that costs a fifth of the throughput (docs/benchmarks.md).
    env={"OMP_NUM_THREADS": "4"},
    cpu_env={"SGLANG_USE_CPU_ENGINE": "1"},
    readiness="/health",  # /v1/models already answers before the warm-up is done
    request_extras=all_fields,
    continues={"continue_final_message": True},
    keeps_stop={"no_stop_trim": True},
    rank_field="routed_dp_rank",
    metric_names={
        "running": "sglang:num_running_reqs",
        "queued": "sglang:num_queue_reqs",
        "kv_use": "sglang:token_usage",
        "prompt_tokens": "sglang:prompt_tokens_total",
        "cached_tokens": "sglang:cached_tokens_total",
        "generated_tokens": "sglang:generation_tokens_total",
    },
    packages=("sglang",),
    lock="images/infer-sglang/requirements.txt",
    # older releases have only the second paths; 0.5.12 answers there too, with a warning in its log
    info_pages={
        "models": ("/v1/models",),
        "model": ("/model_info", "/get_model_info"),
        "server": ("/server_info", "/get_server_info"),
    },
    served=served,
    slots=slots,
    grace_s=40.0,  # SGLang checks for SIGTERM and for the end of its requests only every 5 s
)
