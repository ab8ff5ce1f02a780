"""For any choice, the new file passes `egm validate`, contains the chosen values, and has comments."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.api import load, parse
from grounding.api.scaffold import PUBLISHED, SHAPES, Choices, quoted, text
from grounding.cli import run as egm
from grounding.cli.init import _usual_size
from grounding.errors import UserError

names = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
places = st.sampled_from(
    [PUBLISHED, SHAPES, "/data/refcoco", "s3://bucket/refcoco", "pvc://claim/data", "my data/ref: coco #1"]
)
choices = st.builds(
    Choices,
    st.sampled_from(["pipeline", "sft", "rl", "eval"]),
    names,
    st.sampled_from(["tiny", "4b", "8b"]),
    places,
    st.sampled_from(["", "/models/mine", "hf://owner/name"]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["sglang", "vllm", "transformers"]),
    st.sampled_from(["", "s3://bucket/egm", "s3://bucket/egm/"]),
)


@settings(max_examples=40)
@given(choices)
def test_every_choice_is_a_valid_file_that_says_what_was_chosen(chosen: Choices) -> None:
    written = text(chosen)
    jobs = parse(written)
    assert len(jobs) == (3 if chosen.what == "pipeline" else 1)
    assert written.count("#") >= 5 and "BUCKET" not in "".join(
        line for line in written.splitlines() if not line.lstrip().startswith("#")
    )
    for job in jobs:
        assert job.metadata.name.startswith(chosen.name)
        assert (job.spec.data.shapes is not None) == chosen.synthetic
        assert (job.spec.output or "") == (f"s3://bucket/egm/{job.metadata.name}" if chosen.output else "")
        if not chosen.synthetic:
            assert all(i.startswith(chosen.data) for i in job.spec.data.images)
        if job.kind == "GroundingTrainJob" and chosen.size != "tiny":
            assert job.spec.resources.gpus_per_node == chosen.gpus
    first = jobs[0]
    if chosen.model:
        assert first.spec.model.source == chosen.model
    if chosen.what == "pipeline":
        assert [j.spec.model.train_job for j in jobs[1:]] == [f"{chosen.name}-sft", f"{chosen.name}-rl"]


@given(st.text(max_size=40))
def test_any_text_is_quoted_so_that_yaml_reads_it_back(value: str) -> None:
    from ruamel.yaml import YAML
    from ruamel.yaml.reader import ReaderError

    try:
        read = YAML(typ="safe").load(f"[{quoted(value)}]")
    except ReaderError:  # characters that YAML does not allow
        return
    assert read == [value]


def test_choices_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UserError, match="batchSize"):
        text(Choices(what="sft", gpus=3))


def test_the_command_writes_and_does_not_overwrite(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert egm(["init", "mine.yaml", "--yes", "--what", "eval", "--output", "s3://b/x"]) == 0
    [job] = load(tmp_path / "mine.yaml")
    assert (job.metadata.name, job.spec.output, job.spec.gpus_per_server) == ("mine", "s3://b/x/mine", 2)
    assert "egm doctor -f mine.yaml" in capsys.readouterr().out
    assert egm(["validate", "-f", "mine.yaml"]) == 0
    assert egm(["init", "mine.yaml", "--yes"]) == 2 and "--force" in capsys.readouterr().err
    assert egm(["init", "mine.yaml", "--yes", "--force", "--size", "tiny"]) == 0
    assert [j.metadata.name for j in load(tmp_path / "mine.yaml")] == ["mine-sft", "mine-rl", "mine-eval"]


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        ([], "tiny-sft"),
        (["--gpus", "8"], "egm-8b-sft"),
        (["--engine", "vllm"], "egm-8b-sft"),
        (["--model", "hf://owner/Qwen3-VL-8B"], "egm-8b-sft"),
        (["--model", "hf://owner/Qwen3-VL-4B-Thinking"], "egm-4b-sft"),
    ],
)
def test_flags_about_gpus_make_no_tiny_job_on_a_machine_without_any(words, preset, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert egm(["init", "a.yaml", "--yes", *words]) == 0
    assert load(tmp_path / "a.yaml")[0].spec.preset == preset


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("hf://Qwen/Qwen3-VL-4B-Thinking", "4b"),
        ("hf://owner/egm_4b", "4b"),
        ("hf://Qwen/Qwen3-VL-8B-Thinking", "8b"),
        ("hf://owner/Model-8B-4bit", "8b"),
        ("hf://OpenGVLab/InternVL3_5-14B", "8b"),
        ("hf://OpenGVLab/InternVL3_5-38B", "8b"),
        ("hf://owner/model-2.4b", "8b"),
        ("hf://owner-4b/model", "8b"),
    ],
)
def test_the_usual_size_is_4b_only_for_a_model_of_that_size(model: str, size: str) -> None:
    assert _usual_size(False, model) == size


def test_gpus_for_a_tiny_model_are_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert egm(["init", "a.yaml", "--yes", "--size", "tiny", "--gpus", "8"]) == 2
    assert "a tiny model uses no GPU" in capsys.readouterr().err and not (tmp_path / "a.yaml").exists()


def test_without_a_terminal_nothing_is_asked_and_with_one_each_question_once(tmp_path, monkeypatch, capsys) -> None:
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", Terminal("sft\nhuge\n4b\npublished\n4\n-\n"))
    assert egm(["init", "a.yaml"]) == 0
    out = capsys.readouterr().out
    assert "One of tiny, 4b, 8b." in out and "Engine" not in out
    [job] = load(tmp_path / "a.yaml")
    assert (job.spec.method, job.spec.resources.gpus_per_node, job.spec.output) == ("sft", 4, None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert egm(["init", "b.yaml"]) == 0


def test_an_unknown_choice_is_reported_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert egm(["init", "job.yaml", "--what", "evall"]) == 2
    assert "'--what': 'evall' is not one of 'pipeline', 'sft', 'rl', 'eval'." in capsys.readouterr().err
