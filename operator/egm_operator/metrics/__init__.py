"""The operator's metrics. `jobs` describes jobs, computed from the cache at each scrape; `meters` counts the operator's own work;
`exposition` serves both on `/metrics`. docs/metrics.md lists them all.
"""
