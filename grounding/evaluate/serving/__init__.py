"""This project's own servers: scripts that an engine's interpreter runs, and their common code.

Their folder is on the path of the engine's process, so that it finds `egm_require_key` by that name.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the scripts are"""
