"""Models from folders: of this project, or any other of the Qwen3 architecture."""

import contextlib
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from engine.runtime import fast_dtype
from models import CustomLLM
from tokenizer import IM_END, create_tokenizer


def load_model_folder(path, tokenizer, dropout, max_length: int, say) -> CustomLLM:
    """A model in fp32 from any folder of the Qwen3 architecture. Says what it inherits.

    A context shorter than max_length grows to it: RoPE needs no new weights. A dropout of "auto"
    is 0, until guards.fit_regularization knows better.

    Raises:
        ValueError: no such folder, another architecture, or a vocabulary smaller than the
            tokenizer's.
    """
    check_model_folder(path)
    dropout = 0.0 if dropout == "auto" else dropout
    model = CustomLLM.from_pretrained(path, dtype=torch.float32, dropout=dropout)
    config = model.config
    config.max_seq_len = max(config.max_seq_len, max_length)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, more than the {config.vocab_size} of the "
            f"model in {path}: use that folder's own tokenizer."
        )
    say(
        f"Starting from {path}: d_model {config.d_model}, n_layers {config.n_layers}, n_heads "
        f"{config.n_heads}, max_seq_len {config.max_seq_len}, vocabulary {config.vocab_size:,}."
    )
    return model


def check_model_folder(path):
    if not Path(path, "config.json").is_file():
        raise ValueError(
            f"{path}: no model folder there (no config.json; looked from {Path.cwd()})."
        )


def open_model_folder(path: str):
    """(model in fp32 on the best device and in eval mode, its tokenizer), as the commands need it.

    Raises:
        ValueError: as load_model_folder.
    """
    check_model_folder(path)
    disable_progress_bar()
    tokenizer = create_tokenizer(model_path=str(path))
    model = load_model_folder(path, tokenizer, 0.0, 0, lambda text: None)
    # check_available: torch built for CUDA names it also where there is no driver.
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    module: torch.nn.Module = model.eval()
    module.to(device)
    return model, tokenizer


def is_chat_model(config, tokenizer) -> bool:
    """Whether a model answers through a chat template, and does not continue the text.

    A final folder says which stage trained it. Of another folder the end token tells: a chat model
    ends its turns, a base model ends documents.
    """
    stage = getattr(config, "training_stage", None)
    return stage != "pretrain" if stage else tokenizer.eos_token == IM_END


@contextlib.contextmanager
def fast_inference(model, dtype: torch.dtype | None = None):
    """Inside, the model computes in 16 bits, without gradients. Bits per byte stay within 1e-3.

    The blocks' matrices are cast once and stay so. Autocast would cast them for every token.
    Embeddings, norms and routers stay in fp32.

    dtype: fp32: as it is; None: the GPU's best, and fp32 on a CPU, where 16 bits may be emulated,
        and a product with one token gains nothing.
    """
    kind = model.device.type
    dtype = dtype or (fast_dtype(model.device) if kind == "cuda" else torch.float32)
    is_narrow = dtype.itemsize == 2
    for name, module in model.model.layers.named_modules():
        if is_narrow and isinstance(module, torch.nn.Linear) and not name.endswith("mlp.gate"):
            module.to(dtype)
    with torch.no_grad(), torch.autocast(kind, dtype, enabled=is_narrow):
        yield
