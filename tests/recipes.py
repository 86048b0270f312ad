"""What the tests of the preparation share: a small recipe, an index of arrays, made-up corpora."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.choice import Index
from corpus.documents import document_of
from corpus.readers import FORMATS

FILLER = "x" * 3000  # of a column that nobody reads: portions are full of it, and little is encoded


class TextRecipe:
    """Each text is a row. What stands before "?" is its question; a character is a token."""

    schema = pa.schema([("text", pa.string())])

    def parse(self, record) -> str:
        return document_of(record)

    def identity(self, text: str) -> str:
        return text

    def question(self, text: str) -> str:
        return text.partition("?")[0]

    def encode(self, texts: list[str], counts: Counter) -> list:
        counts["texts"] += len(texts)
        return texts

    def length(self, text: str) -> int:
        return len(text)

    def pack(self, texts: list[str], counts: Counter) -> pa.RecordBatch:
        return pa.record_batch({"text": pa.array(texts, pa.string())})


def index_of(identities, questions=None, sizes=None, datasets=None) -> Index:
    """The index of records with these columns; by default questions differ and sizes are 30."""
    count = len(identities)
    return Index(
        np.array(identities, dtype=np.uint64),
        np.array(identities if questions is None else questions, dtype=np.uint64),
        np.array([30] * count if sizes is None else sizes, dtype=np.uint32),
        np.array([0] * count if datasets is None else datasets, dtype=np.uint16),
        per_portion=[count],
        portion_bytes=[0],
        counts=Counter(),
        aside=Path(),
    )


def write_records(path: Path, records: list) -> Path:
    """A file of records in the format that its name says."""
    kind = path.suffixes[0]
    assert kind in FORMATS
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, compression="none")
        return path
    if kind == ".txt":
        text = "\n\n".join(records)
    elif kind == ".json":
        text = json.dumps(records, ensure_ascii=False, indent=1)
    else:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode(), 1) if path.suffix == ".gz" else text.encode())
    return path


def documents(count: int, choose: random.Random) -> list[dict]:
    """With duplicates, empty ones and some that are no text."""
    texts = [f"第{choose.randrange(count * 3 // 4)}篇，天地玄黄。" * 3 for _ in range(count)]
    texts[::50] = [""] * len(texts[::50])
    return [{"text": text if choose.random() > 0.01 else None} for text in texts]


def conversations(count: int, choose: random.Random) -> list[dict]:
    """Several answers of a question, duplicates, and some without an answer."""
    return [
        {
            "instruction": f"问{choose.randrange(count // 2)}",
            "response": "" if choose.random() < 0.02 else f"答{choose.randrange(3)}。",
        }
        for _ in range(count)
    ]


def preferences(count: int, choose: random.Random) -> list[dict]:
    """Several pairs of a question, duplicates, and some of equal answers."""
    return [
        {
            "instruction": f"问{choose.randrange(count // 2)}",
            "chosen": f"好{choose.randrange(3)}",
            "rejected": f"{choose.choice('好坏差')}{choose.randrange(2)}",
        }
        for _ in range(count)
    ]


def write_mixed(folder: Path, make, count: int = 1400, texts: bool = False) -> str:
    """A folder of records in all formats, about four megabytes in each but one of some more."""
    choose = random.Random(0)
    folder.mkdir()
    for name, size in {
        "1.jsonl": 2 * count,
        "2.json": count,
        "3.jsonl.gz": count,
        "4.parquet": count,
        "5.jsonl": count // 2,
    }.items():
        write_records(folder / name, [r | {"url": FILLER} for r in make(size, choose)])
    if texts:
        records = [record["text"] for record in make(count, choose) if record["text"]]
        write_records(folder / "6.txt", records)
    return str(folder)
