"""The metrics, environment and commands of the engines. The metrics are samples from the engines' documentation."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.evaluate.engines import ENGINES, Metrics, ServeOptions
from grounding.evaluate.role import program
from grounding.runtime import flashinfer

SGLANG = """\
# HELP sglang:num_running_reqs The number of running requests.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{dp_rank="0",engine_type="unified",model_name="m",tp_rank="0"} 12.0
sglang:num_running_reqs{dp_rank="1",engine_type="unified",model_name="m",tp_rank="0"} 10.0
# HELP sglang:num_queue_reqs The number of requests in the waiting queue.
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{dp_rank="0",engine_type="unified",model_name="m",tp_rank="0"} 3.0
sglang:num_queue_reqs{dp_rank="1",engine_type="unified",model_name="m",tp_rank="0"} 0.0
# HELP sglang:token_usage The token usage.
# TYPE sglang:token_usage gauge
sglang:token_usage{dp_rank="0",engine_type="unified",model_name="m",tp_rank="0"} 0.28
sglang:token_usage{dp_rank="1",engine_type="unified",model_name="m",tp_rank="0"} 0.31
# HELP sglang:prompt_tokens_total Number of prefill tokens processed.
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="m"} 8000.0
# HELP sglang:cached_tokens_total Number of cached prompt tokens.
# TYPE sglang:cached_tokens_total counter
sglang:cached_tokens_total{cache_source="device",model_name="m"} 5000.0
sglang:cached_tokens_total{cache_source="host",model_name="m"} 1000.0
# HELP sglang:generation_tokens_total Number of generation tokens processed.
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{model_name="m"} 7.5e+03
# HELP sglang:time_to_first_token_seconds Histogram of time to first token in seconds.
# TYPE sglang:time_to_first_token_seconds histogram
sglang:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 3.0
sglang:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 8.0
sglang:time_to_first_token_seconds_sum{model_name="m"} 2.3
sglang:time_to_first_token_seconds_count{model_name="m"} 8.0
"""
VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 8.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.125
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 900.0
# HELP vllm:prefix_cache_hits_total Prefix cache hits, in terms of number of cached tokens.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 600.0
# HELP vllm:prefix_cache_hits_created Prefix cache hits, in terms of number of cached tokens.
# TYPE vllm:prefix_cache_hits_created gauge
vllm:prefix_cache_hits_created{engine="0",model_name="m"} 1.7e+09
# HELP vllm:mm_cache_queries_total Multi-modal cache queries, in terms of number of queried items.
# TYPE vllm:mm_cache_queries_total counter
vllm:mm_cache_queries_total{engine="0",model_name="m"} 30.0
# HELP vllm:mm_cache_hits_total Multi-modal cache hits, in terms of number of cached items.
# TYPE vllm:mm_cache_hits_total counter
vllm:mm_cache_hits_total{engine="0",model_name="m"} 25.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 900.0
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 240.0
"""


def test_sglang_copies_are_added_up_and_the_fullest_counts():
    found = ENGINES["sglang"].metrics(SGLANG)
    assert found == Metrics(22, 3, 0.31, 8000, 6000, 7500)
    assert found.hit_rate == 0.75


def test_vllm():
    found = ENGINES["vllm"].metrics(VLLM)
    assert found == Metrics(8, 2, 0.125, 900, 600, 240, 25, 30)


def test_a_server_that_says_nothing():
    assert ENGINES["sglang"].metrics("") == Metrics() and Metrics().hit_rate is None
    assert ENGINES["vllm"].metrics(SGLANG) == Metrics()
    assert Metrics(prompt_tokens=0, cached_tokens=0).hit_rate is None


@given(st.text(max_size=200) | st.integers(0, len(SGLANG)).map(lambda n: SGLANG[:n]))
def test_any_text_is_read_or_refused(text):
    try:
        ENGINES["sglang"].metrics(text)
    except ValueError:
        pass


def test_flashinfer_is_one_switch():
    off = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "SGLANG_IS_FLASHINFER_AVAILABLE": "false"}
    assert flashinfer.environment({}) == off
    assert flashinfer.environment({"EGM_FLASHINFER": "1"}) == {}
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in flashinfer.environment({"VLLM_USE_FLASHINFER_SAMPLER": "1"})
    for name in ("sglang", "vllm"):
        assert off.items() <= ENGINES[name].environment({}, gpus=8).items()
        assert not off.keys() & ENGINES[name].environment({"EGM_FLASHINFER": "1"}, gpus=8).keys()


def test_a_server_without_a_gpu():
    options = ServeOptions(gpus=0, max_length=2048)
    for name in ("sglang", "vllm"):
        engine = ENGINES[name]
        argv = engine.command("/m", options)
        assert argv[argv.index("--dtype") + 1] == "float32" and "2048" in argv
        assert not {"--dp-size", "--data-parallel-size"} & set(argv)
        assert engine.environment({}, gpus=0).keys() > engine.environment({}, gpus=1).keys()
    assert ENGINES["sglang"].environment({"SGLANG_USE_CPU_ENGINE": "0"}, gpus=0).get("SGLANG_USE_CPU_ENGINE") is None


def test_sglang_does_not_take_a_thread_a_core() -> None:
    assert ENGINES["sglang"].environment({}, gpus=1)["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in ENGINES["sglang"].environment({"OMP_NUM_THREADS": "16"}, gpus=1)


def test_the_engine_s_own_interpreter(monkeypatch, tmp_path):
    other = tmp_path / "python"
    other.touch()
    monkeypatch.setenv("EGM_ENGINE_PYTHON", str(other))
    monkeypatch.setenv("EGM_ENGINE_ARGS", "--log-level 'a b'")
    assert program(["python", "-m", "x"]) == [str(other), "-m", "x", "--log-level", "a b"]
    (tmp_path / "transformers").touch()
    assert program(["transformers"])[0] == str(tmp_path / "transformers")
    monkeypatch.setenv("EGM_ENGINE_PYTHON", str(tmp_path / "absent"))
    with pytest.raises(Exception, match="EGM_ENGINE_PYTHON"):
        program(["python"])


@pytest.mark.parametrize(
    ("name", "copies", "shared"),
    [("sglang", "--dp-size", "--tp-size"), ("vllm", "--data-parallel-size", "--tensor-parallel-size")],
)
def test_gpus_are_divided_into_copies_that_share_them(name, copies, shared):
    for gpus, together, expected in ((8, 1, "8"), (8, 8, "1"), (8, 2, "4")):
        argv = ENGINES[name].command("/m", ServeOptions(gpus=gpus, tensor_parallel=together))
        assert (argv[argv.index(copies) + 1], argv[argv.index(shared) + 1]) == (expected, str(together))


def test_copies_on_several_gpus_do_not_wait_for_flashinfers_all_reduce():
    plain = ENGINES["vllm"].command("/m", ServeOptions(gpus=2))
    argv = ENGINES["vllm"].command("/m", ServeOptions(gpus=2, tensor_parallel=2))
    chosen = json.loads(argv[argv.index("--compilation-config") + 1])
    assert chosen["pass_config"]["fuse_allreduce_rms"] is False, "vLLM would compile the fusion by FlashInfer"
    assert "--compilation-config" not in plain, "one GPU has no all-reduce"


@pytest.mark.parametrize(
    ("name", "stages", "experts"),
    [
        ("sglang", ["--pp-size", "2"], ["--ep-size", "4"]),
        ("vllm", ["--pipeline-parallel-size", "2"], ["--enable-expert-parallel"]),
    ],
)
def test_a_copy_may_be_cut_into_stages_and_experts(name, stages, experts):
    plain = ENGINES[name].command("/m", ServeOptions(gpus=8))
    options = ServeOptions(gpus=8, tensor_parallel=4, pipeline_parallel=2, expert_parallel=True)
    argv = ENGINES[name].command("/m", options)
    assert options.copies == 1 and " ".join(stages) in " ".join(argv) and " ".join(experts) in " ".join(argv)
    assert not {stages[0], experts[0]} & set(plain)


@pytest.mark.parametrize("name", ["sglang", "vllm"])
def test_code_of_the_model_folder_runs_only_if_the_job_says_so(name):
    command = ENGINES[name].command
    assert "--trust-remote-code" not in command("/m", ServeOptions())
    assert "--trust-remote-code" in command("/m", ServeOptions(trust_remote_code=True))
