"""The fast encoder gives the ids of the tokenizers library, id for id, or leaves a text to it."""

import pickle
import sys
import unicodedata

import numpy as np
import pytest
from fuzz import TEXT
from hypothesis import given, settings
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from corpus.encoder import BYTE_CHARACTERS, WORTH_IT, Encoder, fast_bpe
from tokenizer import QWEN2_SPLIT, SPECIAL_TOKENS, create_tokenizer, encode_plain

LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
TEXTS = ["The quick brown fox jumps over the lazy dog, doesn't it? 12345 times!"]
TEXTS += [
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。",
    "été élève naïve café",
    "x = [1, 2]\n\n\tif x:  pass\r\n",
]
# What has broken encoders: control tokens, spaces, marks, emoji, apostrophes, long words.
AWKWARD = [
    "",
    " ",
    "\n",
    "a\u0301 e\u0308",
    "<|im_end|><|im_start|>user\n",
    "👩‍👩‍👧 🇨🇳 ❤️",
    "I'M we'Re ſ's K",
]
AWKWARD += [
    "x" * 3000,
    "天地玄黄" * 800,
    "\0\x07\x7f\x85\u2028\u3000\ufeff",
    "١٢٣ Ⅷ ½ 1234567",
    "𠮷野家",
]
AWKWARD += [
    " " * 5000 + "x",
    "\n \n  \r\n\t\t \n",
    "a<think>b</think>",
    "\u1160\u115f\u3164",
    "-- __ .,;",
]
LONG = [
    " " * 500_000,
    "x" * 100_000,
    "天" * 100_000,
    ("word " * 20_000),
    "\n" * 100_000,
    "!" * 100_000,
]


def wrap(tokenizer: Tokenizer, **options) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def trained(pre_tokenizer, normalizer=None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 10, trainer)
    return wrap(tokenizer, eos_token=SPECIAL_TOKENS[1])


def split_at(pattern: str):
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


def of_merges(*merges, ignore_merges=False, more=(), **options):
    """A byte-level BPE whose merges are written out: 'a b' 'ab c'."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokens = dict.fromkeys([*BYTE_CHARACTERS, *("".join(pair) for pair in pairs), *more])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges, **options)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return wrap(tokenizer)


def gpt2_like():
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


def with_own_tokens():
    tokenizer = trained(split_at(QWEN2_SPLIT))
    tokenizer.add_tokens(["<think>", "</think>", "天地"])
    return tokenizer


FAST = {
    "qwen2": lambda: trained(split_at(QWEN2_SPLIT)),
    "llama3": lambda: trained(split_at(LLAMA3_SPLIT)),
    "gpt2": gpt2_like,
    "nfc": lambda: trained(split_at(QWEN2_SPLIT), normalizers.NFC()),
    "own tokens": with_own_tokens,
}


@pytest.fixture(scope="module", params=FAST)
def fast(request) -> Encoder:
    """An encoder of each kind that is fast."""
    return fast_encoder(FAST[request.param]())


def fast_encoder(tokenizer) -> Encoder:
    encoder = Encoder(tokenizer, WORTH_IT)
    assert encoder.fast is not None
    return encoder


def assert_equal(encoder: Encoder, texts: list[str]):
    expected = encode_plain(encoder.tokenizer, texts)
    for text, ids, wanted in zip(texts, encoder(texts), expected, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == wanted, repr(text[:300])


# --- equal ids ----------------------------------------------------------------------------------


def test_awkward_texts_have_the_ids_of_the_tokenizer(fast):
    assert_equal(fast, TEXTS + AWKWARD)
    assert_equal(fast, ["".join(AWKWARD), "".join(AWKWARD[::-1])])


@given(TEXT)
@settings(max_examples=200)
def test_any_text_has_the_ids_of_the_tokenizer(text):
    for encoder in ENCODERS:
        assert_equal(encoder, [text])


ENCODERS = [fast_encoder(FAST[name]()) for name in ("qwen2", "gpt2", "nfc", "own tokens")]


@pytest.mark.slow
def test_very_long_lines_and_runs_of_spaces_have_the_ids_of_the_tokenizer(tokenizer):
    assert_equal(fast_encoder(tokenizer), LONG)


def test_texts_do_not_touch_each_other(fast):
    """What stands between them in one call is no part of them, and ends the words of both."""
    parts = ["a", " ", "  a", "\n", "", "天", "\u0301", "'s", "1", "12", "\U0010fffe", "<|im_end|>"]
    assert_equal(fast, [first + second for first in parts for second in parts])
    assert_equal(fast, ["a\U0010ffffb", *parts, "\U0010ffff", ""])
    assert fast([]) == []


def is_tried(point: int) -> bool:
    """Every character that has a meaning of its own; of ideographs and the unassigned some."""
    category = unicodedata.category(chr(point))
    is_ideograph = 0x3400 <= point < 0xD7B0 or 0x17000 <= point < 0x19000 or point >= 0x20000
    if category == "Cs":
        return False
    return point % 16 == 7 or (category not in ("Cn", "Co") and not is_ideograph)


POINTS = [chr(point) for point in range(sys.maxunicode + 1) if is_tried(point)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "llama3", "gpt2"])
def test_every_kind_of_character_is_split_alike_between_letters_numbers_and_spaces(name):
    encoder = fast_encoder(FAST[name]())
    chunks = [POINTS[start : start + 50] for start in range(0, len(POINTS), 50)]
    assert len(POINTS) > 90_000
    for context in ("a{0}b 1{0}2 ", "{0}{0} \n{0}'{0}."):
        assert_equal(encoder, ["".join(map(context.format, chunk)) for chunk in chunks])


@pytest.mark.slow
def test_the_tokenizer_of_qwen3_is_fast_and_equal(real_data):
    encoder = fast_encoder(create_tokenizer(model_path=str(real_data("qwen3_tokenizer"))))
    assert_equal(encoder, TEXTS + AWKWARD + LONG)
    chunks = [POINTS[start : start + 50] for start in range(0, len(POINTS), 50)]
    assert_equal(encoder, ["".join(map("a{0}b {0}{0}1".format, chunk)) for chunk in chunks])


# --- what is left to the tokenizer --------------------------------------------------------------


def test_few_bytes_are_left_to_the_tokenizer_and_come_out_the_same(tokenizer):
    slow = Encoder(tokenizer, WORTH_IT - 1)
    assert slow.fast is None
    texts = (TEXTS + AWKWARD) * 8  # more than are encoded at a time
    assert_equal(slow, texts)
    for one, other in zip(slow(texts), fast_encoder(tokenizer)(texts), strict=True):
        assert np.array_equal(one, other)
    assert slow([]) == []


@pytest.mark.parametrize(
    ("name", "text", "is_left"),
    [
        ("nfc", "e\u0301", True),
        ("nfc", "\u00e9", False),
        ("qwen2", "e\u0301", False),
        ("own tokens", "a<think>", True),
        ("own tokens", "a<|im_end|>", False),
        ("qwen2", "a<think>", False),
        ("qwen2", "a\U0010ffffb", True),
    ],
)
def test_text_that_is_normalized_or_holds_an_added_token_is_left_to_the_tokenizer(
    name, text, is_left
):
    encoder = fast_encoder(FAST[name]())
    assert (encoder.fast.encode([text])[0] is None) == is_left
    assert_equal(encoder, [text])


def wordpiece():
    vocabulary = {token: number for number, token in enumerate(["[UNK]", "a", "##b", "b"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(tokenizer)


def unigram():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return wrap(tokenizer)


def sentencepiece_like():
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocabulary, [("a", "b")], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return wrap(tokenizer)


def without_a_byte():
    vocabulary = {token: number for number, token in enumerate([*BYTE_CHARACTERS[:-1], "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return wrap(tokenizer)


OTHERS = {
    "wordpiece": wordpiece,
    "unigram": unigram,
    "sentencepiece": sentencepiece_like,
    "not every byte": without_a_byte,
    "two merges of one token": lambda: of_merges("a b", "b c", "ab c", "x y", "a bc"),
    "whole words first": lambda: of_merges("a b", ignore_merges=True, more=("abc",)),
    "dropout": lambda: of_merges("a b", dropout=0.5),
    "prefix space": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "another split": lambda: trained(split_at(r"\s+|\S+")),
    "no split": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "three steps": lambda: trained(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), split_at(QWEN2_SPLIT)])
    ),
    "lower case": lambda: trained(split_at(QWEN2_SPLIT), normalizers.Lowercase()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_tokenizer_that_is_not_known_to_be_equal_encodes_by_itself(name):
    encoder = Encoder(OTHERS[name](), WORTH_IT)
    assert encoder.fast is None
    if name != "dropout":
        assert_equal(encoder, ["ab abc", "天 ab"])


def test_a_tokenizer_that_is_python_alone_is_not_fast():
    assert fast_bpe(object()) is None


# --- merges -------------------------------------------------------------------------------------


def test_a_token_that_no_merge_reaches_never_comes_out():
    """Of `abc` the merge of a and b comes first, and ab and c have none."""
    encoder = fast_encoder(of_merges("a b", "b c", "a bc", "d e"))
    unreachable = encoder.tokenizer.convert_tokens_to_ids("abc")
    (ids,) = encoder(["abc xabc abcabc de abbc"])
    assert unreachable not in ids
    assert_equal(encoder, ["abc xabc abcabc de abbc", "bcabc", "aabc"])


def test_merges_that_follow_each_other_may_give_one_token():
    encoder = fast_encoder(of_merges("b c", "a b", "ab c", "a bc"))
    assert_equal(encoder, ["abc", "xabcabc abbc", "aabcbc"])


@given(TEXT)
@settings(max_examples=30)
def test_random_merges_give_the_ids_of_the_tokenizer_or_are_left_to_it(text):
    text = "".join("abc"[ord(character) % 3] for character in text * 4)
    for encoder in MERGES:
        assert_equal(encoder, [text, text[::-1]])


MERGES = [
    Encoder(of_merges(*merges), WORTH_IT)
    for merges in (
        ("a b", "b a", "ab a", "ba b", "aba b"),
        ("b a", "a a", "aa a", "c aa", "a b", "aa b", "caa b"),
        ("c c", "cc c", "cc cc", "a cc", "ccc a", "b c"),
    )
]


def test_an_encoder_can_be_sent_to_a_process(fast):
    again = pickle.loads(pickle.dumps(fast))
    assert again.fast is not None
    for one, other in zip(fast(TEXTS + AWKWARD), again(TEXTS + AWKWARD), strict=True):
        assert np.array_equal(one, other)
