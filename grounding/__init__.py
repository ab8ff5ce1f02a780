"""Visual grounding: data, training, evaluation. No Kubernetes in here. For scripts and notebooks: `grounding.library` (docs/python.md)."""
