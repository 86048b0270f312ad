"""Advice before a run: what corpus, device and settings say about each other, in three lines."""

import torch

from engine import memory
from engine.memory import StepMemory
from engine.runtime import Runtime
from engine.settings import length_key

MOST = 3  # lines
FEW_TOKENS = 2.0  # of training per parameter; compute-optimal is 20 (arXiv 2203.15556)
MANY_EPOCHS = 4  # up to here repeated text is almost as good as new text (arXiv 2305.16264)
SHORT_ROW, LARGE_CORPUS = 256, 20_000_000  # tokens
SMALL_BATCH = 0.1  # of the card's memory
LARGE_VOCABULARY = 0.5  # of all parameters


def advise(config: dict, model, tokens: int, row_length: int, rt: Runtime, trial=None) -> list[str]:
    """At most three lines, the weightiest first, each with the key to change.

    Args:
        config: its num_epochs is how often the rows are read, also where max_steps ends the run.
        tokens: of the training rows; an epoch trains on each once.
        row_length: tokens of a row.
        trial: (forward_backward, full_batch) of the stage, to count a step's memory.
    """
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        *_about_data(config, tokens, row_length, parameters),
        *_about_device(config, model, rt, trial),
        *_about_vocabulary(config, model, parameters),
    ]
    return [f"Advice: {line}" for line in lines[:MOST]]


def _about_data(config: dict, tokens: int, row_length: int, parameters: int):
    epochs = config["num_epochs"]
    if "d_model" in config and tokens * min(epochs, MANY_EPOCHS) < FEW_TOKENS * parameters:
        yield (
            f"{parameters:,} parameters learn {tokens:,} tokens by heart. More text (dataset) or a "
            "smaller model (d_model, n_layers) serves better."
        )
    if epochs > MANY_EPOCHS:
        yield f"after {MANY_EPOCHS} epochs the same text teaches little that is new (num_epochs)."
    if row_length < SHORT_ROW and tokens > LARGE_CORPUS:
        yield (
            f"rows of {row_length} tokens cut the documents of a corpus of {tokens:,} tokens into "
            f"pieces: 512 or more shows the model their context ({length_key(config)})."
        )


def _about_device(config: dict, model, rt: Runtime, trial):
    if rt.device.type != "cuda":
        return
    if rt.dtype is torch.float16 and torch.cuda.is_bf16_supported(including_emulation=False):
        yield "this card has bf16, which is as fast as fp16 and cannot overflow (mixed_precision)."
    if trial is None:
        return
    card = torch.cuda.get_device_properties(rt.device).total_memory / 2**30
    needed = memory.on_card(
        StepMemory(config, model.config, *trial).peak(
            config["batch_size"], config["gradient_checkpointing"]
        )["total"]
    )
    if needed < SMALL_BATCH * card:
        yield (
            f"a step takes {needed:.1f} of the card's {card:.0f} GiB (estimated): a larger "
            "batch_size, or a larger model, uses the card better."
        )


def _about_vocabulary(config: dict, model, parameters: int):
    embedding = model.get_input_embeddings().weight
    share = embedding.numel() / parameters
    if "d_model" in config and share > LARGE_VOCABULARY:
        yield (
            f"{share:.0%} of the parameters are the embeddings of {embedding.shape[0]:,} tokens: a "
            "smaller vocabulary leaves more to the layers (tokenizer_path None and vocab_size)."
        )
