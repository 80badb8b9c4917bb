"""The loggers of this package, `optimum_fwdprune.*`, whose default level is the verbosity of transformers."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import TextIO

from . import ranks


LIBRARY = __name__.partition(".")[0]
TRANSFORMERS = "transformers"

# The values of TRANSFORMERS_VERBOSITY.
_LEVELS = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


# How messages on the console are worded: commands replace the arguments of Python by their options.
WORDING: ContextVar[Callable[[str], str]] = ContextVar("wording", default=str)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module of this package.

    Its level is the one that was set on it or on `logging.getLogger("optimum_fwdprune")`, else that of transformers
    (`transformers.logging.set_verbosity_info()`, `TRANSFORMERS_VERBOSITY`). Messages are written to stderr and passed
    to the handlers of the root logger. If one of these writes to the console, this logger does not write to stderr.

    Args:
        name (`str`): name of the module.
    """
    logger = logging.getLogger(name)
    # `setLoggerClass` would have no effect on a logger that exists already because a user has set its level.
    logger.__class__ = _LibraryLogger
    return logger


class _LibraryLogger(logging.Logger):
    """A logger with the level of transformers, unless it or a parent in this package has a level."""

    def getEffectiveLevel(self) -> int:
        logger: logging.Logger | None = self
        while logger is not None and logger.name.partition(".")[0] == LIBRARY:
            if logger.level:
                return logger.level
            logger = logger.parent
        # Processes other than the main one log errors only.
        return _level_of_transformers() if ranks.speaks() else max(_level_of_transformers(), logging.ERROR)


def _level_of_transformers() -> int:
    logger = logging.getLogger(TRANSFORMERS)
    # Before transformers is imported its logger has no level; importing it sets the level of the variable.
    return logger.level or _LEVELS.get(os.environ.get("TRANSFORMERS_VERBOSITY", ""), logging.WARNING)


class _ConsoleHandler(logging.Handler):
    """Writes to stderr, unless a handler of the root logger writes to the console."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None or _root_writes_to_console():
            return
        try:
            sys.stderr.write(WORDING.get()(self.format(record)) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _root_writes_to_console() -> bool:
    if not logging.getLogger(LIBRARY).propagate:
        return False
    consoles: tuple[TextIO | None, ...] = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    # The handler of rich has a console instead of a stream.
    return any(
        hasattr(handler, "console") or getattr(handler, "stream", None) in consoles
        for handler in logging.getLogger().handlers
    )


_handler = _ConsoleHandler()
_handler.setFormatter(logging.Formatter(f"[{LIBRARY}] %(message)s"))
get_logger(LIBRARY).addHandler(_handler)
