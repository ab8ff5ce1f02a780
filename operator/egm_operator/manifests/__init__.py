"""Turn roles into manifests. Pure: the same job gives the same objects. A test checks them against the API server."""
