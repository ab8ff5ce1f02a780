"""Log lines of a role's process: level by `$EGM_LOG_LEVEL` (INFO), form by `$EGM_LOG_FORMAT` (text, or json for collectors), all on stderr."""

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
    """One JSON object a line, times in UTC; `context` is in every line, an attribute of `fields` where a record has it."""

    def __init__(self, context: Mapping[str, str], fields: Sequence[str] = ()) -> None:
        super().__init__()
        self.context, self.fields = dict(context), fields

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
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
    """For people: hour, first letter of the level, logger (or what else `subject` names, of which `default` is one), message."""

    def __init__(self, subject: str = "name", default: str = "") -> None:
        form = f"%(asctime)s %(levelname).1s %({subject})s: %(message)s"
        super().__init__(form, datefmt="%H:%M:%S", defaults={subject: default} if default else None)


def set_up(environ: Mapping[str, str], context: Mapping[str, str]) -> None:
    """Configure the root logger, once, over whatever was there. Raises `UserError` that names the variable."""
    given = Environment.from_environ(environ)
    level, form = given.log_level, given.log_format
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json(context) if form == "json" else Text())
    # libraries speak when something is wrong; everything they have to say comes with DEBUG
    logging.basicConfig(level=level if level in ("DEBUG", "ERROR") else "WARNING", handlers=[handler], force=True)
    logging.getLogger("grounding").setLevel(level)
