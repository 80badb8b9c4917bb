"""Progress of long stages: bars on terminals and in notebooks, lines of text elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from . import ranks
from .loggers import LIBRARY, WORDING, get_logger


# Seconds between two lines of one stage.
INTERVAL = 15.0

# Width of a text bar in a notebook, in characters.
NOTEBOOK_COLUMNS = 90


def progress(
    iterable: Iterable[Any], description: str, total: int | None = None, unit: str = "step", initial: int = 0
) -> Any:
    """Wrap `iterable` to show the progress of a loop over it.

    On a terminal and in a notebook a bar is shown. Elsewhere, for example with `nohup` or where stderr is a file, a
    line is written to stderr at the start, every 15 seconds, and at the end: the stage, the share done, the time
    elapsed and the time left. Nothing is shown where transformers' progress bars are disabled, where the verbosity is
    that of errors, and in all processes of a run but the main one.

    Args:
        iterable (`Iterable`): the items of the loop, one per unit of work.
        description (`str`): name of the stage.
        total (`int`, *optional*): number of units; by default the length of `iterable`, if it has one.
        unit (`str`, defaults to `"step"`): name of a unit.
        initial (`int`, defaults to 0): units that an interrupted run has done already.

    Returns:
        an iterable with the method `set_postfix(refresh=False, **values)`, which shows values beside the progress.
    """
    silent, in_notebook = is_silent(), _in_notebook()
    if not silent and not in_notebook and not sys.stderr.isatty():
        return _Lines(iterable, description, total, unit, initial)
    from tqdm.auto import tqdm

    # An inner bar is removed when it is finished.
    options: dict[str, Any] = {"leave": None}
    if silent:
        options["disable"] = True
    elif in_notebook:
        options = _options_in_notebook(tqdm)
    return tqdm(iterable, desc=description, total=total, unit=unit, initial=initial, **options)


def announce(text: str) -> None:
    """Write to stderr what a run is about to do, unless progress is disabled.

    Args:
        text (`str`): one or more lines.
    """
    if not is_silent():
        _write_line(WORDING.get()(text))


@contextmanager
def one_step(description: str) -> Iterator[None]:
    """Show the progress of a stage without parts, which is running while the context is open."""
    steps = iter(progress((None,), description))
    next(steps)
    try:
        yield
        next(steps, None)
    finally:
        steps.close()


def is_silent() -> bool:
    """Return whether progress is not shown in this process."""
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
        # A closed pipe must not end the work.
        pass


def _in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, whose stderr is no terminal."""
    interactive = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(interactive, "config", {})


def _options_in_notebook(tqdm: Any) -> dict[str, Any]:
    """Return options of a bar in a notebook: a widget, or text where ipywidgets is not installed."""
    from tqdm.notebook import tqdm_notebook

    # tqdm counts widgets differently from text bars, so that leave=None would remove outer widgets too.
    options: dict[str, Any] = {"leave": not getattr(tqdm, "_instances", ())}
    if not issubclass(tqdm, tqdm_notebook):
        # Notebooks do not move a cursor up: an inner text bar would add a line at every step. All bars share one line,
        # with one width, so that none leaves a part of another.
        options |= {"position": 0, "ncols": NOTEBOOK_COLUMNS}
    return options


class _Lines:
    """Progress as lines of text, for files and pipes."""

    # Number of stages that are running. A stage inside of another one writes lines only if it takes long.
    _running = 0

    def __init__(self, iterable: Iterable[Any], description: str, total: int | None, unit: str, initial: int):
        self._iterable, self._description, self._initial = iterable, description, initial
        self._total = getattr(iterable, "__len__", lambda: None)() if total is None else total
        self._units = unit + ("es" if unit.endswith(("s", "x", "ch", "sh")) else "s")
        self._postfix = ""

    def __iter__(self) -> Iterator[Any]:
        is_inner, done = _Lines._running > 0, self._initial
        start = last = time.monotonic()
        _Lines._running += 1
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
            _Lines._running -= 1
            elapsed = time.monotonic() - start
            if done > self._initial and (elapsed >= INTERVAL or (not is_inner and self._total != 1)):
                self._write(done, elapsed)

    def set_postfix(self, refresh: bool = False, **values: Any) -> None:
        """Show these values in the following lines."""
        self._postfix = "".join(f", {name} {value}" for name, value in values.items())

    def _write(self, done: int, elapsed: float) -> None:
        text, new = self._description, done - self._initial
        if self._total is None:
            text += f": {done} {self._units}"
        elif self._total != 1:
            share = f" ({done / self._total:.0%})" if self._total else ""
            text += f": {done} of {self._total} {self._units}{share}"
        if new:
            text += f", {duration(elapsed)} elapsed"
            if self._total is not None and done < self._total:
                text += f", {duration(elapsed / new * (self._total - done))} left"
        _write_line(text + self._postfix)


def duration(seconds: float) -> str:
    """Return seconds as `H:MM:SS`, or as `M:SS` if they are less than an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
