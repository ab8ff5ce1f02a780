"""Check whether this machine has what a job needs: `egm doctor`, and the check before `egm run` and `egm serve` begin.

`needs` (pure) derives the needs from a job and its roles. `probe` examines the machine and asks the hub and stores. `judge` (pure) compares
the two and returns one `Verdict` per subject. `command` combines them. Nothing is downloaded and no GPU memory is allocated.
"""
