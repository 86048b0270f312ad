"""Any text, any conversation, any pair: ids, mask and labels agree, and nothing is lost.

fuzz.py says how many cases are run, and how to run more.
"""

from itertools import islice

import numpy as np
import pytest
from fuzz import SURROGATE, TEXT, attempt, cases, data_file
from hypothesis import given
from hypothesis import strategies as st

from corpus.chat_format import Renderer, flatten
from corpus.packing import PackedCollator
from dpo_data import prepare_dpo_data
from kernels import IGNORE_INDEX
from sft_data import prepare_sft_data
from tokenizer import (
    IM_END,
    IM_START,
    SPECIAL_TOKENS,
    encode_plain,
    token_byte_lengths,
    train_tokenizer,
)
from train_data import prepare_data

TOKENIZERS = {
    "merges": train_tokenizer(["天地玄黄，宇宙洪荒。", "The quick brown fox."] * 10, 320),
    "bytes alone": train_tokenizer([], 260),
}
some_tokenizer = st.sampled_from(list(TOKENIZERS.values()))


def control_ids(tokenizer) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))


def runs_of(row: dict) -> list[tuple]:
    """The documents of a packed row: position_ids count from 0 in each."""
    positions = np.array(row["position_ids"])
    starts = np.flatnonzero(positions == 0)
    runs = np.split(np.array(row["input_ids"]), starts[1:])
    assert positions.tolist() == [i for run in runs for i in range(len(run))]
    return [tuple(run.tolist()) for run in runs]


# --- tokenizer ----------------------------------------------------------------------------------


@cases(60)
@given(tokenizer=some_tokenizer, texts=st.lists(TEXT, max_size=4))
def test_tokens_have_the_bytes_of_their_text_and_none_is_a_control_token(tokenizer, texts):
    lengths = token_byte_lengths(tokenizer)
    for text, ids in zip(texts, encode_plain(tokenizer, texts), strict=True):
        assert lengths[ids].sum() == len(text.encode())
        assert not control_ids(tokenizer) & set(ids)
        assert tokenizer.decode(ids) == text


@cases(20)
@given(corpus=st.lists(TEXT, max_size=5), vocab_size=st.integers(260, 300), text=TEXT)
def test_whatever_a_tokenizer_was_trained_on_every_text_comes_back(corpus, vocab_size, text):
    tokenizer = train_tokenizer(corpus, vocab_size)
    assert tokenizer.decode(encode_plain(tokenizer, [text])[0]) == text
    assert len(tokenizer) <= vocab_size


# --- pre-training rows --------------------------------------------------------------------------


def spells(documents: list[tuple], runs: list[tuple], at: int = 0) -> bool:
    """Whether the runs, each used once, can be laid end to end to give the documents."""
    if not documents:
        return not runs
    rest = documents[0][at:]
    if not rest:
        return spells(documents[1:], runs)
    for run in sorted(set(runs), key=len, reverse=True):
        if rest[: len(run)] == run:
            others = list(runs)
            others.remove(run)
            if spells(documents, others, at + len(run)):
                return True
    return False


def usable(documents: list[str]) -> list[str]:
    """Each text once, without blank ones and lone surrogates."""
    return list(
        dict.fromkeys(
            text
            for text in documents
            if text.strip() and not any(0xD800 <= ord(c) <= 0xDFFF for c in text)
        )
    )


@pytest.mark.slow
@cases(40)
@given(
    documents=st.lists(st.one_of(TEXT, TEXT, TEXT, SURROGATE), min_size=1, max_size=10),
    max_seq_len=st.integers(8, 40),
)
def test_every_document_is_in_the_rows_once_and_in_order(tokenizer_folder, documents, max_seq_len):
    with data_file([{"text": text} for text in documents]) as (path, cache):
        texts = usable(documents)
        prepared, refusal = attempt(
            prepare_data, tokenizer_folder, path, max_seq_len, cache_dir=cache
        )
        if refusal:
            assert refusal.startswith(path) and "too few" in refusal
            assert len(texts) < 2, "two documents are always enough"
            return
        splits, tokenizer = prepared
        rows = [*splits["train"], *splits["validation"]]
    expected = [(*ids, tokenizer.eos_token_id) for ids in encode_plain(tokenizer, texts)]
    assert spells(expected, [run for row in rows for run in runs_of(row)])
    assert [tokenizer.decode(ids[:-1], skip_special_tokens=True) for ids in expected] == texts
    check_collated(rows, max_seq_len, tokenizer.pad_token_id)


def check_collated(rows: list[dict], length: int, pad: int):
    """Every token but a document's first is its own label, and padding is nothing."""
    batch = {name: t.numpy() for name, t in PackedCollator(length, pad)(rows).items()}
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        ids, labels = batch["input_ids"][index], batch["labels"][index]
        assert ids.tolist() == row["input_ids"] + [pad] * (length - size)
        assert batch["attention_mask"][index].tolist() == [1] * size + [0] * (length - size)
        chosen = row.get("labels", row["input_ids"])
        expected = [
            label if position else IGNORE_INDEX
            for label, position in zip(chosen, row["position_ids"], strict=True)
        ]
        assert labels.tolist() == expected + [IGNORE_INDEX] * (length - size)


# --- conversations ------------------------------------------------------------------------------


@st.composite
def conversations(draw, last=("user", "assistant")) -> list[dict]:
    """Messages in any order of roles, the first perhaps a system message."""
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=4))
    roles = draw(st.sampled_from([[], ["system"]])) + roles + [draw(st.sampled_from(last))]
    return [{"role": role, "content": draw(TEXT)} for role in roles]


def as_record(messages: list[dict], share_gpt: bool) -> dict:
    if not share_gpt:
        return {"messages": messages}
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}


def rendered(tokenizer, messages: list[dict], **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def replies_of(tokenizer, ids: tuple) -> list[bool]:
    """The mask, worked out from control tokens alone: text cannot hold any."""
    start, stop = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    header = [start, *encode_plain(tokenizer, ["assistant\n"])[0]]
    mask, speaking = [], False
    for index, token in enumerate(ids):
        speaking = speaking and token != start
        mask.append(speaking)
        if token == stop:
            speaking = False
        elif list(ids[: index + 1][-len(header) :]) == header:
            speaking = True
    return mask


@cases(60)
@given(tokenizer=some_tokenizer, messages=conversations())
def test_rendering_is_the_chat_templates(tokenizer, messages):
    ids, mask = (array.tolist() for array in flatten(Renderer(tokenizer).render([messages])[0]))
    assert tokenizer.decode(ids) == rendered(tokenizer, messages)
    spoken = [token for token, is_target in zip(ids, mask, strict=True) if is_target]
    assert tokenizer.decode(spoken) == rendered_replies(messages)
    learns_all = sum(taught(messages)) == sum(m["role"] == "assistant" for m in messages)
    agree = list.__eq__ if learns_all else is_within
    assert agree(mask, replies_of(tokenizer, tuple(ids)))
    if any(token in m["content"] for m in messages for token in SPECIAL_TOKENS):
        return  # the template takes typed control tokens for real ones
    if any(m["content"][:1].isspace() for m in messages):
        return  # the template's header and the text's first line feed become one token
    expected = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    assert ids == expected["input_ids"]
    assert agree(mask, [bool(target) for target in expected["assistant_masks"]])


@pytest.mark.slow
@cases(60)
@given(
    tokenizer=some_tokenizer,
    talks=st.lists(conversations(), min_size=1, max_size=6),
    share_gpt=st.booleans(),
    max_length=st.sampled_from([32, 40, 64, 2048]),
)
def test_only_replies_are_targets_and_they_decode_to_the_reply(
    tokenizer, talks, share_gpt, max_length
):
    with data_file([as_record(talk, share_gpt) for talk in talks]) as (path, cache):
        prepared, refusal = attempt(
            prepare_sft_data, tokenizer, path, max_length, None, cache_dir=cache
        )
        assert bool(refusal) == (f"{path}: no example with a reply" in refusal)
        splits = prepared[0] if prepared else {"train": [], "validation": []}
        rows = [*splits["train"], *splits["validation"]]
    found = []
    for row in rows:
        assert len(row["input_ids"]) <= max_length
        labels = iter(row["labels"])
        for run in runs_of(row):
            mine = list(islice(labels, len(run)))
            mask = [label != IGNORE_INDEX for label in mine]
            assert is_within(mask, replies_of(tokenizer, run))
            targets = [token for token, target in zip(run, mask, strict=True) if target]
            assert targets == [label for label in mine if label != IGNORE_INDEX]
            found.append((tokenizer.decode(run), tokenizer.decode(targets)))
    if max_length == 2048:  # nothing is cut
        kept = learnable(talks)
        spoken = [rendered_replies(talk) for talk in kept]
        texts = [rendered(tokenizer, talk) for talk in kept]
        assert sorted(found) == sorted(zip(texts, spoken, strict=True))
    check_collated(rows, max_length, tokenizer.pad_token_id)


def is_within(part: list[bool], whole: list[bool]) -> bool:
    return all(one <= other for one, other in zip(part, whole, strict=True))


def taught(talk: list[dict]) -> list[bool]:
    """Of each message whether it is a reply with words to a question with words."""
    asked = [m["role"] == "user" and bool(m["content"].strip()) for m in talk]
    return [
        m["role"] == "assistant" and bool(m["content"].strip()) and any(asked[:number])
        for number, m in enumerate(talk)
    ]


def rendered_replies(talk: list[dict]) -> str:
    pairs = zip(talk, taught(talk), strict=True)
    return "".join(m["content"] + IM_END for m, is_taught in pairs if is_taught)


def learnable(talks: list[list[dict]]) -> list[list[dict]]:
    """Each conversation once, up to the last reply that teaches something."""
    kept = []
    for talk in talks:
        places = [number for number, is_taught in enumerate(taught(talk)) if is_taught]
        talk = talk[: places[-1] + 1] if places else []
        if talk and talk not in kept:
            kept.append(talk)
    return kept


# --- pairs --------------------------------------------------------------------------------------


@st.composite
def pair_records(draw) -> tuple[dict, list[dict], str, str]:
    """(record, its question, chosen, rejected) in one of the accepted formats."""
    prompt, chosen, rejected = draw(conversations(last=("user",))), draw(TEXT), draw(TEXT)
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    record = draw(
        st.sampled_from(
            [
                {"prompt": prompt, "chosen": chosen, "rejected": rejected},
                {"messages": prompt, "chosen": answers[0], "rejected": answers[1][0]},
                {"chosen": prompt + answers[0], "rejected": prompt + answers[1]},
            ]
        )
    )
    return record, prompt, chosen, rejected


@pytest.mark.slow
@cases(60)
@given(
    tokenizer=some_tokenizer,
    pairs=st.lists(pair_records(), min_size=1, max_size=5),
    max_length=st.sampled_from([32, 40, 64, 2048]),
)
def test_both_answers_of_a_pair_follow_one_question(tokenizer, pairs, max_length):
    with data_file([record for record, *_ in pairs]) as (path, cache):
        prepared, refusal = attempt(
            prepare_dpo_data, tokenizer, path, max_length, None, cache_dir=cache
        )
        if refusal:
            assert f"{path}: no pair with two different answers" in refusal
            assert max_length < 2048 or not preferences(pairs)
            return
        splits, collate = prepared
        rows = [*splits["train"], *splits["validation"]]
    for row in rows:
        for name in ("chosen_ids", "rejected_ids"):
            # The question keeps its last 16 tokens and its headers, whatever max_length is.
            assert len(row["prompt_ids"]) + len(row[name]) <= max_length
            whole = tuple(row["prompt_ids"] + row[name])
            mask = replies_of(tokenizer, whole)
            assert all(mask[-len(row[name]) :]) and not mask[len(row["prompt_ids"]) - 1]
    if max_length == 2048:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        found = [[*(tokenizer.decode(r[n]) for n in names), r["chosen_bytes"]] for r in rows]
        expected = [
            [
                rendered(tokenizer, prompt, add_generation_prompt=True),
                chosen + IM_END,
                rejected + IM_END,
                len(chosen.encode()),
            ]
            for prompt, chosen, rejected in preferences(pairs)
        ]
        assert sorted(found) == sorted(expected)
    check_pairs(rows, collate(rows))


def preferences(pairs: list[tuple]) -> list[tuple]:
    """Each pair once, where question and both answers have words, and the answers differ."""
    kept: list[tuple] = []
    for _, *pair in pairs:
        prompt, chosen, rejected = pair
        asked = "".join(m["content"] for m in prompt if m["role"] == "user")
        words = chosen.strip(), rejected.strip(), asked.strip()
        if all(words) and words[0] != words[1] and tuple(pair) not in kept:
            kept.append(tuple(pair))
    return kept


def check_pairs(rows: list[dict], batch: dict):
    """Targets are the answers alone, each predicted by the token before it in its own branch."""
    ids, branches = batch["input_ids"].flatten(), batch["branch_ids"].flatten()
    sizes = []
    for index, row in enumerate(rows):
        for branch, name in ((1, "chosen_ids"), (2, "rejected_ids")):
            mine = batch["sequence_index"] == 2 * index + branch - 1
            before = batch["predictor_index"][mine]
            assert batch["target_ids"][mine].tolist() == row[name]
            assert ids[before].tolist() == [row["prompt_ids"][-1], *row[name][:-1]]
            assert branches[before].tolist() == [0] + [branch] * (len(row[name]) - 1)
            sizes.append(len(row[name]))
    assert batch["answer_lengths"].tolist() == sizes
    assert len(batch["target_ids"]) == sum(sizes)
