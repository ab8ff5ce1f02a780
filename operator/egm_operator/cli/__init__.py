"""The user's side of a cluster: `egm top|submit|cancel`, `egm logs|report --cluster`. With the rights of whoever asks;
nothing here is the operator's.

`screen` is pure (jobs -> tables), `actions` talks to the API server.
"""
