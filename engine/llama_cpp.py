"""What llama.cpp and ollama know by name: ways of splitting text, and a chat template."""

import json
import re

from tokenizer import CHAT_TEMPLATE, IM_END, QWEN2_SPLIT

LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"+|\p{N}|", r"+|\p{N}{1,3}|")  # three digits together
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = [rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"]
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"  # endings of English words
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK_V3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KEEPS_ALL = {("Isolated", False), ("Removed", True)}  # two ways to say: each match is a piece
# `tokenizer.ggml.pre` by the regexes that split a text one after the other.
PRE_NAMES = {
    (QWEN2_SPLIT,): "qwen2",
    (LLAMA3_SPLIT,): "chatglm-bpe",  # GLM-4's, and all others that cut numbers in threes
    (GPT2_SPLIT,): "gpt-2",
    (r"\p{N}", GPT2_SPLIT): "smollm",
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3_WORDS): "deepseek-v3",
    ("[\\r\\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"): "deepseek-coder",
    (WORDS[0] + SHORT + "|" + WORDS[1] + SHORT + r"|\p{N}{1,3}" + REST,): "gpt-4o",
}
# The same of tokenizers that take a whole word before they look at their merges.
WHOLE_WORD_NAMES = {
    (LLAMA3_SPLIT,): "llama-bpe",
    (WORDS[0] + "|" + WORDS[1] + r"|\p{N}" + REST,): "tekken",
}
# ollama knows a template only within 100 edits of one of its own: this is ChatML as it has it, but
# for the reasoning of earlier answers, which is left out as in training.
OLLAMA_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "(message['content'].split('</think>')[-1].lstrip('\n') if message.role == 'assistant' else "
    "message['content']) + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same in the language of ollama's Modelfile. Behind its end the model writes.
MODELFILE_TEMPLATE = (
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n"
)


def pre_name(tokenizer) -> str:
    """llama.cpp's name (`tokenizer.ggml.pre`) of how a byte-level BPE splits text.

    Raises:
        ValueError: it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored = json.loads(backend.to_str()) if backend else {"model": {"type": "a slow tokenizer"}}
    model = stored["model"]
    if model["type"] != "BPE":
        raise _unknown(f"is of the type {model['type']}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _unknown("marks the ends of words")
    if (stored["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _unknown(f"changes text before it is split ({stored['normalizer']['type']})")
    pieces = list(_splits(stored["pre_tokenizer"] or {"type": "nothing"}))
    if None not in pieces:
        raise _unknown("is not byte-level")
    takes_words = model.get("ignore_merges")
    patterns = tuple(piece for piece in pieces if piece)
    name = (WHOLE_WORD_NAMES if takes_words else PRE_NAMES).get(patterns)
    if name is None:
        first = "takes whole words and " * bool(takes_words)
        raise _unknown(f"{first}splits text by {', '.join(patterns)}"[:200])
    return name


def _unknown(reason: str) -> ValueError:
    return ValueError(
        "Only byte-level BPE tokenizers can be exported to GGUF whose way of splitting text has a "
        "name in llama.cpp, such as another model's split (Qwen2, Llama 3, GLM-4, GPT-2, DeepSeek) "
        f"or the one that tokenizer.py trains; this one {reason}."
    )


def _splits(step: dict):
    """The regexes of a pre-tokenizer, in order; None for the step that turns text into bytes."""
    kind = step["type"]
    if kind == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _splits(inner)
    elif kind == "ByteLevel" and not step["add_prefix_space"]:
        if step["use_regex"]:
            yield GPT2_SPLIT
        yield None
    elif kind == "Digits":
        yield r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    elif kind == "Split" and (step["behavior"], step["invert"]) in KEEPS_ALL:
        pattern = next(iter(step["pattern"].values()))
        yield pattern.replace("\r", "\\r").replace("\n", "\\n")
    else:
        raise _unknown(f"splits text by {kind} ({json.dumps(step, ensure_ascii=False)[:80]})")


def gguf_templates(tokenizer) -> list[dict[str, str]]:
    """The chat templates of a GGUF file: for talking, and llama.cpp's for tools.

    A tokenizer's own template goes along as it is.
    """
    # The markers around an assistant's words are Hugging Face's. llama.cpp does not know them.
    whole = re.sub(r"{%-? *(end)?generation *-?%}", "", tokenizer.chat_template)
    if tokenizer.chat_template != CHAT_TEMPLATE:
        return [{"name": "default", "template": whole}]
    return [
        {"name": "default", "template": OLLAMA_TEMPLATE},
        {"name": "tool_use", "template": whole},
    ]


def modelfile(name: str, is_chat_model: bool, context: int, stops: list[str]) -> str:
    """An ollama Modelfile for the GGUF file of this name. A base model gets the bare text."""
    template = MODELFILE_TEMPLATE if is_chat_model else "{{ .Prompt }}"
    stops = stops if IM_END in stops or not is_chat_model else [*stops, IM_END]
    lines = [f"FROM ./{name}", f'TEMPLATE """{template}"""', f"PARAMETER num_ctx {context}"]
    lines += ["PARAMETER temperature 0.7"]
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]) + "\n"
