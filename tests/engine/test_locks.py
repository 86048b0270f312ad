"""Locks, also where the file system has none."""

import errno
import fcntl
import tempfile
import threading
import time

import pytest
from filelock import FileLock, SoftFileLock, Timeout
from tiny import write_corpus

from engine.locks import WaitingLock, describe_lock, has_locks, lock_in


@pytest.fixture
def no_locks(monkeypatch):
    """A file system as NFS without a lock service."""

    def flock(stream, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_file_system_with_locks_is_known(tmp_path):
    assert has_locks(tmp_path)
    lock = lock_in(tmp_path)
    assert isinstance(lock, FileLock)
    assert not isinstance(lock, SoftFileLock)
    assert describe_lock(lock) == f"the lock is {tmp_path / '.lock'}"


def test_without_locks_a_file_is_the_lock_and_its_limit_is_said(tmp_path, no_locks):
    lock = lock_in(tmp_path)
    with lock:
        assert (tmp_path / ".softlock").exists()
        with pytest.raises(Timeout):
            lock_in(tmp_path).acquire(timeout=0)
    assert not (tmp_path / ".softlock").exists()
    assert f"so {tmp_path / '.softlock'} is one. If the run that made it is gone, delete that" in (
        describe_lock(lock)
    )


def test_a_folder_is_tried_once(tmp_path, monkeypatch):
    lock_in(tmp_path)
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    lock_in(tmp_path)


def test_another_error_of_the_file_system_stays_what_it_is(tmp_path, monkeypatch):
    def flock(stream, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        has_locks(tmp_path)


@pytest.mark.slow
def test_who_waits_says_what_for(tmp_path, capsys):
    held = FileLock(tmp_path / ".lock")
    held.acquire()
    taken = []

    def wait():
        with WaitingLock(lock_in(tmp_path), "another run", seconds=1):
            taken.append(True)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(2)
    assert taken == []
    held.release()
    waiting.join()
    assert taken == [True]
    assert capsys.readouterr().out == (
        f"Waiting for another run: the lock is {tmp_path / '.lock'}.\n"
    )


NO_LOCKS = """
import errno, fcntl
def flock(fd, operation):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


@pytest.mark.slow
def test_data_are_prepared_on_a_file_system_without_locks(tmp_path, run_python):
    data = [None, write_corpus(tmp_path, 100), 64, 300]
    code = "from train_data import prepare_data\n"
    code += f"prepare_data(*{data!r}, cache_dir={str(tmp_path / 'c')!r})"
    done = run_python(NO_LOCKS + code)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "c").rglob(".softlock"))
