"""Write a checkpoint as one GGUF file, for llama.cpp, ollama and LM Studio.

    python export_gguf.py checkpoints/dpo/…/final model.gguf --dtype q8_0

    python export_gguf.py checkpoints/dpo/…/final model.gguf --modelfile    and ollama's Modelfile

Needs `pip install gguf`. llama.cpp's own converter refuses a tokenizer that it does not know. Here
one is known by how it splits text, and the file says so (`tokenizer.ggml.pre`, such as qwen2).
"""

import argparse
import json
import os
import re
from pathlib import Path

import numpy as np
import torch

from engine import llama_cpp
from engine.command import as_command
from engine.model_folder import is_chat_model, open_model_folder
from tokenizer import IM_END

DTYPES = ("f32", "f16", "q8_0")
LAYER_NAMES = {  # Qwen3's -> llama.cpp's
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_tensors(model) -> dict[str, torch.Tensor]:
    """llama.cpp's names and tensors. A layer's experts are stacked to (experts, out, in)."""
    tensors: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # without it llama.cpp uses the embedding
        if match := EXPERT.fullmatch(name):
            layer, expert, kind = match.groups()
            stacked = experts.setdefault(f"blk.{layer}.ffn_{kind}_exps.weight", {})
            stacked[int(expert)] = tensor
        elif match := LAYER.fullmatch(name):
            tensors[f"blk.{match[1]}.{LAYER_NAMES[match[2]]}.weight"] = tensor
        else:
            tensors[OTHERS[name]] = tensor
    for name, stacked in experts.items():
        tensors[name] = torch.stack([stacked[index] for index in range(len(stacked))])
    return tensors


def write_hyper_parameters(writer, config):
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.use_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_d_ff)


def write_tokenizer(writer, tokenizer, vocab_size: int):
    """Tokens, types, merges, special ids, chat templates.

    Raises:
        ValueError: llama.cpp does not know how the tokenizer splits text.
    """
    import gguf

    split = llama_cpp.pre_name(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # A published vocabulary may leave out numbers between its tokens.
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [vocabulary.get(index, f"[PAD{index}]") for index in range(max(vocabulary) + 1)]
    types = [
        gguf.TokenType.NORMAL if index in vocabulary else gguf.TokenType.UNUSED
        for index in range(len(tokens))
    ]
    for index, token in tokenizer.added_tokens_decoder.items():
        kind = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
        tokens[index], types[index] = token.content, kind
    for index in range(len(tokens), vocab_size):  # the rows that pad the embedding
        tokens.append(f"[PAD{index}]")
        types.append(gguf.TokenType.UNUSED)
    merges = [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_eot_token_id(tokenizer.convert_tokens_to_ids(IM_END))
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(llama_cpp.gguf_templates(tokenizer))


def as_numpy(name: str, tensor: torch.Tensor, dtype: str):
    """(array, type). llama.cpp needs norms and the router in f32."""
    import gguf

    array = tensor.detach().float().cpu().numpy()
    if array.ndim == 1 or "ffn_gate_inp" in name or dtype == "f32":
        return array, gguf.GGMLQuantizationType.F32
    kind = gguf.GGMLQuantizationType.Q8_0
    if dtype == "f16" or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return array.astype(np.float16), gguf.GGMLQuantizationType.F16
    return gguf.quants.quantize(array, kind), kind


def export(folder: str, output: str, dtype: str = "f16", modelfile: bool = False) -> Path:
    """Write `output` whole or not at all. Returns its path.

    modelfile: also write a Modelfile for ollama beside it.

    Raises:
        ValueError: the folder has no model, llama.cpp cannot know its tokenizer, gguf is not
            installed, or another Modelfile is there.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError("exporting needs `pip install gguf`.") from error
    target, temporary = Path(output), Path(output + ".tmp")
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(f"{output}: name a file in a folder that exists.")
    model, tokenizer = open_model_folder(folder)
    if modelfile:
        write_modelfile(target, model.config, tokenizer)
    writer = gguf.GGUFWriter(temporary, "qwen3moe" if model.config.use_moe else "qwen3")
    try:
        writer.add_name(Path(folder).resolve().parent.name)
        file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
        writer.add_file_type(gguf.LlamaFileType[file_types[dtype]])
        write_hyper_parameters(writer, model.config)
        write_tokenizer(writer, tokenizer, model.config.vocab_size)
        for name, tensor in gguf_tensors(model).items():
            array, kind = as_numpy(name, tensor, dtype)
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def write_modelfile(target: Path, config, tokenizer):
    """With it `ollama create` needs to guess nothing."""
    stops = tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id])
    is_chat = is_chat_model(config, tokenizer)
    text = llama_cpp.modelfile(target.name, is_chat, config.max_seq_len, stops)
    path = target.with_name("Modelfile")
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} is there already and says something else: move it away.")
    path.write_text(text, encoding="utf-8")


@as_command()
def main():
    parser = argparse.ArgumentParser(description="Write a checkpoint as a GGUF file.")
    parser.add_argument("folder", help="a final folder")
    parser.add_argument("output", help="the .gguf file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="f16")
    parser.add_argument("--modelfile", action="store_true", help="also ollama's, beside it")
    arguments = parser.parse_args()
    try:
        path = export(arguments.folder, arguments.output, arguments.dtype, arguments.modelfile)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{path}: {path.stat().st_size / 2**20:,.1f} MiB")
    if arguments.modelfile:
        print(f"{path.with_name('Modelfile')}: `ollama create my-llm -f` this file")


if __name__ == "__main__":
    main()
