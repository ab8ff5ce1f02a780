"""Model folders: a complete one has no problem, and each fault is found in its file before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folders import INTERN, QWEN, safetensors, tensors, write_model

from grounding.cli import run as egm
from grounding.errors import Failure, UserError
from grounding.models.folder import examine, of_source, require, require_exported, require_trainable

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("config", "family"), [(QWEN, "qwen3-vl"), (INTERN, "internvl")])
def test_a_whole_folder_has_no_problem(tmp_path: Path, config: dict[str, Any], family: str, shards: int) -> None:
    model = examine(write_model(tmp_path / "m", config, shards), family)
    assert model.problems == () and len(model.tensors) == len(tensors(config))


def _edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(value)))

    return apply


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _cut(name: str, left: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - left)


def _without(name: str, place: str) -> Callable[[Path], None]:
    """Write the shard `place` again without a tensor that the index lists for it."""

    def apply(folder: Path) -> None:
        held = json.loads((folder / INDEX).read_text())["weight_map"]
        whole = tensors()
        own = {n: whole[n] for n, file in held.items() if file == place and n != name}
        assert len(own) < sum(file == place for file in held.values())
        (folder / place).write_bytes(safetensors(own))

    return apply


def _out_of_index(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        place = json.loads((folder / INDEX).read_text())["weight_map"][name]
        _without(name, place)(folder)
        _edit(INDEX, lambda v: v | {"weight_map": {n: f for n, f in v["weight_map"].items() if n != name}})(folder)

    return apply


def _other_patches(folder: Path) -> None:
    _edit("config.json", lambda v: v | {"vision_config": v["vision_config"] | {"patch_size": 16}})(folder)
    _edit("preprocessor_config.json", lambda v: v | {"patch_size": 14})(folder)


NAMES = list(tensors())
SECOND = NAMES[1]  # this tensor is in the second of three shards
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
TEXT = QWEN["text_config"]
FAULTS: list[tuple[str, Callable[[Path], None], str, str]] = [
    ("shard is absent", _remove(SHARD), SHARD, "is absent"),
    ("shard is cut", _cut(SHARD, 1), SHARD, "is truncated: 1 of"),
    ("shard is cut in its header", lambda f: os.truncate(f / SHARD, 100), SHARD, "ends within its header"),
    ("shard is empty", _write(SHARD, b""), SHARD, "does not begin"),
    ("shard is a page of HTML", _write(SHARD, "<!DOCTYPE html>" * 40), SHARD, "does not begin"),
    ("shard is a pointer", _write(SHARD, LFS), SHARD, "Git LFS"),
    ("shard has more bytes", lambda f: (f / SHARD).open("ab").write(b"x") and None, SHARD, "1 bytes after"),
    ("tensor is not in its shard", _without(SECOND, SHARD), SHARD, f"lacks {SECOND}"),
    ("tensor is nowhere", _out_of_index(SECOND), INDEX, f"lacks {SECOND}; a program"),
    ("index is absent", _remove(INDEX), INDEX, "3 of its weight files exist"),
    ("index is cut", _cut(INDEX, 5), INDEX, "not valid JSON"),
    ("index has no map", _write(INDEX, "{}"), INDEX, "no weight_map"),
    ("index leads out", _edit(INDEX, lambda v: {"weight_map": {"a": "../x"}}), INDEX, "outside the folder"),
    ("other sizes", _edit("config.json", lambda v: v | {"text_config": TEXT | {"hidden_size": 32}}), INDEX, "shape"),
    ("more layers", _edit("config.json", lambda v: v | {"text_config": TEXT | {"num_hidden_layers": 4}}), INDEX, "lacks"),
    ("config is absent", _remove("config.json"), "", "the folder has no model"),
    ("config is cut", _cut("config.json", 3), "config.json", "not valid JSON"),
    ("config is a pointer", _write("config.json", LFS), "config.json", "Git LFS"),
    ("config is a list", _write("config.json", "[]"), "config.json", "expected a JSON object"),
    ("config without sizes", _write("config.json", '{"model_type": "qwen3_vl"}'), "config.json", "text_config is missing"),
    ("config with a word", _edit("config.json", lambda v: v | {"text_config": {"vocab_size": "many"}}), "config.json", "whole"),
    ("another family", _edit("config.json", lambda v: v | {"model_type": "internvl"}), "config.json", "of type"),
    ("tokenizer is absent", _remove("tokenizer.json"), "tokenizer.json", "no tokenizer"),
    ("tokenizer is cut", _cut("tokenizer.json", 2), "tokenizer.json", "not valid JSON"),
    ("tokenizer is too large", _edit("tokenizer.json", lambda v: v | {"added_tokens": [{"id": 64}]}), "tokenizer.json", "64 rows"),
    ("no chat template", _remove("chat_template.jinja"), "chat_template.jinja", "no chat template"),
    ("template is cut", _cut("chat_template.jinja", 8), "chat_template.jinja", "not a valid template"),
    ("template is empty", _write("chat_template.jinja", " "), "chat_template.jinja", "is empty"),
    ("template of another kind", _write("chat_template.jinja", "{{ bos_token }}"), "chat_template.jinja", "not include any message"),
    (
        "another number for pictures",
        _edit("tokenizer.json", lambda v: v | {"added_tokens": [{"id": 6, "content": "<|image_pad|>"}]}),
        "tokenizer.json",
        "has number 6",
    ),
    ("sampling defaults are cut", _write("generation_config.json", "{"), "generation_config.json", "not valid JSON"),
    ("index of another model", _write("model.safetensors", safetensors(tensors())), INDEX, "lists other files"),
    (
        "patches of another size",
        _other_patches,
        "preprocessor_config.json",
        "patch_size is 14",
    ),
    ("no processor", _remove("preprocessor_config.json"), "preprocessor_config.json", "pictures"),
    ("processor is cut", _cut("preprocessor_config.json", 2), "preprocessor_config.json", "not valid JSON"),
    ("processor of texts", _write("preprocessor_config.json", "{}"), "preprocessor_config.json", "image processor"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "file", "words"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_fault_is_found_with_its_file(tmp_path: Path, fault: Callable[[Path], None], file: str, words: str) -> None:
    folder = write_model(tmp_path / "m", shards=3)
    fault(folder)
    with pytest.raises(UserError) as caught:
        require(folder, "qwen3-vl")
    assert caught.value.file == str(folder / file if file else folder)
    assert words in caught.value.message and caught.value.hint and caught.value.exit_code == 2


def test_weights_of_whole_numbers_are_no_weights_unless_the_configuration_names_a_quantisation(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(safetensors(tensors(), "I8", 1))
    with pytest.raises(UserError, match="of type I8"):
        require(folder)
    _edit("config.json", lambda v: v | {"quantization_config": {"quant_method": "awq"}})(folder)
    require(folder)
    with pytest.raises(UserError, match=r"quantised \(awq\)"):
        require_trainable(str(folder), "qwen3-vl")


def test_a_tied_model_needs_no_output_projection(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", QWEN | {"tie_word_embeddings": True})
    assert examine(folder).problems == ()
    _edit("config.json", lambda v: v | {"tie_word_embeddings": False})(folder)
    assert "lacks lm_head.weight" in examine(folder).problems[0].what


def test_names_of_older_files_are_known(tmp_path: Path) -> None:
    def old(name: str) -> str:
        if name == "lm_head.weight":
            return "language_model.lm_head.weight"
        name = name.removeprefix("model.")
        return name.replace("language_model.", "language_model.model.", 1) if name.startswith("language") else name

    folder = write_model(tmp_path / "m", INTERN)
    (folder / "model.safetensors").write_bytes(safetensors({old(n): s for n, s in tensors(INTERN).items()}))
    assert examine(folder, "internvl").problems == ()


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Q"}')
    with pytest.raises(UserError, match=r"adapter_config.json: .*LoRA adapter of Qwen/Q"):
        require(folder)
    write_model(folder)
    with pytest.raises(UserError, match="in the same folder as full weights"):
        require(folder)


def test_what_is_no_model_folder_names_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        require(tmp_path / "nowhere")
    inner = write_model(tmp_path / "cache" / "snapshots" / "abc")
    with pytest.raises(UserError, match=f"Did you mean {inner}"):
        require(tmp_path / "cache")
    (tmp_path / "global_step_4" / "actor").mkdir(parents=True)
    with pytest.raises(UserError, match="egm checkpoint export"):
        require(tmp_path / "global_step_4")


def test_an_unknown_architecture_with_a_hole_in_its_layers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    _edit("config.json", lambda v: v | {"model_type": "another_vl"})(folder)
    assert examine(folder).problems == ()
    names = dict.fromkeys((f"model.layers.{i}.{part}" for i in range(4) for part in ("q", "k", "v")), (2, 2))
    names |= {"model.layers.0.dense": (2, 2)}  # a layer of another kind
    (folder / "model.safetensors").write_bytes(safetensors(names))
    assert examine(folder).problems == ()
    del names["model.layers.2.k"]
    (folder / "model.safetensors").write_bytes(safetensors(names))
    assert "lacks model.layers.2.k" in examine(folder).problems[0].what


def test_old_weights_are_looked_at_without_being_run(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x05\x06" + bytes(18))  # a valid, empty zip archive
    assert examine(folder).problems == ()
    (folder / "pytorch_model.bin").write_bytes(b"half")
    assert "is truncated" in examine(folder).problems[0].what


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_cut_file_and_no_lost_tensor_passes(tmp_path: Path, data: st.DataObject) -> None:
    folder = write_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    if data.draw(st.booleans()):
        os.truncate(weights, data.draw(st.integers(0, weights.stat().st_size - 1)))
    else:
        lost = data.draw(st.sampled_from(NAMES))
        weights.write_bytes(safetensors({n: s for n, s in tensors().items() if n != lost}))
    found = examine(folder).problems
    assert found and found[0].file == weights


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=300), name=st.sampled_from(["model.safetensors", "tokenizer.json", "config.json"]))
def test_no_bytes_end_in_a_traceback(tmp_path: Path, junk: bytes, name: str) -> None:
    folder = write_model(tmp_path / "m")
    (folder / name).write_bytes(junk)
    assert examine(folder).problems


def test_an_export_that_lacks_a_tensor_is_a_failure(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        (folder / name).unlink()
    require_exported(folder)
    (folder / "model.safetensors").write_bytes(safetensors({n: s for n, s in tensors().items() if n != SECOND}))
    with pytest.raises(Failure, match=f"lacks {SECOND}"):
        require_exported(folder)


MANIFEST = """apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: a}
spec:
  preset: egm-4b-rl
  model:
    source: MODEL
  data: {prepared: /d/rows}
"""


def test_validate_looks_at_a_folder_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, job = write_model(tmp_path / "m", shards=3), tmp_path / "job.yaml"
    job.write_text(MANIFEST.replace("MODEL", str(folder)))
    assert egm(["validate", "-f", str(job)]) == 0
    (folder / SHARD).unlink()
    (folder / "chat_template.jinja").unlink()
    assert egm(["validate", "-f", str(job)]) == 2
    said = capsys.readouterr().err
    assert f"error: {job}:7: spec.model.source: {folder / SHARD}: is absent" in said
    assert "chat_template.jinja" in said
    assert egm(["validate", "--json", "-f", str(job)]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [each["ok"] for each in found] == [False, False] and found[0]["line"] == 7
    job.write_text(MANIFEST.replace("MODEL", str(tmp_path / "elsewhere")))
    assert egm(["validate", "-f", str(job)]) == 0
    assert "was not checked" in capsys.readouterr().err


def test_serve_and_the_server_role_refuse_a_broken_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, job = write_model(tmp_path / "m"), tmp_path / "job.yaml"
    (folder / "preprocessor_config.json").unlink()
    job.write_text(
        "apiVersion: grounding.egm.dev/v1alpha1\nkind: GroundingEvalJob\nmetadata: {name: a}\n"
        f"spec: {{model: {{source: {folder}}}, engine: transformers, data: {{shapes: {{}}}}}}\n"
    )
    assert egm(["serve", "-f", str(job), "--runs", str(tmp_path / "runs")]) == 2
    assert f"{folder / 'preprocessor_config.json'}: spec.model.source: is absent" in capsys.readouterr().err
    monkeypatch.setenv("EGM_PORT", "1")
    arguments = ["role", "server", "--job", str(job), "--data", str(tmp_path), "--model", str(folder)]
    assert egm(arguments) == 2
    assert "preprocessor_config.json" in capsys.readouterr().err


def test_only_folders_of_this_machine_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGM_PVC_ROOT", str(tmp_path))
    for source in (None, "tiny://", "hf://a/b", "s3://b/m", "pvc://claim/m"):
        assert of_source(source) is None
    (tmp_path / "claim" / "m").mkdir(parents=True)
    assert of_source("pvc://claim/m") == tmp_path / "claim" / "m"
    assert of_source("file:///m") == of_source("/m") == Path("/m")


def test_validate_says_what_training_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m")
    _edit("config.json", lambda v: v | {"quantization_config": {"quant_method": "awq"}})(folder)
    job = tmp_path / "job.yaml"
    for source, words in ((folder, "are quantised (awq)"), (folder / "config.json", "no such folder")):
        job.write_text(
            "apiVersion: grounding.egm.dev/v1alpha1\nkind: GroundingTrainJob\nmetadata: {name: a}\n"
            f"spec: {{preset: egm-8b-sft, model: {{source: {source}}}, data: {{train: [a.json], images: [b]}}}}\n"
        )
        assert egm(["validate", "-f", str(job)]) == 2
        assert words in capsys.readouterr().err
