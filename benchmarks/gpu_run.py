"""Running the parts of `gpu.py`: within a time, each by itself, with what it prints and how it fails kept as text."""

import gc
import logging
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from gpu_device import Device
from gpu_report import result_of


# Group -> share of the time that its parts may have before those of the others had their turn.
SHARES = {"requests": 0.35, "offloading": 0.15, "pruning": 0.4, "speed": 0.25, "other layouts": 0.25}


class OutOfTime(BaseException):
    """A part took several times as long as foreseen; nothing in between may take it for an error of its own."""


@dataclass(frozen=True)
class Part:
    """Something to try.

    Args:
        group (`str`): of `SHARES`.
        name (`str`): unique in the group.
        seconds (`float`): that it takes at most on one H100; it does not start where less is left.
        run (`Callable`): returns what came of it as JSON values; under `wrong` what is not as it should be.
    """

    group: str
    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]


def run_parts(
    parts: list[Part], device: Device, seconds: float, done: list[dict[str, Any]], write: Callable[[], None]
) -> bool:
    """Run what fits into the time, and add a record of every part to `done`; whether the device answered to the end.

    A group that has used up its share of the time waits until the others had their turn.
    """
    end = time.perf_counter() + seconds
    spent = dict.fromkeys(SHARES, 0.0)
    waiting, postponed = list(parts), []
    for last in (False, True):
        for part in waiting:
            left = end - time.perf_counter()
            if not last and spent[part.group] + part.seconds > SHARES[part.group] * seconds:
                postponed.append(part)
                continue
            if part.seconds > left:
                reason = f"no time left: {left:.0f} s, and it may take {part.seconds:.0f}"
                record = {"group": part.group, "part": part.name, "status": "not run", "reason": reason}
            else:
                record = run_part(part, device, min(left, 3 * part.seconds + 10))
                spent[part.group] += record["seconds"]
            done.append(record)
            write()
            print(f"{record['status']:8} {part.group}: {part.name}: {result_of(record)}", flush=True)
            if record["status"] == "failed" and not device.answers():
                return False
        waiting = postponed
    return True


def run_part(part: Part, device: Device, limit: float) -> dict[str, Any]:
    """Run a part for at most so many seconds and return its record, whatever happens."""
    record: dict[str, Any] = {"group": part.group, "part": part.name, "status": "ok"}
    torch.manual_seed(0)
    device.reset_peak()
    start = time.perf_counter()
    try:
        with at_most(limit), kept_messages(record):
            record |= part.run()
            device.synchronize()
        if "wrong" in record:
            record |= {"status": "failed", "error": record["wrong"], "traceback": record.pop("wrong")}
    except (Exception, OutOfTime) as error:
        record |= getattr(error, "measured", {})
        # Its frames hold models; what they say is kept as text.
        record |= {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
        traceback.clear_frames(error.__traceback__)
    record["seconds"] = time.perf_counter() - start
    if device.answers():
        record["peak_bytes"] = record.get("peak_bytes") or device.peak()
        device.free()
    return record


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after so many seconds, where the system can."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number, _frame):
        raise OutOfTime(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def kept_messages(record: dict[str, Any]) -> Iterator[None]:
    """Keep what the package logs in the block in the record instead of printing it."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: messages.append(entry.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("optimum_fwdprune")
    level, propagates, handlers = logger.level, logger.propagate, list(logger.handlers)
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers = handlers
        logger.propagate = propagates
        logger.setLevel(level)
        if messages:
            record["messages"] = messages


@contextmanager
def quiet() -> Iterator[None]:
    """Let no other library print in the block, and no search for unused objects look at what was imported before it,
    which would take seconds in all."""
    gc.collect()
    gc.freeze()
    accelerate, verbosity = logging.getLogger("accelerate"), transformers.logging.get_verbosity()
    level, bars = accelerate.level, transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # accelerate logs this for every model with offloaded layers.
    accelerate.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.unfreeze()
        accelerate.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
