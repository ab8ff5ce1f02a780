"""Visual grounding: data, training, evaluation. It does not depend on Kubernetes. For scripts and notebooks, see `grounding.library`
(docs/python.md).
"""
