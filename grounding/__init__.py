"""Visual grounding: data, training and evaluation, independent of Kubernetes. Scripts and notebooks use `grounding.library`
(docs/python.md).
"""
