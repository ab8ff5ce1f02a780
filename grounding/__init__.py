"""Visual grounding: data, training, evaluation. No Kubernetes in here."""
