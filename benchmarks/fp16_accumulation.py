"""What training loses when a GPU sums products in fp16, simulated on a CPU.

    python benchmarks/fp16_accumulation.py --data '../shared/data/real/pt_*.xz' --folder /tmp/sums
    python benchmarks/fp16_accumulation.py … --chunk 0 16 8 --steps 600 --seeds 0 1

A GeForce multiplies fp16 matrices twice as fast when their products are summed in fp16
(`torch.backends.cuda.matmul.allow_fp16_accumulation`). Here the blocks' projections sum that way in
forward and for the gradient of their input: a tensor core adds `chunk` products exactly, then
rounds the running sum to fp16. Weights' gradients, the head and attention sum in fp32. Chunk 0:
all sums in fp32, the result rounded to fp16. The rest is fp16 training as on a GPU: fp32 weights,
fp16 activations and gradients, dynamic loss scale, clipping, Muon.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from learning_rates import MODEL
from peers import ROOT  # noqa: F401  # finds the project

import train_llm
from corpus import cache
from corpus.packing import PackedCollator
from engine import optim
from engine.evaluation import validate
from engine.runtime import make_runtime
from models import CustomLLM
from train_data import prepare_data


class Summed(torch.autograd.Function):
    """x @ weight.T in fp16: x (..., d_in), weight (d_out, d_in) in fp32, the result in fp32."""

    @staticmethod
    def forward(ctx, x, weight, chunk: int):
        flat, half = x.flatten(0, -2).half(), weight.half()
        ctx.save_for_backward(flat, half)
        ctx.chunk = chunk
        return product(flat, half.T, chunk).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, *gradients):
        flat, half = ctx.saved_tensors
        shape = gradients[0].shape[:-1]
        grad = gradients[0].flatten(0, -2).half()
        of_weight = (grad.float().T @ flat.float()).half().float()
        return product(grad, half, ctx.chunk).view(*shape, -1), of_weight, None


def product(a: torch.Tensor, b: torch.Tensor, chunk: int) -> torch.Tensor:
    """a (tokens, inner) @ b (inner, d_out), both fp16. The running sum is rounded to fp16."""
    a, b = a.float(), b.float()
    if not chunk:
        return (a @ b).half().float()
    total = a.new_zeros(len(a), b.shape[1])
    for start in range(0, a.shape[1], chunk):
        part = slice(start, start + chunk)
        total = total.addmm_(a[:, part], b[part]).half().float()
    return total


class SummedLinear(torch.nn.Linear):
    chunk = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return Summed.apply(input, self.weight, SummedLinear.chunk)


def train(arguments, chunk: int, seed: int) -> dict:
    """One run: its validation loss and the scale that the loss ends with."""
    folder = Path(arguments.folder)
    splits, tokenizer = prepare_data(
        None,
        arguments.data,
        MODEL["max_seq_len"],
        MODEL["vocab_size"],
        None,
        10,
        validation_tokens=65_536,
        cache_dir=folder / "cache",
    )
    torch.manual_seed(seed)
    config = train_llm.DEFAULTS | MODEL | {"max_steps": arguments.steps, "weight_decay": 0.1}
    model = CustomLLM(train_llm.make_model_config(config, len(tokenizer)))
    SummedLinear.chunk = chunk
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.lm_head:
            layer.__class__ = SummedLinear
    rt = make_runtime(torch.float16, torch.device("cpu"))  # for its scaler
    optimizers = optim.build(model, config)
    collate = PackedCollator(MODEL["max_seq_len"], tokenizer.pad_token_id)
    rows, size = splits["train"].with_format("numpy"), MODEL["batch_size"]
    order = torch.randperm(len(rows), generator=torch.manual_seed(seed)).tolist()
    run: Any = SimpleNamespace(
        total_steps=arguments.steps, tokens_per_step=size * MODEL["max_seq_len"]
    )
    for step in range(1, arguments.steps + 1):
        chosen = [order[(step * size + i) % len(order)] for i in range(size)]
        loss = model(**collate([rows[i] for i in chosen]), skip_logits=True).loss
        rt.scaler.scale(loss).backward()
        optim.set_learning_rate(optimizers, step, run, config)
        optim.step(model, optimizers, rt, config["max_grad_norm"])
        if step % 50 == 0:
            print(f"chunk {chunk}, seed {seed}, step {step}: loss {loss:.4f}", flush=True)
    held_out = splits["validation"].with_format("numpy")
    batches = [collate([row]) for row in held_out]
    plain = make_runtime(None, rt.device)  # no autocast: the layers round by themselves
    loss = validate(model, batches, cache.target_bytes(held_out, tokenizer), plain)["val/loss"]
    return {"chunk": chunk, "seed": seed, "loss": loss, "loss scale": rt.scaler.get_scale()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="corpora of real text")
    parser.add_argument("--folder", required=True, help="for the prepared data and results")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--chunk", type=int, nargs="+", default=[0, 16, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for chunk in arguments.chunk:
            print(json.dumps(train(arguments, chunk, seed)), flush=True)


if __name__ == "__main__":
    main()
