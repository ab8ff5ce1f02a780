"""The user's commands for a cluster: `egm top|submit|cancel`, `egm logs|report|doctor --cluster`. They use the user's rights, not the
operator's.

`screen` is pure and turns jobs into tables. `actions` sends requests to the API server. `doctor` checks what a cluster has.
"""
