"""`python -m grounding.cli` is `egm`."""

from grounding.cli import main

main()
