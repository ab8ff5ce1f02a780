"""A store that is tried again says what it waits for."""

from __future__ import annotations

import httpx
import pytest
from botocore.exceptions import EndpointConnectionError

from grounding.storage import Transfer
from grounding.storage.hub import HubStore
from grounding.storage.s3 import S3Store

REFUSALS = {
    "hf://o/model": httpx.ConnectError("Connection refused"),
    "s3://bucket/model": EndpointConnectionError(endpoint_url="http://127.0.0.1:9"),
}


@pytest.mark.parametrize("uri", REFUSALS)
def test_a_store_that_does_not_answer_says_what_it_waits_for(uri: str) -> None:
    refusals, lines = [REFUSALS[uri]], list[str]()

    def call() -> str:
        if refusals:
            raise refusals.pop()
        return "answered"

    transfer = Transfer(patience_s=600, say=lines.append)
    store = HubStore("o/model", transfer) if uri.startswith("hf") else S3Store("bucket", "model", transfer)
    assert store._try(call) == "answered"
    assert len(lines) == 1 and lines[0].startswith(f"waiting for {uri}: {REFUSALS[uri]}; trying again for up to ")
