"""Pre-training: text in, a base model out.

python train_llm.py                                      the bundled sample, settings below
python train_llm.py --dataset my_corpus/ --batch_size 16 any key, for this run
torchrun --nproc_per_node 2 train_llm.py                 several GPUs
"""

from collections import Counter
from functools import partial

from corpus import cache
from corpus.packing import PackedCollator
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
from engine.time_limit import fit_time_limit
from models import CustomLLM, CustomLLMConfig
from train_data import choose_vocab_size, prepare_data, unigram_loss

wandb_config = {
    # model
    "d_model": 512,  # width of the residual stream
    "n_heads": 8,  # attention heads, each of d_model / n_heads
    "n_kv_heads": None,  # fewer than n_heads: grouped-query attention, a smaller KV cache
    "n_layers": 6,  # blocks
    "d_ff": 2048,  # width of SwiGLU
    "max_seq_len": 128,  # tokens of a row; 512 or more for real corpora
    "dropout": "auto",  # 0; 0.2 where the corpus is small enough to be learnt by heart
    "use_moe": False,  # a mixture of experts in place of each SwiGLU
    "num_experts": 4,  # of each block
    "top_k": 2,  # experts per token
    "moe_d_ff": None,  # width of one expert; None: d_ff
    # data
    "dataset": "data/pretrain_sample.jsonl",  # file, folder, glob, Hub name; or {name: share}
    "text_column": None,  # None: the first of text, content, completion
    "max_dataset_bytes": None,  # bytes to read of each dataset; None: all
    "validation_tokens": 1_000_000,  # held out at most, and at most 5 % of the documents
    "num_proc": None,  # processes that prepare the data; None: one for each core
    "verify_data": False,  # read every file again, though its date and size are the same
    "tokenizer_path": None,  # folder or Hub name; None: that of init_from, or a new one
    "vocab_size": "auto",  # of the tokenizer trained here: 6400; 4096 for less than 3 MB of text
    "tokenizer_megabytes": 10,  # of text that it is trained on
    "num_workers": 2,  # processes that collate rows ahead
    # optimization
    "batch_size": 32,  # rows of one forward pass; "auto": a step's 32 or more, in as few as fit
    "gradient_accumulation_steps": 1,  # forward passes of one optimizer step
    "learning_rate": 5e-4,  # x 10 beside Muon, x 4 alone: peak, for 20,000 steps of 16,384 tokens
    "num_epochs": 3,  # passes over the data
    "max_steps": 0,  # stop after that many; 0: all epochs
    "time_limit": None,  # "8h", "90m": fewer steps, so that the run ends in time
    "stop_after": None,  # "55m": save and end then; the same command goes on
    "optimizer": "muon",  # for the blocks' matrices; "adamw": for everything
    "muon_learning_rate": 1.3e-3,  # peak of the matrices that Muon takes
    "scale_learning_rate": True,  # both, to the run's steps and their tokens; False: literal
    "warmup_ratio": 0.05,  # of all steps
    "min_lr_ratio": 0.1,  # of the peak, at the end of the cosine
    "weight_decay": "auto",  # on matrices only: 0.1; 1.0 where "auto" dropout is 0.2
    "max_grad_norm": 1.0,  # 0: no clipping
    "seed": 42,  # of the weights, the order of the data, and dropout
    # speed and memory
    "mixed_precision": "fp16",  # "bf16" is as fast on a 3090 and cannot overflow; "no": fp32
    "fp16_accumulation": False,  # sums in fp16: faster on a GeForce, never measured there
    "gradient_checkpointing": False,  # "selective" or "full": less memory, more time
    "torch_compile": "auto",  # on CUDA, where a compiler is found; True: on every device
    "cuda_graph": False,  # a micro-batch is one launch: for small models on fast cards
    "device": "auto",  # the GPU where there is one; "cpu": leave it alone
    # run
    "init_from": None,  # continue from this model folder instead of random weights
    "output_dir": "checkpoints",  # everything that a run writes is under it
    "trackers": ["wandb"],  # also "tensorboard", "swanlab"; []: only metrics.jsonl
    "log_every": "auto",  # steps, as the three below; "auto": engine/cadence.py; 0: at the end
    "eval_every": "auto",  # validation
    "sample_every": "auto",  # generated samples
    "save_every": "auto",  # checkpoints
    "keep_checkpoints": 2,  # how many of the newest stay; the best one stays too
    "resume": "auto",  # continue an unfinished run of this configuration; False: never
}
DEFAULTS = wandb_config  # train() has a parameter of the same name
SAMPLE_PROMPTS = ["第一条　为了", "红烧肉的做法", "春眠不觉晓，"]


@runs.one_run
def train(
    project_name: str = "llm-pretrain",
    run_name: str | None = None,
    wandb_config: dict | None = None,
) -> str:
    """Pre-train a model. Returns its folder, checkpoints/pretrain/<run>/final.

    Args:
        project_name: the project at wandb and SwanLab.
        run_name: the folder under checkpoints/pretrain. None: the unfinished run of the same
            configuration, otherwise the time.
        wandb_config: any subset of this script's keys.

    Raises:
        ValueError: bad configuration or data, before anything is trained or overwritten.
        NumericalError: loss or gradients not finite; names step, rows, last good checkpoint.
    """
    # 1. Configuration, device, precision
    config = settings.resolve(DEFAULTS, wandb_config)
    rt = runtime.start(config["mixed_precision"], config["seed"], config["device"])
    # Before any work, with the largest vocabulary that "auto" can come to.
    guards.check_memory(make_model_config(config, choose_vocab_size(config["vocab_size"])))

    # 2. Run folder: a new one, or an unfinished one to resume
    run = runs.open_run("pretrain", run_name, config, rt, cache.contents_of, DEFAULTS)
    if run.final.exists():
        rt.say(f"{run.final} is finished already: nothing to do.")
        return str(run.final)

    # 3. Tokenizer and data
    with rt.main_first():
        splits, tokenizer = prepare_data(
            config["tokenizer_path"] or config["init_from"],
            config["dataset"],
            config["max_seq_len"],
            config["vocab_size"],
            config["text_column"],
            config["tokenizer_megabytes"],
            **cache.options_of(config),
        )
    config = config | {"vocab_size": len(tokenizer)}
    collate = PackedCollator(config["max_seq_len"], tokenizer.pad_token_id)
    data_counts = cache.counts_of(splits)
    fingerprint = cache.data_fingerprint(splits["train"])
    runs.check_same_data(run, fingerprint)

    # 4. Model and optimizers
    if config["init_from"]:
        model = model_folder.load_model_folder(
            config["init_from"], tokenizer, config["dropout"], config["max_seq_len"], rt.say
        )
    else:
        model = CustomLLM(make_model_config(config, len(tokenizer)))
    config = guards.fit_regularization(config, model, data_counts["tokens"], rt)
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
    unigram = unigram_loss(splits, len(tokenizer))
    rt.say(f"Validation loss of token frequencies alone: {unigram:.4f}")
    prompts = SAMPLE_PROMPTS

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


def make_model_config(config: dict, vocab_size: int) -> CustomLLMConfig:
    """The vocabulary is padded to a multiple of 64, which makes a GPU's matrix products faster."""
    names = "d_model n_heads n_kv_heads n_layers d_ff max_seq_len dropout use_moe num_experts top_k"
    sizes = {name: config[name] for name in (*names.split(), "moe_d_ff")}
    sizes["dropout"] = 0.0 if sizes["dropout"] == "auto" else sizes["dropout"]
    return CustomLLMConfig(-(-vocab_size // 64) * 64, **sizes)


def main():
    settings.run_from_command_line(train, wandb_config)


if __name__ == "__main__":
    main()
