"""The two passes: the same bytes from any number of processes, and what becomes of a record."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from recipes import (
    TextRecipe,
    conversations,
    documents,
    preferences,
    write_mixed,
    write_records,
)

from corpus.cache import Data, Options
from corpus.choice import TRAIN
from corpus.preparation import Corpus, read_index, write_rows
from corpus.readers import PORTION
from dpo_data import PairRecipe, prepare_dpo_data
from sft_data import ConversationRecipe, prepare_sft_data
from train_data import DocumentRecipe, prepare_data

FILES = ("train.arrow", "validation.arrow", "statistics.json")


def text_corpus(folder: Path, **texts: list) -> Path:
    """A folder with a .jsonl file of each name."""
    folder.mkdir(exist_ok=True)
    for name, lines in texts.items():
        write_records(folder / f"{name}.jsonl", [{"text": text} for text in lines])
    return folder


def read_texts(dataset, **options) -> list[str]:
    """The texts that are read of a dataset, in order."""
    recipe, data = TextRecipe(), Data(str(dataset), Options(**options))
    return [text for task in data.corpus.tasks() for _, text in _parsed(recipe, task.portion)]


def _parsed(recipe: TextRecipe, portion):
    return [(line, recipe.parse(record)) for line, record in portion.records()]


# --- the same bytes -----------------------------------------------------------------------------

STAGES = {
    "pretrain": (documents, lambda tokenizer, path, **o: prepare_data(tokenizer, path, 64, **o)),
    "sft": (conversations, lambda tokenizer, path, **o: prepare_sft_data(tokenizer, path, 64, **o)),
    "dpo": (preferences, lambda tokenizer, path, **o: prepare_dpo_data(tokenizer, path, 64, **o)),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_any_number_of_processes_gives_the_same_bytes(tmp_path, tokenizer, tokenizer_folder, stage):
    make, prepare = STAGES[stage]
    data = write_mixed(tmp_path / "data", make, texts=stage == "pretrain")
    given = tokenizer_folder if stage == "pretrain" else tokenizer
    found = []
    for num_proc in (1, 2, 3):
        cache = tmp_path / str(num_proc)
        prepare(given, data, cache_dir=cache, num_proc=num_proc, validation_tokens=3000)
        (folder,) = cache.glob(f"{stage}-*")
        found.append([(folder / name).read_bytes() for name in FILES])
    assert sum(path.stat().st_size for path in Path(data).iterdir()) > 3 * PORTION
    assert found[0] == found[1] == found[2]
    counts = json.loads(found[0][2])
    assert counts["read"] > 5000
    assert counts["dropped: duplicate"] > 100
    assert counts["held out, not used"] >= 0
    assert all(len(part) > 1000 for part in found[0][:2])


@pytest.mark.slow
def test_any_number_of_processes_trains_the_same_tokenizer(tmp_path):
    data = write_mixed(tmp_path / "data", documents, texts=True)
    found = []
    for num_proc in (1, 3):
        settings = {"vocab_size": 300, "tokenizer_megabytes": 0.05, "num_proc": num_proc}
        prepare_data(None, data, 64, cache_dir=tmp_path / str(num_proc), **settings)
        (folder,) = (tmp_path / str(num_proc)).glob("tokenizer-*")
        found.append((folder / "tokenizer.json").read_bytes())
    assert found[0] == found[1]


# --- how much is read ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 499, 500, 501, 999, 1000])
def test_reading_ends_at_the_record_with_which_the_bytes_are_reached(tmp_path, count):
    texts = [f"{number:04d}" for number in range(1000)]
    folder = text_corpus(tmp_path / "data", a=texts[:500], b=texts[500:])
    size = len('{"text": "0000"}\n')
    for limit in ((count - 1) * size + 1, count * size):
        assert read_texts(folder, max_dataset_bytes=limit) == texts[:count]
    assert read_texts(folder, max_dataset_bytes=10**12) == texts
    assert read_texts(folder, max_dataset_bytes=2e9) == texts
    assert read_texts(folder) == texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_the_bytes_are_counted_across_the_blocks_of_a_file(tmp_path, name):
    texts = [f"{number:06d}{'x' * 20_000}" for number in range(500)]
    records = texts if name == "a.txt" else [{"text": text} for text in texts]
    path = write_records(tmp_path / name, records)
    for limit in (PORTION // 2, PORTION + 500_000, 2 * PORTION + 500_000):
        found = read_texts(path, max_dataset_bytes=limit)
        assert found == texts[: len(found)]
        slack = 256 * 20_100 if name == "a.parquet" else 20_100  # a table is read in batches
        assert limit <= sum(len(text) + 60 for text in found) <= limit + slack + 60 * 500


def test_each_dataset_has_the_limit_for_itself(tmp_path):
    parts = {name: [f"{name}{number:03d}" for number in range(100)] for name in "ab"}
    folder = text_corpus(tmp_path / "data", **parts)
    size = len('{"text": "a000"}\n')
    names = [str(folder / f"{name}.jsonl") for name in "ab"]
    data = Data(names, Options(cache_dir=tmp_path, max_dataset_bytes=10 * size))
    assert read_index(data.corpus, TextRecipe(), tmp_path).datasets.tolist() == [0] * 10 + [1] * 10
    assert data.size == 20 * size


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz"])
def test_nothing_behind_the_limit_is_looked_at(tmp_path, name, num_proc):
    texts = [f"{number:06d}" for number in range(300)]
    records = texts if name == "a.txt" else [{"text": text} for text in texts]
    path = write_records(tmp_path / name, records)
    broken = b'\xff\n{"text": \n'
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + broken)[:-9])
    else:
        path.write_bytes(path.read_bytes().removesuffix(b"\n]") + b"\n" + broken)
    options = {"cache_dir": tmp_path, "num_proc": num_proc}
    with pytest.raises(ValueError, match=f"{name}:\\d+: (not UTF-8|the archive)"):
        read_index(Data(str(path), Options(**options)).corpus, TextRecipe(), tmp_path)
    data = Data(str(path), Options(max_dataset_bytes=1500, **options))
    assert 50 < read_index(data.corpus, TextRecipe(), tmp_path).counts["read"] < 300


# --- errors -------------------------------------------------------------------------------------


def filled(text: str, **more) -> dict:
    return {"text": text, "url": "x" * 3000, **more}


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_first_broken_record_in_the_order_of_the_files_is_the_error(tmp_path, num_proc):
    """A process finds the second one sooner: before the first stands a portion of slow records."""
    folder = tmp_path / "data"
    folder.mkdir()
    slow = [{"text": f"{number}", "list": [[]] * 900} for number in range(1200)]
    fast = [filled(f"{number}") for number in range(2000)]
    write_records(folder / "a.jsonl", [*slow, {"body": "first"}, *fast])
    write_records(folder / "b.jsonl", [{"body": "second"}, *fast])
    with open(folder / "c.jsonl", "w") as stream:
        stream.write("{third\n")
    write_records(folder / "d.jsonl.gz", fast[:10])
    (folder / "d.jsonl.gz").write_bytes(b"no archive")
    for name, line in (("a", 1201), ("b", 1), ("c", 1), ("d", 1)):
        corpus = Corpus([(sorted(folder.iterdir()), None)], num_proc=num_proc)
        with pytest.raises(ValueError, match=rf"{name}\.jsonl[.gz]*:{line}: "):
            read_index(corpus, TextRecipe(), tmp_path)
        next(folder.glob(f"{name}.*")).unlink()
        write_records(folder / f"{name}.jsonl", fast)


def rewrite(path: Path, change):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: [*lines, '{"text": "new"}\n'],
        lambda lines: lines[::-1],
        lambda lines: [],
        lambda lines: lines * 20,
    ],
    ids=["a line less", "a line more", "another order", "empty", "more portions"],
)
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, change):
    folder = text_corpus(tmp_path / "data", a=list("abc"), b=[f"{n}" * 99 for n in range(900)])
    tasks = Corpus([(sorted(folder.iterdir()), None)]).tasks()
    assert next(tasks).portion.path.name == "a.jsonl"
    rewrite(folder / "b.jsonl", change)
    with pytest.raises(ValueError, match=r"b\.jsonl: the file was changed while it was read"):
        list(tasks)


def test_what_was_read_once_is_not_read_again(tmp_path):
    folder = text_corpus(tmp_path / "data", a=list("abc"), b=[f"{n}" * 99 for n in range(900)])
    with Data(str(folder), Options(cache_dir=tmp_path)) as data:
        index, choice = data.index(TextRecipe()), data.choice(TextRecipe())
        write_rows(tmp_path, data.corpus, TextRecipe(), index, choice, 100)
        before = [(tmp_path / name).read_bytes() for name in FILES[:2]]
        rewrite(folder / "b.jsonl", lambda lines: [])
        write_rows(tmp_path, data.corpus, TextRecipe(), index, choice, 100)
    assert [(tmp_path / name).read_bytes() for name in FILES[:2]] == before
    assert not list(tmp_path.glob("reading-*"))


def test_what_a_killed_command_laid_aside_goes_with_the_next_one(tmp_path):
    folder = text_corpus(tmp_path / "data", a=list("abc"))
    left = tmp_path / "reading-killed"
    left.mkdir()
    (left / ".lock").touch()
    (left / "0").write_bytes(b"items")
    with Data(str(folder), Options(cache_dir=tmp_path)) as data:
        assert not left.exists(), "also where the rows are there and nothing is read"
        data.index(TextRecipe())
        with Data(str(folder), Options(cache_dir=tmp_path)) as other:
            other.index(TextRecipe())
            assert len(list(tmp_path.glob("reading-*"))) == 2, "what is in use stays"
        assert list(tmp_path.glob("reading-*/0"))
    assert not list(tmp_path.glob("reading-*")), "nor does anything stay after the end"
    write_records(folder / "b.jsonl", [3])
    with pytest.raises(ValueError, match=r"b.jsonl:1"):
        prepare_data(None, str(folder), 64, 300, cache_dir=tmp_path)
    assert not list(tmp_path.glob("reading-*")), "nor after an error"


# --- memory -------------------------------------------------------------------------------------

RECORDS = {
    "pretrain": lambda n: {"text": f"{n} " + "words " * 115},
    "sft": lambda n: {"instruction": f"{n} " + "words " * 55, "response": "answer " * 50},
    "dpo": lambda n: (
        {"instruction": f"{n} " + "words " * 40, "chosen": "good " * 45} | {"rejected": "bad " * 55}
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", RECORDS)
def test_the_first_reading_keeps_some_bytes_of_a_record_and_not_its_text(
    tmp_path, tokenizer, stage
):
    recipe = {
        "pretrain": lambda: DocumentRecipe(None),
        "sft": lambda: ConversationRecipe(tokenizer, 64, 0),
        "dpo": lambda: PairRecipe(tokenizer, 64, 0),
    }[stage]()
    few, many = 12_000, 36_000  # three portions and seven
    peaks = {}
    for count in (few, many):
        path = tmp_path / f"{count}.jsonl"
        write_records(path, list(map(RECORDS[stage], range(count))))
        assert path.stat().st_size > count * 690 > 2 * PORTION
        corpus = Corpus([([path], None)], num_proc=1)
        tracemalloc.start()
        try:
            index = read_index(corpus, recipe, tmp_path)
            peaks[count] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(index.identities) == count
        assert len(index.per_portion) == path.stat().st_size // PORTION + 1
    assert (peaks[many] - peaks[few]) / (many - few) < 64


def test_a_corpus_without_a_usable_record_has_an_empty_index(tmp_path):
    folder = text_corpus(tmp_path / "data", a=["", " "])
    data = Data(str(folder), Options(cache_dir=tmp_path))
    index = data.index(TextRecipe())
    assert index.counts == {"read": 2, "dropped: empty": 2}
    assert len(data.choice(TextRecipe())) == 0
    counts = write_rows(
        tmp_path, data.corpus, TextRecipe(), index, data.choice(TextRecipe()), tokens=10
    )
    assert counts["texts"] == 0
    assert TRAIN not in data.choice(TextRecipe())
