"""Run torchrun and exit with the code of its ranks: `python -m grounding.train.sft.torchrun` with the arguments of `torch.distributed.run`.

torch's own launcher turns every failure into exit code 1, so a mistake (2) would be tried again, and a requested stop (143) would count as a
failure. It also signals each rank's whole process group, which ends the data loaders before the rank has saved its last checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from grounding.runtime import environment, exits
from grounding.runtime.ranks import rank_of, world_size_of
from grounding.train import loopback


def launcher(env: Mapping[str, str], gpus: int, arguments: list[str]) -> list[str]:
    """Return the torchrun command that starts one rank per GPU on each pod of the gang. Pure.

    Empty if one process is enough, or if this process already is a rank.
    """
    pods, ranks = world_size_of(env), max(1, gpus)
    if "LOCAL_RANK" in env or pods * ranks == 1:
        return []
    command = [sys.executable, "-m", "grounding.train.sft.torchrun", f"--nnodes={pods}", f"--nproc-per-node={ranks}"]
    master = env.get("MASTER_ADDR") if pods > 1 else ""  # PyTorchJob sets it also on one node
    command += [f"--node-rank={rank_of(env)}", f"--master-addr={master or loopback.ADDRESS}"]
    command += [f"--master-port={env.get('MASTER_PORT') or 29500}", "--max-restarts=0"]
    return [*command, "-m", "grounding.cli", *arguments]


def exit_code(ranks: Mapping[int, int], first: int) -> int:
    """Return a node's exit code from those of its failed ranks (negative: a signal). `first`: the rank that failed first. Pure.

    A mistake on any rank takes precedence, because other ranks may have been stopped, or have lost the connection, before they noticed it.
    """
    if exits.MISTAKE in ranks.values():
        return exits.MISTAKE
    code = ranks[first]
    return 128 - code if code < 0 else code


def _gently() -> None:
    """Make torch send SIGTERM and SIGINT only to the ranks; after the timeout, kill each rank with all processes that it started."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    whole = SubprocessHandler.close

    def close(self: Any, death_sig: signal.Signals | None = None) -> None:
        wanted = death_sig or signal.SIGTERM
        if wanted == signal.SIGKILL:
            whole(self, wanted)
        else:
            self.proc.send_signal(wanted)

    SubprocessHandler.close = close


def _patiently(grace_s: float) -> None:
    """Give ranks that were asked to stop the grace period to save their checkpoint; torch would kill them after 30 s.

    If a rank has failed, the others have torch's 30 s, because they may hang in a call that needs the failed rank.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext

    whole = SubprocessContext._close

    def close(self: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        asked = isinstance(sys.exc_info()[1], SignalException)  # torch calls `close` while it handles the signal
        whole(self, death_sig, max(1, int(grace_s)) if asked else timeout)

    SubprocessContext._close = close


def main() -> None:
    """Run the ranks and end with their exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    loopback.keep_stores_here()
    if f"--master-addr={loopback.ADDRESS}" in sys.argv:
        os.environ.update(loopback.environment(os.environ))
    _gently()
    _patiently(environment.of_process().grace_seconds)
    code = exits.DONE
    try:
        run()
    except ChildFailedError as error:
        first, _ = error.get_first_failure()
        code = exit_code({rank: failure.exitcode for rank, failure in error.failures.items()}, first)
        sys.stderr.write(f"sft: rank {first} failed first; exit code {code}; see the lines of the ranks above\n")
    except SignalException as error:  # torch has forwarded the signal and waited
        code = 128 + int(error.sigval)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
