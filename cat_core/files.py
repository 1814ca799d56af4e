"""Files and folders that are whole or not there: written under a temporary name, then renamed.

The temporary name holds the number of the process, so that the next command can tell what a killed
one has left. A lock keeps two commands out of one folder.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import ctypes
    import msvcrt
else:
    import fcntl

LOCK = "lock"  # the file's name in a locked folder; the file stays, the lock does not
# Windows' PROCESS_QUERY_LIMITED_INFORMATION, ERROR_ACCESS_DENIED and STILL_ACTIVE.
QUERY = 0x1000
DENIED = 5
STILL_ACTIVE = 259
SECONDS_A_TRY = 0.5  # of a process that waits for a lock


class InUseError(OSError):
    """Another process works in the folder."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file that takes its place when the block ends.

    When the block fails, the temporary file goes and an older one stays whole. What killed
    processes left of the same file goes first. The folder is made where it is missing. The file
    may be read by whoever may read this process's other new files, whoever wrote it. Raises OSError
    for a disk that is full or read-only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    partial = _partial(path)
    try:
        partial.touch()
        # Some writers, safetensors among them, put a private file into the place of this one.
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, which is made empty.

    An older folder at `path` goes when the new one is complete.
    """
    remove_leftovers(path.parent, path.name)
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def remove_leftovers(folder: Path, beginning: str = "") -> None:
    """Remove what processes that run no more have left in a folder under temporary names.

    Args:
        beginning: of the names; what other commands left stays.
    """
    if not folder.is_dir():
        return
    for entry in os.scandir(folder):
        if not (entry.name.startswith(beginning) and entry.name.endswith(".partial")):
            continue
        process = entry.name.split(".")[-2]
        if process.isdecimal() and not _is_running(int(process)):
            _remove(Path(entry.path))


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep others out of a folder until the block ends; the lock dies with its process too.

    The folder is made where it is missing. A disk that knows no locks is used without one.

    Args:
        wait: until the other one has done, instead of InUseError.
    Raises:
        InUseError: another process has locked the folder.
        OSError: nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "ab") as file:
        while not _try_lock(file):
            if not wait:
                raise InUseError(f"another process works in {folder}")
            time.sleep(SECONDS_A_TRY)
        yield


def require_writable(folder: Path) -> None:
    """Raise OSError unless a file can be made in a folder, which is made where it is missing.

    Several processes may ask at the same time: each makes a file of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = _partial(folder / "probe")
    try:
        probe.write_text("x", encoding="utf-8")
    finally:
        probe.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """The temporary name of this process for a file or folder."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def _remove(path: Path) -> None:
    """Remove a file or folder; one that is held by somebody stays."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:
        pass


def _try_lock(file: BinaryIO) -> bool:
    """Lock an open file; False where another process holds the lock."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # some network disks know no locks
        return True
    return True


def _is_running(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    if sys.platform == "win32":  # where os.kill would end it
        return _is_running_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no process has such a number
        return True
    return True


def _is_running_on_windows(process: int) -> bool:
    """The same by Windows' own functions, which know an ended process while others hold it."""
    if sys.platform != "win32":
        return False
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    handle = kernel.OpenProcess(QUERY, False, process)
    if not handle:
        return ctypes.get_last_error() == DENIED  # another user's
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return code.value == STILL_ACTIVE
