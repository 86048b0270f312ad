"""Supervised fine-tuning: conversations in, a chat model out.

python sft_train.py                                      the bundled sample, settings below
python sft_train.py --dataset my_chats.jsonl             any key, for this run
torchrun --nproc_per_node 2 sft_train.py                 several GPUs
"""

from collections import Counter
from itertools import islice

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from corpus.chat_format import as_prompt
from corpus.packing import check_splits, data_fingerprint, target_bytes
from corpus.readers import find_final, settings_hash
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
from engine.guards import explain_out_of_memory, fit_batch_size
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
from sft_data import prepare_sft_data
from tokenizer import IM_END, create_tokenizer
from train_data import prepare_data

wandb_config = {
    # model
    "init_from": None,  # any Qwen3-architecture folder; None: the newest pre-trained model
    "max_length": 256,  # tokens of a row; conversations are packed into it whole
    "dropout": 0.0,
    # data
    "dataset": "data/sft_sample.jsonl",  # file, folder or glob
    "pretrain_mix_ratio": 0.0,  # share of rows from pretrain_dataset, against forgetting
    "pretrain_dataset": "data/pretrain_sample.jsonl",
    "num_workers": 2,  # processes that collate rows ahead
    # optimization
    "batch_size": 16,  # rows of one forward pass; "auto": of 32, as many as fit
    "gradient_accumulation_steps": 1,  # forward passes of one optimizer step
    "learning_rate": 5e-4,  # peak; a larger pre-trained model wants 1e-5 to 1e-4
    "num_epochs": 3,
    "max_steps": 0,  # stop earlier; 0: all epochs
    "optimizer": "muon",  # for the blocks' matrices; "adamw": for everything
    "muon_learning_rate": 5e-3,  # peak of the matrices that Muon takes
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
    "output_dir": "checkpoints",
    "log_every": 1,  # in steps, as the three below; each also at the end; 0: never before
    "eval_every": 20,
    "sample_every": 40,
    "save_every": 40,
    "keep_checkpoints": 2,  # the newest so many, and the best
    "resume": "auto",  # go on with an unfinished run of this configuration; False: never
}
DEFAULTS = wandb_config  # train_sft() has a parameter of the same name
SAMPLE_PROMPTS = [
    "红烧肉怎么做？",
    "做西红柿炒鸡蛋需要准备哪些原料？",
    "《劳动合同法》第三条是怎么规定的？",
]


def train_sft(
    project_name: str = "llm-sft",
    run_name: str | None = None,
    wandb_config: dict | None = None,
    data_path: str | None = None,
) -> str:
    """Fine-tune a model on conversations; returns its folder, checkpoints/sft/<run>/final.

    Args:
        project_name: the wandb project.
        run_name: folder under checkpoints/sft; None: the time, or the unfinished run of the same
            configuration.
        wandb_config: any subset of this script's keys.
        data_path: the key `dataset`, as an argument.

    Raises:
        ValueError: bad configuration or data, before anything is trained or overwritten.
        NumericalError: loss or gradients not finite; names step, rows, last good checkpoint.
    """
    # 1. Configuration, device, precision
    config = resolve_config(DEFAULTS, wandb_config)
    config["dataset"] = data_path or config["dataset"]
    accelerator = make_accelerator()
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    say = make_say(is_main)
    precision = choose_precision(config["mixed_precision"], device, say)
    config["init_from"] = str(
        config["init_from"] or find_final(config["output_dir"], "pretrain", "train_llm.py")
    )
    seed_everything(config["seed"])

    # 2. Run folder: a new one, or an unfinished one to resume
    run = open_run("sft", run_name, config, accelerator)
    if run.final.exists():
        say(f"{run.final} is finished already: nothing to do.")
        return str(run.final)

    # 3. Tokenizer and data
    tokenizer = create_tokenizer(model_path=config["init_from"])
    tokenizer.eos_token = IM_END  # a chat model stops at the end of its turn
    with accelerator.main_process_first():
        splits, collate = prepare_sft_data(
            tokenizer,
            config["dataset"],
            config["max_length"],
            split=None,
            cache_dir=f"{config['output_dir']}/cache",
        )
        if config["pretrain_mix_ratio"]:
            splits["train"] = mix_in_pretraining(splits["train"], config)
    check_splits(splits, config["dataset"])
    fingerprint = data_fingerprint(splits["train"])
    check_same_data(run, fingerprint)

    # 4. Model and optimizer
    model = load_model_folder(
        config["init_from"], tokenizer, config["dropout"], config["max_length"], say
    )
    model.to(device).train()
    checkpoint_blocks(model, config["gradient_checkpointing"])
    optimizers = build_optimizers(model, config)
    config = fit_batch_size("sft_train.py", config, model, optimizers, precision, accelerator, say)

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
    rows = splits["train"].with_format("numpy")
    batches = iter(make_loader(rows, collate, config["num_workers"], batch_sampler=sampler))
    held_out = splits["validation"].with_format("numpy")
    parts = rank_batches(len(held_out), config["batch_size"], rank, world)
    validation = make_loader(held_out, collate, num_workers=0, batch_sampler=parts)
    validation_bytes = target_bytes(splits["validation"], tokenizer)

    # 7. Tracking, and what is about to happen
    tracker = Tracker(run, project_name, config, is_main)
    say(describe_run(config, model, sampler, precision, config["max_length"]))
    prompts = [as_prompt(tokenizer, text) for text in SAMPLE_PROMPTS]
    if step == 0:
        say("Before fine-tuning:")
        samples = generate_samples(model, tokenizer, prompts, precision)
        tracker.log_samples(SAMPLE_PROMPTS, samples, step, say)
    meter = Meter(model, sampler, tokens_seen, device)

    # 8. Loop
    with (
        explain_out_of_memory("sft_train.py", config, model),
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
                    samples = generate_samples(model, tokenizer, prompts, precision)
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


def mix_in_pretraining(rows: Dataset, config: dict) -> Dataset:
    """Add rows of plain text, all of it targets, until they are pretrain_mix_ratio of all rows."""
    ratio = config["pretrain_mix_ratio"]
    if ratio >= 1:
        raise ValueError(f"pretrain_mix_ratio={ratio} must be below 1.")
    texts, _ = prepare_data(
        config["init_from"],
        config["pretrain_dataset"],
        config["max_length"],
        cache_dir=f"{config['output_dir']}/cache",
    )
    count = min(len(texts["train"]), round(len(rows) * ratio / (1 - ratio)))
    order = np.random.Generator(np.random.PCG64(config["seed"])).permutation(len(texts["train"]))
    plain = texts["train"].select(order[:count])
    plain = plain.add_column("labels", plain["input_ids"]).cast(rows.features)
    mixed = concatenate_datasets([rows, plain])
    mixed.info.description = settings_hash(*map(data_fingerprint, (rows, plain)), count)
    return mixed


def main():
    run_from_command_line(train_sft, wandb_config)


if __name__ == "__main__":
    main()
