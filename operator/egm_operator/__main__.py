"""`python -m egm_operator`."""

from egm_operator.main import main

main()
