"""Switch off FlashInfer's kernels unless `EGM_FLASHINFER=1`, because they fail to build or run with older C libraries.

The reference implementation switches them off everywhere. vLLM and SGLang each have their own variable; the code that starts an engine
calls `environment`.
"""

from __future__ import annotations

from collections.abc import Mapping

from grounding.runtime.environment import Environment

NO_FUSED_ALL_REDUCE = '{"pass_config": {"fuse_allreduce_rms": false}}'
"""vLLM's `--compilation-config` for tensor parallelism. On Hopper GPUs, vLLM 0.24 otherwise fuses all-reduce and norm by FlashInfer, whatever
`VLLM_USE_FLASHINFER_SAMPLER` says. On two H200s a server then compiled for more than 200 s without an end (docs/benchmarks.md).
"""
OFF = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "SGLANG_IS_FLASHINFER_AVAILABLE": "false"}


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to `environ`: none if FlashInfer is wanted, and none that is already set. Pure."""
    if Environment.from_environ(environ).flashinfer:
        return {}
    return {name: value for name, value in OFF.items() if name not in environ}
