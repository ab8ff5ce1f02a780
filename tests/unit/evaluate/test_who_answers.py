"""The servers themselves are asked which model they serve; an evaluation has one model, or a note says that it has several."""

import json

import pyarrow.parquet as pq
import pytest

from grounding.cli import run as command_line
from grounding.errors import UserError
from grounding.evaluate.engines import get_engine
from grounding.evaluate.identify import identify, page_url
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.served import UNKNOWN, ServedModel
from grounding.runtime.access import Access
from tests.unit.evaluate.conftest import Server
from tests.unit.evaluate.test_run import evaluation, go


def sglang(name="m", path="/models/m", weights="default", version="0.5.12"):
    return {
        "/v1/models": {"data": [{"id": name, "root": name, "parent": None}]},
        "/model_info": {"model_path": path, "weight_version": weights},
        "/server_info": {"version": version, "api_key": "sk-of-the-server"},
    }


@pytest.fixture
def other():
    server = Server()
    yield server
    server.close()


def ask(server, engine="sglang", asked_as="m", access=None, limit_s=3.0):
    import asyncio

    return asyncio.run(identify(get_engine(engine), server.url, asked_as, access or Access(), limit_s)).served


@pytest.mark.parametrize(
    ("endpoint", "models", "info"),
    [
        ("http://h:1", "http://h:1/v1/models", "http://h:1/model_info"),
        ("http://h:1/v1/", "http://h:1/v1/models", "http://h:1/model_info"),
        ("http://h/a/openai", "http://h/a/openai/v1/models", "http://h/a/openai/model_info"),
        ("http://h/x/chat/completions", "http://h/x/models", "http://h/x/model_info"),
    ],
)
def test_where_pages_are(endpoint, models, info):
    assert (page_url(endpoint, "/v1/models"), page_url(endpoint, "/model_info")) == (models, info)


def test_a_server_says_how_much_it_works_on_at_once(server):
    import asyncio

    states = [{"effective_max_running_requests_per_dp": n} for n in (48, 32)]
    for found, slots in ((states, 80), ([], None), ([{}], None), (None, None), ([{**states[0]}, 5], None)):
        server.pages = {"/server_info": {"version": "0.5.12", "internal_states": found}}
        facts = asyncio.run(identify(get_engine("sglang"), server.url, "m", Access()))
        assert (facts.served.version, facts.slots) == ("0.5.12", slots)


def test_an_older_server_has_the_page_under_another_name(server):
    server.pages = {"/get_model_info": {"model_path": "/old"}}
    assert ask(server) == ServedModel(path="/old")


@pytest.mark.parametrize("page", [404, 500, 302, "<html>login</html>", "[1, 2", "7", [], {"data": 5}, "hang"])
def test_a_page_that_says_nothing_is_no_failure(server, page):
    server.pages = {"/v1/models": page, "/model_info": {"model_path": "/m"}}
    assert ask(server, limit_s=0.5).id is None
    assert page == "hang" or ask(server).path == "/m"


def test_the_key_goes_to_the_pages_too(server):
    server.pages = sglang()
    assert ask(server, access=Access({"Authorization": "Bearer sk-test"})).version == "0.5.12"
    assert {headers.get("Authorization") for _, headers in server.seen} == {"Bearer sk-test"}


def test_no_server_is_no_failure(server):
    server.close()
    assert ask(server) == UNKNOWN
    server.close = lambda: None


def test_rows_summary_and_table_say_who_answered(dataset, server):
    server.pages = sglang()
    summary = go(evaluation(dataset, server.url, engine="sglang"))
    said = {"reply": None, "id": "m", "path": "/models/m", "weight_version": "default", "version": None}
    assert [s.model_dump() for s in summary.served] == [said | {"answers": 48}] and summary.served_models == ("m",)
    assert summary.servers[0].served == ServedModel(**said | {"version": "0.5.12"}) and not summary.notes
    rows = list(read_rows(dataset / "out"))
    assert {(r["served_id"], r["served_path"], r["weight_version"]) for r in rows} == {("m", "/models/m", "default")}
    columns = pq.read_table(dataset / "out" / "results.parquet").select(["served_id", "served_path"]).to_pydict()
    assert set(columns["served_path"]) == {"/models/m"} and set(columns["served_id"]) == {"m"}
    assert "sk-of-the-server" not in (dataset / "out" / "summary.json").read_text()


def test_a_server_that_takes_any_name_is_found_out(dataset, server, capsys):
    server.pages = sglang("Qwen/Other", "/models/other")
    words = ["eval", "--files", str(dataset / "refcoco_val.jsonl"), "--images", str(dataset / "images")]
    words += ["--model", "m", "--endpoint", server.url, "--out", str(dataset / "named")]
    assert command_line(words) == 0
    assert "the server serves 'Qwen/Other', the model that was asked for is 'm'" in capsys.readouterr().out
    assert command_line([*words, "--strict"]) == 1


@pytest.mark.parametrize(
    ("pages", "words"),
    [
        (sglang(path="/models/b"), "serves the weights from '/models/b'"),
        (sglang("b"), "serves 'b'"),
        (sglang(weights="2"), "serves weight version '2'"),
    ],
)
def test_endpoints_that_differ_stop_the_run_before_anything_is_asked(dataset, server, other, pages, words):
    server.pages, other.pages = sglang(), pages
    with pytest.raises(UserError, match="different models") as caught:
        go(evaluation(dataset, server.url, other.url, engine="sglang"))
    assert server.url in caught.value.message and other.url in caught.value.message and words in caught.value.message
    assert server.count == other.count == 0
    e = evaluation(dataset, server.url, other.url, engine="sglang", mixed=True)
    summary = go(e)
    assert summary.done == 48 and any("different models" in note for note in summary.notes)


def test_servers_of_one_job_may_keep_the_model_in_different_folders(dataset, server, other):
    server.pages, other.pages = sglang(), sglang(path="/tmp/elsewhere")
    summary = go(evaluation(dataset, server.url, other.url, engine="sglang", one_source=True))
    assert summary.macro is not None and not summary.notes


def test_different_releases_of_an_engine_are_a_note(dataset, server, other):
    server.pages, other.pages = sglang(), sglang(version="0.5.13")
    summary = go(evaluation(dataset, server.url, other.url, engine="sglang"))
    assert summary.notes == ("the endpoints run different releases of the engine: 0.5.12, 0.5.13",)


def test_a_server_that_comes_back_with_another_model_stops_the_run(dataset, server):
    server.pages = sglang()

    def plan(n, asked):
        if n == 20:
            server.pages = sglang(path="/models/step-2")
            return "half"
        return None

    server.plan = plan
    with pytest.raises(UserError, match=r"now it serves the weights from '/models/step-2'"):
        go(evaluation(dataset, server.url, engine="sglang"))
    rows = [r for r in read_rows(dataset / "out") if r["outcome"] != "error"]
    assert 0 < len(rows) <= 24 and {r["served_path"] for r in rows} == {"/models/m"}
    assert json.loads((dataset / "out" / "summary.json").read_text())["macro"] is None


def test_weights_that_change_in_a_running_server_stop_the_run(dataset, server):
    def plan(n, asked):
        reply = {"model": "m", "choices": [{"message": {"content": "[1, 2, 3, 4]"}, "finish_reason": "stop"}]}
        return reply | {"metadata": {"weight_version": "1" if n < 20 else "2"}}

    server.plan = plan
    with pytest.raises(UserError, match="now it serves weight version '2'"):
        go(evaluation(dataset, server.url))
    assert {r["weight_version"] for r in read_rows(dataset / "out")} == {"1"}


def test_answers_of_another_model_in_the_folder_stop_the_run(dataset, server):
    server.pages = sglang()
    assert go(evaluation(dataset, server.url, engine="sglang", limit=2)).done == 4
    server.pages, asked = sglang(weights="2"), server.count
    with pytest.raises(UserError, match="serves weight version '2', but the answers so far came from a server that"):
        go(evaluation(dataset, server.url, engine="sglang"))
    assert server.count == asked


def test_a_server_without_pages_is_asked_for_them_once(dataset, server):
    assert go(evaluation(dataset, server.url, engine="sglang")).done == 48
    assert [path for path, _ in server.seen].count(
        "/v1/models"
    ) == 2  # once at the start, and once with the first answer
