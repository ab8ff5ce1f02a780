"""`hf://` with a local server of the Hub's API: the real `huggingface_hub` runs in separate processes, because it reads `HF_ENDPOINT` once."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub import Hub

REPOSITORY = Path(__file__).parents[2]
FETCH = (
    "import sys\nfrom grounding.cli import _complain\nfrom grounding.errors import EgmError\nfrom grounding.storage import Transfer, fetch\n"
    "try:\n    print(fetch(sys.argv[1], transfer=Transfer(patience_s=float(sys.argv[2]))))\n"
    "except EgmError as error:\n    sys.exit(_complain(error))\n"
)


@pytest.fixture
def hub():
    weights = os.urandom(30_000_000)
    served = Hub(
        {
            "o/model": {"config.json": b"{}", "model.safetensors": weights, "sub/notes.txt": b"hello"},
            "datasets/o/data": {
                "train.json": b"[1]",
                "other.json": b"[2]",
                "coco.tar.part_aa": os.urandom(20_000),
                "coco.tar.part_ab": os.urandom(10_000),
            },
        }
    )
    yield served
    served.stop()


@pytest.fixture
def world(hub, tmp_path):
    """Return the environment of a node with its own caches that can reach only this hub."""
    named = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "EGM_"))}
    return named | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "EGM_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(REPOSITORY),
    }


def start(world, uri, patience=60):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", FETCH, uri, str(patience)], env=world, **pipes)


def fetched(world, uri, patience=60):
    child = start(world, uri, patience)
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return Path(out.strip())


def refused(world, uri, patience=1):
    child = start(world, uri, patience)
    _, errors = child.communicate(timeout=120)
    assert "Traceback" not in errors
    return child.returncode, errors


def gets(hub, name):
    """Return the ranges of the requests for a file's content."""
    return [span for method, asked, span in hub.asked if (method, asked) == ("GET", name)]


def test_a_model_is_fetched_once_whole_and_verified(hub, world):
    folder = fetched(world, "hf://o/model")
    assert {n: (folder / n).read_bytes() for n in hub.files["o/model"]} == hub.files["o/model"]
    assert sorted(gets(hub, "model.safetensors")) == ["bytes=0-16777215", "bytes=16777216-29999999"]
    before = len(hub.asked)
    assert fetched(world, "hf://o/model") == folder
    assert len(hub.asked) == before
    hub.stop()  # the next call must not need the hub, because everything is downloaded
    assert fetched(world, "hf://o/model") == folder
    assert fetched(world | {"HF_HUB_OFFLINE": "1"}, "hf://o/model") == folder


def test_files_folders_parts_and_data_sets(hub, world):
    assert fetched(world, "hf://o/model/sub").joinpath("notes.txt").read_bytes() == b"hello"
    file = fetched(world, "hf://datasets/o/data/train.json")
    assert file.read_bytes() == b"[1]" and not file.with_name("other.json").exists()
    tar = fetched(world, "hf://datasets/o/data/coco.tar")
    parts = sorted(p for p in tar.parent.glob("coco.tar.part_*"))
    assert [p.read_bytes() for p in parts] == [v for n, v in hub.files["datasets/o/data"].items() if "part" in n]
    assert file.read_bytes() == b"[1]"


def test_a_new_commit_is_followed_file_by_file(hub, world):
    folder = fetched(world, "hf://o/model")
    hub.asked.clear()
    hub.files["o/model"]["config.json"] = b'{"new": 1}'
    del hub.files["o/model"]["sub/notes.txt"]
    assert fetched(world, "hf://o/model") == folder
    assert (folder / "config.json").read_bytes() == b'{"new": 1}' and not (folder / "sub/notes.txt").exists()
    assert not gets(hub, "model.safetensors")


def test_what_the_hub_s_own_cache_holds_is_linked(hub, world):
    code = "import huggingface_hub as h; h.snapshot_download('o/model')"
    subprocess.run([sys.executable, "-c", code], env=world, check=True)
    hub.asked.clear()
    folder = fetched(world, "hf://o/model")
    assert (folder / "model.safetensors").read_bytes() == hub.files["o/model"]["model.safetensors"]
    assert not gets(hub, "model.safetensors")


def test_several_processes_of_a_node_fetch_once(hub, world):
    children = [start(world, "hf://o/model") for _ in range(3)]
    folders = {c.communicate(timeout=120)[0].strip() for c in children}
    assert len(folders) == 1 and all(c.returncode == 0 for c in children)
    assert len(gets(hub, "model.safetensors")) == 2


def test_a_connection_that_breaks_costs_its_part(hub, world):
    hub.cut_after, hub.cuts = 7_000_000, 3
    folder = fetched(world, "hf://o/model")
    assert (folder / "model.safetensors").read_bytes() == hub.files["o/model"]["model.safetensors"]
    assert len(gets(hub, "model.safetensors")) == 2 + 3


def test_a_hub_that_goes_away_meanwhile_is_waited_for(hub, world):
    hub.cut_after, hub.cuts = 7_000_000, 99
    child = start(world, "hf://o/model")
    until = time.monotonic() + 60
    while hub.cuts == 99 and time.monotonic() < until:
        time.sleep(0.05)
    hub.stop()
    hub.cut_after = 0
    threading.Timer(12, hub.start).start()  # 12 s is longer than the five tries of huggingface_hub itself
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert (Path(out.strip()) / "model.safetensors").read_bytes() == hub.files["o/model"]["model.safetensors"]


def test_a_killed_fetch_goes_on_with_the_missing_parts(hub, world, tmp_path):
    partial = tmp_path / "cache/hf/o/model/.model.safetensors.partial.json"
    hub.cut_after, hub.cuts = 15_000_000, 99  # the first part has more bytes than this, the second part has fewer
    child = start(world, "hf://o/model")
    until = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert partial.exists() and not (tmp_path / "cache/hf/o/model/model.safetensors").exists()
    hub.cut_after = 0
    hub.asked.clear()
    folder = fetched(world, "hf://o/model")
    assert (folder / "model.safetensors").read_bytes() == hub.files["o/model"]["model.safetensors"]
    assert len(gets(hub, "model.safetensors")) == 1


def test_damage_is_found(hub, world):
    hub.damaged = {"model.safetensors"}
    code, errors = refused(world, "hf://o/model", 30)
    assert code == 1 and "by its digest" in errors and "model.safetensors" in errors
    hub.damaged = set()
    assert fetched(world, "hf://o/model").is_dir()


def test_mistakes_are_sentences(hub, world):
    assert refused(world, "hf://o/absent")[0] == 2
    code, errors = refused(world, "hf://o/model/absent.json")
    assert code == 2 and "nothing is there" in errors
    assert refused(world, "hf://o/model@nowhere")[0] == 2
    hub.down = True
    code, errors = refused(world, "hf://datasets/o/data", 1)
    assert code == 1 and "cannot be downloaded" in errors
    code, errors = refused(world | {"HF_HUB_OFFLINE": "1"}, "hf://o/model", 30)
    assert code == 1 and "HF_HUB_OFFLINE" in errors


def test_a_model_of_the_hub_is_known_by_its_content_online_and_offline(hub, world):
    def known():
        code = "import sys\nfrom grounding.models.content import content_of\nprint(content_of(sys.argv[1]))"
        return subprocess.run(
            [sys.executable, "-c", code, "hf://o/model"], env=world, capture_output=True, text=True, check=True
        ).stdout

    first = known()
    assert first.startswith("listing:")
    fetched(world, "hf://o/model")
    hub.stop()
    world["HF_HUB_OFFLINE"] = "1"
    assert known() == first, "the content must be known without the hub, because the model was downloaded"
    del world["HF_HUB_OFFLINE"]
    hub.start()
    hub.files["o/model"]["config.json"] = b"{ }"
    assert known() not in (first, "\n")


def test_commands_take_what_the_hub_has_by_its_name(world, tmp_path):
    from release import write_release

    root = write_release(tmp_path / "EGM_Datasets")
    name = "datasets/JamesZGQ/EGM_Datasets"
    served = Hub({name: {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}})
    try:
        egm = [sys.executable, "-m", "grounding.cli"]
        words = [
            "data",
            "prepare",
            "--out",
            str(tmp_path / "out"),
            "--eval",
            f"hf://{name}/metadata/eval/refcoco_val.jsonl",
        ]
        words += ["--train", f"hf://{name}/vanilla_grounding_reasoning_training_dataset_raw.jsonl"]
        images = ["--images", f"hf://{name}/coco.tar", "--images", f"hf://{name}/coco_flip.tar"]
        here = {"capture_output": True, "text": True, "env": world | {"HF_ENDPOINT": served.url}, "timeout": 300}
        done = subprocess.run([*egm, *words, *images], **here)
        assert done.returncode == 0 and "6 training rows, 1 validation rows" in done.stdout, done.stderr
        words = ["eval", "--dry-run", "--model", "m", "--out", str(tmp_path / "o"), "--files"]
        done = subprocess.run([*egm, *words, f"hf://{name}/metadata/eval/refcoco_val.jsonl", *images], **here)
        assert done.returncode == 0 and "6 expressions on 6 images" in done.stdout, done.stderr
        done = subprocess.run([*egm, "data", "lint", f"hf://{name}/absent.jsonl", *images], **here)
        assert done.returncode == 2 and "absent.jsonl: nothing is there" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        served.stop()
