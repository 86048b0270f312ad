import json
import sys
import urllib.request

import numpy as np
import pytest
import torch
from foreign import MAKERS
from tiny import peer, pretrain_config
from transformers import AutoTokenizer

from export_gguf import export, gguf_tensors, main
from models import CustomLLM, CustomLLMConfig
from tokenizer import create_tokenizer, encode_plain
from train_llm import train

gguf = pytest.importorskip("gguf", reason="an extra: pip install gguf")
pytestmark = pytest.mark.slow  # the models are trained


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def model_folder(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("export")
    changes = {"use_moe": request.param, "moe_d_ff": 32, "num_epochs": 4, "learning_rate": 1e-2}
    return train(wandb_config=pretrain_config(folder, **changes))


def text(field) -> str:
    return bytes(field.parts[field.data[0]]).decode()


def test_every_weight_is_in_the_file_under_llama_cpps_name(model_folder, tmp_path):
    reader = gguf.GGUFReader(export(model_folder, str(tmp_path / "model.gguf"), "f32"))
    model = CustomLLM.from_pretrained(model_folder)
    expected = gguf_tensors(model)
    assert {t.name for t in reader.tensors} == set(expected)
    assert sum(t.numel() for t in expected.values()) == sum(p.numel() for p in model.parameters())
    for tensor in reader.tensors:
        assert np.array_equal(
            tensor.data.reshape(expected[tensor.name].shape), expected[tensor.name].numpy()
        )
    architecture = text(reader.fields["general.architecture"])
    assert architecture == ("qwen3moe" if model.config.use_moe else "qwen3")
    assert reader.fields[f"{architecture}.block_count"].parts[-1][0] == 2


def test_the_tokenizer_goes_along_with_its_split_and_control_tokens(model_folder, tmp_path):
    reader = gguf.GGUFReader(export(model_folder, str(tmp_path / "model.gguf"), "f16"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert text(reader.fields["tokenizer.ggml.pre"]) == "qwen2"
    tokens = reader.fields["tokenizer.ggml.tokens"]
    names = [bytes(tokens.parts[i]).decode() for i in tokens.data]
    assert names[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(names) == CustomLLM.from_pretrained(model_folder).config.vocab_size
    kinds = reader.fields["tokenizer.ggml.token_type"]
    control = [n for n, i in zip(names, kinds.data, strict=True) if kinds.parts[i][0] == 3]
    assert set(control) == {"<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    template = text(reader.fields["tokenizer.chat_template"])
    assert "<|im_start|>" in template
    assert "generation %" not in template


def test_smaller_types_shrink_matrices_and_leave_norms_alone(model_folder, tmp_path):
    sizes = []
    for dtype in ("f32", "f16", "q8_0"):
        path = export(model_folder, str(tmp_path / f"{dtype}.gguf"), dtype)
        sizes.append(path.stat().st_size)
        kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(path).tensors}
        assert kinds["output_norm.weight"] == gguf.GGMLQuantizationType.F32
    assert sizes == sorted(sizes, reverse=True)
    assert kinds["blk.0.attn_q.weight"] == gguf.GGMLQuantizationType.Q8_0


def test_what_cannot_be_exported_is_one_clear_error(tmp_path, model_folder):
    with pytest.raises(ValueError, match="nowhere"):
        export("nowhere", str(tmp_path / "a.gguf"))
    for output in (str(tmp_path), str(tmp_path / "absent" / "a.gguf")):
        with pytest.raises(ValueError, match="name a file in a folder that exists"):
            export(model_folder, output)
    tokenizer = create_tokenizer(model_path=model_folder)
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    CustomLLM.from_pretrained(model_folder).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"Only byte-level BPE .*'s split .* tokenizer\.py trains"):
        export(str(tmp_path / "other"), str(tmp_path / "a.gguf"))
    assert not list(tmp_path.glob("a.gguf*"))
    assert torch.is_tensor(CustomLLM.from_pretrained(model_folder).lm_head.weight)


def test_a_modelfile_is_written_beside_and_never_over_another(model_folder, tmp_path):
    path = export(model_folder, str(tmp_path / "model.gguf"), modelfile=True)
    text = path.with_name("Modelfile").read_text(encoding="utf-8")
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\n'), "a base model"
    assert 'PARAMETER stop "<|endoftext|>"' in text
    export(model_folder, str(path), modelfile=True)
    path.with_name("Modelfile").write_text("FROM llama3\n")
    with pytest.raises(ValueError, match="Modelfile is there already and says something else"):
        export(model_folder, str(path), modelfile=True)
    assert path.with_name("Modelfile").read_text() == "FROM llama3\n"


def export_untrained(folder, tokenizer) -> str:
    """The GGUF file of a tiny model with this tokenizer."""
    size = max(tokenizer.get_vocab().values()) + 1
    config = CustomLLMConfig(size, d_model=64, n_heads=2, n_layers=1, d_ff=64, max_seq_len=128)
    CustomLLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(export(str(folder / "model"), str(folder / "model.gguf"), "f32"))


def test_the_gaps_of_a_vocabulary_are_unused_tokens(tmp_path):
    folder = MAKERS["qwen2"](tmp_path / "tokenizer")
    stored = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    last = max(stored["model"]["vocab"], key=stored["model"]["vocab"].get)
    stored["model"]["vocab"][last] += 5
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    tokenizer = create_tokenizer(model_path=folder)
    reader = gguf.GGUFReader(export_untrained(tmp_path, tokenizer))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    gap = stored["model"]["vocab"][last] - 2
    assert tokens[gap] == f"[PAD{gap}]"
    assert all(tokens[index] == name for name, index in tokenizer.get_vocab().items())


@pytest.mark.peer
@pytest.mark.parametrize("name", ["minimind", "deepseek", "glm", "llama3", "qwen2"])
def test_llama_cpp_splits_text_as_other_projects_tokenizers_do(tmp_path, name):
    tokenizer = create_tokenizer(model_path=MAKERS[name](tmp_path / "tokenizer"))
    llama = LlamaCpp(export_untrained(tmp_path, tokenizer))
    for text in [*MIXED, "1234567 tests' we'LL 天地12 玄黄"]:
        ids = encode_plain(tokenizer, [text])[0]
        assert llama.tokenize(text, special=False) == ids, text


def test_the_command_without_gguf_says_in_one_line_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(sys, "argv", ["export_gguf.py", "final", "model.gguf"])
    with pytest.raises(SystemExit, match="error: exporting needs `pip install gguf`"):
        main()


MIXED = [
    "天地玄黄，宇宙洪荒。",
    "The quick brown fox's 3 tails, don't they?",
    "在2024年，价格上涨12.5%！\n\n  第3条　为了",
    "emoji 😀👩‍👩‍👧 fi ﬁ é ①",
    "  leading and   trailing  \n",
    "混排mixed文字123abc，。\t\ttab",
]


class LlamaCpp:
    """llama.cpp's own server, in this process and on the loopback address."""

    def __init__(self, path, cache_type: str = "F32"):
        xllamacpp = peer("xllamacpp")
        options = xllamacpp.CommonParams()
        options.model.path, options.n_ctx, options.cpuparams.n_threads = str(path), 256, 1
        options.hostnames, options.port, options.n_parallel = ["127.0.0.1"], 0, 1
        kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache_type}")
        options.cache_type_k = options.cache_type_v = kind
        # Its flash attention rounds to 16 bits.
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.warmup, options.verbosity = False, 0
        self.server = xllamacpp.Server(options)

    def post(self, path: str, **body) -> dict:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def tokenize(self, text: str, special: bool) -> list[int]:
        asked = {"content": text, "add_special": False, "parse_special": special}
        return self.post("/tokenize", **asked)["tokens"]

    def next_log_probs(self, prompt: list[int], vocab_size: int) -> np.ndarray:
        """Log-probs (vocab_size,) of the token after a prompt; NaN where it gives none."""
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocab_size}
        # It reports nothing of a token that is half a character: the bias makes it choose a whole
        # one. The log-probs are those before the bias.
        asked["logit_bias"] = [[self.tokenize("a", special=False)[0], 1e6]]
        answer = self.post("/completion", **asked)
        log_probs = np.full(vocab_size, np.nan)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            log_probs[token["id"]] = token["logprob"]
        return log_probs


def compare_log_probs(model, llama: LlamaCpp, ids: list[int], first: int, tolerance: float):
    """Ours and llama.cpp's log-probs of the whole vocabulary, at each position from `first` on."""
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    for length in range(first, len(ids) + 1):
        theirs = llama.next_log_probs(ids[:length], model.config.vocab_size)
        known = ~np.isnan(theirs)
        assert known.mean() > 0.99
        np.testing.assert_allclose(theirs[known], ours[length - 1][known], atol=tolerance)
        likeliest = int(np.nanargmax(theirs))
        assert ours[length - 1][likeliest] >= ours[length - 1][known].max() - tolerance


@pytest.mark.peer
def test_llama_cpp_reads_the_file_as_we_mean_it(model_folder, tmp_path):
    llama = LlamaCpp(export(model_folder, str(tmp_path / "model.gguf"), "f32"))
    tokenizer = create_tokenizer(model_path=model_folder)
    for text in MIXED:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama.tokenize(text, special=False) == ids, text
    marked = "<|im_start|>user\n天地<|im_end|>"
    ids = tokenizer(marked, add_special_tokens=False)["input_ids"]
    assert llama.tokenize(marked, special=True) == ids

    model = CustomLLM.from_pretrained(model_folder).eval()
    prompt = tokenizer("天地", return_tensors="pt")["input_ids"]
    # Its server takes no more tokens than the context of 32 that the file names.
    greedy = model.generate(
        prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=-1
    )[0]
    compare_log_probs(model, llama, greedy.tolist(), prompt.shape[1], tolerance=1e-3)


def call(city: str) -> dict:
    arguments = json.dumps({"城市": city}, ensure_ascii=False)
    return {"id": city, "type": "function", "function": {"name": "天气", "arguments": arguments}}


@pytest.mark.peer
def test_llama_cpp_renders_tools_and_reasoning_with_the_template_as_we_do(model_folder, tmp_path):
    llama = LlamaCpp(export(model_folder, str(tmp_path / "model.gguf"), "f32"))
    user, again = ({"role": "user", "content": text} for text in ("北京天气？", "谢谢，上海呢？"))
    answer = {"role": "assistant", "content": "<think>\n想\n</think>\n\n晴。"}
    calls = {"role": "assistant", "content": "我查。", "tool_calls": [call("北京"), call("上海")]}
    calls["reasoning_content"] = "查两个。\n"
    results = [{"role": "tool", "content": text, "tool_call_id": text} for text in ("晴", "雨")]
    function = {"name": "天气", "description": '"今天"', "parameters": {"type": "object"}}
    tools = {"tools": [{"type": "function", "function": function}]}
    tokenizer = create_tokenizer(model_path=model_folder)
    for messages, options in [
        ([{"role": "system", "content": "短"}, user, answer, again], {}),
        ([user, answer, again, calls, *results], tools),
        ([{"role": "system", "content": "短"}, user, calls, *results, answer, again], tools),
    ]:
        ours = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
        assert llama.post("/apply-template", messages=messages, **options)["prompt"] == ours


@pytest.mark.peer
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_llama_cpp_loads_the_smaller_types(model_folder, tmp_path, dtype):
    llama = LlamaCpp(export(model_folder, str(tmp_path / "model.gguf"), dtype))
    model = CustomLLM.from_pretrained(model_folder).eval()
    ids = create_tokenizer(model_path=model_folder)("天地玄黄，宇宙")["input_ids"]
    compare_log_probs(model, llama, ids, 1, tolerance=0.1)
