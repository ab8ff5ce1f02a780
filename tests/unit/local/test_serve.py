"""`egm serve` with small real servers: readiness, draining, a server that ends by itself, mistakes."""

import asyncio
import os
import signal
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from grounding.errors import Failure, UserError
from grounding.local.serve import Serving, chosen_job, serve, served, serving
from grounding.roles import Probe, Role

SERVER = """
import http.server, os, signal, sys, threading, time
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow":
            time.sleep(1)
        if self.path == "/crash":
            print("the last thing it said", flush=True)
            os._exit(3)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"done")
    def log_message(self, *a): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["EGM_PORT"])), H)
server.daemon_threads = False  # close waits for what is in flight
signal.signal(signal.SIGTERM, lambda *a: STUBBORN or threading.Thread(target=server.shutdown).start())
server.serve_forever()
server.server_close()
"""


KEYED = SERVER.replace('b"done"', 'os.environ["EGM_API_KEY"].encode()').replace("STUBBORN", "False")


def what(tmp_path, *, stubborn=False, argv=None, servers=2, grace=5.0, port=0, gpus=0):
    script = tmp_path / "server.py"
    script.write_text(SERVER.replace("STUBBORN", str(stubborn)))
    role = Role(
        "server",
        tuple(argv or (sys.executable, str(script))),
        kind="server",
        replicas=servers,
        gpus=gpus,
        probe=Probe("/health", timeout_s=20),
    )
    return Serving(role, tmp_path / "serve", port, grace_s=grace, gpus=("0", "1"))


def go(wanted, then):
    """Run `egm serve`; call `then(urls)` in a thread once all servers are ready. Return (code, output)."""
    said = []
    code = asyncio.run(serve(wanted, said.append, lambda urls: threading.Thread(target=then, args=(urls,)).start()))
    return code, said


def get(url):
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.read()


def test_servers_are_told_their_key_or_that_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("EGM_API_KEY", "of somebody else")
    for key in ("", "k" * 43):
        wanted = replace(what(tmp_path, servers=1, argv=(sys.executable, "-S", "-c", KEYED)), key=key)
        with served(wanted, print) as [url]:
            assert get(url).decode() == key
    assert "k" * 43 not in repr(wanted)


def test_requests_in_flight_are_answered_before_the_end(tmp_path):
    answers, urls = [], []

    def then(found):
        urls.extend(found)
        slow = threading.Thread(target=lambda: answers.append(get(found[1] + "/slow")))
        slow.start()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        slow.join()

    code, said = go(what(tmp_path), then)
    deadline = time.monotonic() + 5
    while not answers and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (code, answers, len(set(urls))) == (0, [b"done"], 2)
    assert "2 stopped" in said[-1] and "killed" not in said[-1]
    for url in urls:
        with pytest.raises(OSError):
            get(url + "/health")


def test_one_that_does_not_stop_is_killed(tmp_path):
    _, said = go(what(tmp_path, stubborn=True, grace=0.5), lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert "killed after the grace period" in said[-1]


def test_one_that_ends_by_itself_is_reported_with_its_last_words(tmp_path):
    def then(urls):
        with pytest.raises(OSError):
            get(urls[0] + "/crash")

    with pytest.raises(Failure, match=r"exit code 3(.|\n)*the last thing it said(.|\n)*server-0\.log"):
        go(what(tmp_path), then)


def test_one_that_never_starts_is_reported_at_once(tmp_path):
    argv = (sys.executable, "-c", "import sys; sys.exit('no such model')")
    start = time.monotonic()
    with pytest.raises(Failure, match=r"before it was ready(.|\n)*no such model"):
        go(what(tmp_path, argv=argv), lambda _: None)
    assert time.monotonic() - start < 15


def test_a_free_port_is_not_one_that_the_system_gives_to_others():
    """A port that the system had chosen was taken by another process before the server of a test bound it."""
    from grounding.local.process import free_port

    least = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50 and all(port > 1024 and port + 10_000 < least for port in ports)


def test_ports_follow_each_other_and_a_used_one_is_named(tmp_path):
    from grounding.local.process import free_port

    port = free_port()
    urls = []
    go(what(tmp_path, port=port, servers=1), lambda u: (urls.extend(u), os.kill(os.getpid(), signal.SIGTERM)))
    assert urls == [f"http://127.0.0.1:{port}"]
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(UserError, match="already in use"):
            go(what(tmp_path, port=s.getsockname()[1], servers=1), lambda _: None)
    with pytest.raises(UserError, match="need 4 GPUs, but this process may use 2"):
        go(what(tmp_path, gpus=2), lambda _: None)


MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: NAME}
spec: {model: MODEL, engine: transformers, servers: 3, data: {images: [x]}EXTRA}
"""


def manifest(path: Path, *jobs):
    path.write_text(
        "---".join(
            MANIFEST.replace("NAME", n).replace("MODEL", m).replace("EXTRA", e)
            for n, m, e in (j + ("",) * (3 - len(j)) for j in jobs)
        )
    )
    return path


def test_which_job_is_served(tmp_path):
    file = manifest(tmp_path / "m.yaml", ("a", "{source: /m}"), ("b", "{source: /n}"))
    with pytest.raises(UserError, match=r"several(.|\n)*--job: a, b"):
        chosen_job(file, "")
    with pytest.raises(UserError, match=r"no GroundingEvalJob 'c'(.|\n)*a, b"):
        chosen_job(file, "c")
    wanted = serving(file, chosen_job(file, "b"), tmp_path / "runs", port=1)
    assert wanted.role.replicas == 3 and "/n" in wanted.role.argv and wanted.port == 1
    assert chosen_job(wanted.folder / "job.yaml", "").metadata.name == "b"
    running = manifest(tmp_path / "r.yaml", ("a", "{source: /m}", ', endpoints: ["http://h:1"]'))
    with pytest.raises(UserError, match="the job starts no servers"):
        serving(running, chosen_job(running, ""), tmp_path / "runs")
