"""One switch for FlashInfer's kernels, which fail to build or to run on older C libraries: off, unless `EGM_FLASHINFER=1`.

The reference switches them off everywhere. vLLM and SGLang each have a variable of their own; whoever starts one of them asks here.
"""

from __future__ import annotations

from collections.abc import Mapping

from grounding.runtime.environment import Environment

OFF = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "SGLANG_IS_FLASHINFER_AVAILABLE": "false"}


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what to add to `environ`: nothing where FlashInfer is wanted, and never over a variable that is set already. Pure."""
    if Environment.from_environ(environ).flashinfer:
        return {}
    return {name: value for name, value in OFF.items() if name not in environ}
