"""Supervised fine-tuning: conversations in, a chat model out.

python sft_train.py                                      the bundled sample, settings below
python sft_train.py --dataset my_chats.jsonl             any key, for this run
torchrun --nproc_per_node 2 sft_train.py                 several GPUs
"""

from collections import Counter
from functools import partial

from datasets import Dataset, concatenate_datasets

from corpus import cache
from corpus.chat_format import as_prompt
from engine import (
    checkpoint,
    cuda_graph,
    evaluation,
    guards,
    memory,
    model_folder,
    optim,
    report,
    runs,
    runtime,
    settings,
    sharding,
    steps,
)
from engine.disk import settings_hash
from engine.time_limit import fit_time_limit
from sft_data import prepare_sft_data
from tokenizer import IM_END, create_tokenizer
from train_data import prepare_data

wandb_config = {
    # model
    "init_from": None,  # any Qwen3-architecture folder; None: the newest pre-trained model
    "max_length": 256,  # tokens of a row; conversations are packed into it whole
    "dropout": 0.0,  # on embeddings, attention and the outputs of each block
    # data
    "dataset": "data/sft_sample.jsonl",  # file, folder, glob, Hub name; or {name: share}
    "max_dataset_bytes": None,  # bytes to read of each dataset; None: all
    "validation_tokens": 1_000_000,  # held out at most, and at most 5 % of the questions
    "num_proc": None,  # processes that prepare the data; None: one for each core
    "verify_data": False,  # read every file again, though its date and size are the same
    "pretrain_mix_ratio": 0.0,  # share of rows from pretrain_dataset, against forgetting
    "pretrain_dataset": "data/pretrain_sample.jsonl",  # plain text to mix in
    "num_workers": 2,  # processes that collate rows ahead
    # optimization
    "batch_size": 16,  # rows of one forward pass; "auto": a step's 32 or more, in as few as fit
    "gradient_accumulation_steps": 1,  # forward passes of one optimizer step
    "learning_rate": 6e-5,  # x 10 beside Muon, x 4 alone: peak, for 20,000 steps
    "num_epochs": 3,  # passes over the data
    "max_steps": 0,  # stop after that many; 0: all epochs
    "time_limit": None,  # "8h", "90m": fewer steps, so that the run ends in time
    "stop_after": None,  # "55m": save and end then; the same command goes on
    "optimizer": "muon",  # for the blocks' matrices; "adamw": for everything
    "muon_learning_rate": 6e-4,  # peak of the matrices that Muon takes
    "scale_learning_rate": True,  # both, to the run's steps; False: literal
    "warmup_ratio": 0.05,  # of all steps
    "min_lr_ratio": 0.1,  # of the peak, at the end of the cosine
    "weight_decay": 0.1,  # on matrices only
    "max_grad_norm": 1.0,  # 0: no clipping
    "seed": 42,  # of the order of the data, and dropout
    # speed and memory
    "mixed_precision": "fp16",  # "bf16" is as fast on a 3090 and cannot overflow; "no": fp32
    "fp16_accumulation": False,  # sums in fp16: faster on a GeForce, never measured there
    "gradient_checkpointing": False,  # "selective" or "full": less memory, more time
    "torch_compile": "auto",  # on CUDA, where a compiler is found; True: on every device
    "cuda_graph": False,  # a micro-batch is one launch: for small models on fast cards
    "device": "auto",  # the GPU where there is one; "cpu": leave it alone
    # run
    "output_dir": "checkpoints",  # everything that a run writes is under it
    "trackers": ["wandb"],  # also "tensorboard", "swanlab"; []: only metrics.jsonl
    "log_every": "auto",  # steps, as the three below; "auto": engine/cadence.py; 0: at the end
    "eval_every": "auto",  # validation
    "sample_every": "auto",  # generated samples
    "save_every": "auto",  # checkpoints
    "keep_checkpoints": 2,  # how many of the newest stay; the best one stays too
    "resume": "auto",  # continue an unfinished run of this configuration; False: never
}
DEFAULTS = wandb_config  # train_sft() has a parameter of the same name
SAMPLE_PROMPTS = [
    "你好，你是谁？",
    "做西红柿炒鸡蛋需要准备哪些原料？",
    "《劳动合同法》第三条是怎么规定的？",
]


@runs.one_run
def train_sft(
    project_name: str = "llm-sft",
    run_name: str | None = None,
    wandb_config: dict | None = None,
    data_path: str | None = None,
) -> str:
    """Fine-tune a model on conversations. Returns its folder, checkpoints/sft/<run>/final.

    Args:
        project_name: the project at wandb and SwanLab.
        run_name: the folder under checkpoints/sft. None: the unfinished run of the same
            configuration, otherwise the time.
        wandb_config: any subset of this script's keys.
        data_path: the key `dataset`, as an argument.

    Raises:
        ValueError: bad configuration or data, before anything is trained or overwritten.
        NumericalError: loss or gradients not finite; names step, rows, last good checkpoint.
    """
    # 1. Configuration, device, precision
    config = settings.resolve(DEFAULTS, wandb_config, dataset=data_path)
    rt = runtime.start(config["mixed_precision"], config["seed"], config["device"])
    config["init_from"] = runs.model_before(config, "pretrain")

    # 2. Run folder: a new one, or an unfinished one to resume
    run = runs.open_run("sft", run_name, config, rt, cache.contents_of, DEFAULTS)
    if run.final.exists():
        rt.say(f"{run.final} is finished already: nothing to do.")
        return str(run.final)

    # 3. Tokenizer and data
    tokenizer = create_tokenizer(model_path=config["init_from"])
    tokenizer.eos_token = IM_END  # a chat model stops at the end of its turn
    with rt.main_first():
        splits, collate = prepare_sft_data(
            tokenizer, config["dataset"], config["max_length"], None, **cache.options_of(config)
        )
        cache.check_splits(splits, config["dataset"])
        if config["pretrain_mix_ratio"]:
            splits["train"] = mix_in_pretraining(splits["train"], config)
    data_counts = cache.counts_of(splits)
    fingerprint = cache.data_fingerprint(splits["train"])
    runs.check_same_data(run, fingerprint)

    # 4. Model and optimizers
    model = model_folder.load_model_folder(
        config["init_from"], tokenizer, config["dropout"], config["max_length"], rt.say
    )
    rt.place(model.train())
    memory.checkpoint_activations(model, config["gradient_checkpointing"])
    runtime.sum_in_fp16(model, config["fp16_accumulation"], rt)
    optimizers = optim.build(model, config)

    # 5. Resume
    state = checkpoint.resume(run, model, optimizers, rt)
    start_step = state.get("step", 0)
    runtime.compile_blocks(model, config["torch_compile"], rt)
    parallel_model = sharding.distribute(rt, model, model.model.layers, optimizers)
    trial = (forward_backward, collate.full_batch)  # what a memory test runs
    config = guards.fit_batch_size(config, parallel_model, optimizers, rt, *trial)
    micro_step = cuda_graph.with_graph(forward_backward, model, config, rt)
    measured = (splits["train"], collate, parallel_model, optimizers, rt, micro_step)
    config = fit_time_limit(config, run, *measured)
    explain_oom = partial(guards.explain_oom, config, model.config, *trial)

    # 6. Order of the data
    loader = steps.StepLoader(splits["train"], collate, config, rt, start_step)
    held_out = evaluation.affordable(splits["validation"], config, loader)
    validation = steps.validation_loader(held_out, collate, config, rt)
    validation_bytes = cache.target_bytes(held_out, tokenizer)

    # 7. Tracking, and what is about to happen
    log = report.Log(run, project_name, config, rt, model, loader, state.get("tokens_seen", 0))
    log.describe(model, data_counts)
    finite = guards.FiniteGuard(run, loader.order, rt)
    rt.say(report.describe_run(config, model, loader, rt, trial))
    prompts = [as_prompt(tokenizer, text) for text in SAMPLE_PROMPTS]
    if start_step == 0:
        rt.say("Before fine-tuning:")
        with explain_oom():
            samples = evaluation.sample(model, tokenizer, prompts, rt)
        log.samples(SAMPLE_PROMPTS, samples, start_step)

    # 8. Loop
    with rt.stop.after(config["stop_after"]) as stop, explain_oom(), rt.writer, log:
        for step, micro_batches in loader:  # steps count from 1
            # Every loss is divided by the targets of the whole step, over all micro-batches and
            # ranks: many small batches give exactly the gradient of one large batch.
            num_targets, num_tokens = steps.count_targets(micro_batches, rt)
            rates = optim.set_learning_rate(optimizers, step, loader, config)
            rt.seed(config["seed"], step)

            totals: Counter = Counter()
            for batch in rt.accumulate(parallel_model, micro_batches):
                totals.update(micro_step(parallel_model, batch, num_targets, rt))
            grad_norm = optim.step(model, optimizers, rt, config["max_grad_norm"])
            finite.note(step, grad_norm)
            log.count(num_tokens)

            due = log.due(step, stop.received is not None)
            if due.log:
                metrics = report.step_metrics(totals, num_tokens, rt) | rates
                metrics["train/grad_norm"] = float(grad_norm)
                metrics["train/epoch"] = step / loader.order.steps_per_epoch
                finite.check(metrics["train/loss"], step)
                log.train(metrics, step)
            val_loss = None
            if due.eval:
                with log.paused("eval"):  # this does not count in tokens per second
                    metrics = evaluation.validate(model, validation, validation_bytes, rt)
                    val_loss = metrics["val/loss"]
                    finite.check(val_loss, step)
                    log.validation(metrics, step)
            if due.save:
                with log.paused("save"):
                    state = {"step": step, "val_loss": val_loss, "data_fingerprint": fingerprint}
                    checkpoint.save(run, model, optimizers, rt, state | log.state(), config)
            if due.sample:  # after the save: samples may fail
                with log.paused("sample"):
                    samples = evaluation.sample(model, tokenizer, prompts, rt)
                    log.samples(SAMPLE_PROMPTS, samples, step)
            if due.stop and step < loader.total_steps:
                log.finish()
                runs.say_how_to_resume(run, stop, rt)
                raise SystemExit(0)

    # 9. Final save
    log.draw()  # first: a finished run is never touched again
    checkpoint.save_final(run, model, tokenizer, rt)
    log.finish()
    rt.wait()
    rt.say(f"Finished: {run.final}")
    return str(run.final)


def forward_backward(model, batch: dict, num_targets: int, rt: runtime.Runtime) -> dict:
    """Gradients of one micro-batch. Returns detached sums, so that its graph is freed here."""
    with rt.autocast():
        output = model(**batch, num_items_in_batch=num_targets, skip_logits=True)
    rt.backward(output.loss)
    return steps.output_sums(output, batch)


def mix_in_pretraining(rows: Dataset, config: dict) -> Dataset:
    """Add rows of plain text, all of it targets, until they are pretrain_mix_ratio of all rows."""
    ratio = config["pretrain_mix_ratio"]
    if ratio >= 1:
        raise ValueError(f"pretrain_mix_ratio={ratio} must be below 1.")
    texts, _ = prepare_data(
        config["init_from"],
        config["pretrain_dataset"],
        config["max_length"],
        **cache.options_of(config),
    )
    count = min(len(texts["train"]), round(len(rows) * ratio / (1 - ratio)))
    plain = texts["train"].shuffle(config["seed"], keep_in_memory=True).select(range(count))
    plain = plain.add_column("labels", plain["input_ids"]).cast(rows.features)
    mixed = concatenate_datasets([rows, plain])
    mixed.info.description = settings_hash(*map(cache.data_fingerprint, (rows, plain)), count)
    return mixed


def main():
    settings.run_from_command_line(train_sft, wandb_config)


if __name__ == "__main__":
    main()
