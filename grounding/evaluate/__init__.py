"""Evaluation: every expression of the eight files, asked of any OpenAI-compatible server, resumable.

work (rows, checked) -> client (requests) -> results (durable rows) -> summary (pure). engines/ knows the servers.
"""
