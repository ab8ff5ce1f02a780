"""Ray across the pods of a job. Rank 0 starts the head, waits for all pods and runs the driver. The others join, watch the head, and exit
with its result.

Every pod has its own Ray node in its own temporary folder. This code never stops another Ray: it finds its processes by a token in their
environment. The loss of any pod ends the run, because verl cannot continue without a rank: the gang restarts from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from grounding.errors import EgmError, Failure
from grounding.jsontypes import JsonObject
from grounding.runtime import environment, processes
from grounding.runtime.environment import Environment
from grounding.runtime.grace import Stop
from grounding.runtime.waiting import Every
from grounding.train.rl import rendezvous
from grounding.train.rl.rendezvous import FINAL, Answer, Membership, Pods

_MARK = Environment.variable("ray_node")
LEAVE_SHARE = 0.2
"""Share of the grace period that a worker reserves to stop its own Ray node"""
HEARTBEAT_S = 1.0
"""Seconds between two messages of a worker to rank 0"""
_EXIT = {"succeeded": 0, "stopped": 143}


@dataclass(frozen=True)
class Node:
    """The resources that this pod offers to Ray. Slots are logical CPUs; verl's TransferQueue, agents and reward workers use one each."""

    gpus: int
    cpus: int


def cpu_slots(cores: int, gpus: int) -> int:
    """Return the number of CPU slots of a pod. verl's placement needs up to 3 per GPU, TransferQueue 9, agents and rewards 8 each, the runner
    1, and all may run on one pod.
    """
    return max(cores, 4 * gpus + 32)


def _say(text: str) -> None:
    print(f"ray: {text}", flush=True)  # noqa: T201


def ray_environment(pods: Pods, mark: str) -> dict[str, str]:
    """Return the environment of a Ray node and of the processes on it."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": pods.token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        # workers import torch and verl before they report; Ray can wait long, because the membership service reports the loss of a node
        "RAY_worker_register_timeout_seconds": "300",
        "RAY_health_check_failure_threshold": "10",
        # without it, a node with several cores starts as many idle workers as slots
        "RAY_worker_maximum_startup_concurrency": "4",
        _MARK: mark,
    }


def start_command(pods: Pods, node: Node, temporary: str) -> list[str]:
    """Return the `ray start` command of this pod, which runs in the foreground."""
    command = [sys.executable, "-m", "grounding.train.rl.ray_start", "start", "--block", "--disable-usage-stats"]
    command += [f"--num-cpus={node.cpus}", f"--num-gpus={node.gpus}", f"--node-ip-address={pods.ip}"]
    if pods.rank == 0:
        command += [
            "--head",
            f"--port={pods.ray_port}",
            "--include-dashboard=false",
            "--no-monitor",
            f"--temp-dir={temporary}",
        ]
    else:
        command += [f"--address={rendezvous.address_of(pods.master, pods.ray_port)}", f"--temp-dir={temporary}"]
    return command


def marked(mark: str) -> list[int]:
    """Return the ids of the processes that have `mark` in their environment."""
    return processes.marked(_MARK, mark)


def end(mark: str, grace_s: float = 10.0) -> None:
    """Stop all processes with `mark`: SIGTERM, then SIGKILL after `grace_s` seconds."""
    processes.stop(lambda: marked(mark), grace_s, 10.0, "Ray's processes")


class RayNode:
    """This pod's Ray node. Until `up` is set, a failed start is repeated at most twice: Ray allows 30 s, but a busy machine needs more."""

    def __init__(self, pods: Pods, node: Node, env: Mapping[str, str], temporary: str) -> None:
        self.pods, self.node, self.env, self.temporary = pods, node, env, temporary
        self.up, self._starts = False, 0
        self._start()

    def _start(self) -> None:
        self._starts += 1
        self.mark = uuid.uuid4().hex
        self.child = subprocess.Popen(
            start_command(self.pods, self.node, f"{self.temporary}/{self._starts}"),
            env={**self.env, **ray_environment(self.pods, self.mark)},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        )

    def ended(self) -> str:
        """Return why the node has ended, in words; empty while it runs or is started again."""
        if self.child.poll() is None:
            return ""
        if not self.up and self._starts < 3:
            _say(f"the Ray node of rank {self.pods.rank} did not start; trying again")
            end(self.mark)
            self._start()
            return ""
        return f"the Ray node of rank {self.pods.rank} ended with exit code {self.child.returncode}"

    def close(self) -> None:
        """Stop the node and all processes that it started."""
        end(self.mark)
        self.child.wait()


@contextlib.contextmanager
def _ray_node(pods: Pods, node: Node, env: Mapping[str, str]) -> Iterator[RayNode]:
    """Run this pod's Ray node while the block runs."""
    # a short path, because Ray's sockets are in it, and a socket's path can have 107 bytes at most
    with tempfile.TemporaryDirectory(prefix="egm-ray-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        made = RayNode(pods, node, env, temporary)
        try:
            yield made
        finally:
            made.close()


def shortfall(nodes: list[JsonObject], membership: Membership, pods: Pods, node: Node) -> str:
    """Return what is missing in Ray's list of nodes, in words; empty if the gang is complete. Pure."""
    absent = membership.missing()
    if absent:
        return f"of {pods.nodes} pods, rank {', '.join(map(str, absent))} has not joined"
    alive = {n["NodeManagerAddress"]: n.get("Resources", {}) for n in nodes if n.get("Alive")}
    places = {0: pods.ip} | {rank: m.ip for rank, m in sorted(membership.members.items())}
    for rank, ip in places.items():
        if ip not in alive:
            return f"Ray on rank {rank} ({ip}) has not started"
        gpus = int(alive[ip].get("GPU", 0))
        if gpus < node.gpus:
            return f"rank {rank} ({ip}) has {gpus} GPUs, but {node.gpus} are needed"
    return ""


@contextlib.contextmanager
def _own_sigterm(stop: Stop) -> Iterator[None]:
    """Keep this process's handler of SIGTERM: `ray.init` replaces it, and `ray.shutdown` removes it in C++, which Python does not notice.

    Either would end rank 0 before verl has saved. Raises `Failure` if SIGTERM arrives meanwhile.
    """
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # Ray's handler
        stop.ask()
        raise Failure("this pod was asked to stop while it waited for the other pods") from None
    finally:
        signal.signal(signal.SIGTERM, own)


def _wait(pods: Pods, node: Node, membership: Membership, head: RayNode, deadline_s: float, stop: Stop) -> bool:
    """Wait for the whole gang; return False if a signal comes first. After `deadline_s`, raise a `Failure` that names the missing pods."""
    import ray

    end_at, said, missing = time.monotonic() + deadline_s, "", "Ray's head has not started"
    connected, because, news = False, "", Every()
    try:
        while not stop.asked:
            if why := head.ended():
                raise Failure(why, hint="Its message is in the log above.")
            if not connected:
                try:
                    with _own_sigterm(stop):
                        ray.init(address=pods.ray_address, log_to_driver=False, logging_level="ERROR")
                    connected = head.up = True
                    membership.ray, because = pods.ray_address, ""
                except Exception as error:  # the head is still starting
                    because = f" ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]})"
            missing = shortfall(ray.nodes(), membership, pods, node) if connected else missing
            if not missing:
                return True
            if (now := missing + because) != said:
                said, news = now, Every()
            if news.due():
                _say(f"waiting: {now}; {max(0.0, end_at - time.monotonic()):.0f} s are left")
            if lost := membership.lost(environment.of_process().lost_seconds):
                raise Failure(lost, hint="Its log shows the reason; the job restarts from its newest checkpoint.")
            if time.monotonic() > end_at:
                raise Failure(
                    f"the gang is incomplete after {deadline_s:.0f} s: {missing}{because}",
                    hint="Look at that pod; spec.startDeadlineSeconds sets how long to wait.",
                )
            time.sleep(0.5)
        return False
    finally:
        if connected:
            with _own_sigterm(stop):
                ray.shutdown()


def lead(
    pods: Pods,
    node: Node,
    env: Mapping[str, str],
    deadline_s: float,
    drive: Callable[[str, Callable[[], str]], int],
    stop: Stop,
    resume: str = "",
    compare: Callable[[list[str]], None] = lambda _: None,
) -> int:
    """Run rank 0. If a worker is asked to stop, trigger `stop` too.

    `drive(ray address, lost)` runs the driver and returns its exit code. It must end the driver when `lost()` returns a reason. `resume` is
    passed to the workers' `restore`, and `compare` gets what each worker trains (`Pods.content`); it raises `Failure` if they differ.
    """
    pods = replace(pods, ip=pods.ip or rendezvous.own_address(pods.master))
    membership = Membership(pods.nodes)
    membership.resume = resume
    membership.on_stop = stop.ask
    os.environ |= ray_environment(pods, "")  # this process also queries Ray
    with rendezvous.meet(pods, membership), _ray_node(pods, node, env) as head:
        code = 1
        try:
            if not _wait(pods, node, membership, head, deadline_s, stop):
                code = 143
                return code
            _say(f"{pods.nodes} nodes with {node.gpus} GPUs each have joined")
            compare(membership.contents())
            membership.state = "running"

            def lost() -> str:
                return membership.lost(environment.of_process().lost_seconds) or head.ended()

            code = drive(pods.ray_address, lost)
            return code
        finally:
            # notify workers while Ray still runs: a worker whose Ray ends first would report a failure
            membership.state = {0: "succeeded", 143: "stopped"}.get(code, "failed")  # type: ignore[assignment]
            membership.wait_until_notified(10.0)


def follow(
    pods: Pods,
    node: Node,
    env: Mapping[str, str],
    deadline_s: float,
    stop: Stop | None = None,
    restore: Callable[[str], None] = lambda _: None,
) -> int:
    """Run a worker. Return 0 if the run succeeded, 1 if it failed, 143 if this pod or rank 0 was asked to stop.

    `restore` is called with rank 0's `resume` before this pod offers its GPUs; it may take longer than rank 0 waits for a silent worker.
    A worker that is asked to stop notifies rank 0 and keeps its Ray node until verl has saved, because a checkpoint needs all ranks.
    """
    pods = replace(pods, ip=pods.ip or rendezvous.own_address(pods.master))
    stop = stop if stop is not None else Stop.of_process()
    first = _join(pods, deadline_s, stop)
    if first["state"] in FINAL:
        return _EXIT.get(first["state"], 1)
    try:
        with _heartbeats(pods, stop) as ended:
            restore(first["resume"])
    except (EgmError, OSError) as error:
        rendezvous.say(pods, error.message if isinstance(error, EgmError) else str(error))
        raise
    if ended:
        return _EXIT.get(ended[0], 1)
    heard, patience_s = time.monotonic(), environment.of_process().lost_seconds
    with _ray_node(pods, node, env) as child:
        while True:
            if stop.asked and stop.left() < LEAVE_SHARE * stop.grace_s:
                rendezvous.say(pods, "it was asked to stop")
                return 143
            answer = rendezvous.say(pods, stopping=stop.asked)
            if answer is not None:
                heard = time.monotonic()
                if answer["state"] in FINAL:
                    _say(f"rank 0 reports: {answer['state']}")
                    return _EXIT.get(answer["state"], 1)
            elif time.monotonic() - heard > patience_s:
                raise Failure(f"rank 0 at {pods.master}:{pods.port} has not answered for {patience_s:.0f} s")
            child.up = child.up or (answer is not None and answer["state"] == "running")
            if why := child.ended():
                rendezvous.say(pods, why)
                raise Failure(why, hint="Its message is in the log above.")
            time.sleep(HEARTBEAT_S)


@contextlib.contextmanager
def _heartbeats(pods: Pods, stop: Stop) -> Iterator[list[str]]:
    """Send rank 0 a worker's messages from a thread while the block runs. Yields a list that gets the state of the run once it has ended."""
    over, ended = threading.Event(), list[str]()

    def send() -> None:
        while not ended and not over.wait(HEARTBEAT_S):
            with contextlib.suppress(EgmError):  # a refused token, which the next message outside this thread reports
                answer = rendezvous.say(pods, stopping=stop.asked)
                if answer is not None and answer["state"] in FINAL:
                    ended.append(answer["state"])

    thread = threading.Thread(target=send, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield ended
    finally:  # nothing may follow the worker's next message, which may be that it leaves
        over.set()
        thread.join()


def _join(pods: Pods, deadline_s: float, stop: Stop) -> Answer:
    """Return rank 0's answer once its Ray runs or the run has ended; a stop of this pod is such an end too."""
    end_at = time.monotonic() + deadline_s
    while not stop.asked:
        answer = rendezvous.say(pods)
        if answer is not None and (answer["state"] in FINAL or answer["ray"]):
            return answer
        if time.monotonic() > end_at:
            raise Failure(
                f"rank 0 at {pods.master}:{pods.port} has not answered after {deadline_s:.0f} s",
                hint="Look at rank 0's log; spec.startDeadlineSeconds sets how long to wait.",
            )
        time.sleep(0.5)
    return Answer(state="stopped", ray="", resume="")
