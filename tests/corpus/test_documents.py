import random
from collections import Counter

import pytest
from tiny import write_jsonl

from corpus.documents import SeenHashes, iter_documents


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_a_hash_is_new_once_wherever_it_is_kept(limit):
    choose, seen, expected = random.Random(0), SeenHashes(limit), set()
    for _ in range(3000):
        digest = choose.randrange(2**64 - 500, 2**64)  # where floats would already be equal
        assert seen.add(digest) == (digest not in expected)
        expected.add(digest)
    assert len(seen.sorted) + len(seen.newest) == len(expected)


def test_every_document_comes_once_and_in_order(tmp_path):
    texts = ["天地", "玄黄", "天地", " ", "宇宙", "玄黄"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    counts = Counter()
    assert list(iter_documents(path, counts)) == ["天地", "玄黄", "宇宙"]
    assert counts == {"read": 6, "dropped: duplicate": 2, "dropped: empty": 1}
