"""Log lines of a role's process, on stderr: level by `$EGM_LOG_LEVEL` (INFO), format by `$EGM_LOG_FORMAT` (text, or json for collectors)."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence

from grounding.runtime.environment import Environment

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
FORMS = ("text", "json")


class Json(logging.Formatter):
    """Format a record as one JSON object per line, with times in UTC.

    `context` is added to every line, and each attribute in `fields` if the record has it.
    """

    def __init__(self, context: Mapping[str, str], fields: Sequence[str] = ()) -> None:
        super().__init__()
        self.context, self.fields = dict(context), fields

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line of JSON."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {
            "time": moment,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self.context,
            **{name: value for name in self.fields if (value := getattr(record, name, None)) is not None},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Text(logging.Formatter):
    """Format a record for people: time, first letter of the level, logger and message.

    `subject` names the record attribute to show instead of the logger; `default` is used if a record lacks it.
    """

    def __init__(self, subject: str = "name", default: str = "") -> None:
        form = f"%(asctime)s %(levelname).1s %({subject})s: %(message)s"
        super().__init__(form, datefmt="%H:%M:%S", defaults={subject: default} if default else None)


def set_up(environ: Mapping[str, str], context: Mapping[str, str]) -> None:
    """Configure the root logger, replacing earlier handlers. Raises a `UserError` that names the variable."""
    given = Environment.from_environ(environ)
    level, form = given.log_level, given.log_format
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json(context) if form == "json" else Text())
    # libraries log from WARNING on, or from this level if it is DEBUG or ERROR
    logging.basicConfig(level=level if level in ("DEBUG", "ERROR") else "WARNING", handlers=[handler], force=True)
    logging.getLogger("grounding").setLevel(level)
