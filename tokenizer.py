"""Tokenizers: load any, or train a byte-level BPE on your own text.

    python tokenizer.py --files data/pretrain_sample.jsonl --vocab_size 6400 --output my_tokenizer

A trained tokenizer splits text as Qwen2's does (single digits, letters, punctuation, spaces), has
no normaliser, and therefore gives every Unicode text back exactly.
"""

import argparse
import json
import re
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import xxhash
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_TOKEN, END_OF_TEXT = "<|pad|>", "<|endoftext|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD_TOKEN, END_OF_TEXT, IM_START, IM_END]

# llama.cpp knows exactly this split as `tokenizer.ggml.pre = qwen2`.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# No language writes such a run, the split leaves it whole, and training is quadratic in its length.
LONG_RUN = re.compile(r"([^\W_]{1000}|\s{1000}|(?:[^\w\s]|_){1000})")
# What Qwen3's template says to a model about its tools, before and behind their definitions.
TOOLS_BEGIN = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_END = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
# corpus/messages.py words tools, calls, their results and reasoning in the same way. The
# generation markers tell apply_chat_template which tokens an assistant wrote.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(question=-1, words='') %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' and not (message.content.startswith('<tool_response>')"
    " and message.content.endswith('</tool_response>')) %}"
    "{%- set ns.question = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- if tools %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' and messages[0].content %}"
    "{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    f"{{{{- {TOOLS_BEGIN!r} }}}}"
    "{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
    f"{{{{- {TOOLS_END!r} }}}}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- set content = message.content or '' %}"
    "{%- set reasoning = message.reasoning_content or '' %}"
    "{%- set in_content = false %}"
    # Reasoning in the content is shown, or left out, as that in a field of its own is.
    "{%- if not reasoning and '</think>' in content"
    " and content.lstrip('\\n').startswith('<think>') %}"
    "{%- set in_content = true %}"
    "{%- set parts = content.split('</think>') %}"
    "{%- set reasoning = parts[0].lstrip('\\n')[7:] %}"
    "{%- set content = (parts[1:] | join('</think>')).lstrip('\\n') %}"
    "{%- endif %}"
    "{%- set reasoning = reasoning.strip('\\n') %}"
    "{%- set ns.words = content %}"
    "{%- if loop.index0 > ns.question and (reasoning or (in_content and loop.last)) %}"
    "{%- set ns.words = '<think>\\n' + reasoning + '\\n</think>\\n\\n' + content.lstrip('\\n') %}"
    "{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- if content or not loop.first %}{%- set ns.words = ns.words + '\\n' %}{%- endif %}"
    "{%- set call = call.function or call %}"
    "{%- set arguments = call.arguments or {} %}"
    "{%- if arguments is not string %}{%- set arguments = arguments | tojson %}{%- endif %}"
    '{%- set ns.words = ns.words + \'<tool_call>\\n{"name": "\' + call.name'
    " + '\", \"arguments\": ' + arguments + '}\\n</tool_call>' %}"
    "{%- endfor %}"
    "{% generation %}{{- ns.words + '<|im_end|>' }}{% endgeneration %}"
    "{{- '\\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- elif not (tools and loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# How the template began before it knew tools. Folders that were saved with it get the new one.
OLDER_TEMPLATE = "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
ALIASES = {
    "qwen": "Qwen/Qwen3-0.6B",
    "llama": "meta-llama/Llama-3.2-1B",
    "mistral": "mistralai/Mistral-7B-v0.3",
    "chatglm": "zai-org/glm-4-9b-chat-hf",
    "baichuan": "baichuan-inc/Baichuan2-7B-Chat",
}


def create_tokenizer(
    model_type: str = "qwen", model_path: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and prepare it for training: a pad token of its own, the ChatML template.

    Args:
        model_type: an alias (qwen, llama, mistral, chatglm, baichuan), a local folder or a Hub
            name. It is used when model_path is None.
        model_path: a local folder or a Hub name.
        trust_remote_code: run the Python code that some Hub repositories bring (baichuan's).

    Raises:
        ValueError: no tokenizer can be loaded. The message says what to do.
    """
    name = str(model_path or ALIASES.get(model_type, model_type))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # AutoTokenizer raises a dozen kinds of errors for this
        cause = (str(error) or repr(error)).splitlines()[0]
        if package := _missing_package(Path(name)):
            raise ValueError(
                f"{name}: its tokenizer.model is SentencePiece's, which is read with "
                f"`pip install {package}`. (Cause: {cause})"
            ) from error
        raise ValueError(
            f"No tokenizer could be loaded from {name!r}: it is neither a local folder with a "
            "tokenizer.json nor a Hub name that can be reached from here. Give a local folder, set "
            "HF_ENDPOINT to a mirror, or leave tokenizer_path unset to train one on your corpus. "
            f"(Aliases: {', '.join(ALIASES)}. Cause: {cause})"
        ) from error
    return prepare_special_tokens(tokenizer)


def _missing_package(folder: Path) -> str:
    """The package without which a folder's tokenizer.model cannot be read; or ''."""
    if not (folder / "tokenizer.model").exists() or (folder / "tokenizer.json").exists():
        return ""
    needed = ("sentencepiece", "protobuf")
    return " ".join(name for name in needed if not any(distributions(name=name)))


def prepare_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give another tokenizer what the three stages need. One that was trained here has it."""
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        # If padding were the EOS token, the loss would ignore EOS as it ignores padding.
        free = END_OF_TEXT in vocabulary and tokenizer.eos_token != END_OF_TEXT
        tokenizer.add_special_tokens({"pad_token": END_OF_TEXT if free else PAD_TOKEN})
    _add_no_space(tokenizer)
    missing = [token for token in (IM_START, IM_END) if token not in vocabulary]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    template = tokenizer.chat_template or ""
    if "{% generation %}" not in template or template.startswith(OLDER_TEMPLATE):
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _add_no_space(tokenizer: PreTrainedTokenizerBase):
    """Let a SentencePiece tokenizer take a text as it is.

    It puts a space before a text, and drops one when it decodes. A message that is encoded by
    itself would begin with other ids than in a conversation that is rendered as a whole.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = ("normalizer", "pre_tokenizer", "decoder")
    if backend is None or not any("▁" in repr(getattr(backend, part)) for part in parts):
        return
    stored, empty = (json.loads(one.to_str()) for one in (backend, Tokenizer(models.BPE())))
    plain = Tokenizer.from_str(json.dumps(empty | {part: _plain(stored[part]) for part in parts}))
    for part in parts:
        setattr(backend, part, getattr(plain, part))
    vars(tokenizer)["add_prefix_space"] = False  # is saved: Llama's class makes these parts anew
    tokenizer.init_kwargs["add_prefix_space"] = False


def _plain(step: dict | None) -> dict | None:
    """A step of tokenizer.json that adds no space before a text and drops none."""
    if step is None or step["type"] == "Prepend" or (step["type"] == "Strip" and "content" in step):
        return None
    for name in ("normalizers", "pretokenizers", "decoders"):  # of a Sequence
        if name in step:
            inner = [kept for one in step[name] if (kept := _plain(one))]
            return step | {name: inner} if inner else None
    return step | {"prepend_scheme": "never"} if "prepend_scheme" in step else step


def train_tokenizer(texts: Iterable[str], vocab_size: int = 6400) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (arXiv 1508.07909) on a stream of texts.

    Only the counts of distinct words are in memory, not the texts.

    Raises:
        ValueError: vocab_size is smaller than the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {smallest}: all bytes and the specials."
        )
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_roles(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_OF_TEXT,
        extra_special_tokens=[IM_START, IM_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _with_roles(texts: Iterable[str]) -> Iterator[str]:
    """Add the role names to the texts, so that each becomes one token of the chat format.

    Texts are unchanged, except that runs of 1,000 letters, spaces or other signs are cut.
    """
    for text in texts:
        yield from LONG_RUN.split(text)
        yield "system\nuser\nassistant\n"


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts. Nothing in them becomes a control token.

    A user who types `<|im_end|>` gets those ten characters, not the end of the turn.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow, Python-only tokenizer
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        return encoded["input_ids"]
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    backend.no_truncation()  # some tokenizer.json files set a truncation, and so does tokenizer(…)
    backend.no_padding()
    try:  # the fast function leaves out character offsets, which nobody here reads
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that give every text the same ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return xxhash.xxh3_64_hexdigest(json.dumps([vocabulary, tokenizer.eos_token]).encode())


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """UTF-8 bytes of the text of each token id, int64 (len(tokenizer),); 0 for special tokens."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in repr(backend.decoder):
        lengths = [len(token) for token in tokens]  # one printable character stands for each byte
    elif any("▁" in token for token in tokens):  # SentencePiece: ▁ is a space, <0xE4> one byte
        lengths = [
            1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
            for token in tokens
        ]
    else:
        lengths = [len(str(tokenizer.decode([i])).encode()) for i in range(len(tokens))]
    for index, added in tokenizer.added_tokens_decoder.items():
        lengths[index] = 0 if added.special else len(added.content.encode())
    for index in tokenizer.all_special_ids:
        lengths[index] = 0
    return np.array(lengths, dtype=np.int64)


def report(tokenizer: PreTrainedTokenizerBase, texts: Iterator[str]) -> str:
    """Compression of texts, compared with one token per character, the simplest tokenizer."""
    characters = size = tokens = 0
    alphabet: set[str] = set()
    started = time.perf_counter()
    for text in texts:
        characters += len(text)
        size += len(text.encode())
        tokens += len(encode_plain(tokenizer, [text])[0])
        alphabet.update(text)
    if not tokens:
        raise ValueError("No text to measure: every document is empty or is not text.")
    return (
        f"{characters:,} characters, {size:,} bytes, {tokens:,} tokens in "
        f"{time.perf_counter() - started:.1f} s\n"
        f"this tokenizer     {characters / tokens:5.2f} characters/token  {size / tokens:5.2f} "
        f"bytes/token   vocabulary {len(tokenizer):,}\n"
        f"character baseline  1.00 characters/token  {size / characters:5.2f} bytes/token   "
        f"vocabulary {len(alphabet):,} (this text's distinct characters)"
    )


def main():
    from corpus.cache import Data, Options  # here: those who import this file need none of it
    from corpus.documents import iter_documents
    from engine.command import as_command
    from train_data import DocumentRecipe, train_on_share

    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer or measure one.")
    parser.add_argument("--files", default="data/pretrain_sample.jsonl", help="file, folder, glob")
    parser.add_argument("--text_column", help="default: text, content or completion")
    parser.add_argument("--vocab_size", type=int, default=6400)
    parser.add_argument("--megabytes", type=float, default=10, help="of text to learn from")
    parser.add_argument("--output", default="checkpoints/tokenizer", help="folder to write")
    parser.add_argument("--measure", help="do not train: measure this folder or Hub name instead")
    arguments = parser.parse_args()
    with as_command():
        try:
            if arguments.measure:
                tokenizer = create_tokenizer(model_path=arguments.measure)
            elif Path(arguments.output, "tokenizer.json").exists():
                raise ValueError(f"{arguments.output} holds a tokenizer: choose another --output.")
            else:
                with Data(arguments.files, Options()) as data:
                    recipe = DocumentRecipe(arguments.text_column)
                    sizes = arguments.vocab_size, arguments.megabytes
                    tokenizer = train_on_share(data, recipe, *sizes)
                tokenizer.save_pretrained(arguments.output)
                print(f"Trained {len(tokenizer):,} tokens -> {arguments.output}")
            print(report(tokenizer, iter_documents(arguments.files, arguments.text_column)))
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
