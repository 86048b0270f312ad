"""Folders as people have them: cards, hidden files, splits, what save_to_disk writes."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from corpus.readers import PORTION, find_files, iter_portions, iter_records

RECORDS = [{"text": f"第{n}条：天地玄黄"} for n in range(7)]
LINE = '{"text": "一"}\n'


def put(folder: Path, **files: str):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_files(str(folder))]


def records(folder: Path) -> list:
    return [record for path in find_files(str(folder)) for _, record in iter_records(path)]


def test_notes_hidden_files_and_what_a_mac_adds_are_left_out_and_named_once(tmp_path, capsys):
    put(tmp_path, **{"a.jsonl": LINE, "README.txt": "card", ".cache/b.jsonl": "half"})
    put(tmp_path, **{"._a.jsonl": "\0", "__MACOSX/._a.jsonl": "\0", "logo.png": ""})
    for _ in range(2):
        assert names(tmp_path) == ["a.jsonl"]
    printed = capsys.readouterr().out
    assert printed.count("left out as no data, or of no known format") == 1
    for name in ("README.txt", "._a.jsonl", "and 1 more"):
        assert name in printed


def test_a_description_by_llama_factory_and_an_empty_part_are_left_out_and_named(tmp_path, capsys):
    put(tmp_path, **{"a.jsonl": LINE, "part-0.jsonl": "", "config.json": "{}"})
    put(tmp_path, **{"dataset_info.json": '{"a": {"file_name": "a.jsonl"}}'})
    assert names(tmp_path) == ["a.jsonl"]
    assert "config.json, dataset_info.json, part-0.jsonl." in capsys.readouterr().out
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"a\.jsonl: the file is empty"):
        find_files(str(tmp_path))


def test_a_folder_of_nothing_but_tables_names_the_command_that_converts_one(tmp_path):
    put(tmp_path, **{"a.csv": "text\n天地\n", "b.png": ""})
    with pytest.raises(ValueError, match=r"no \.jsonl, .* file there .*read_csv\('a\.csv'"):
        find_files(str(tmp_path))


def test_a_pattern_leaves_notes_out_too_unless_it_names_nothing_else(tmp_path):
    put(tmp_path, **{"a.jsonl": LINE, "README.md": "card"})
    assert [path.name for path in find_files(f"{tmp_path}/*")] == ["a.jsonl"]
    put(tmp_path, **{"notes/README.txt": "text"})
    assert [path.name for path in find_files(f"{tmp_path}/notes/*.txt")] == ["README.txt"]


@pytest.mark.parametrize(
    "others", [["test.jsonl", "dev.jsonl"], ["data/test-00000-of-00001.jsonl"], ["eval/b.jsonl"]]
)
def test_of_a_folder_with_a_train_split_the_others_are_left_out_and_named(tmp_path, capsys, others):
    put(tmp_path, **{"train.jsonl": LINE, "more.jsonl": LINE})
    put(tmp_path, **dict.fromkeys(others, '{"question": "no answer"}\n'))
    assert names(tmp_path) == ["more.jsonl", "train.jsonl"]
    printed = capsys.readouterr().out
    assert "the split train is read; left out are 1 of " in printed
    assert all(name in printed for name in others)
    assert len(find_files(str(tmp_path), every_split=True)) == 2 + len(others)


def test_without_a_train_split_every_file_is_read(tmp_path):
    put(tmp_path, **{"test.jsonl": LINE, "validation.jsonl": LINE})
    assert names(tmp_path) == ["test.jsonl", "validation.jsonl"]


def test_what_save_to_disk_wrote_is_read_and_its_descriptions_are_left_out(tmp_path, capsys):
    whole = datasets.Dataset.from_list(RECORDS)
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    put(tmp_path / "one", **{"cache-0123.arrow": "what an earlier map() left"})
    assert records(tmp_path / "one") == RECORDS
    printed = capsys.readouterr().out
    for name in ("state.json", "dataset_info.json", "cache-0123.arrow"):
        assert name in printed
    splits = {"train": whole.select(range(4)), "test": whole.select(range(4, 7))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert records(tmp_path / "two") == RECORDS[:4]


def test_records_in_a_file_of_such_a_name_are_data(tmp_path):
    put(tmp_path, **{"state.json": json.dumps(RECORDS, ensure_ascii=False)})
    assert records(tmp_path) == RECORDS


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
def test_arrow_comes_portion_by_portion_however_large_its_batches_are(tmp_path, new):
    path = tmp_path / "a.arrow"
    rows = [{"text": f"{n} " + "x" * 40_000} for n in range(500)]
    table = pa.Table.from_pylist(rows)
    with new(str(path), table.schema) as stream:
        stream.write_batch(table.to_batches()[0])
    portions = list(iter_portions(path))
    assert len(portions) >= 4
    assert max(portion.size for portion in portions) < 1.3 * PORTION
    assert [record for portion in portions for _, record in portion.records()] == rows
    assert [line for portion in portions for line, _ in portion.records()] == [*range(1, 501)]
    positions = [portion.position for portion in portions]
    assert positions == sorted(positions)
    assert positions[-1] <= path.stat().st_size


def test_what_is_no_arrow_is_named(tmp_path):
    (tmp_path / "a.arrow").write_bytes(b"no arrow at all")
    with pytest.raises(ValueError, match=r"a\.arrow: not a readable Arrow file"):
        list(iter_records(tmp_path / "a.arrow"))
