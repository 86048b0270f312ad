"""Pre-training: text in, a base model out.

python train_llm.py                                      the bundled sample, settings below
python train_llm.py --dataset my_corpus/ --batch_size 16 any key, for this run
torchrun --nproc_per_node 2 train_llm.py                 several GPUs
"""

from collections import Counter
from itertools import islice

import torch

from corpus.packing import PackedCollator, data_fingerprint, target_bytes
from curves import plot_curves
from engine.checkpoint import (
    check_same_data,
    load_checkpoint,
    load_model_folder,
    open_run,
    save_checkpoint,
    save_final,
    say_how_to_resume,
)
from engine.guards import check_memory, explain_out_of_memory, fit_batch_size
from engine.optim import (
    build_optimizers,
    learning_rate_factor,
    optimizer_step,
    set_learning_rate,
)
from engine.report import (
    Meter,
    Tracker,
    describe_run,
    log_line,
    make_say,
    progress_bar,
    validation_line,
)
from engine.settings import resolve_config, run_from_command_line
from engine.sharding import distribute, gradient_sync, make_accelerator, stop_requested
from engine.steps import (
    StepSampler,
    StopSignal,
    check_finite,
    checkpoint_blocks,
    choose_precision,
    compile_blocks,
    count_tokens,
    generate_samples,
    is_due,
    make_loader,
    moe_metrics,
    moe_sums,
    rank_batches,
    seed_everything,
    seed_step,
    to_device,
    validate,
)
from models import CustomLLM, CustomLLMConfig
from train_data import prepare_data, unigram_loss

wandb_config = {
    # model
    "d_model": 512,
    "n_heads": 8,
    "n_kv_heads": None,  # fewer than n_heads: grouped-query attention, a smaller KV cache
    "n_layers": 6,
    "d_ff": 2048,
    "max_seq_len": 128,  # tokens of a row; 512 or more for real corpora
    "dropout": 0.0,  # a corpus that is read once or thrice needs none
    "use_moe": False,
    "num_experts": 4,
    "top_k": 2,  # experts per token
    "moe_d_ff": None,  # width of one expert; None: d_ff
    # data
    "dataset": "data/pretrain_sample.jsonl",  # file, folder, glob or Hub dataset
    "tokenizer_path": None,  # folder or Hub name; None: train one on the dataset
    "vocab_size": 6400,  # of the tokenizer trained here
    "num_workers": 2,  # processes that collate rows ahead
    # optimization
    "batch_size": 32,  # rows of one forward pass; "auto": of 32, as many as fit
    "gradient_accumulation_steps": 1,  # forward passes of one optimizer step
    "learning_rate": 4e-3,  # peak; a model of hundreds of millions wants less
    "num_epochs": 3,
    "max_steps": 0,  # stop earlier; 0: all epochs
    "optimizer": "muon",  # for the blocks' matrices; "adamw": for everything
    "muon_learning_rate": 4e-2,  # peak of the matrices that Muon takes
    "warmup_ratio": 0.05,  # of all steps
    "min_lr_ratio": 0.1,  # of the peak, at the end of the cosine
    "weight_decay": 0.1,  # on matrices only
    "max_grad_norm": 1.0,  # 0: no clipping
    "seed": 42,
    # speed and memory
    "mixed_precision": "fp16",  # "bf16" is as fast on a 3090 and cannot overflow; "no": fp32
    "gradient_checkpointing": False,  # "attention", "full": ever less memory, more time
    "torch_compile": "auto",  # on CUDA only; True: everywhere
    # run
    "init_from": None,  # continue from this model folder instead of random weights
    "output_dir": "checkpoints",
    "log_every": 1,  # in steps, as the three below; each also at the end; 0: never before
    "eval_every": 40,
    "sample_every": 80,
    "save_every": 80,
    "keep_checkpoints": 2,  # the newest so many, and the best
    "resume": "auto",  # go on with an unfinished run of this configuration; False: never
}
DEFAULTS = wandb_config  # train() has a parameter of the same name
SAMPLE_PROMPTS = ["第一条　为了", "红烧肉的做法", "春眠不觉晓，"]


def train(
    project_name: str = "llm-pretrain",
    run_name: str | None = None,
    wandb_config: dict | None = None,
) -> str:
    """Pre-train a model and return its folder, checkpoints/pretrain/<run>/final.

    Args:
        project_name: the wandb project.
        run_name: folder under checkpoints/pretrain; None: the time, or the unfinished run of the
            same configuration.
        wandb_config: any subset of this script's keys.

    Raises:
        ValueError: bad configuration or data, before anything is trained or overwritten.
        NumericalError: loss or gradients not finite; names step, rows, last good checkpoint.
    """
    # 1. Configuration, device, precision
    config = resolve_config(DEFAULTS, wandb_config)
    accelerator = make_accelerator()
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    say = make_say(is_main)
    precision = choose_precision(config["mixed_precision"], device, say)
    check_memory(make_model_config(config, config["vocab_size"]))  # before any work
    seed_everything(config["seed"])

    # 2. Run folder: a new one, or an unfinished one to resume
    run = open_run("pretrain", run_name, config, accelerator)
    if run.final.exists():
        say(f"{run.final} is finished already: nothing to do.")
        return str(run.final)

    # 3. Tokenizer and data
    with accelerator.main_process_first():
        splits, tokenizer = prepare_data(
            config["tokenizer_path"] or config["init_from"],
            config["dataset"],
            config["max_seq_len"],
            config["vocab_size"],
            cache_dir=f"{config['output_dir']}/cache",
        )
    fingerprint = data_fingerprint(splits["train"])
    check_same_data(run, fingerprint)

    # 4. Model and optimizer
    if config["init_from"]:
        model = load_model_folder(
            config["init_from"], tokenizer, config["dropout"], config["max_seq_len"], say
        )
    else:
        model = CustomLLM(make_model_config(config, len(tokenizer)))
    model.to(device).train()
    checkpoint_blocks(model, config["gradient_checkpointing"])
    optimizers = build_optimizers(model, config)
    config = fit_batch_size("train_llm.py", config, model, optimizers, precision, accelerator, say)

    # 5. Resume
    step, tokens_seen = 0, 0
    if run.checkpoint:
        load_checkpoint(run.checkpoint, model, optimizers, precision)
        step, tokens_seen = run.state["step"], run.state["tokens_seen"]
        say(f"Resuming {run.folder} at step {step}.")
    compile_blocks(model, config["torch_compile"], device)
    parallel_model = distribute(accelerator, model, model.model.layers, optimizers)

    # 6. Order of the data
    sampler = StepSampler(len(splits["train"]), config, rank, world, start_step=step)
    collate = PackedCollator(config["max_seq_len"], tokenizer.pad_token_id)
    rows = splits["train"].with_format("numpy")
    batches = iter(make_loader(rows, collate, config["num_workers"], batch_sampler=sampler))
    held_out = splits["validation"].with_format("numpy")
    parts = rank_batches(len(held_out), config["batch_size"], rank, world)
    validation = make_loader(held_out, collate, num_workers=0, batch_sampler=parts)
    validation_bytes = target_bytes(splits["validation"], tokenizer)

    # 7. Tracking, and what is about to happen
    tracker = Tracker(run, project_name, config, is_main)
    say(describe_run(config, model, sampler, precision, config["max_seq_len"]))
    say(f"Validation loss of token frequencies alone: {unigram_loss(splits, len(tokenizer)):.4f}")
    meter = Meter(model, sampler, tokens_seen, device)

    # 8. Loop
    with (
        explain_out_of_memory("train_llm.py", config, model),
        StopSignal() as stop,
        progress_bar(sampler, is_main) as bar,
    ):
        while step < sampler.total_steps:
            # All micro-batches of the step first: each loss is divided by all their targets.
            micro_batches = list(islice(batches, sampler.micro_batches(step)))
            num_items, tokens = count_tokens(micro_batches, accelerator)
            factor = learning_rate_factor(step, sampler.total_steps, config)
            learning_rates = set_learning_rate(optimizers, factor)
            seed_step(config["seed"], step, rank)

            step_loss, routed = torch.zeros((), device=device), Counter()
            for index, batch in enumerate(micro_batches):
                batch = to_device(batch, device)
                is_last = index == len(micro_batches) - 1
                with gradient_sync(accelerator, parallel_model, is_last):
                    with precision.autocast():
                        output = parallel_model(
                            **batch, num_items_in_batch=num_items, skip_logits=True
                        )
                    # Ranks' gradients are averaged: times their number, they are summed.
                    precision.scaler.scale(output.loss * world).backward()
                step_loss += output.loss.detach()
                routed.update(moe_sums(output, batch))
                del output  # and its graph, before the next forward
            grad_norm = optimizer_step(model, optimizers, precision, config["max_grad_norm"])
            step += 1
            meter.count(tokens)
            bar.update()

            stopping = stop_requested(stop, accelerator)
            due = is_due(config, step, sampler.total_steps, stopping)
            if due["log"]:
                metrics = {
                    "train/loss": float(accelerator.reduce(step_loss, reduction="sum")),
                    **learning_rates,
                    "train/grad_norm": float(grad_norm),
                    "train/epoch": step / sampler.steps_per_epoch,
                    **moe_metrics(routed, tokens, accelerator),
                    **precision.metrics(),
                    **meter.read(step),
                }
                check_finite(metrics["train/loss"], precision, step, run.checkpoint, sampler)
                tracker.log(metrics, step)
                say(log_line(metrics, step, sampler.total_steps))
            val_loss = None
            with meter.paused():
                if due["eval"]:
                    metrics = validate(model, validation, validation_bytes, precision, accelerator)
                    val_loss = metrics["val/loss"]
                    check_finite(val_loss, precision, step, run.checkpoint, sampler)
                    tracker.log(metrics, step)
                    say(validation_line(metrics, step))
                if due["sample"]:
                    samples = generate_samples(model, tokenizer, SAMPLE_PROMPTS, precision)
                    tracker.log_samples(SAMPLE_PROMPTS, samples, step, say)
                if due["save"]:
                    state = {"step": step, "tokens_seen": meter.tokens_seen, "val_loss": val_loss}
                    state |= {"data_fingerprint": fingerprint, "wandb_id": tracker.wandb_id}
                    save_checkpoint(run, model, optimizers, precision, state, config, is_main)
            if stopping and step < sampler.total_steps:
                tracker.finish()
                say_how_to_resume(run, stop, say)
                raise SystemExit(0)

    # 9. Final save
    if is_main:
        plot_curves(run.folder)  # first: a run that has its final folder is never touched again
    save_final(run, model, tokenizer, is_main)
    tracker.finish()
    accelerator.wait_for_everyone()
    say(f"Finished: {run.final}")
    return str(run.final)


def make_model_config(config: dict, vocab_size: int) -> CustomLLMConfig:
    """The vocabulary is padded to a multiple of 64, which matrix products on a GPU like."""
    names = ("d_model", "n_heads", "n_kv_heads", "n_layers", "d_ff", "max_seq_len", "dropout")
    names += ("use_moe", "num_experts", "top_k", "moe_d_ff")
    return CustomLLMConfig(-(-vocab_size // 64) * 64, **{name: config[name] for name in names})


def main():
    run_from_command_line(train, wandb_config)


if __name__ == "__main__":
    main()
