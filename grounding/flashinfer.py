"""One switch for FlashInfer's kernels, which fail to build or to run on older C libraries: off, unless `EGM_FLASHINFER=1`.

The reference switches them off everywhere. vLLM and SGLang each have a variable of their own; whoever starts one of them asks here.
"""

from __future__ import annotations

from collections.abc import Mapping

SWITCH = "EGM_FLASHINFER"
OFF = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "SGLANG_IS_FLASHINFER_AVAILABLE": "false"}


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What to add to `environ`: nothing where FlashInfer is wanted, and never over a variable that is set already. Pure."""
    if environ.get(SWITCH, "").lower() in ("1", "true", "yes", "on"):
        return {}
    return {name: value for name, value in OFF.items() if name not in environ}
