"""How far long stages are: bars on terminals and in notebooks, lines everywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from . import ranks
from .loggers import LIBRARY, get_logger


# Seconds between two lines of one stage.
INTERVAL = 15.0


def progress(
    iterable: Iterable[Any], description: str, total: int | None = None, unit: str = "step", initial: int = 0
) -> Any:
    """Wrap `iterable` so that users see how far its consumer is.

    On a terminal and in a notebook there is a bar. Elsewhere, as with `nohup` or where the output goes to a file,
    stderr gets a line at the start, one every 15 seconds, and one at the end: the stage, the share done, the time
    elapsed and the time left. Nothing is shown where transformers' progress bars are disabled, where the verbosity is
    that of errors, and in all processes of a run but the main one.

    Args:
        iterable (`Iterable`): what is done, a unit at a time.
        description (`str`): name of the stage.
        total (`int`, *optional*): how many units there are; by default the length of `iterable`, where it has one.
        unit (`str`, defaults to `"step"`): name of one unit.
        initial (`int`, defaults to 0): units that were done before, by a run that was interrupted.

    Returns:
        an iterable with the method `set_postfix(refresh=False, **values)`, which shows values beside the progress.
    """
    is_silent, in_notebook = _is_silent(), _in_notebook()
    if not is_silent and not in_notebook and not sys.stderr.isatty():
        return _Lines(iterable, description, total, unit, initial)
    from tqdm.auto import tqdm

    # An inner bar on a terminal vanishes when it is done.
    options: dict[str, Any] = {} if in_notebook else {"leave": None}
    if is_silent:
        options["disable"] = True
    return tqdm(iterable, desc=description, total=total, unit=unit, initial=initial, **options)


def announce(text: str) -> None:
    """Write what a run is about to do to stderr, where progress is shown at all.

    Args:
        text (`str`): one or more lines.
    """
    if not _is_silent():
        _write_line(text)


@contextmanager
def one_step(description: str) -> Iterator[None]:
    """Show a stage without parts, which is under way while the context is open."""
    steps = iter(progress((None,), description))
    next(steps)
    try:
        yield
        next(steps, None)
    finally:
        steps.close()


def _is_silent() -> bool:
    from transformers.utils import logging as transformers_logging

    return (
        sys.stderr is None
        or not ranks.speaks()
        or not transformers_logging.is_progress_bar_enabled()
        or not get_logger(LIBRARY).isEnabledFor(logging.WARNING)
    )


def _write_line(text: str) -> None:
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        # Nobody reads a pipe that was closed, and the work is no worse for it.
        pass


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose stderr is no terminal."""
    interactive = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(interactive, "config", {})


class _Lines:
    """Progress as lines of text, for files and pipes."""

    # Stages that are under way: one that is part of another has a line only where it takes long.
    _under_way = 0

    def __init__(self, iterable: Iterable[Any], description: str, total: int | None, unit: str, initial: int):
        self._iterable, self._description, self._initial = iterable, description, initial
        self._total = getattr(iterable, "__len__", lambda: None)() if total is None else total
        self._units = unit + ("es" if unit.endswith(("s", "x", "ch", "sh")) else "s")
        self._postfix = ""

    def __iter__(self) -> Iterator[Any]:
        is_inner, done = _Lines._under_way > 0, self._initial
        start = last = time.monotonic()
        _Lines._under_way += 1
        try:
            if not is_inner:
                self._write(done, 0.0)
            for item in self._iterable:
                yield item
                done += 1
                now = time.monotonic()
                if now - last >= INTERVAL and done != self._total:
                    self._write(done, now - start)
                    last = now
        finally:
            _Lines._under_way -= 1
            elapsed = time.monotonic() - start
            if done > self._initial and (elapsed >= INTERVAL or (not is_inner and self._total != 1)):
                self._write(done, elapsed)

    def set_postfix(self, refresh: bool = False, **values: Any) -> None:
        """Show these values in the lines to come."""
        self._postfix = "".join(f", {name} {value}" for name, value in values.items())

    def _write(self, done: int, elapsed: float) -> None:
        text, new = self._description, done - self._initial
        if self._total is None:
            text += f": {done} {self._units}"
        elif self._total != 1:
            share = f" ({done / self._total:.0%})" if self._total else ""
            text += f": {done} of {self._total} {self._units}{share}"
        if new:
            text += f", {_duration(elapsed)} elapsed"
            if self._total is not None and done < self._total:
                text += f", {_duration(elapsed / new * (self._total - done))} left"
        _write_line(text + self._postfix)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
