"""Code about models that both training and evaluation use."""

PACKED_ROWS = "packed_rows"
"""Name under which transformers knows attention without padding (`attention.py`). It must not contain "flash", or transformers would look
for a kernel
"""
