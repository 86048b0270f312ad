"""Folders that are whole or absent, and names that change with what they stand for."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import Timeout

from engine.disk import ScratchFolder, atomic_folder, cache_lock, settings_hash


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_settings_hash_tells_settings_apart_and_ignores_the_order_of_keys():
    assert settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1})
    assert len({settings_hash(1, 2), settings_hash(2, 1), settings_hash("1", 2)}) == 3


def test_an_atomic_folder_is_whole_after_success(tmp_path):
    target = tmp_path / "new" / "target"
    with atomic_folder(target) as temporary:
        put(temporary, "a", b"1")
        put(temporary, "deep/b", b"2")
        assert not target.exists()
    assert (target / "a").read_bytes() == b"1"
    assert (target / "deep" / "b").read_bytes() == b"2"
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_atomic_folder_is_absent_after_an_exception_inside(tmp_path, error):
    def fail_inside():
        with atomic_folder(tmp_path / "target") as temporary:
            put(temporary, "half", b"1")
            raise error

    with pytest.raises(error):
        fail_inside()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path):
    put(tmp_path, "target.tmp/half", b"1")
    with atomic_folder(tmp_path / "target") as temporary:
        put(temporary, "whole", b"2")
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(tmp_path / "target") == ["whole"]


def test_the_lock_of_a_cache_is_held_by_one_at_a_time(tmp_path):
    with cache_lock(tmp_path / "cache"), pytest.raises(Timeout):
        cache_lock(tmp_path / "cache").acquire(timeout=0)
    with cache_lock(tmp_path / "cache") as lock:
        assert lock.is_locked


def test_scratch_folders_are_made_and_cleared_by_several_at_once(tmp_path):
    def use(rounds: int):
        for _ in range(rounds):
            with cache_lock(tmp_path):
                ScratchFolder.clear_left(tmp_path, "scratch")
                scratch = ScratchFolder(tmp_path, "scratch")
            for name in "abcdefgh":
                put(scratch.path, name, b"1")
            assert len(list(scratch.path.glob("?"))) == 8, "what is in use stays"
            scratch.clear()

    with ThreadPoolExecutor() as pool:
        commands = [pool.submit(use, 200) for _ in range(3)]
    assert [command.exception() for command in commands] == [None] * 3
    assert os.listdir(tmp_path) == [".lock"]
