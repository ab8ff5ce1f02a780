"""The user's commands for a cluster: `egm top|submit|cancel`, `egm logs|report --cluster`. They use the user's rights, not the operator's.

`screen` is pure and turns jobs into tables. `actions` sends requests to the API server.
"""
