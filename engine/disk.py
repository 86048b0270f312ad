"""Writing files so that they are whole or absent; names of what is cached."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash
from filelock import Timeout

from engine.locks import WaitingLock, lock_in

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields a folder to write into. It becomes `target` when all of it is on the disk.

    After a kill or an error `target` is absent. The next writer removes what was left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with explain_full_disk(target):
            yield temporary
            for path in [p for p in temporary.rglob("*") if p.is_file()]:
                with open(path, "rb+") as stream:
                    os.fsync(stream.fileno())
            _sync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    os.replace(temporary, target)
    _sync_folder(target.parent)


def cache_lock(cache: Path) -> WaitingLock:
    """Hold it while a folder of the cache is made: another run that needs the folder waits."""
    cache.mkdir(parents=True, exist_ok=True)
    return WaitingLock(lock_in(cache), f"another run that prepares {cache}")


class ScratchFolder:
    """A folder under the cache that one command uses. clear() deletes it.

    Hold the cache's lock while one is made and while others' are cleared: between its birth and
    its lock it looks as if its command had been killed.
    """

    def __init__(self, cache: Path, name: str):
        cache.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache))
        self.lock = lock_in(self.path)
        self.lock.acquire()

    def clear(self):
        self.lock.release()
        shutil.rmtree(self.path, ignore_errors=True)

    @staticmethod
    def clear_left(cache: Path, name: str):
        """Delete what killed commands left: their locks went with them.

        A command that ends just now deletes its own, too: each misses what the other deleted.
        FileExistsError is filelock's, of a folder that went while it looked.
        """
        for folder in cache.glob(f"{name}-*"):
            gone = FileNotFoundError, FileExistsError
            with contextlib.suppress(Timeout, *gone), lock_in(folder).acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, text: str):
    """Write a file. After a kill or an error it has its old content or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    with explain_full_disk(path), open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def append_whole(path: Path, content: bytes, sync: bool = False):
    """Append to a file, all or nothing. It is opened for each: an error leaves no open file.

    sync: onto the disk before this returns.
    """
    with open(path, "ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            if (written := stream.write(content)) < len(content):  # the disk became full
                stream.write(content[written:])
            if sync:
                os.fsync(stream.fileno())
        except OSError:
            stream.truncate(before)
            raise


def remove(path: Path):
    """Delete a file, a folder, or a link without what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_newest(path: Path, others: Iterable[Path]):
    """Date a file or folder after the others, which a clock that was set back does not."""
    newest = max((other.stat().st_mtime for other in others if other != path), default=0.0)
    if path.stat().st_mtime <= newest:
        os.utime(path, (newest + 1, newest + 1))


class DiskFullError(OSError):
    """The disk is full. The message says what could not be written and what to do."""


@contextlib.contextmanager
def explain_full_disk(target: Path) -> Iterator[None]:
    """Raise DiskFullError when writing `target` fails because the disk is full.

    torch, safetensors and tokenizers raise errors that do not tell the cause. Then a test file is
    written to find out.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        number = number if number in DISK_FULL else _full_disk_errno(target.parent)
        if number is None:
            raise
        raise DiskFullError(
            f"{target} could not be written: {os.strerror(number)} "
            f"({shutil.disk_usage(target.parent).free / 2**20:,.0f} MiB free there). Free some "
            "space and run the same command again: it continues from what was saved before."
        ) from error


def _full_disk_errno(folder: Path) -> int | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(bytes(2**20))
    except OSError as error:
        return error.errno if error.errno in DISK_FULL else None
    return None


def _sync_folder(folder: Path):
    if os.name == "posix":  # other systems cannot open a folder and do not need it
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def settings_hash(*settings) -> str:
    """A short name for a combination of settings: what a cache folder is called."""
    return xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True, default=str).encode())
