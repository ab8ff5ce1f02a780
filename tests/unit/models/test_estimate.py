"""The estimates of `egm plan`: sizes of the models, memory compared with measurements, steps."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from model_folders import QWEN, write_model

from grounding.api import PRESETS, read
from grounding.api.models import GROUP_VERSION
from grounding.api.resolved import ResolvedTrainJob
from grounding.cli import run as egm
from grounding.models.estimate import Estimate, Given, estimate, known, known_names, steps

ROOT = Path(__file__).parents[3]


def _job(preset: str, gpus: int, **hyperparameters: Any) -> ResolvedTrainJob:
    data = {"train": ["/x.json"], "images": ["/p"]} if preset.endswith("sft") else {"prepared": "/rows"}
    model = {"model": PRESETS[preset]["model"] or {"source": "/m"}}
    spec = {
        "preset": preset,
        "data": data,
        "resources": {"gpusPerNode": gpus},
        "hyperparameters": hyperparameters,
    } | model
    job, found = read(
        {"apiVersion": GROUP_VERSION, "kind": "GroundingTrainJob", "metadata": {"name": "a"}, "spec": spec}
    )
    assert isinstance(job, ResolvedTrainJob), found
    return job


def _plan(job: ResolvedTrainJob, rows: int | None = 10_000) -> Estimate:
    return estimate(job, Given(known(job.spec.model.source or ""), rows))


# the numbers of weights that the models' own pages and transformers report
@pytest.mark.parametrize(
    ("source", "weights"),
    [
        ("hf://Qwen/Qwen3-VL-2B-Thinking", 2_127_532_032),
        ("hf://Qwen/Qwen3-VL-4B-Thinking", 4_437_815_808),
        ("hf://Qwen/Qwen3-VL-8B-Thinking", 8_767_123_696),
        ("hf://JamesZGQ/EGM-4B-SFT", 4_437_815_808),
        ("hf://JamesZGQ/EGM-8B-SFT", 8_767_123_696),
        ("hf://OpenGVLab/InternVL3-8B-hf", 7_944_373_760),
    ],
)
def test_sizes_of_the_models_of_presets(source: str, weights: int) -> None:
    found = known(source)
    assert found is not None and found.parameters == weights


def test_every_preset_has_a_model_of_the_table() -> None:
    sources = {str(preset["model"].get("source", "tiny://")) for preset in PRESETS.values()} - {"tiny://"}
    assert sources == set(known_names())
    assert known("hf://somebody/else") is None and known("hf://JamesZGQ/EGM-4B-SFT@main") is not None


# bench/gpu/train-4b.json: the most memory in use on one H200 at 4B with Liger's kernels, by tokens of a pack
MEASURED = [(7_690, False, 112.3e9), (10_253, False, 125.0e9), (15_379, True, 86.5e9)]


@pytest.mark.parametrize(("tokens", "recomputed", "most"), MEASURED)
def test_memory_is_within_5_percent_of_what_was_measured(tokens: int, recomputed: bool, most: float) -> None:
    (phase,) = _plan(_job("egm-4b-sft", 1, tokensPerGpu=tokens, gradientCheckpointing=recomputed)).phases
    assert abs(phase.bytes / most - 1) < 0.05


def test_states_of_the_optimizer_are_16_bytes_a_trained_weight() -> None:
    model = known("hf://Qwen/Qwen3-VL-4B-Thinking")
    assert model is not None
    for gpus, expected in (
        (1, 2 * model.parameters + 16 * model.trained(True)),
        (2, (4 * model.parameters + 12 * model.trained(True)) / 2),
    ):
        (phase,) = _plan(_job("egm-4b-sft", gpus)).phases
        states = sum(part.bytes for part in phase.parts if part.name in ("weights", "gradients", "optimizer"))
        assert states == expected


def test_more_gpus_take_less_of_each() -> None:
    one, eight = (_plan(_job("egm-8b-rl", gpus)) for gpus in (1, 8))
    update = {name: next(p for p in plan.phases if p.name == "update") for name, plan in (("1", one), ("8", eight))}
    for name in ("weights", "gradients", "optimizer"):
        sizes = [next(part.bytes for part in update[n].parts if part.name == name) for n in ("1", "8")]
        assert sizes[0] == pytest.approx(8 * sizes[1])


def test_what_an_option_saves_is_in_its_part() -> None:
    def part(name: str, **hyperparameters: Any) -> float:
        phase = next(p for p in _plan(_job("egm-8b-rl", 8, **hyperparameters)).phases if p.name == "update")
        return next(each.bytes for each in phase.parts if each.name == name)

    assert part("activations") < part("activations", gradientCheckpointing=False) / 10
    assert part("logits", tokensPerGpu=51200) == 2 * part("logits", tokensPerGpu=25600)
    rollouts = [_plan(_job("egm-8b-rl", 8, offloadOptimizer=off)).phases[0] for off in (True, False)]
    assert {p.name for p in rollouts[1].parts} - {p.name for p in rollouts[0].parts} == {"optimizer"}
    kept = [_plan(_job("egm-8b-sft", 8, keepCheckpoints=n)).disk[0].bytes for n in (1, 3)]
    assert kept[1] == 2 * kept[0]


@pytest.mark.parametrize(
    ("preset", "rows", "changed", "expected"),
    [
        ("egm-8b-rl", 10_000, {}, 3 * (10_000 // 256)),
        ("egm-8b-sft", 10_000, {}, 79),
        ("egm-8b-sft", 10_000, {"epochs": 2}, 158),
        ("egm-8b-rl", None, {}, None),
        ("egm-8b-rl", None, {"maxSteps": 7}, 7),
    ],
)
def test_steps(preset: str, rows: int | None, changed: dict[str, Any], expected: int | None) -> None:
    job = _job(preset, 8, **changed)
    assert steps(job, rows) == expected
    assert (_plan(job, rows).hours is None) == (expected is None)


@drawn(preset=st.sampled_from(sorted(PRESETS)), gpus=st.sampled_from([0, 1]), rows=st.none() | st.integers(1, 10**7))
def test_any_preset_has_a_plan_of_finite_parts(preset: str, gpus: int, rows: int | None) -> None:
    what = _plan(_job(preset, gpus), rows)
    sizes = [p.bytes for phase in what.phases for p in phase.parts]
    sizes += [p.bytes for p in (*what.step, *what.disk, *what.pod_memory)]
    assert all(0 <= size < 1 << 60 for size in sizes)
    assert bool(what.phases) == (gpus > 0 and known(PRESETS[preset]["model"].get("source", "")) is not None)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "jobs").glob("*.yaml")))
def test_every_job_file_has_a_plan(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert egm(["plan", "-f", str(ROOT / "jobs" / file)]) == 0
    assert "pods    prepare x 1" in capsys.readouterr().out


@pytest.mark.usefixtures("no_network")
def test_the_plan_of_the_8b_job_names_steps_memory_disk_and_pods(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "-f", str(ROOT / "jobs/egm8b-rl.yaml")]
    assert egm(command) == 0
    said = capsys.readouterr().out
    assert "steps   rows x 3 / 256" in said and "--rows" in said
    assert egm([*command, "--rows", "10000", "--gpu-memory", "20"]) == 0
    said = capsys.readouterr().out
    for words in (
        "8.77 billion weights",
        "steps   117 (10,000 rows x 3 / 256)",
        "256 prompts, 4,096 answers (16 a prompt)",
        "rl x 1 (8 GPUs each)",
        "memory of a GPU, update",
        "of 20: more than it has",
        "KV cache",
        "optimizer",
        "checkpoints",
        "hours",
    ):
        assert words in said, words
    assert egm([*command, "--rows", "10000", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["steps"] == 117 and found["parameters"] == 8_767_123_696 and found["hours"] > 0


def test_a_folder_and_rows_of_this_machine_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, rows = write_model(tmp_path / "m", QWEN), tmp_path / "rows.jsonl"
    rows.write_text("{}\n" * 40)
    job = tmp_path / "job.yaml"
    spec = f"{{preset: egm-4b-sft, model: {{source: {folder}}}, data: {{train: [{rows}], images: [{tmp_path}]}}}}"
    head = f"apiVersion: {GROUP_VERSION}\nkind: GroundingTrainJob\nmetadata: {{name: a}}\nspec: "
    job.write_text(head + spec)
    assert egm(["plan", "-f", str(job), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["steps"] == 1 and found["parameters"] < 100_000
    (folder / "config.json").write_text(
        '{"model_type": "qwen3_vl", "text_config": {}, "vision_config": {"depth": "x"}}'
    )
    assert egm(["plan", "-f", str(job)]) == 2
    assert "config.json: depth must be" in capsys.readouterr().err


def test_with_lora_only_adapters_have_gradients_moments_and_checkpoints() -> None:
    for preset, gpus in (("egm-8b-sft", 1), ("egm-8b-rl", 8)):
        whole, adapted = (_plan(_job(preset, gpus, freezeVision=True, **more)) for more in ({}, {"lora": {"rank": 16}}))
        # 36 layers of 4096 wide: q 4096x4096, k and v 1024x4096, o 4096x4096, gate, up and down 12288x4096
        adapters = 36 * 16 * (2 * 8192 + 2 * 5120 + 3 * 16384)

        def part(plan: Estimate, name: str) -> float:
            return next(part.bytes for part in (*plan.phases[-1].parts, *plan.disk) if part.name == name)

        assert part(adapted, "weights") == part(whole, "weights")
        assert part(adapted, "gradients") == pytest.approx(4 * adapters / gpus)
        assert part(whole, "checkpoints") > 100 * part(adapted, "checkpoints")
        assert part(adapted, "model") == part(whole, "model")
        assert whole.hours is not None and adapted.hours is not None and adapted.hours < whole.hours


def test_steps_of_a_mixture_are_known_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("a", 300), ("b", 1000)):
        (tmp_path / f"{name}.json").write_text(json.dumps([{}] * rows))
    data = {"train": [f"{tmp_path}/a.json", f"{tmp_path}/b.json"], "weights": [2, 0.1], "images": ["/p"]}
    spec = {"preset": "egm-8b-sft", "data": data, "hyperparameters": {"batchSize": 64}}
    manifest = {"apiVersion": GROUP_VERSION, "kind": "GroundingTrainJob", "metadata": {"name": "a"}, "spec": spec}
    (tmp_path / "job.yaml").write_text(json.dumps(manifest))
    assert egm(["plan", "-f", str(tmp_path / "job.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["steps"] == 11  # 700 rows in batches of 64


def test_the_best_checkpoint_takes_the_disk_of_one_more() -> None:
    one, two = (_plan(_job("egm-8b-rl", 8, keepCheckpoints=1, **more)) for more in ({}, {"keepBest": "valIou"}))
    sizes = [next(part.bytes for part in plan.disk if part.name == "checkpoints") for plan in (one, two)]
    assert sizes[1] == pytest.approx(1.5 * sizes[0])


@pytest.mark.parametrize(
    ("sweep", "times", "said"),
    [
        ({}, 1, ""),
        ({"thinkingBudgets": [0, 64, 256]}, 3, "3 settings, 3 answers to each"),
        ({"thinkingBudgets": [0, 64], "samples": [1, 4], "maxPixels": [50176]}, 10, "4 settings, 10 answers to each"),
        ({"settings": [{"samples": 4}, {"thinkingBudget": 0}]}, 5, "2 settings, 5 answers to each"),
    ],
)
def test_a_sweep_asks_as_often_as_it_has_answers(sweep: dict[str, Any], times: int, said: str) -> None:
    spec = {
        "model": {"source": "hf://Qwen/Qwen3-VL-8B-Thinking"},
        "data": {"images": ["/i"]},
        "sampling": {"temperature": 0.7},
    }

    def planned(spec: dict[str, Any]) -> Estimate:
        job, found = read(
            {"apiVersion": GROUP_VERSION, "kind": "GroundingEvalJob", "metadata": {"name": "e"}, "spec": spec}
        )
        assert job is not None, found
        return estimate(job, Given(known("hf://Qwen/Qwen3-VL-8B-Thinking"), 1000))

    once, swept = planned(spec), planned({**spec, "sweep": sweep} if sweep else spec)
    assert once.hours is not None and swept.hours == pytest.approx(times * once.hours)
    assert swept.step[0].note == said and swept.step[0].bytes == 1000


def _advice(job: ResolvedTrainJob) -> list[str]:
    return [text for text in _plan(job).assumptions if "without offloading" in text]


def test_plan_says_if_nothing_needs_to_be_offloaded() -> None:
    """A 4B model ran on one H200 with 0.4 of the memory for vLLM (docs/benchmarks.md); 8B needs several GPUs for that."""
    small = {"batchSize": 64, "miniBatchSize": 64, "rollouts": 8, "responseLength": 300, "promptLength": 1024}
    (said,) = _advice(_job("egm-4b-rl", 1, **small))
    assert said.endswith("offloadParameters: false, offloadOptimizer: false, gpuMemoryUtilization: 0.4")
    assert not _advice(_job("egm-8b-rl", 1, **small)), (
        "139.8 GiB are less than the weights, gradients and moments of 8B"
    )
    assert _advice(_job("egm-8b-rl", 8)), "eight GPUs share the states of 8B"
    kept = {"offloadParameters": False, "offloadOptimizer": False}
    assert not _advice(_job("egm-4b-rl", 1, **small, **kept)), "there is nothing to advise"
