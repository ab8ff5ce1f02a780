"""Run `python -m sglang.launch_server` with the key in `$EGM_API_KEY`. On its command line, everyone on the machine could see the key.

This script imports only SGLang and `egm_require_key`. Its arguments are those of SGLang's server. SGLang 0.5.12 requires the key itself,
but not at paths that begin with /health or /metrics (such as /health_generate), not for OPTIONS, and not for WebSockets. `RequireKey`
leaves nothing open but /health and /metrics. The script can be removed when SGLang reads a key from its environment and requires it
everywhere else.
"""

from __future__ import annotations

import os
import sys

from egm_require_key import RequireKey, key_of_process


def main() -> None:
    """Run SGLang's server. Raises `RuntimeError` if there is no key, or if SGLang does not support one."""
    key = key_of_process()
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    arguments = prepare_server_args(sys.argv[1:])
    if not hasattr(arguments, "api_key"):
        raise RuntimeError("this version of SGLang has no api_key; 0.5.12 has")
    # like SGLang itself, import the app only after the plugins and arguments
    from sglang.srt.entrypoints.http_server import app

    arguments.api_key = key  # SGLang's warm-up sends it
    app.add_middleware(RequireKey)
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
