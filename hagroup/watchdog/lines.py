"""``log_style = "luna"``: log lines as existing monitoring greps for them (REQUIREMENTS.md 2, T's table 5.2)."""

from __future__ import annotations

import logging
import os
from datetime import datetime
from typing import IO

from hagroup.config import logging as logs
from hagroup.config.model import LogStyle


class LunaFormatter(logging.Formatter):
    """``HH:MM:SS [pid] HA group: …``; what Luna has no words for stands behind the same beginning."""

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, logs.FIELDS, {}))
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        text = fields.get("luna")
        if text is None:
            group = f"HA group: {fields['serial']} " if "serial" in fields and "text" in fields else ""
            text = f"{group}{fields['text']}" if "text" in fields else record.getMessage()
        line = f"{time} [{os.getpid()}] {text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info and record.exc_info[0] else line


def configure(style: LogStyle, stream: IO[str] | None = None, level: int = logging.INFO) -> None:
    """All of hagroup's log goes to ``stream`` (default: standard error) in this style. A second call replaces it."""
    logger = logging.getLogger(logs.ROOT)
    for handler in [one for one in logger.handlers if isinstance(one.formatter, LunaFormatter)]:
        logger.removeHandler(handler)
    if style != "luna":
        logs.configure(style, level, stream)
        return
    logs.configure("console", level, stream)
    handler = logger.handlers[-1]  # the one that was just added
    handler.setFormatter(LunaFormatter())
