"""Run the operator by `python -m egm_operator`."""

from egm_operator.controller.main import main

main()
