"""Locks between processes, also on a file system that has none of its own."""

import errno
import functools
import sys
import tempfile
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

# What flock answers on NFS without a lock service, on Lustre, and on some network drives.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def lock_in(folder: Path, **options) -> BaseFileLock:
    """The lock of a folder. The system frees it when its process ends, however it ends.

    Where the file system has no locks, a file that exists is the lock. A process that is killed
    there leaves it behind: describe_lock() says so.
    """
    if has_locks(folder.absolute()):
        return FileLock(folder / ".lock", **options)
    return SoftFileLock(folder / ".softlock", **options)


@functools.cache  # it makes a file to find out
def has_locks(folder: Path) -> bool:
    """Whether files in a folder can be locked. filelock would wait for ever where they cannot."""
    if sys.platform == "win32":
        return True
    import fcntl

    with tempfile.TemporaryFile(dir=folder) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise
    return True


def describe_lock(lock: BaseFileLock) -> str:
    """What a person can do about a lock that another process holds."""
    if isinstance(lock, SoftFileLock):
        return (
            f"this file system has no locks, so {lock.lock_file} is one. If the run that made it "
            "is gone, delete that file"
        )
    return f"the lock is {lock.lock_file}"


class WaitingLock:
    """A lock that says what it waits for, when it has waited for so many `seconds`."""

    def __init__(self, lock: BaseFileLock, what: str, seconds: float = 10.0):
        self.lock, self.what, self.seconds = lock, what, seconds
        self.acquire = lock.acquire

    def __enter__(self) -> BaseFileLock:
        try:
            self.lock.acquire(timeout=self.seconds)
        except Timeout:
            print(f"Waiting for {self.what}: {describe_lock(self.lock)}.", flush=True)
            self.lock.acquire()
        return self.lock

    def __exit__(self, *exception):
        self.lock.release()
