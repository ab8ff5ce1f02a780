"""Files by URI behind one small interface: folders (`file://`, `pvc://`, plain paths), S3 (`s3://`) and the Hugging Face hub (`hf://`).

    store = open_store("s3://bucket/results/egm-8b")
    store.write("summary.json", data)        # whole or not at all
    fetch("s3://bucket/models/egm-8b")       # a local path; downloaded once per node, resumable, verified
    send(folder, "s3://bucket/checkpoints/step-40", last="complete.json")

Names within a store are relative paths with `/`. S3's credentials, region and endpoint come from boto3's own sources
(`AWS_ACCESS_KEY_ID`, profiles, pod identities; `AWS_ENDPOINT_URL_S3` for a server other than Amazon's). They are never stored or printed.
"""

from __future__ import annotations

from grounding.storage.base import (
    Entry,
    Location,
    Progress,
    Store,
    Transfer,
    cache_folder,
    destination,
    is_remote,
    local_path,
    locate,
)
from grounding.storage.fetch import (
    Outstanding,
    ProgressLogger,
    fetch,
    holds,
    in_cache,
    in_words,
    listing,
    outstanding,
    send,
)
from grounding.storage.opening import open_store

__all__ = [
    "Entry",
    "Location",
    "Outstanding",
    "Progress",
    "ProgressLogger",
    "Store",
    "Transfer",
    "cache_folder",
    "destination",
    "fetch",
    "holds",
    "in_cache",
    "in_words",
    "is_remote",
    "listing",
    "local_path",
    "locate",
    "open_store",
    "outstanding",
    "send",
]
