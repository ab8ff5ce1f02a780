"""Switch off FlashInfer's kernels unless `EGM_FLASHINFER=1`, because they fail to build or run with older C libraries.

The reference implementation switches them off everywhere. vLLM and SGLang each have their own variable; the code that starts an engine
calls `environment`.
"""

from __future__ import annotations

from collections.abc import Mapping

from grounding.runtime.environment import Environment

OFF = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "SGLANG_IS_FLASHINFER_AVAILABLE": "false"}


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to `environ`: none if FlashInfer is wanted, and none that is already set. Pure."""
    if Environment.from_environ(environ).flashinfer:
        return {}
    return {name: value for name, value in OFF.items() if name not in environ}
