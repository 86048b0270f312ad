"""A corpus without usable text. What is estimated of others: tests/commands/test_plan.py."""

import pytest
from recipes import write_records

from corpus.estimate import estimate, first_megabyte
from corpus.preparation import Corpus
from train_data import DocumentRecipe


def test_a_megabyte_without_text_is_an_error(tmp_path, tokenizer):
    path = write_records(tmp_path / "a.jsonl", [{"text": " "}] * 3)
    corpus = Corpus([([path], None)])
    recipe = DocumentRecipe(None, tokenizer, 32)
    with pytest.raises(ValueError, match=r"a\.jsonl: its first megabyte has nothing to train on"):
        estimate(corpus, first_megabyte(corpus), recipe)
