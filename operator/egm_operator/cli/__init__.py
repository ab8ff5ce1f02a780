"""The user's side of a cluster: `egm top|submit|cancel`, `egm logs|report --cluster`. They use the rights of the user, not the operator's.

`screen` is pure (jobs -> tables), `actions` talks to the API server.
"""
