"""What becomes of each record: held out, a share of a mixture, the tokenizer's share."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import TextRecipe, index_of, write_records
from tiny import sentences

from corpus.cache import Data, Options
from corpus.choice import (
    BYTES_PER_TOKEN,
    LEAVE_OUT,
    TRAIN,
    VALIDATION,
    choose,
    choose_for_tokenizer,
    question_hash,
    validation_limit,
)
from train_data import prepare_data

EVERYTHING = 10**9  # tokens: more than there are
TOP = 2**64 - 1


def hashes_of(count: int, seed: int = 0) -> list[int]:
    choose_one = random.Random(seed)
    return [choose_one.randrange(2**64) for _ in range(count)]


def chosen(index, what: int, ratio: float = 0.05, tokens: int = EVERYTHING) -> set[int]:
    """The questions of the records that become training or validation."""
    return set(index.questions[choose(index, [None], ratio, tokens) == what].tolist())


# --- what is held out ---------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.5])
def test_about_the_ratio_of_all_questions_is_held_out_and_those_of_the_smallest_hashes(ratio):
    index = index_of(hashes_of(20_000))
    held_out, training = (chosen(index, what, ratio=ratio) for what in (VALIDATION, TRAIN))
    assert len(held_out) == pytest.approx(20_000 * ratio, rel=0.2)
    assert max(held_out) < ratio * 2**64 <= min(training)
    assert len(held_out) + len(training) == 20_000


@pytest.mark.parametrize("tokens", [1, 10, 100, 1000])
def test_at_most_the_bytes_of_so_many_tokens_are_held_out(tokens):
    sizes = [random.Random(number).randrange(1, 90) for number in range(20_000)]
    index = index_of(hashes_of(20_000), sizes=sizes)
    choice = choose(index, [None], 0.05, tokens)
    held_out = index.sizes[choice == VALIDATION]
    room = tokens * BYTES_PER_TOKEN
    assert len(held_out) >= 1
    assert held_out.sum() <= room or len(held_out) == 1
    assert held_out.sum() > room - 90
    assert index.questions[choice == VALIDATION].max() < index.questions[choice == TRAIN].min()


@given(st.data())
@settings(max_examples=60)
def test_what_was_trained_on_is_never_held_out_when_text_is_added(data):
    """In any order, with duplicates, several answers, and several datasets that are taken whole."""
    records = st.tuples(st.integers(0, 30), st.integers(0, 2), st.integers(0, 1))
    tokens = data.draw(st.sampled_from([1, 5, 30, 10**6]))
    ratio = data.draw(st.sampled_from([0.05, 0.3, 0.9]))
    corpus = [(-1, 0, 0)]  # one is never below the ratio
    trained: set[int] = set()
    for _ in range(data.draw(st.integers(1, 5))):
        more = data.draw(st.lists(records, max_size=8))
        place = data.draw(st.integers(0, len(corpus)))
        corpus = [*corpus[:place], *more, *corpus[place:]]
        questions = [TOP if q < 0 else question_hash(str(q)) for q, _, _ in corpus]
        identities = [question_hash(f"{q} {a}") for q, a, _ in corpus]
        sizes = [1 + identity % 40 for identity in identities]
        index = index_of(identities, questions, sizes, [dataset for _, _, dataset in corpus])
        choice = choose(index, [None, None], ratio, tokens)
        held_out = set(index.questions[choice == VALIDATION].tolist())
        now = set(index.questions[choice == TRAIN].tolist())
        assert not now & held_out, "the answers of a question are on one side"
        assert not trained & held_out
        trained |= now
        assert held_out or len(now) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_growing_corpus_holds_out_a_part_of_what_it_held_out_before_and_of_what_is_new(seed):
    hashes = hashes_of(30_000, seed)
    sizes = [random.Random(number).randrange(1, 900) for number in range(30_000)]
    trained: set[int] = set()
    before: set[int] = set()
    for count in (20, 200, 201, 5_000, 30_000):
        index = index_of(hashes[:count], sizes=sizes[:count])
        held_out = chosen(index, VALIDATION, tokens=5_000)
        assert not held_out & trained
        assert held_out <= before | set(hashes[len(trained) :])
        trained |= chosen(index, TRAIN, tokens=5_000)
        before |= held_out


def test_answers_of_one_question_are_held_out_together_or_not_at_all():
    questions = [5, 5, 5, 9, 9, 9, TOP]
    index = index_of(range(7), questions, sizes=[30] * 7)
    for tokens, expected in ((10, {5}), (29, {5}), (30, {5}), (59, {5}), (60, {5, 9})):
        choice = choose(index, [None], 0.5, tokens)
        assert set(index.questions[choice == VALIDATION].tolist()) == expected
        assert (choice == VALIDATION).sum() == 3 * len(expected)
    assert (choose(index, [None], 0.5, 60)[[6]] == TRAIN).all()


@pytest.mark.parametrize("ratio", [1e-9, 1 - 1e-9])
def test_where_one_side_would_be_empty_the_question_of_the_smallest_hash_is_held_out(ratio):
    index = index_of(range(5), [2**63 + 2, 2**63, 2**63 + 1, 2**63, 2**63 + 2])
    assert choose(index, [None], ratio, EVERYTHING).tolist() == [1, 2, 1, 2, 1]
    assert validation_limit(index, index.is_first, ratio, EVERYTHING) == 2**63 + 1


def test_of_one_question_nothing_is_held_out():
    index = index_of([1, 2, 3], [7, 7, 7])
    for ratio in (1e-9, 0.5, 1 - 1e-9):
        assert choose(index, [None], ratio, EVERYTHING).tolist() == [TRAIN] * 3
    assert choose(index_of([]), [None], 0.5, 10).tolist() == []


def test_a_duplicate_is_left_out_wherever_it_comes_again():
    index = index_of([4, 5, 4, TOP, 5, TOP], datasets=[0, 0, 1, 1, 1, 2])
    choice = choose(index, [None] * 3, 0.5, EVERYTHING)
    assert choice.tolist() == [VALIDATION, VALIDATION, LEAVE_OUT, TRAIN, LEAVE_OUT, LEAVE_OUT]
    assert index.counts == {"dropped: duplicate": 3}


# --- mixtures -----------------------------------------------------------------------------------


def shares_of(index, choice, count: int) -> list[float]:
    """The share of each dataset in the text that is used."""
    used = choice != LEAVE_OUT
    sizes = np.bincount(index.datasets[used], index.sizes[used], minlength=count)
    return (sizes / sizes.sum()).tolist()


@pytest.mark.parametrize(
    ("weights", "counts", "whole"),
    [
        ([0.7, 0.3], [10_000, 10_000], 0),
        ([0.3, 0.7], [10_000, 10_000], 1),
        ([0.7, 0.3], [20_000, 2_000], 1),
        ([7, 3], [20_000, 2_000], 1),
        ([1, 1, 2], [4_000, 9_000, 20_000], 0),
        ([0.5], [1_000], 0),
    ],
)
def test_each_dataset_has_its_share_of_the_text_and_the_shortest_is_used_whole(
    weights, counts, whole
):
    datasets = [number for number, count in enumerate(counts) for _ in range(count)]
    sizes = [random.Random(n).randrange(10, 50) * (1 + d) for n, d in enumerate(datasets)]
    index = index_of(hashes_of(len(datasets)), sizes=sizes, datasets=datasets)
    choice = choose(index, weights, 0.05, EVERYTHING)
    expected = (np.array(weights) / sum(weights)).tolist()
    assert shares_of(index, choice, len(counts)) == pytest.approx(expected, abs=0.015)
    used = Counter(index.datasets[choice != LEAVE_OUT].tolist())
    assert used[whole] == counts[whole]
    assert all(used[number] < counts[number] for number in range(len(counts)) if number != whole)
    assert 0 < (choice == VALIDATION).sum() < 0.07 * (choice == TRAIN).sum()


def test_duplicates_count_once_in_a_mixture():
    hashes = hashes_of(10_000)
    index = index_of(hashes + hashes[:5_000], datasets=[0] * 10_000 + [1] * 5_000)
    assert (choose(index, [None, None], 0.05, EVERYTHING) != LEAVE_OUT).sum() == 10_000
    more = hashes_of(5_000, seed=1)
    index = index_of(hashes + hashes[:5_000] + more, datasets=[0] * 10_000 + [1] * 10_000)
    choice = choose(index, [0.5, 0.5], 0.05, EVERYTHING)
    assert shares_of(index, choice, 2) == pytest.approx([0.5, 0.5], abs=0.02)
    assert (choice[15_000:] != LEAVE_OUT).all()


def test_a_mixture_that_uses_little_has_something_held_out_too():
    """Of the many texts of the second only a few are used, and none of those below the limit."""
    for seed in range(20):
        hashes = hashes_of(1_003, seed)
        index = index_of(hashes, sizes=[30] * 1_003, datasets=[0] * 3 + [1] * 1_000)
        choice = choose(index, [0.5, 0.5], 0.05, 10)
        assert (choice == VALIDATION).any() and (choice == TRAIN).any()
        below = index.questions[choice == VALIDATION].max()
        assert below < index.questions[choice == TRAIN].min()


def write_numbers(folder, name: str, count: int, start: int = 0) -> str:
    texts = [f"{number:07d}" for number in range(start, start + count)]
    return str(write_records(folder / f"{name}.jsonl", [{"text": text} for text in texts]))


def test_datasets_of_a_list_are_taken_whole_and_those_of_a_dict_in_their_shares(
    tmp_path, tokenizer_folder
):
    a, b = write_numbers(tmp_path, "a", 1000), write_numbers(tmp_path, "b", 1000, start=900)

    def texts(dataset):
        splits, tokenizer = prepare_data(tokenizer_folder, dataset, 64, cache_dir=tmp_path)
        rows = [row for split in splits.values() for row in split["input_ids"]]
        shown = "".join(map(tokenizer.decode, rows)).split(tokenizer.eos_token)
        return Counter(int(text) for text in shown if text)

    assert texts([a, b]) == dict.fromkeys(range(1900), 1)
    assert texts({a: 1}) == texts(a) == dict.fromkeys(range(1000), 1)
    mixed = texts({a: 0.7, b: 0.3})
    assert set(mixed.values()) == {1}
    assert set(range(1000)) <= set(mixed), "the shorter for its share is used whole"
    assert len(mixed) == pytest.approx(1000 / 0.7, rel=0.05)
    # Those that are in both count for the first: 900 are left of the shorter one.
    assert texts({b: 0.3, a: 0.7}).total() == pytest.approx(900 / 0.7, rel=0.05)


def test_a_dataset_of_a_mixture_that_has_nothing_usable_is_named(tmp_path):
    full = write_records(tmp_path / "a.jsonl", [{"text": text} for text in sentences(9)])
    empty = write_records(tmp_path / "b.jsonl", [{"text": " "}])
    data = Data({str(full): 0.5, str(empty): 0.5}, Options(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"b\.jsonl: it has nothing usable") as caught:
        data.choice(TextRecipe())
    assert "a.jsonl" not in str(caught.value)


# --- the tokenizer's share ----------------------------------------------------------------------


def test_a_tokenizer_gets_at_most_so_many_bytes_of_training_text_chosen_by_hash():
    hashes = hashes_of(5_000)
    sizes = [random.Random(number).randrange(1, 2_000) for number in range(5_000)]
    index = index_of(hashes, sizes=sizes)
    choice = choose(index, [None], 0.2, EVERYTHING)
    for megabytes in (0.01, 0.5, 2.0):
        share = choose_for_tokenizer(index, choice, megabytes)
        assert set(choice[share > 0].tolist()) == {TRAIN}
        size = index.sizes[share > 0].sum()
        assert megabytes * 1e6 - 2_000 < size <= megabytes * 1e6
    assert (choose_for_tokenizer(index, choice, 1e6) > 0).tolist() == (choice == TRAIN).tolist()
    # In another order the same texts are chosen.
    order = np.random.default_rng(0).permutation(5_000)
    other = index_of(np.array(hashes, dtype=np.uint64)[order], sizes=np.array(sizes)[order])
    again = choose_for_tokenizer(other, choice[order], 0.5)
    expected = choose_for_tokenizer(index, choice, 0.5)
    assert set(other.questions[again > 0]) == set(index.questions[expected > 0])


def test_a_tokenizer_gets_one_document_at_least():
    index = index_of([5, TOP - 1, TOP], sizes=[10, 3_000_000, 3_000_000])
    choice = choose(index, [None], 0.5, EVERYTHING)
    assert choice.tolist() == [VALIDATION, TRAIN, TRAIN]
    assert (choose_for_tokenizer(index, choice, 1e-6) > 0).sum() == 1
    assert choose_for_tokenizer(index_of([]), np.empty(0, np.uint8), 10).tolist() == []


# --- end to end ---------------------------------------------------------------------------------


def test_a_corpus_that_grows_never_validates_with_what_it_has_trained_on(
    tmp_path, tokenizer_folder
):
    texts = sentences(1200)
    trained: set[str] = set()
    for count in (100, 300, 1200):
        path = write_records(tmp_path / "a.jsonl", [{"text": text} for text in texts[:count]])
        options = {"cache_dir": tmp_path, "validation_tokens": 600}
        splits, tokenizer = prepare_data(tokenizer_folder, str(path), 256, **options)
        found = {
            name: "".join(map(tokenizer.decode, rows["input_ids"])).split(tokenizer.eos_token)
            for name, rows in splits.items()
        }
        held_out = set(found["validation"]) - {""}
        assert held_out and not held_out & trained
        assert sum(len(row) for row in splits["validation"]["input_ids"]) <= 600
        trained |= set(found["train"])
    assert len(trained) > 1100


def test_no_more_tokens_are_held_out_than_asked_for_and_the_rest_is_not_trained_on(tmp_path):
    texts = [f"{number:05d}" for number in range(2000)]
    path = write_records(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    data = Data(str(path), Options(cache_dir=tmp_path, validation_ratio=0.2, validation_tokens=100))
    recipe = TextRecipe()
    choice = data.choice(recipe)
    # 300 bytes are 60 texts of five characters, which are the tokens of this recipe.
    held_out = [texts[place] for place in np.flatnonzero(choice == VALIDATION)]
    assert sorted(held_out, key=question_hash) == sorted(texts, key=question_hash)[:60]
