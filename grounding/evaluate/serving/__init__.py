"""Scripts that start servers and run in an engine's interpreter, and their common code.

The folder is on the import path of the engine's process, so that the engine finds the module `egm_require_key`.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Folder of the scripts"""
