"""`egm eval`, the role of a job and the library send the same requests to a server."""

from pathlib import Path

import pytest

from grounding import library
from grounding.cli import run as command_line
from grounding.errors import UserError
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Sampling, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.role import evaluate_role
from grounding.evaluate.with_engine import with_engine

JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {{name: same}}
spec:
  model: {{source: hf://a/model}}
  engine: {engine}
  endpoints: [{url}]
  prompt: "Find {{sent}}."
  boxRemap: keep
  concurrency: 1
  sampling: {{maxTokens: 77, temperature: 0.5, topK: 7, seed: 3}}
  data: {{files: [refcoco_val.jsonl], images: [images]}}
"""
SAMPLING = Sampling(max_tokens=77, temperature=0.5, top_k=7, seed=3)


def asked(engine: str, **changes: object) -> Evaluation:
    client = Options(("http://127.0.0.1:1",), Request("m", "qwen3", system="s", body={"a": 1}))
    return Evaluation((Path("f"),), (), Path("out"), "m", client, SAMPLING, engine=engine, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sglang", "vllm", "transformers", "openai"])
def test_the_engine_decides_fields_routing_and_who_answers(name: str) -> None:
    engine = get_engine(name)
    found = with_engine(asked(name), copies=4).client
    assert found.request.extras == engine.request_extras(SAMPLING) != {}
    assert found.request.routing == engine.routing(4)
    assert (found.served_by, found.sampling) == (engine, SAMPLING)
    assert (found.request.model, found.request.system, dict(found.request.body)) == ("m", "s", {"a": 1})


def test_a_name_is_omitted_only_for_an_engine_that_needs_none() -> None:
    assert with_engine(asked("transformers"), omit_name=True).client.request.model is None
    assert with_engine(asked("sglang"), omit_name=True).client.request.model == "m"


def test_a_remap_is_part_of_the_profile() -> None:
    assert with_engine(asked("sglang"), box_remap="keep").scoring == "egm-eval-pixels"
    with pytest.raises(UserError, match="always scales"):
        with_engine(asked("sglang", scoring="vlmevalkit"), box_remap="keep")


@pytest.mark.parametrize("engine", ["sglang", "transformers"])
def test_command_and_role_send_the_same_requests(dataset, server, monkeypatch, engine):
    monkeypatch.chdir(dataset)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (dataset / "job.yaml").write_text(JOB.format(url=server.url, engine=engine))
    evaluate_role(dataset / "job.yaml", dataset / "data", dataset / "role")
    of_role, server.bodies[:] = list(server.bodies), []
    line = f"eval refcoco_val.jsonl --images images --endpoint {server.url} --model hf://a/model --out cli --engine {engine}"
    drawn = "--concurrency 1 --box-remap keep --seed 3 --max-tokens 77 --temperature 0.5 --top-k 7"
    assert command_line([*line.split(), *drawn.split(), "--prompt", "Find {sent}."]) == 0
    assert len(of_role) >= 24
    assert of_role == server.bodies
    assert (dataset / "role/summary.json").is_file() and (dataset / "cli/summary.json").is_file()


def test_the_library_sends_what_the_command_sends(dataset, server, monkeypatch):
    monkeypatch.chdir(dataset)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    library.evaluate(
        "refcoco_val.jsonl", "images", endpoint=server.url, model="m", out="lib", sampling=SAMPLING, concurrency=1
    )
    of_library, server.bodies[:] = list(server.bodies), []
    line = f"eval refcoco_val.jsonl --images images --endpoint {server.url} --model m --out cli"
    drawn = "--concurrency 1 --seed 3 --max-tokens 77 --temperature 0.5 --top-k 7"
    assert command_line([*line.split(), *drawn.split()]) == 0
    assert of_library == server.bodies and len(of_library) == 24
