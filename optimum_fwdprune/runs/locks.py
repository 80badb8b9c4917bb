"""Folders that several runs may name: one run at a time writes to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import check_output_file
from . import ranks
from .loggers import get_logger


logger = get_logger(__name__)

# Name of the lock in a folder that a run fills over a long time.
LOCK = ".lock"


@contextmanager
def held(folder: str | Path, remedy: str) -> Iterator[None]:
    """Hold a folder while the block runs, so that no other run writes to it.

    Of several processes of one launcher the main one holds the folder for all. A process that is killed lets go of it.

    Args:
        folder (`str` or `Path`): it is made where it does not exist.
        remedy (`str`): what to name instead, for the error: "another folder with resume=...".

    Raises:
        BlockingIOError: where another run holds the folder.
        OSError: where the folder is a file, or nothing can be written there.
    """
    lock = FileLock(Path(folder).absolute() / LOCK, blocking=False)

    def acquire() -> None:
        check_output_file(lock.lock_file)
        try:
            lock.acquire()
        except Timeout as error:
            raise BlockingIOError(
                f"Another run is using the folder {folder}. Wait until it has finished, or name {remedy}."
            ) from error

    ranks.from_main(acquire)
    try:
        yield
    finally:
        _release(lock)


@contextmanager
def taking_turns(path: str | Path) -> Iterator[None]:
    """Let one process at a time run the block that reads or writes `path`; the others wait.

    The lock is a hidden file beside `path`, since `path` may be a folder that has to be empty before it is written.

    Args:
        path (`str` or `Path`): a file or folder, which need not exist.

    Raises:
        OSError: where nothing can be written beside `path`.
    """
    path = Path(path).absolute()
    lock = FileLock(check_output_file(path.with_name(f".{path.name}{LOCK}")))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Waiting for another process that is using %s.", path)
        lock.acquire()
    try:
        yield
    finally:
        _release(lock)


def _release(lock: FileLock) -> None:
    """Let go of a lock that this process holds, and remove its file, so that an empty folder can be removed."""
    if not lock.is_locked:
        return
    try:
        # While the lock is held: a process that opened the file before sees that it is gone, and makes a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
    except OSError as error:
        # Windows removes no file that is open.
        logger.debug("%s stays: %s", lock.lock_file, error)
    lock.release()
