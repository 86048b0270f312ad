"""The hash of a corpus: its bytes alone, and a file that has not changed is not opened again."""

import json
import os
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import sentences, write_jsonl

from engine.identity import MANIFEST, YOUNG, content_hash
from train_data import prepare_data

OPENED: list[Path] = []  # while a test looks: every file that this process opens
LOOKING = threading.Event()


def note_opened(event: str, arguments: tuple):
    """A hook cannot be removed: it does nothing but while a test looks."""
    if event == "open" and LOOKING.is_set() and isinstance(arguments[0], str | os.PathLike):
        OPENED.append(Path(arguments[0]))


sys.addaudithook(note_opened)


@contextmanager
def opened(folder: Path):
    """The names of the files of a folder that are opened within, in order."""
    OPENED.clear()
    names: list[str] = []
    LOOKING.set()
    try:
        yield names
    finally:
        LOOKING.clear()
        names += [path.name for path in OPENED if path.parent == folder]


def put(folder: Path, **contents: str) -> list[Path]:
    """Files of these names and contents."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.jsonl" for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_text(content)
    return paths


def grow_old(files: list[Path]):
    """Wait until the stamps of new files can be trusted."""
    youngest = max(file.stat().st_ctime for file in files)
    time.sleep(max(0, youngest + YOUNG + 0.1 - time.time()))


@pytest.fixture(scope="module")
def old_files(tmp_path_factory) -> list[Path]:
    files = put(tmp_path_factory.mktemp("old"), a="one", b="two", c="three")
    grow_old(files)
    return files


def test_the_hash_depends_on_the_bytes_of_each_file_and_on_nothing_else(tmp_path):
    cache = tmp_path / "cache"
    first = content_hash(put(tmp_path / "here", a="one", b="two"), cache)
    assert content_hash(put(tmp_path / "there", x="one", y="two"), cache) == first
    assert content_hash(put(tmp_path / "there", x="one", y="two"), tmp_path / "other") == first
    others = [
        put(tmp_path / "1", a="two", b="one"),
        put(tmp_path / "2", a="onet", b="wo"),
        put(tmp_path / "3", a="one", b="twO"),
        put(tmp_path / "4", a="one"),
        put(tmp_path / "5", a="one", b="two", c=""),
    ]
    assert len({first, *(content_hash(files, cache) for files in others)}) == 6


def test_a_file_that_has_not_changed_is_not_opened_again(tmp_path, old_files):
    folder, cache = old_files[0].parent, tmp_path / "cache"
    with opened(folder) as names:
        first = content_hash(old_files, cache)
    assert names == ["a.jsonl", "b.jsonl", "c.jsonl"]
    with opened(folder) as names:
        assert content_hash(old_files, cache) == first
        assert content_hash(old_files[:2], cache) != first
    assert names == []
    with opened(folder) as names:
        assert content_hash(old_files, cache, verify=True) == first
    assert names == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_a_young_file_is_read_again_because_its_stamp_may_stay_the_same(tmp_path):
    files, cache = put(tmp_path / "new", a="one"), tmp_path / "cache"
    before = content_hash(files, cache)
    if time.time() - files[0].stat().st_ctime > 1.9:
        pytest.skip("this machine was too slow: the file is not young any more")
    with opened(files[0].parent) as names:
        assert content_hash(files, cache) == before
    assert names == ["a.jsonl"]


def test_the_file_that_has_changed_is_opened_and_the_others_are_not(tmp_path):
    files, cache = put(tmp_path / "data", a="one", b="two", c="three"), tmp_path / "cache"
    grow_old(files)
    before = content_hash(files, cache)
    put(files[0].parent, b="two and more")
    with opened(files[0].parent) as names:
        assert content_hash(files, cache) != before
    assert names == ["b.jsonl"]
    # The same size and the same date: the time of the change itself cannot be set.
    status = files[2].stat()
    files[2].write_text("eerht")
    os.utime(files[2], ns=(status.st_atime_ns, status.st_mtime_ns))
    after = content_hash(put(tmp_path / "copy", a="one", b="two and more", c="eerht"), cache)
    with opened(files[0].parent) as names:
        assert content_hash(files, cache) == after
    assert "c.jsonl" in names and "a.jsonl" not in names


@pytest.mark.parametrize("spoilt", ['{"/a": [', "[]", "3", "\xff", "{}", ""])
def test_a_spoilt_memory_is_ignored_and_written_anew(tmp_path, old_files, spoilt):
    expected = content_hash(old_files, tmp_path / "other")
    (tmp_path / MANIFEST).write_text(spoilt, encoding="latin-1")
    assert content_hash(old_files, tmp_path) == expected
    known = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    assert set(known) == {str(path) for path in old_files}


def test_what_is_known_of_other_files_is_kept(tmp_path, old_files):
    content_hash(old_files[:1], tmp_path)
    content_hash(old_files[1:], tmp_path)
    with opened(old_files[0].parent) as names:
        content_hash(old_files, tmp_path)
    assert names == []


@pytest.mark.slow
def test_several_runs_may_write_the_memory_at_once(tmp_path, old_files):
    errors = []

    def run(number: int):
        try:
            for _ in range(20):
                content_hash(old_files[number % 3 :], tmp_path / "cache", verify=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(os.listdir(tmp_path / "cache")) == [".lock", MANIFEST]


# --- the rows of a corpus -----------------------------------------------------------------------


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_after_a_restart_no_file_of_the_corpus_is_opened(tmp_path):
    """Nothing but the cache folder tells a second run of the first."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    path = Path(write_jsonl(data / "a.jsonl", [{"text": text} for text in sentences(60)]))
    grow_old([path])
    settings = {"vocab_size": 300, "max_seq_len": 32, "cache_dir": cache, "num_proc": 1}
    with opened(data) as names:
        first, _ = prepare_data(None, str(data), **settings)
    assert set(names) == {"a.jsonl"}
    assert len(names) == 2, "hashed, and read once for the tokenizer and the rows"
    with opened(data) as names:
        second, _ = prepare_data(None, str(data), **settings)
    assert names == []
    assert second["train"].to_dict() == first["train"].to_dict()
    with opened(data) as names:
        prepare_data(None, str(data), verify_data=True, **settings)
    assert names == ["a.jsonl"]


def test_a_copied_or_renamed_corpus_finds_the_rows_of_the_first(tmp_path, tokenizer_folder):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    for number in range(3):
        records = [{"text": text} for text in sentences(30, seed=number)]
        write_jsonl(data / f"{number}.jsonl", records)
    prepare_data(tokenizer_folder, str(data), 32, cache_dir=cache)
    before = folders(cache)
    assert len(before) == 1
    shutil.copytree(data, tmp_path / "copy")
    (tmp_path / "copy" / "0.jsonl").rename(tmp_path / "copy" / "00.jsonl")
    prepare_data(tokenizer_folder, f"{tmp_path}/copy/*.jsonl", 32, cache_dir=cache)
    assert folders(cache) == before
    with open(tmp_path / "copy" / "2.jsonl", "a") as stream:
        stream.write('{"text": "one more"}\n')
    prepare_data(tokenizer_folder, str(tmp_path / "copy"), 32, cache_dir=cache)
    assert len(folders(cache)) == 2
