"""Roles -> manifests. Pure: the same job gives the same objects, and a test compares them with what the API server accepts."""
