"""Evaluation: ask an OpenAI-compatible server about every expression of the eight files. Can be resumed.

worklist (checked rows) -> client (requests) -> results (durable rows) -> summary (pure). engines/ describes the servers.
"""
