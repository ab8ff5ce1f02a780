"""What this machine has, judged by what a job needs: `egm doctor`, and the check before `egm run` and `egm serve` begin.

`needs` (pure) reads a job and its roles; `probe` looks at the machine and asks hub and stores; `judge` (pure) compares the two and gives one
`Verdict` a subject; `command` puts them together. Nothing is downloaded and no GPU is bound.
"""
