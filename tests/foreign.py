"""Tokenizers as other projects publish them, with small vocabularies that are trained here."""

import json
from pathlib import Path

from tiny import sentences
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from engine.llama_cpp import DEEPSEEK_V3_WORDS, LLAMA3_SPLIT
from tokenizer import QWEN2_SPLIT

TEXTS = [*sentences(40), "The quick brown fox's 12345 tails, don't they? ", "system user assistant"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(*patterns: str) -> list:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def byte_level(steps: list, special: list[str], **model) -> Tokenizer:
    """A byte-level BPE of 360 tokens that splits text by these steps."""
    backend = Tokenizer(models.BPE(**model))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return backend


def sentencepiece(legacy: bool) -> Tokenizer:
    """A SentencePiece BPE with byte fallback, as Llama 2 (legacy) and later Mistral have it."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    learner.train_from_iterator(TEXTS, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(learned["vocab"], key=learned["vocab"].get)
    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if legacy:
        before = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(before)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def puts_before(backend: Tokenizer, *special: str) -> Tokenizer:
    """The same with these tokens before every text, as tokenizer(text) then gives it."""
    template = " ".join([*special, "$A"])
    ids = [(token, backend.token_to_id(token)) for token in special]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return backend


def save(folder: Path, backend: Tokenizer, **config) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
    return str(folder)


def minimind(folder: Path) -> str:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = byte_level([pre_tokenizers.ByteLevel(add_prefix_space=False)], special)
    names = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[0]}
    return save(folder, backend, **names, unk_token=special[0], chat_template="{{ messages }}")


def deepseek(folder: Path) -> str:
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    words = DEEPSEEK_V3_WORDS.replace(r"\r", "\r").replace(r"\n", "\n")  # as it is published
    patterns = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", words)
    backend = byte_level([*split(*patterns), BYTES], [begin, end])
    backend = puts_before(backend, begin)
    return save(folder, backend, bos_token=begin, eos_token=end, pad_token=end)


def glm(folder: Path) -> str:
    special = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]
    backend = byte_level([*split(LLAMA3_SPLIT), BYTES], special)
    backend = puts_before(backend, "[gMASK]", "<sop>")
    return save(folder, backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def llama3(folder: Path) -> str:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    backend = byte_level([*split(LLAMA3_SPLIT), BYTES], special, ignore_merges=True)
    backend = puts_before(backend, special[0])
    return save(folder, backend, bos_token=special[0], eos_token=special[1])


def qwen2(folder: Path) -> str:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = byte_level([*split(QWEN2_SPLIT), BYTES], special)
    backend.normalizer = normalizers.NFC()
    return save(folder, backend, eos_token=special[2], pad_token=special[0])


def llama2(folder: Path) -> str:
    backend = puts_before(sentencepiece(legacy=True), "<s>")
    return save(folder, backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def mistral(folder: Path) -> str:
    backend = puts_before(sentencepiece(legacy=False), "<s>")
    backend.add_special_tokens([AddedToken("[INST]"), AddedToken("[/INST]")])
    return save(folder, backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


MAKERS = {
    "minimind": minimind,
    "deepseek": deepseek,
    "glm": glm,
    "llama3": llama3,
    "qwen2": qwen2,
    "llama2": llama2,
    "mistral": mistral,
}
