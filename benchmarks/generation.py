"""Tokens per second of replies, and questions per second of `evaluate.py --task choice`.

    python benchmarks/generation.py                    the 28 M model of train_llm.py
    python benchmarks/generation.py --model small      5 M

The peer of replies is transformers' `model.generate`: prompt after prompt, and batches padded on
the left. The peer of questions is each option in a row of its own. All run on one random model in
one process, in turn. Prompts and questions are made of the bundled SFT sample, and the tokenizer is
trained on it. One token in a hundred ends a reply, so that replies differ in length.
"""

import argparse
import time

import numpy as np
import torch
from peers import ROOT, describe_cpu, print_table, read_jsonl

from corpus.exam import Question
from engine.answers import answer_log_probs
from engine.generation import BATCH, Sampling, complete
from evaluate import BATCH_TOKENS, Posed, ask, window_log_probs
from models import CustomLLM, CustomLLMConfig
from tokenizer import train_tokenizer

SIZES = {
    "28M": {"d_model": 512, "n_heads": 8, "n_layers": 6, "d_ff": 2048},
    "small": {"d_model": 256, "n_heads": 4, "n_layers": 4, "d_ff": 704},
}
ENDS = range(100, 6400, 100)  # tokens that end a reply
CHATS = 4  # prompts that are answered one by one
Replies = list[list[int]]


def run_ours(model, prompts: Replies, sampling: Sampling) -> Replies:
    replies: Replies = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        replies += complete(model, batch, sampling, list(range(start, start + len(batch))))
    return replies


def run_ours_one_by_one(model, prompts: Replies, sampling: Sampling) -> Replies:
    return [complete(model, [prompt], sampling, [0])[0] for prompt in prompts]


def run_generate(model, prompts: Replies, sampling: Sampling, batch_size: int = 1) -> Replies:
    """transformers' own loop. The padding of its replies is taken off."""
    replies: Replies = []
    options: dict = {"max_new_tokens": sampling.max_new_tokens, "do_sample": False}
    if sampling.temperature:
        options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        torch.manual_seed(start)
        found = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        for reply in found[:, longest:].tolist():
            end = next((n for n, token in enumerate(reply, 1) if token in ENDS), len(reply))
            replies.append(reply[:end])
    return replies


def run_generate_in_batches(model, prompts: Replies, sampling: Sampling) -> Replies:
    return run_generate(model, prompts, sampling, BATCH)


def score_ours(model, posed: list[Posed]) -> list[np.ndarray]:
    prompts, options = [one.prompt for one in posed], [one.options for one in posed]
    scores = answer_log_probs(model, prompts, options, BATCH_TOKENS)
    return [log_probs for of_question in scores for log_probs in of_question]


def score_option_by_option(model, posed: list[Posed]) -> list[np.ndarray]:
    pairs = [(one.prompt, option) for one in posed for option in one.options]
    return window_log_probs(model, [(prompt + option, len(prompt)) for prompt, option in pairs])


def compare(tasks: dict, column: str, rounds: int, count=len):
    """Every task in turn, after a first round that warms up. A task's rate is count(result)/s."""
    results: dict[str, list[dict]] = {name: [] for name in tasks}
    for number in range(1 + rounds):
        for name, task in tasks.items():
            started = time.perf_counter()
            amount = count(task())
            rate = amount / (time.perf_counter() - started)
            if number:
                results[name].append({"rate": rate})
    print_table(results, {"rate": column}, "ours", None)


def count_tokens(replies: Replies) -> int:
    return sum(map(len, replies))


def compare_replies(model, prompts: Replies, new_tokens: int, rounds: int):
    greedy, drawn = Sampling(new_tokens), Sampling(new_tokens, temperature=0.9, top_p=0.95)
    few = prompts[: 2 * CHATS]
    equal = run_ours(model, few, greedy) == run_generate(model, few, greedy)
    print(f"\ngreedy tokens of {len(few)} prompts are equal: {equal}")
    print(f"\n{len(prompts)} pairs, up to {new_tokens} tokens each")
    tasks = {"ours": run_ours, "generate": run_generate}
    tasks["generate, batches"] = run_generate_in_batches
    calls = {name: lambda run=run: run(model, prompts, drawn) for name, run in tasks.items()}
    compare(calls, "tokens/s", rounds, count_tokens)
    print(f"\nchat: {CHATS} replies, one by one")
    tasks = {"ours": run_ours_one_by_one, "generate": run_generate}
    chats = {name: lambda run=run: run(model, few[:CHATS], drawn) for name, run in tasks.items()}
    compare(chats, "tokens/s", rounds, count_tokens)


def make_questions(records: list[dict], count: int) -> list[Question]:
    """Four answers of the sample to each question, the first 16 characters of each."""
    answers, questions = [record["response"][:16] for record in records], []
    for number, record in enumerate(records[:count]):
        options = [answers[(number + n * 37) % len(records)] for n in range(4)]
        questions.append(Question("x", record["instruction"], options, 0))
    return questions


def compare_questions(model, tokenizer, records: list[dict], count: int, rounds: int):
    for shots, by_text in ((0, False), (0, True), (5, False)):
        questions = make_questions(records, count + shots)
        posed = ask(tokenizer, questions, shots, by_text, 1024)["x"]
        one, other = score_ours(model, posed), score_option_by_option(model, posed)
        error = max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
        sums = [[scores.sum() for scores in found] for found in (one, other)]
        best = [np.reshape(of_all, (-1, 4)).argmax(1).tolist() for of_all in sums]
        what = "the options' words" if by_text else "letters"
        print(f"\n{len(posed)} questions, {shots} shots, {what}; ", end="")
        print(f"scores differ by {error:.1e} at most, choices are equal: {best[0] == best[1]}")
        tasks = {
            "ours": lambda posed=posed: score_ours(model, posed),
            "option by option": lambda posed=posed: score_option_by_option(model, posed),
        }
        compare(tasks, "questions/s", rounds, lambda scores: len(scores) // 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SIZES), default="28M")
    tasks = ["replies", "questions"]
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64, help="of a reply, at most")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(describe_cpu())
    records = read_jsonl(ROOT / "data/sft_sample.jsonl", 800)
    tokenizer = train_tokenizer([r["instruction"] + r["response"] for r in records], 6400)
    torch.manual_seed(0)
    size = SIZES[arguments.model]
    model = CustomLLM(CustomLLMConfig(vocab_size=6400, max_seq_len=1024, **size)).eval()
    model.generation_config.eos_token_id = list(ENDS)
    prompts = []
    for record in records[:: len(records) // arguments.prompts][: arguments.prompts]:
        message = {"role": "user", "content": record["instruction"]}
        prompts.append(
            tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
        )
    print(f"{arguments.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    print(f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens")
    with torch.no_grad():
        if "replies" in arguments.tasks:
            compare_replies(model, prompts, arguments.new_tokens, arguments.rounds)
        if "questions" in arguments.tasks:
            compare_questions(model, tokenizer, records, arguments.questions, arguments.rounds)


if __name__ == "__main__":
    main()
