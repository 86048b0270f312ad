"""What a corpus comes to by its first megabyte. More of it: tests/commands/test_plan.py."""

import gzip

import pytest
from recipes import write_records
from tiny import sentences

from corpus.estimate import estimate, first_megabyte
from corpus.preparation import Corpus
from train_data import DocumentRecipe


def test_a_megabyte_without_text_is_an_error(tmp_path, tokenizer):
    path = write_records(tmp_path / "a.jsonl", [{"text": " "}] * 3)
    corpus = Corpus([([path], None)])
    recipe = DocumentRecipe(None, tokenizer, 32)
    with pytest.raises(ValueError, match=r"a\.jsonl: its first megabyte has nothing to train on"):
        estimate(corpus, first_megabyte(corpus), recipe)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
def test_a_limit_counts_bytes_of_text_however_the_file_is_stored(tmp_path, tokenizer, compressed):
    text = "".join(sentences(20))
    path = write_records(tmp_path / "a.jsonl", [{"text": f"{n}{text}"} for n in range(3000)])
    size = path.stat().st_size
    if compressed:
        content, path = path.read_bytes(), path.with_suffix(".jsonl.gz")
        path.write_bytes(gzip.compress(content))
    recipe = DocumentRecipe(None, tokenizer, 32)
    tokens = {}
    for limit in (None, size * 2 // 3, size * 9):
        corpus = Corpus([([path], None)])
        tokens[limit] = estimate(corpus, first_megabyte(corpus), recipe, limit).tokens
    assert tokens[size * 2 // 3] == pytest.approx(tokens[None] * 2 / 3, rel=0.05)
    assert tokens[size * 9] == tokens[None]
