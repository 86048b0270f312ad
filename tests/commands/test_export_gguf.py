import sys

import numpy as np
import pytest
import torch
from tiny import pretrain_config
from transformers import AutoTokenizer

from export_gguf import export, gguf_tensors, main
from models import CustomLLM
from tokenizer import create_tokenizer
from train_llm import train

gguf = pytest.importorskip("gguf", reason="an extra: pip install gguf")


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


def test_llama_cpp_reads_the_file_as_we_mean_it(model_folder, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="a peer: pip install llama-cpp-python")
    path = export(model_folder, str(tmp_path / "model.gguf"), "f32")
    llama = llama_cpp.Llama(
        str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    tokenizer = create_tokenizer(model_path=model_folder)
    for text in MIXED:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == ids, text
    marked = "<|im_start|>user\n天地<|im_end|>"
    ids = tokenizer(marked, add_special_tokens=False)["input_ids"]
    assert llama.tokenize(marked.encode(), add_bos=False, special=True) == ids

    model = CustomLLM.from_pretrained(model_folder).eval()
    prompt = tokenizer("天地", return_tensors="pt")["input_ids"]
    greedy = model.generate(
        prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=-1
    )[0]
    llama.eval(greedy.tolist())
    with torch.no_grad():
        expected = model(greedy[None]).logits[0].numpy()
    theirs = np.asarray(llama.scores[: len(greedy)])
    np.testing.assert_allclose(theirs, expected, atol=1e-3)
    start = prompt.shape[1] - 1
    assert theirs[start:-1].argmax(-1).tolist() == greedy[start + 1 :].tolist()


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_llama_cpp_loads_the_smaller_types(model_folder, tmp_path, dtype):
    llama_cpp = pytest.importorskip("llama_cpp", reason="a peer: pip install llama-cpp-python")
    path = export(model_folder, str(tmp_path / "model.gguf"), dtype)
    llama = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    ids = create_tokenizer(model_path=model_folder)("天地玄黄，宇宙")["input_ids"]
    llama.eval(ids)
    with torch.no_grad():
        logits = CustomLLM.from_pretrained(model_folder)(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(np.asarray(llama.scores[: len(ids)]), logits, atol=0.1)
