"""Run `egm` as `python -m grounding.cli`."""

from grounding.cli import main

main()
