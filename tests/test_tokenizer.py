import json
import os
import re
import sys
import unicodedata
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

import tokenizer as tokenizer_module
from tokenizer import (
    ALIASES,
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    PAD_TOKEN,
    SPECIAL_TOKENS,
    create_tokenizer,
    encode_plain,
    report,
    token_byte_lengths,
    tokenizer_identity,
    train_tokenizer,
)

LOOK_ALIKES = "".join(SPECIAL_TOKENS) + "<|im_end|" + "|im_end|>"
AWKWARD = [
    "😀👩‍👩‍👧‍👦🇨🇳",
    "a\0b\x01\x7f\x85",
    "\u202eright to left\u200f שלום\u061c",
    "𠀀𠮷𪚥 CJK extension B",
    "a\r\nb\rc\n\n\n d\t\te\v\f",
    "  leading,   inner and trailing  ",
    "e\u0301 é \ufb01 Å Å ½ \ufeff",
    *(LOOK_ALIKES, ""),
]
TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "问一"},
    {"role": "assistant", "content": "答 one"},
    {"role": "user", "content": "问二"},
    {"role": "assistant", "content": "答\ntwo"},
]


def assert_comes_back(tokenizer, text: str):
    (ids,) = encode_plain(tokenizer, [text])
    assert tokenizer.decode(ids) == text
    assert not set(ids) & control_ids(tokenizer)
    assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode())


def control_ids(tokenizer) -> set[int]:
    return {tokenizer.pad_token_id, tokenizer.eos_token_id} | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }


def replies_in(tokenizer) -> str:
    """What the assistant mask covers of TURNS."""
    encoded = tokenizer.apply_chat_template(
        TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return tokenizer.decode([token for token, is_reply in pairs if is_reply])


def save(folder: Path, backend: Tokenizer, **config) -> Path:
    """A tokenizer as someone else may have saved it."""
    backend.save(str(folder / "tokenizer.json"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level(folder: Path, added=("</s>",), change=lambda backend: None, **config) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(added))
    change(backend)
    return save(folder, backend, **{"eos_token": "</s>"} | config)


@given(st.text())
def test_every_text_comes_back_exactly_and_holds_no_control_token(tokenizer, text):
    assert_comes_back(tokenizer, text)


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "\n", " ", "7", "天", "\r"])))
def test_text_made_of_look_alikes_comes_back_without_a_control_token(tokenizer, parts):
    assert_comes_back(tokenizer, "".join(parts))


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back_exactly(tokenizer, text):
    assert_comes_back(tokenizer, text)


def test_texts_in_one_batch_do_not_influence_each_other(tokenizer):
    together = encode_plain(tokenizer, AWKWARD)
    assert together == [encode_plain(tokenizer, [text])[0] for text in AWKWARD]
    assert encode_plain(tokenizer, []) == []


def test_each_digit_is_a_token_however_often_a_number_was_seen():
    text = "¥2024, 1234567890年(5)-6.7% x8"
    tokenizer = train_tokenizer([text] * 500, vocab_size=300)
    tokens = tokenizer.convert_ids_to_tokens(encode_plain(tokenizer, [text])[0])
    assert [token for token in tokens if re.search("[0-9]", token)] == re.findall("[0-9]", text)


def test_the_four_special_tokens_have_the_first_ids_and_padding_is_not_the_end(tokenizer):
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2, 3]
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD_TOKEN, END_OF_TEXT)
    assert set(tokenizer.all_special_ids) == {0, 1, 2, 3}
    assert token_byte_lengths(tokenizer)[:4].tolist() == [0, 0, 0, 0]
    assert len(token_byte_lengths(tokenizer)) == len(tokenizer)


def test_encoding_plain_text_leaves_the_tokenizer_as_it_was(tokenizer):
    text = f"a{IM_END}"
    backend = tokenizer.backend_tokenizer
    before = backend.encode(text).ids
    encode_plain(tokenizer, [text])
    assert backend.encode(text).ids == before
    assert before[-1] == tokenizer.convert_tokens_to_ids(IM_END)


def test_padding_and_cutting_asked_of_the_tokenizer_elsewhere_do_not_reach_plain_text(tokenizer):
    tokenizer(["a", "b c d"], padding="max_length", max_length=3, truncation=True)
    assert list(map(len, encode_plain(tokenizer, ["a", "98765"]))) == [1, 5]


def test_the_mask_of_the_chat_template_covers_exactly_the_replies_and_their_ends(tokenizer):
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == (
        "<|im_start|>system\nS<|im_end|>\n"
        "<|im_start|>user\n问一<|im_end|>\n<|im_start|>assistant\n答 one<|im_end|>\n"
        "<|im_start|>user\n问二<|im_end|>\n<|im_start|>assistant\n答\ntwo<|im_end|>\n"
    )
    assert replies_in(tokenizer) == "答 one<|im_end|>答\ntwo<|im_end|>"


def test_the_generation_prompt_ends_where_a_reply_begins(tokenizer):
    prompt = tokenizer.apply_chat_template(TURNS[:2], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(TURNS[:3], tokenize=False)
    assert whole == prompt + "答 one<|im_end|>\n"


def test_a_saved_tokenizer_is_the_same_however_it_is_loaded(tokenizer, tokenizer_folder):
    loaded = [
        AutoTokenizer.from_pretrained(tokenizer_folder),
        create_tokenizer(tokenizer_folder),
        create_tokenizer(model_path=tokenizer_folder),
    ]
    for other in loaded:
        assert tokenizer_identity(other) == tokenizer_identity(tokenizer)
        assert encode_plain(other, AWKWARD) == encode_plain(tokenizer, AWKWARD)
        assert other.all_special_tokens == tokenizer.all_special_tokens
        assert other.chat_template == tokenizer.chat_template == CHAT_TEMPLATE


def test_tokenizers_of_other_vocabularies_have_other_identities(tokenizer):
    other = train_tokenizer(["完全不同的文字"] * 10, vocab_size=320)
    assert tokenizer_identity(other) != tokenizer_identity(tokenizer)


def test_every_alias_names_its_repository_and_an_unreachable_one_says_what_to_do(monkeypatch):
    assert set(ALIASES) == {"qwen", "llama", "mistral", "chatglm", "baichuan"}
    for error in (OSError("no network\nat all"), KeyError()):

        def unreachable(*_, error=error, **__):
            raise error

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
        for alias, name in ALIASES.items():
            with pytest.raises(ValueError, match="No tokenizer could be loaded from") as caught:
                create_tokenizer(alias)
            message = str(caught.value)
            assert repr(name) in message
            assert "HF_ENDPOINT" in message
            assert "leave tokenizer_path unset" in message
            assert "\n" not in message


def test_an_unknown_name_is_one_clear_error_without_a_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="Aliases: qwen, llama, mistral, chatglm, baichuan"):
        create_tokenizer("nobody/no-such-tokenizer")


def test_a_folder_without_a_tokenizer_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"neither a local folder with a tokenizer\.json"):
        create_tokenizer(model_path=str(tmp_path))


def test_a_foreign_tokenizer_gets_padding_turn_markers_and_a_template(tmp_path):
    tokenizer = create_tokenizer(model_path=byte_level(tmp_path))
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD_TOKEN, "</s>")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    markers = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[2:])
    rendered = tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert rendered.count(markers[1]) == 5
    assert token_byte_lengths(tokenizer)[markers].tolist() == [0, 0]
    assert_comes_back(tokenizer, LOOK_ALIKES + "</s>天")


def test_a_foreign_tokenizer_without_an_end_of_text_gets_one_that_is_not_its_padding(tmp_path):
    tokenizer = create_tokenizer(model_path=byte_level(tmp_path, eos_token=None))
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD_TOKEN, END_OF_TEXT)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, None}) == 3


@pytest.mark.parametrize(
    ("added", "expected"),
    [(["</s>"], PAD_TOKEN), (["</s>", END_OF_TEXT], END_OF_TEXT)],
    ids=["new", "free"],
)
def test_padding_that_is_the_end_of_text_is_replaced(tmp_path, added, expected):
    folder = byte_level(tmp_path, added, pad_token="</s>")
    tokenizer = create_tokenizer(model_path=folder)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_a_template_that_cannot_mark_replies_is_replaced_and_one_that_can_is_kept(tmp_path):
    own = "{% generation %}x{% endgeneration %}"
    kept = create_tokenizer(model_path=byte_level(tmp_path, chat_template=own))
    assert kept.chat_template == own
    replaced = create_tokenizer(model_path=byte_level(tmp_path, chat_template="{{ 1 }}"))
    assert replaced.chat_template == CHAT_TEMPLATE


def test_padding_and_cutting_written_in_a_tokenizer_file_do_not_reach_plain_text(tmp_path):
    def limit(backend):
        backend.enable_truncation(4)
        backend.enable_padding(length=10)

    tokenizer = create_tokenizer(model_path=byte_level(tmp_path, change=limit))
    assert list(map(len, encode_plain(tokenizer, ["a", "123456"]))) == [1, 6]


def test_byte_lengths_of_a_sentencepiece_tokenizer_count_spaces_and_single_bytes(tmp_path):
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)},
        [("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = create_tokenizer(model_path=save(tmp_path, backend, eos_token="</s>"))
    assert_comes_back(tokenizer, "ab a 天😀 b</s>")


def test_byte_lengths_count_the_bytes_of_added_words_and_nothing_for_special_ones(tmp_path):
    folder = byte_level(tmp_path, change=lambda backend: backend.add_tokens(["天地玄黄"]))
    tokenizer = create_tokenizer(model_path=folder)
    assert len(encode_plain(tokenizer, ["天地玄黄"])[0]) == 1
    assert_comes_back(tokenizer, "天地玄黄 and 宇宙")


def test_too_small_a_vocabulary_is_refused_and_the_smallest_works():
    with pytest.raises(
        ValueError, match="vocab_size=259 must be at least 260: all bytes and the specials"
    ):
        train_tokenizer(["text"], vocab_size=259)
    assert_comes_back(train_tokenizer(["text"], vocab_size=260), "text 天")


def test_training_reads_a_stream_once_and_makes_each_role_name_one_token():
    served = []

    def stream():
        for number in range(300):
            served.append(number)
            yield f"第{number}条"

    tokenizer = train_tokenizer(stream(), vocab_size=320)
    assert served == list(range(300))
    assert len(tokenizer) <= 320
    assert [len(ids) for ids in encode_plain(tokenizer, ["system", "user", "assistant"])] == [1] * 3


def test_the_report_counts_characters_bytes_and_tokens(tokenizer):
    texts = ["天地", "abc"]
    tokens = sum(map(len, encode_plain(tokenizer, texts)))
    lines = report(tokenizer, iter(texts)).splitlines()
    assert lines[0].startswith(f"5 characters, 9 bytes, {tokens} tokens in ")
    assert f"{5 / tokens:.2f} characters/token" in lines[1]
    assert "1.00 characters/token   1.80 bytes/token   vocabulary 5 " in lines[2]
    with pytest.raises(ValueError, match="No text to measure: every document is empty"):
        report(tokenizer, iter([]))


@pytest.mark.slow
def test_the_real_qwen3_tokenizer_is_ready_for_training(real_data):
    tokenizer = create_tokenizer(model_path=real_data("qwen3_tokenizer"))
    assert len(tokenizer) == 151_669
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    for text in AWKWARD:
        assert_comes_back(tokenizer, unicodedata.normalize("NFC", text))
    assert replies_in(tokenizer) == "答 one<|im_end|>答\ntwo<|im_end|>"


@pytest.mark.slow
def test_the_command_trains_saves_and_compares_with_one_token_per_character(tmp_path, run_script):
    (tmp_path / "corpus.jsonl").write_text('{"text": "the cat and the cat"}\n' * 3)
    arguments = ("--files", "corpus.jsonl", "--vocab_size", 270, "--output", "out")
    done = run_script("tokenizer.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "Trained 270 tokens -> out" in done.stdout
    assert "this tokenizer " in done.stdout
    assert "character baseline  1.00 characters/token" in done.stdout
    assert_comes_back(create_tokenizer(model_path=tmp_path / "out"), "the cat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "full"], "error: full holds a tokenizer: choose another --output"),
        (["--measure", "absent"], "error: No tokenizer could be loaded from 'absent'"),
    ],
)
def test_the_command_fails_in_one_line_and_overwrites_nothing(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "--files", "corpus.jsonl", *arguments])
    with pytest.raises(SystemExit, match=message) as caught:
        tokenizer_module.main()
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "full") == ["tokenizer.json"]
    assert (tmp_path / "full" / "tokenizer.json").read_text() == "{}"
