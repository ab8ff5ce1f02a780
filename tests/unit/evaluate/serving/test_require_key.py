"""A server with a key answers only requests that carry the key, and the key appears in no argument, log or process list."""

import asyncio
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import by_path
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.evaluate.engines import ENGINES, ServeOptions
from grounding.evaluate.serving import FOLDER
from grounding.runtime.environment import Environment

KEY = "k" * 43
script = by_path.module(FOLDER / "egm_require_key.py")


def ask(path="/v1/chat/completions", method="POST", kind="http", headers=()):
    """Return the status that a request gets; 200 if it reaches the application."""
    said = []

    async def application(scope, receive, send):
        said.append(200)

    async def send(message):
        said.append(message.get("status", message.get("code")))

    async def receive():
        return {}

    scope = {"type": kind, "path": path, "headers": list(headers)} | ({"method": method} if kind == "http" else {})
    asyncio.run(script.RequireKey(application)(scope, receive, send))
    return said[0]


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("EGM_API_KEY", KEY)


def test_the_variable_is_the_one_that_both_back_ends_set():
    assert Environment.variable("api_key") == script.VARIABLE
    assert Environment(api_key=KEY).as_environ() == {script.VARIABLE: KEY}


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (200, {"headers": [(b"authorization", f"Bearer {KEY}".encode())]}),
        (200, {"path": "/health", "method": "GET"}),
        (200, {"path": "/metrics", "method": "GET"}),
        (200, {"path": "/metrics/", "method": "GET"}),
        (200, {"kind": "lifespan"}),
        (401, {}),
        (401, {"method": "OPTIONS"}),
        (401, {"path": "/invocations"}),
        (401, {"path": "/health", "method": "POST"}),
        (401, {"path": "/health/../load_model", "method": "GET"}),
        (401, {"path": "/healthy", "method": "GET"}),
        (401, {"headers": [(b"authorization", KEY.encode())]}),
        (401, {"headers": [(b"authorization", b"Bearer ")]}),
        (401, {"headers": [(b"authorization", f"Bearer {KEY}x".encode())]}),
        (401, {"headers": [(b"authorization", f"Bearer {KEY}".encode()), (b"authorization", b"x")]}),
        (1008, {"kind": "websocket", "path": "/v1/realtime"}),
        (1008, {"kind": "websocket", "path": "/health"}),
    ],
)
def test_only_what_carries_the_key_passes(status, request_):
    assert ask(**request_) == status


@given(st.binary(max_size=80), st.text(max_size=30))
def test_nothing_else_passes(value, path):
    scope = {"type": "http", "path": path, "method": "POST", "headers": [(b"authorization", value)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EGM_API_KEY", KEY)
        assert not script.RequireKey(None)._allowed(scope)


def test_a_server_that_was_to_have_a_key_does_not_start_without(monkeypatch):
    monkeypatch.setenv("EGM_API_KEY", "  ")
    with pytest.raises(RuntimeError, match="EGM_API_KEY"):
        script.RequireKey(None)


def test_a_key_is_not_shown_and_its_copies_are_plain():
    key = script.key_of_process()
    assert key == KEY and KEY not in f"{key!r} {[key]} { ({'api_key': key}) }"
    assert type(copy.deepcopy(key)) is str and type(pickle.loads(pickle.dumps(key))) is str


@pytest.mark.parametrize("name", ["sglang", "vllm", "transformers"])
def test_no_command_holds_the_key(name):
    argv = ENGINES[name].command("/m", ServeOptions(keyed=True))
    assert KEY not in " ".join(argv)
    plain = ENGINES[name].command("/m", ServeOptions())
    if name == "vllm":
        assert argv[argv.index("--middleware") + 1] == "egm_require_key.RequireKey" and "--middleware" not in plain
    else:
        assert Path(argv[1]).is_file()
    if name == "sglang":
        assert plain[1:3] == ["-m", "sglang.launch_server"] and plain[3:] == argv[2:]


SGLANG = {
    "__init__": "",
    "launch_server": "def run_server(arguments):\n"
    "    from sglang.srt.entrypoints.http_server import app\n"
    "    print('got', arguments.api_key == 'K' * 43, app.layers, arguments, open('/proc/self/cmdline').read())\n",
    "srt/__init__": "",
    "srt/entrypoints/__init__": "",
    "srt/entrypoints/http_server": "class App:\n    layers = []\n"
    "    def add_middleware(self, layer): self.layers.append(layer.__name__)\napp = App()\n",
    "srt/plugins/__init__": "def load_plugins(): print('plugins')\n",
    "srt/server_args": "import dataclasses\n@dataclasses.dataclass\nclass ServerArgs:\n    argv: list\nFIELD\n"
    "def prepare_server_args(argv): return ServerArgs(argv)\n",
    "srt/utils": "def kill_process_tree(pid, include_parent): print('ended')\n",
}
"""The parts of SGLang 0.5.12 that the script uses, with their names"""


@pytest.mark.parametrize("known", [True, False])
def test_sglang_gets_the_key_out_of_sight(tmp_path, known):
    for name, text in SGLANG.items():
        file = tmp_path / "sglang" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("FIELD", "    api_key: str | None = None" if known else ""))
    command = [sys.executable, FOLDER / "sglang_server.py", "--port", "8000"]
    key = "K" * 43
    environment = {"PYTHONPATH": str(tmp_path), "EGM_API_KEY": key}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert key not in found.stdout + found.stderr
    if known:
        assert found.returncode == 0, found.stderr
        assert "got True ['RequireKey'] ServerArgs(argv=['--port', '8000'], api_key='(hidden)')" in found.stdout
        assert found.stdout.startswith("plugins") and found.stdout.endswith("ended\n")
    else:
        assert found.returncode == 1 and "no api_key" in found.stderr and "got" not in found.stdout
