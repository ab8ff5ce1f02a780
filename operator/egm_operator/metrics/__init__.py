"""The operator's metrics. `jobs` is what it knows of jobs, computed from the cache at each scrape; `meters` is what it does itself; `exposition`
puts both on `/metrics`. docs/metrics.md lists them all.
"""
