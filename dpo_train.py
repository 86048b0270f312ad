"""Direct preference optimization: pairs of answers in, a model that prefers the chosen out.

python dpo_train.py                                      the bundled sample, settings below
python dpo_train.py --dataset my_pairs.jsonl             any key, for this run
torchrun --nproc_per_node 2 dpo_train.py                 several GPUs
"""

from itertools import islice

from corpus.chat_format import as_prompt
from corpus.packing import check_splits, data_fingerprint
from corpus.readers import find_final
from curves import plot_curves
from dpo_data import prepare_dpo_data
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
from engine.preference import (
    AnswerScorer,
    add_reference_logps,
    batch_losses,
    check_loss_options,
    count_pairs,
    dpo_loss,
    summarize,
    validate_pairs,
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
    NumericalError,
    StepSampler,
    StopSignal,
    check_finite,
    checkpoint_blocks,
    choose_precision,
    compile_blocks,
    generate_samples,
    is_due,
    make_loader,
    rank_batches,
    seed_everything,
    seed_step,
    to_device,
)
from tokenizer import IM_END, create_tokenizer

__all__ = ["dpo_loss", "train_dpo", "wandb_config"]

wandb_config = {
    # model
    "init_from": None,  # policy: any Qwen3-architecture folder; None: the newest fine-tuned model
    "max_length": 256,  # tokens of a question with either of its answers
    "dropout": 0.0,  # the policy's only; the reference never drops
    # loss
    "beta": 0.1,  # how dear it is to move away from the reference
    "loss_type": "sigmoid",  # DPO; "ipo" and "hinge" are for comparison
    "label_smoothing": 0.0,  # cDPO: the share of pairs that may be labelled the wrong way round
    "rpo_alpha": 0.0,  # weight of a fine-tuning loss on chosen answers, against collapse
    "length_normalized": False,  # log-probs per token in place of sums
    "max_chosen_logp_drop": 1.0,  # nats per token of chosen answers on validation: then warn
    "stop_on_collapse": False,  # and stop
    # data
    "dataset": "data/dpo_sample.jsonl",  # file, folder or glob
    "num_workers": 2,  # processes that collate pairs ahead
    # optimization
    "batch_size": 8,  # pairs of one forward pass; "auto": of 32, as many as fit
    "gradient_accumulation_steps": 2,  # forward passes of one optimizer step
    "learning_rate": 2e-5,  # peak; a larger model wants 5e-7 to 5e-6
    "num_epochs": 2,
    "max_steps": 0,  # stop earlier; 0: all epochs
    "optimizer": "adamw",  # or "muon"
    "muon_learning_rate": 2e-4,  # peak of the matrices that Muon takes
    "warmup_ratio": 0.1,  # of all steps
    "min_lr_ratio": 0.1,  # of the peak, at the end of the cosine
    "weight_decay": 0.0,  # the reference is what to stay near, not zero
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
DEFAULTS = wandb_config  # train_dpo() has a parameter of the same name
SAMPLE_PROMPTS = [
    "红烧肉怎么做？",
    "做西红柿炒鸡蛋需要准备哪些原料？",
    "《劳动合同法》第三条是怎么规定的？",
]


def train_dpo(
    project_name: str = "llm-dpo",
    run_name: str | None = None,
    wandb_config: dict | None = None,
    data_path: str | None = None,
    reference_model_path: str | None = None,
) -> str:
    """Train a policy on preference pairs; returns its folder, checkpoints/dpo/<run>/final.

    Args:
        project_name: the wandb project.
        run_name: folder under checkpoints/dpo; None: the time, or the unfinished run of the same
            configuration.
        wandb_config: any subset of this script's keys.
        data_path: the key `dataset`, as an argument.
        reference_model_path: folder of the reference model; None: the policy's own start.

    Raises:
        ValueError: bad configuration or data, before anything is trained or overwritten.
        NumericalError: loss or gradients not finite; names step, rows, last good checkpoint.
    """
    # 1. Configuration, device, precision
    config = resolve_config(DEFAULTS, wandb_config)
    check_loss_options(config)
    config["dataset"] = data_path or config["dataset"]
    accelerator = make_accelerator()
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    say = make_say(is_main)
    precision = choose_precision(config["mixed_precision"], device, say)
    config["init_from"] = str(
        config["init_from"] or find_final(config["output_dir"], "sft", "sft_train.py")
    )
    seed_everything(config["seed"])

    # 2. Run folder: a new one, or an unfinished one to resume
    run = open_run("dpo", run_name, config, accelerator)
    if run.final.exists():
        say(f"{run.final} is finished already: nothing to do.")
        return str(run.final)

    # 3. Tokenizer and data
    tokenizer = create_tokenizer(model_path=config["init_from"])
    tokenizer.eos_token = IM_END
    with accelerator.main_process_first():
        splits, collate = prepare_dpo_data(
            tokenizer,
            config["dataset"],
            config["max_length"],
            split=None,
            cache_dir=f"{config['output_dir']}/cache",
        )
    check_splits(splits, config["dataset"])
    fingerprint = data_fingerprint(splits["train"])
    check_same_data(run, fingerprint)

    # 4. Model and optimizer
    model = load_model_folder(
        config["init_from"], tokenizer, config["dropout"], config["max_length"], say
    )
    model.to(device)
    reference_path = reference_model_path or config["init_from"]
    with accelerator.main_process_first():
        splits = add_reference_logps(
            splits,
            reference_path,
            tokenizer,
            collate,
            precision,
            f"{config['output_dir']}/cache",
            say,
        )
    model.train()
    checkpoint_blocks(model, config["gradient_checkpointing"])
    optimizers = build_optimizers(model, config)
    config = fit_batch_size("dpo_train.py", config, model, optimizers, precision, accelerator, say)

    # 5. Resume
    step, tokens_seen, start_logp, warned = 0, 0, None, False
    if run.checkpoint:
        load_checkpoint(run.checkpoint, model, optimizers, precision)
        step, tokens_seen = run.state["step"], run.state["tokens_seen"]
        start_logp, warned = run.state["start_logp"], run.state["warned"]
        say(f"Resuming {run.folder} at step {step}.")
    compile_blocks(model, config["torch_compile"], device)
    scorer = distribute(accelerator, AnswerScorer(model), model.model.layers, optimizers)

    # 6. Order of the data
    sampler = StepSampler(len(splits["train"]), config, rank, world, start_step=step)
    rows = splits["train"].with_format("numpy")
    batches = iter(make_loader(rows, collate, config["num_workers"], batch_sampler=sampler))
    held_out = splits["validation"].with_format("numpy")
    parts = rank_batches(len(held_out), config["batch_size"], rank, world)
    validation = make_loader(held_out, collate, num_workers=0, batch_sampler=parts)

    # 7. Tracking, and what is about to happen
    tracker = Tracker(run, project_name, config, is_main)
    say(describe_run(config, model, sampler, precision, 2 * config["max_length"]))
    prompts = [as_prompt(tokenizer, text) for text in SAMPLE_PROMPTS]
    if step == 0:
        metrics = validate_pairs(scorer, validation, precision, accelerator, config)
        start_logp = metrics["val/logps/chosen_per_token"]
        tracker.log(metrics, step)
        say("Before preference optimization:\n" + validation_line(metrics, step))
        samples = generate_samples(model, tokenizer, prompts, precision)
        tracker.log_samples(SAMPLE_PROMPTS, samples, step, say)
    meter = Meter(model, sampler, tokens_seen, device)

    # 8. Loop
    with (
        explain_out_of_memory("dpo_train.py", config, model),
        StopSignal() as stop,
        progress_bar(sampler, is_main) as bar,
    ):
        while step < sampler.total_steps:
            # All micro-batches of the step first: each loss is divided by all their pairs.
            micro_batches = list(islice(batches, sampler.micro_batches(step)))
            num_pairs, tokens = count_pairs(micro_batches, accelerator)
            factor = learning_rate_factor(step, sampler.total_steps, config)
            learning_rates = set_learning_rate(optimizers, factor)
            seed_step(config["seed"], step, rank)

            sums = 0.0
            for index, batch in enumerate(micro_batches):
                batch = to_device(batch, device)
                is_last = index == len(micro_batches) - 1
                with gradient_sync(accelerator, scorer, is_last):
                    with precision.autocast():
                        logps = scorer(**batch)
                    losses, totals = batch_losses(logps, batch, config)
                    loss = losses.sum() / num_pairs
                    # Ranks' gradients are averaged: times their number, they are summed.
                    precision.scaler.scale(loss * world).backward()
                del logps, losses, loss  # and their graph, before the next forward
                sums += totals
            grad_norm = optimizer_step(model, optimizers, precision, config["max_grad_norm"])
            step += 1
            meter.count(tokens)
            bar.update()

            stopping = stop_requested(stop, accelerator)
            due = is_due(config, step, sampler.total_steps, stopping)
            if due["log"]:
                metrics = summarize(sums, accelerator)
                metrics |= {
                    "train/loss": metrics.pop("loss"),
                    **learning_rates,
                    "train/grad_norm": float(grad_norm),
                    "train/epoch": step / sampler.steps_per_epoch,
                    **precision.metrics(),
                    **meter.read(step),
                }
                check_finite(metrics["train/loss"], precision, step, run.checkpoint, sampler)
                tracker.log(metrics, step)
                say(log_line(metrics, step, sampler.total_steps) + reward_line(metrics))
            val_loss, collapsed = None, False
            with meter.paused():
                if due["eval"]:
                    metrics = validate_pairs(scorer, validation, precision, accelerator, config)
                    val_loss = metrics["val/loss"]
                    check_finite(val_loss, precision, step, run.checkpoint, sampler)
                    tracker.log(metrics, step)
                    say(validation_line(metrics, step))
                    drop = start_logp - metrics["val/logps/chosen_per_token"]
                    collapsed = drop > config["max_chosen_logp_drop"]
                    if collapsed and not warned:
                        warned = due["save"] = True
                        say(collapse_warning(drop, config))
                if due["sample"]:
                    samples = generate_samples(model, tokenizer, prompts, precision)
                    tracker.log_samples(SAMPLE_PROMPTS, samples, step, say)
                if due["save"]:
                    state = {"step": step, "tokens_seen": meter.tokens_seen, "val_loss": val_loss}
                    state |= {"data_fingerprint": fingerprint, "wandb_id": tracker.wandb_id}
                    state |= {"start_logp": start_logp, "warned": warned}
                    save_checkpoint(run, model, optimizers, precision, state, config, is_main)
            if stopping and step < sampler.total_steps:
                tracker.finish()
                say_how_to_resume(run, stop, say)
                raise SystemExit(0)
            if collapsed and config["stop_on_collapse"]:
                tracker.finish()
                raise NumericalError(
                    f"Stopped at step {step} by stop_on_collapse; saved {run.checkpoint}."
                )

    # 9. Final save
    if is_main:
        plot_curves(run.folder)  # first: a run that has its final folder is never touched again
    save_final(run, model, tokenizer, is_main)
    tracker.finish()
    accelerator.wait_for_everyone()
    say(f"Finished: {run.final}")
    return str(run.final)


def reward_line(metrics: dict) -> str:
    names = ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    return "".join(f" | {name.split('/')[1]} {metrics[name]:.3g}" for name in names)


def collapse_warning(drop: float, config: dict) -> str:
    return (
        f"WARNING: chosen answers of the validation set have become {drop:.2f} nats per token less "
        f"likely than at the start (max_chosen_logp_drop {config['max_chosen_logp_drop']}): the "
        "model forgets what it should prefer. Lower learning_rate, raise beta, or set rpo_alpha "
        "to 0.1 - 1."
    )


def main():
    run_from_command_line(train_dpo, wandb_config)


if __name__ == "__main__":
    main()
