"""Direct preference optimization: pairs of answers in, a model that prefers the chosen out.

python dpo_train.py                                      the bundled sample, settings below
python dpo_train.py --dataset my_pairs.jsonl             any key, for this run
torchrun --nproc_per_node 2 dpo_train.py                 several GPUs
"""

from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F

from corpus import cache
from corpus.chat_format import as_prompt
from dpo_data import prepare_dpo_data
from engine import (
    checkpoint,
    evaluation,
    guards,
    memory,
    model_folder,
    optim,
    preference,
    report,
    runs,
    runtime,
    settings,
    sharding,
    steps,
)
from engine.time_limit import fit_time_limit
from models import CustomLLMConfig
from tokenizer import IM_END, create_tokenizer

wandb_config = {
    # model
    "init_from": None,  # policy: any Qwen3-architecture folder; None: the newest fine-tuned model
    "max_length": 256,  # tokens of a question with either of its answers
    "dropout": 0.0,  # of the policy; the reference has none
    # loss
    "beta": 0.1,  # the higher, the closer the policy stays to the reference
    "loss_type": "sigmoid",  # DPO; "ipo" and "hinge" are for comparison
    "label_smoothing": 0.0,  # cDPO: the share of pairs that may be labelled wrongly
    "rpo_alpha": 0.0,  # weight of a fine-tuning loss on chosen answers, against collapse
    "length_normalized": False,  # log-probs per token instead of sums
    "max_chosen_logp_drop": 1.0,  # nats per token of chosen validation answers; then warn
    "stop_on_collapse": False,  # stop instead of warning
    # data
    "dataset": "data/dpo_sample.jsonl",  # file, folder, glob, Hub name; or {name: share}
    "max_dataset_bytes": None,  # bytes to read of each dataset; None: all
    "validation_tokens": 1_000_000,  # held out at most, and at most 5 % of the questions
    "num_proc": None,  # processes that prepare the data; None: one for each core
    "verify_data": False,  # read every file again, though its date and size are the same
    "num_workers": 2,  # processes that collate pairs ahead
    # optimization
    "batch_size": 8,  # pairs of one forward pass; "auto": a step's 32 or more, in as few as fit
    "gradient_accumulation_steps": 2,  # forward passes of one optimizer step
    "learning_rate": 1.2e-6,  # x 10 beside Muon, x 4 alone: peak, for 20,000 steps
    "num_epochs": 2,  # passes over the data
    "max_steps": 0,  # stop after that many; 0: all epochs
    "time_limit": None,  # "8h", "90m": fewer steps, so that the run ends in time
    "stop_after": None,  # "55m": save and end then; the same command goes on
    "optimizer": "adamw",  # or "muon"
    "muon_learning_rate": 1.2e-5,  # peak of the matrices that Muon takes
    "scale_learning_rate": True,  # both, to the run's steps; False: literal
    "warmup_ratio": 0.1,  # of all steps
    "min_lr_ratio": 0.1,  # of the peak, at the end of the cosine
    "weight_decay": 0.0,  # the policy must stay near the reference, not near zero
    "max_grad_norm": 1.0,  # 0: no clipping
    "seed": 42,  # of the order of the data, and dropout
    # speed and memory
    "mixed_precision": "fp16",  # "bf16" is as fast on a 3090 and cannot overflow; "no": fp32
    "fp16_accumulation": False,  # sums in fp16: faster on a GeForce, never measured there
    "gradient_checkpointing": False,  # "selective" or "full": less memory, more time
    "torch_compile": "auto",  # on CUDA, where a compiler is found; True: on every device
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
DEFAULTS = wandb_config  # train_dpo() has a parameter of the same name
SAMPLE_PROMPTS = [
    "你好，你是谁？",
    "做西红柿炒鸡蛋需要准备哪些原料？",
    "《劳动合同法》第三条是怎么规定的？",
]


@runs.one_run
def train_dpo(
    project_name: str = "llm-dpo",
    run_name: str | None = None,
    wandb_config: dict | None = None,
    data_path: str | None = None,
    reference_model_path: str | None = None,
) -> str:
    """Train a policy on preference pairs. Returns its folder, checkpoints/dpo/<run>/final.

    Args:
        project_name: the project at wandb and SwanLab.
        run_name: the folder under checkpoints/dpo. None: the unfinished run of the same
            configuration, otherwise the time.
        wandb_config: any subset of this script's keys.
        data_path: the key `dataset`, as an argument.
        reference_model_path: folder of the reference model. None: the policy's own start.

    Raises:
        ValueError: bad configuration or data, before anything is trained or overwritten.
        NumericalError: loss or gradients not finite; names step, rows, last good checkpoint.
    """
    # 1. Configuration, device, precision
    config = settings.resolve(DEFAULTS, wandb_config, dataset=data_path)
    preference.check_loss_options(config)
    reference = reference_model_path and str(reference_model_path)
    config["reference_model_path"] = reference  # another one is another run
    rt = runtime.start(config["mixed_precision"], config["seed"], config["device"])
    config["init_from"] = runs.model_before(config, "sft")

    # 2. Run folder: a new one, or an unfinished one to resume
    run = runs.open_run("dpo", run_name, config, rt, cache.contents_of, DEFAULTS)
    if run.final.exists():
        rt.say(f"{run.final} is finished already: nothing to do.")
        return str(run.final)

    # 3. Tokenizer and data
    tokenizer = create_tokenizer(model_path=config["init_from"])
    tokenizer.eos_token = IM_END
    with rt.main_first():
        splits, collate = prepare_dpo_data(
            tokenizer, config["dataset"], config["max_length"], None, **cache.options_of(config)
        )
        cache.check_splits(splits, config["dataset"])
    data_counts = cache.counts_of(splits)
    fingerprint = cache.data_fingerprint(splits["train"])
    runs.check_same_data(run, fingerprint)
    reference = config["reference_model_path"] or config["init_from"]
    trial = (trial_step(config), collate.full_batch)  # what a memory test runs
    shape = CustomLLMConfig.from_pretrained(config["init_from"])
    with guards.explain_oom(config, shape, *trial), rt.main_first():
        splits = preference.add_reference_logps(
            splits, fingerprint, reference, tokenizer, collate, rt, config
        )

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
    scorer = sharding.distribute(rt, preference.AnswerScorer(model), model.model.layers, optimizers)
    step_of_scorer = partial(forward_backward, config=config)
    config = guards.fit_batch_size(
        config, scorer, optimizers, rt, step_of_scorer, collate.full_batch
    )
    measured = (splits["train"], collate, scorer, optimizers, rt, step_of_scorer)
    config = fit_time_limit(config, run, *measured)
    explain_oom = partial(guards.explain_oom, config, model.config, *trial)

    # 6. Order of the data
    loader = steps.StepLoader(splits["train"], collate, config, rt, start_step)
    held_out = evaluation.affordable(splits["validation"], config, loader)
    validation = steps.validation_loader(held_out, collate, config, rt)
    losses = partial(pair_losses, config=config)

    # 7. Tracking, and what is about to happen
    log = report.Log(run, project_name, config, rt, model, loader, state.get("tokens_seen", 0))
    log.describe(model, data_counts)
    finite = guards.FiniteGuard(run, loader.order, rt)
    collapse = preference.CollapseGuard(config, state, rt)
    rt.say(report.describe_run(config, model, loader, rt, trial))
    prompts = [as_prompt(tokenizer, text) for text in SAMPLE_PROMPTS]
    if start_step == 0:
        rt.say("Before preference optimization:")
        with explain_oom():
            metrics = preference.validate(scorer, validation, rt, losses)
            samples = evaluation.sample(model, tokenizer, prompts, rt)
        collapse.start(metrics)
        log.validation(metrics, start_step)
        log.samples(SAMPLE_PROMPTS, samples, start_step)

    # 8. Loop
    with rt.stop.after(config["stop_after"]) as stop, explain_oom(), rt.writer, log:
        for step, micro_batches in loader:  # steps count from 1
            # Every loss is divided by the pairs of the whole step, over all micro-batches and
            # ranks: many small batches give exactly the gradient of one large batch.
            num_pairs, num_tokens = preference.count_pairs(micro_batches, rt)
            rates = optim.set_learning_rate(optimizers, step, loader, config)
            rt.seed(config["seed"], step)

            totals: Counter = Counter()
            for batch in rt.accumulate(scorer, micro_batches):
                totals.update(forward_backward(scorer, batch, num_pairs, rt, config))
            grad_norm = optim.step(model, optimizers, rt, config["max_grad_norm"])
            finite.note(step, grad_norm)
            log.count(num_tokens)

            due = log.due(step, stop.received is not None)
            if due.log:
                metrics = preference.pair_metrics(totals, rt) | rates | report.scaler_metrics(rt)
                metrics["train/loss"] = metrics.pop("loss")
                metrics["train/grad_norm"] = float(grad_norm)
                metrics["train/epoch"] = step / loader.order.steps_per_epoch
                finite.check(metrics["train/loss"], step)
                log.train(metrics, step, preference.reward_line(metrics))
            val_loss = None
            if due.eval:
                with log.paused("eval"):  # this does not count in tokens per second
                    metrics = preference.validate(scorer, validation, rt, losses)
                    val_loss = metrics["val/loss"]
                    finite.check(val_loss, step)
                    log.validation(metrics, step)
                    due.save |= collapse.check(metrics)
            if due.save:
                with log.paused("save"):
                    state = {"step": step, "val_loss": val_loss, "data_fingerprint": fingerprint}
                    state |= log.state() | collapse.state()
                    checkpoint.save(run, model, optimizers, rt, state, config)
            if due.sample:  # after the save: samples may fail
                with log.paused("sample"):
                    samples = evaluation.sample(model, tokenizer, prompts, rt)
                    log.samples(SAMPLE_PROMPTS, samples, step)
            if due.stop and step < loader.total_steps:
                log.finish()
                runs.say_how_to_resume(run, stop, rt)
                raise SystemExit(0)
            if collapse.collapsed and config["stop_on_collapse"]:
                log.finish()
                rt.writer.wait()
                raise guards.NumericalError(
                    f"Stopped at step {step} by stop_on_collapse; saved {run.checkpoint}."
                )

    # 9. Final save
    log.draw()  # first: a finished run is never touched again
    checkpoint.save_final(run, model, tokenizer, rt)
    log.finish()
    rt.wait()
    rt.say(f"Finished: {run.final}")
    return str(run.final)


def forward_backward(scorer, batch: dict, num_pairs: int, rt: runtime.Runtime, config: dict):
    """Gradients of one micro-batch. Returns detached sums, so that its graph is freed here."""
    with rt.autocast():
        logps = scorer(**batch)
    losses, sums = pair_losses(logps, batch, config)
    rt.backward(losses.sum() / num_pairs)
    return sums


def trial_step(config: dict):
    """forward_backward of a bare model, for those who count its memory."""

    def run(model, batch: dict, num_pairs: int, rt: runtime.Runtime) -> dict:
        return forward_backward(preference.AnswerScorer(model), batch, num_pairs, rt, config)

    return run


def pair_losses(logps: torch.Tensor, batch: dict, config: dict) -> tuple[torch.Tensor, dict]:
    """Losses (pairs,) from the answers' log-probs (2 * pairs,), and sums for the metrics."""
    lengths = batch["answer_lengths"].view(-1, 2)  # (pairs, 2)
    policy, reference = logps.view(-1, 2), batch["reference_logps"].view(-1, 2)
    if config["length_normalized"]:
        policy, reference = policy / lengths, reference / lengths
    chosen_logps, rejected_logps = policy.unbind(1)
    losses, chosen_rewards, rejected_rewards = preference_losses(
        chosen_logps,
        rejected_logps,
        reference[:, 0],
        reference[:, 1],
        config["beta"],
        config["loss_type"],
        config["label_smoothing"],
    )
    if config["rpo_alpha"]:  # Pang et al. 2024 (arXiv 2404.19733): likelihood of the chosen answer
        losses = losses - config["rpo_alpha"] * logps[::2] / lengths[:, 0]
    return losses, preference.pair_sums(losses, chosen_rewards, rejected_rewards, logps, batch)


def preference_losses(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, chosen reward and rejected reward of each pair, all (pairs,); rewards are detached.

    sigmoid: DPO, Rafailov et al. 2023, eq. 7, with cDPO's label smoothing. ipo: Azar et al. 2023,
    eq. 17. hinge: SLiC, Zhao et al. 2023.
    """
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    margin = chosen - rejected
    if loss_type == "sigmoid":
        right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
    elif loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = F.relu(1 - beta * margin)
    else:
        known = ", ".join(preference.LOSS_TYPES)
        raise ValueError(f"loss_type={loss_type!r} must be one of {known}.")
    return losses, beta * chosen.detach(), beta * rejected.detach()


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """preference_losses with its options; the losses averaged over the pairs to a scalar."""
    losses, chosen_rewards, rejected_rewards = preference_losses(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
        **options,
    )
    return losses.mean(), chosen_rewards, rejected_rewards


def main():
    settings.run_from_command_line(train_dpo, wandb_config)


if __name__ == "__main__":
    main()
