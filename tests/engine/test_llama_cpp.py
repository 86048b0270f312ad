"""What llama.cpp and ollama know by name."""

import json
import re

import jinja2.sandbox
import pytest
from foreign import BYTES, MAKERS, byte_level, save, split
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from corpus.chat_format import Renderer, flatten
from engine.llama_cpp import (
    MODELFILE_TEMPLATE,
    OLLAMA_TEMPLATE,
    gguf_templates,
    modelfile,
    pre_name,
)
from tokenizer import QWEN2_SPLIT, create_tokenizer

# ChatML as ollama has it among the templates that it knows.
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "短"},
    {"role": "user", "content": "问一</think>？"},
    {"role": "assistant", "content": "<think>\n想\n</think>\n\n答一。"},
    {"role": "user", "content": "问二？"},
]


def edits(one: str, other: str) -> int:
    """Levenshtein's distance, by which ollama recognizes a template."""
    row = list(range(len(other) + 1))
    for i, x in enumerate(one, 1):
        new = [i]
        for j, y in enumerate(other, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


def test_ollama_recognizes_the_exported_template(tokenizer):
    default, tools = gguf_templates(tokenizer)
    assert (default["name"], tools["name"]) == ("default", "tool_use")
    assert edits(default["template"], CHATML) < 100
    assert "generation %}" not in tools["template"]


def test_the_exported_template_gives_the_text_of_ours_without_tools(tokenizer):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    for count in range(1, len(TALK) + 1):
        rendered = environment.from_string(OLLAMA_TEMPLATE).render(
            messages=TALK[:count], add_generation_prompt=True
        )
        ours = tokenizer.apply_chat_template(
            TALK[:count], tokenize=False, add_generation_prompt=True
        )
        if TALK[count - 1]["role"] == "user":
            assert rendered == ours


def go(template: str, messages: list[dict]) -> str:
    """What Go's text/template makes of the little that our Modelfile uses."""
    body = re.fullmatch(r"{{- range \.Messages }}(.*){{ end }}(.*)", template, re.DOTALL)
    assert body
    turns = [
        body[1].replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
        for m in messages
    ]
    return "".join(turns) + body[2]


def test_the_modelfile_asks_as_the_model_was_trained(tokenizer):
    plain = [{"role": "system", "content": "短"}, {"role": "user", "content": "问？"}]
    asked = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert go(MODELFILE_TEMPLATE, plain) == asked
    ids, _ = flatten(Renderer(tokenizer).render([plain])[0])
    assert asked.startswith(tokenizer.decode(ids))
    text = modelfile("m.gguf", True, 512, ["</s>"])
    assert text.startswith(f'FROM ./m.gguf\nTEMPLATE """{MODELFILE_TEMPLATE}"""\n')
    for line in ("num_ctx 512", 'stop "</s>"', 'stop "<|im_end|>"'):
        assert f"PARAMETER {line}\n" in text
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile("m.gguf", False, 512, ["</s>"])


def test_a_tokenizers_own_template_goes_along_as_it_is(tokenizer_folder, tmp_path):
    tokenizer = create_tokenizer(model_path=tokenizer_folder)
    tokenizer.chat_template = "{% for m in messages %}{% generation %}x{%- endgeneration -%}"
    assert gguf_templates(tokenizer) == [
        {"name": "default", "template": "{% for m in messages %}x"}
    ]


NAMES = {
    "minimind": "gpt-2",
    "deepseek": "deepseek-v3",
    "glm": "chatglm-bpe",
    "llama3": "llama-bpe",
    "qwen2": "qwen2",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_split_that_llama_cpp_knows_is_known_by_its_regex(tmp_path, name):
    assert pre_name(create_tokenizer(model_path=MAKERS[name](tmp_path))) == NAMES[name]


def test_the_real_qwen3_tokenizer_is_known(real_data):
    assert pre_name(create_tokenizer(model_path=real_data("qwen3_tokenizer"))) == "qwen2"


def test_digits_before_gpt2s_split_are_smollms(tmp_path):
    steps = [pre_tokenizers.Digits(individual_digits=True)]
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    folder = save(tmp_path, byte_level(steps, ["</s>"]), eos_token="</s>")
    assert pre_name(create_tokenizer(model_path=folder)) == "smollm"


def lower(backend):
    backend.normalizer = normalizers.Lowercase()


def with_model(backend: Tokenizer, **changes) -> Tokenizer:
    stored = json.loads(backend.to_str())
    stored["model"] |= changes
    return Tokenizer.from_str(json.dumps(stored))


def whole_words(backend):
    return with_model(backend, ignore_merges=True)


QWEN = [*split(QWEN2_SPLIT), BYTES]
UNKNOWN = {
    "another regex": ([*split(r"\p{L}+"), BYTES], lambda backend: None, r"splits text by \\p{L}\+"),
    "no bytes": (split(QWEN2_SPLIT), lambda backend: None, "is not byte-level"),
    "a space before": (
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        lambda backend: None,
        "splits text by ByteLevel",
    ),
    "lower case": (QWEN, lower, r"changes text before it is split \(Lowercase\)"),
    "whole words": (QWEN, whole_words, r"takes whole words and splits text by \(\?i:"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_split_without_a_name_is_refused_with_the_reason(tmp_path, name):
    steps, change, reason = UNKNOWN[name]
    backend = byte_level(steps, ["</s>"])
    backend = change(backend) or backend
    tokenizer = create_tokenizer(model_path=save(tmp_path, backend, eos_token="</s>"))
    with pytest.raises(ValueError, match=rf"Only byte-level BPE .*; this one {reason}"):
        pre_name(tokenizer)


def test_sentencepiece_and_suffixes_are_refused_with_the_reason(tmp_path):
    llama2 = create_tokenizer(model_path=MAKERS["llama2"](tmp_path / "llama2"))
    with pytest.raises(ValueError, match="this one "):
        pre_name(llama2)
    suffixed = with_model(byte_level(QWEN, ["</s>"]), end_of_word_suffix="</w>")
    folder = save(tmp_path / "suffix", suffixed, eos_token="</s>")
    with pytest.raises(ValueError, match="this one marks the ends of words"):
        pre_name(create_tokenizer(model_path=folder))
    words = Tokenizer(models.WordLevel({"一": 0, "</s>": 1}, unk_token="</s>"))
    folder = save(tmp_path / "words", words, eos_token="</s>")
    with pytest.raises(ValueError, match="this one is of the type WordLevel"):
        pre_name(create_tokenizer(model_path=folder))
