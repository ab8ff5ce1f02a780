"""Models: what training and evaluation both use."""

PACKED_ROWS = "packed_rows"
"""transformers' name of attention without padding (`attention.py`). It has no "flash" in it, by which transformers would look for a kernel"""
