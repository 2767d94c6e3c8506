"""Files that are either the old one or the new one, never half of either."""

import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

STALE = 24 * 3600.0
"""Seconds without a change after which nobody can still be writing, where no lock tells."""
_NAME = re.compile(r"\.dtme-[0-9a-f]{32}-(?P<host>.*)")


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file of the same name, flush it to disk, then rename it to ``path``.

    Whoever is killed in it leaves a hidden folder beside ``path``, which the next ``write_beside`` there removes.
    """
    _make_folder(path.parent)
    for left in path.parent.glob(".dtme-*"):
        _remove_if_dead(left)
    with _workplace(path.parent) as (folder, mode):
        beside = folder / path.name
        write(beside)
        beside.chmod(mode)  # some writers make files that are private to the user
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
        _flush_folder(path.parent)


@contextmanager
def _workplace(parent: Path) -> Iterator[tuple[Path, int]]:
    """A locked folder of our own, and the permissions that files get here (those that the umask leaves)."""
    handle = None
    while handle is None:
        folder = parent / f".dtme-{uuid.uuid4().hex}-{_host()}"
        folder.mkdir()
        handle = _open_lock(folder)
        # who took it for a dead one, before it was locked, has removed it, and with it the file that is locked now
        if handle is not None and not _is_lock_of(handle, folder):
            os.close(handle)
            handle = None
    try:
        yield folder, os.fstat(handle).st_mode & 0o777
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _open_lock(folder: Path) -> int | None:
    """The lock file of ``folder``, held until it is closed or this process ends in any way; None if ``folder`` is gone.

    File systems without locks let everybody have it.
    """
    try:
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def _remove_if_dead(folder: Path) -> None:
    """Remove what a killed process left; never what one that lives is writing."""
    match = _NAME.fullmatch(folder.name)
    if match is None or not folder.is_dir():
        return
    with suppress(OSError):
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # a lock may hold on the writer's own machine only, and there may be none
            tells = _take_lock(handle) and match["host"] == _host()
            if tells or time.time() - max(path.stat().st_mtime for path in [folder, *folder.iterdir()]) > STALE:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _take_lock(handle: int) -> bool:
    """Whether the lock is ours now; BlockingIOError where somebody holds it, False where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_lock_of(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder / "lock"))
    except FileNotFoundError:
        return False


def _host() -> str:
    return re.sub(r"[^0-9A-Za-z_]+", "-", platform.node())[:64]


def _make_folder(folder: Path) -> None:
    """Make it and what it lies in, so that they outlive a loss of power as the files in them do."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        _flush_folder(one.parent)


def _flush_folder(folder: Path) -> None:
    """Make the names in it outlive a loss of power, where the system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        with suppress(OSError):  # nor flushed on some file systems
            os.fsync(handle)
    finally:
        os.close(handle)
