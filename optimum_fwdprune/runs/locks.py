"""Locks of folders and files that several runs or processes may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import check_output_file
from . import ranks
from .loggers import get_logger


logger = get_logger(__name__)

# The name of the lock file in a folder.
LOCK = ".lock"


@contextmanager
def held(folder: str | Path, remedy: str) -> Iterator[None]:
    """Lock a folder while the block runs, so that no other run writes to it.

    If there are several processes of one launcher, the main one holds the lock for all. A lock ends with its process.

    Args:
        folder (`str` or `Path`): the folder, which is created where it does not exist.
        remedy (`str`): the way out, for the error message, such as "another folder with resume=...".

    Raises:
        BlockingIOError: where another run has locked the folder.
        OSError: where the folder is a file, or nothing can be written to it.
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
    """Run a block that reads or writes `path` in one process at a time; other processes wait.

    The lock is a hidden file beside `path`, since `path` may be a folder that must be empty before it is written.

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
    """Release a lock that this process holds, and remove its file, so that an empty folder can be removed."""
    if not lock.is_locked:
        return
    try:
        # It is removed while the lock is held. A process that waits for it notices this, and creates a new file.
        Path(lock.lock_file).unlink(missing_ok=True)
    except OSError as error:
        # Windows does not remove open files.
        logger.debug("%s was not removed: %s", lock.lock_file, error)
    lock.release()
