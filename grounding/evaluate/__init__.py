"""Evaluation: asks an OpenAI-compatible server about every expression of the eight files. An interrupted evaluation can be resumed.

Data flow: worklist (checked rows) -> client (requests) -> results (durable rows) -> summary (pure). `engines/` describes the servers.
"""
