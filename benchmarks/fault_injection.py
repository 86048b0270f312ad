"""Kill each stage at random moments, fill its disk, resume, and compare with an undisturbed run.

    python benchmarks/fault_injection.py [--stage pretrain] [--kills 30] [--seed 0]

After every fault all checkpoints must be whole and the disk use bounded; every finished run must
have the undisturbed run's files, final weights and logged numbers, bit for bit. Else: exit status
1. Several faults hit each run before it finishes.

half-written: faults that left a *.tmp behind; resumed: the next run went on from a checkpoint.
"""

import argparse
import random
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from forked_runs import STAGES, run

from engine.checkpoint import find_damage, list_checkpoints
from engine.identity import MANIFEST
from engine.tracker import read_metrics

CHANGES = {"dropout": 0.1, "num_workers": 2, "save_every": 3, "keep_checkpoints": 2}
EPOCHS = {"pretrain": 2, "sft": 4, "dpo": 6}  # 30 to 40 steps
TIMES = {"train/tokens_per_second", "train/eta_seconds", "memory/allocated_gib"}
# What a phase writes, below output_dir: there the disk can become full.
WRITES = {
    "tokenizer training": "cache/tokenizer-*/*",
    "data preparation": "cache/*/train.arrow",
    "reference log-probs": "cache/reference-*/*",
    "checkpoint": "*/run/step_*/*",
    "final save": "*/run/final/*",
}
# How a run ends that met a fault; without one it must be "done".
EXPECTED = {"kill": "killed", "disk full": "error error: .* could not be written: ", None: "done"}
IN_THE_LOOP = ("step", "validation", "checkpoint")  # come again and again


class Reference:
    """An undisturbed run of a stage: what it made and how long each phase took."""

    def __init__(self, stage: str, folder: Path, base: str | None):
        folder.mkdir()
        self.stage, self.output = stage, folder / "undisturbed"
        changes = CHANGES | {"num_epochs": EPOCHS[stage]}
        make_config: Any = STAGES[stage][2]
        self.config = make_config(folder, *([base] if base else []), **changes)
        event, self.spans = run(stage, self.config | {"output_dir": str(self.output)})
        if event != "done":
            raise SystemExit(f"error: the undisturbed {stage} run failed: {event}")
        self.final = self.output / stage / "run" / "final"
        # Beside what a finished run keeps: the best checkpoint, and one being written.
        checkpoints = list_checkpoints(self.final.parent)
        self.most_bytes = size_of(self.output) + 2 * max(map(size_of, checkpoints)) + 2**16

    def violations(self, output: Path, finished: bool) -> list[str]:
        """What is wrong with the output_dir of a run that met a fault or has finished."""
        run_folder = output / self.stage / "run"
        damage = {path: find_damage(path) for path in list_checkpoints(run_folder)}
        found = [f"{path}: {problem}" for path, problem in damage.items() if problem]
        if (size := size_of(output)) > self.most_bytes:
            found.append(f"{output}: {size:,} bytes, more than {self.most_bytes:,}")
        if finished:
            if difference := names(output) ^ names(self.output):
                found.append(f"{output}: other files than undisturbed: {sorted(difference)}")
            if contents(run_folder / "final") != contents(self.final):
                found.append(f"{run_folder}/final differs from the undisturbed run's")
            if records(run_folder) != records(self.final.parent):
                found.append(f"{run_folder}/metrics.jsonl differs from the undisturbed run's")
        return found


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def names(folder: Path) -> set[str]:
    """All files but that of the data's hashes: it is there when the data are old enough."""
    paths = (path for path in folder.rglob("*") if path.name != MANIFEST)
    return {str(path.relative_to(folder)) for path in paths}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(run_folder: Path) -> list[dict]:
    """Every line of metrics.jsonl without what depends on the clock; a torn one is an error."""
    path = run_folder / "metrics.jsonl"
    metrics = read_metrics(path)
    if len(metrics) != path.read_bytes().count(b"\n"):
        return [{"torn": str(path)}]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in metrics]


def disturb(reference: Reference, output: Path, faults, choose, table: dict) -> list[str]:
    """Run into one fault after another in a fresh folder, then to the end; returns violations."""
    config = reference.config | {"output_dir": str(output)}
    problems: list[str] = []
    met: list[tuple] = []
    for kind, phase in [*faults, (None, None)]:
        if met and list_checkpoints(output / reference.stage / "run"):
            table[met[-1]]["resumed"] += 1
        event, _ = run(reference.stage, config, **aim(reference, kind, phase, choose))
        problems += reference.violations(output, finished=event == "done")
        if event == "done":
            break
        if not re.match(EXPECTED[kind], event):
            problems.append(f"{output}: {event}")
            break
        met.append((kind, phase))
        table[met[-1]]["faults"] += 1
        table[met[-1]]["half-written"] += any(output.rglob("*.tmp"))
    for fault in met:
        table[fault]["bit-equal"] += not problems
    shutil.rmtree(output)
    return problems


def aim(reference: Reference, kind, phase, choose) -> dict:
    """When exactly a run is killed (a little after the phase's end, at most), or its disk full."""
    if kind == "kill":
        spans = reference.spans[phase]
        number = choose.randint(1, max(1, len(spans) // 4))
        return {"kill": (phase, number, choose.uniform(0, 1.1) * choose.choice(spans))}
    if kind == "disk full":
        largest = max(path.stat().st_size for path in reference.output.glob(WRITES[phase]))
        return {"full": (phase, 1, choose.randrange(largest))}
    return {}


def choose_faults(phases: list[str], kills: int, choose) -> list[tuple[str, str]]:
    """One run's faults in the order of its phases: (kind, phase); the last run's disk is full too.

    The phases of the loop come twice, mixed.
    """
    middle = choose.sample(IN_THE_LOOP * 2, 2 * len(IN_THE_LOOP))
    before_and_after = [phase for phase in phases if phase not in IN_THE_LOOP]
    order = [*before_and_after[:-1], *middle, before_and_after[-1]]
    killed = choose.sample(range(len(order)), min(kills, len(order)))
    faults = []
    for index, phase in enumerate(order):
        if kills <= len(order) and phase in WRITES and phase not in order[:index]:
            faults.append(("disk full", phase))
        if index in killed:
            faults.append(("kill", phase))
    return faults


def disturb_often(reference: Reference, folder: Path, kills: int, choose) -> tuple[dict, list[str]]:
    """({(kind, phase): counts}, violations) of so many kills, and of a full disk in every phase."""
    table: dict[tuple, Counter] = defaultdict(Counter)
    problems: list[str] = []
    rounds, left = 0, kills
    while left and not problems:
        faults = choose_faults(list(reference.spans), left, choose)
        problems += disturb(reference, folder / str(rounds), faults, choose, table)
        left = kills - sum(c["faults"] for (kind, _), c in table.items() if kind == "kill")
        rounds += 1
    return table, problems


def main():
    parser = argparse.ArgumentParser(description="Kill, fill up, resume, compare.")
    parser.add_argument("--stage", choices=STAGES, help="default: all three")
    parser.add_argument("--kills", type=int, default=30, help="of each stage, at least")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    choose, problems = random.Random(arguments.seed), []
    columns = ("faults", "half-written", "resumed", "bit-equal")
    print("| stage | fault | during |", " | ".join(columns), "|\n|---|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as name:
        base = None
        for stage in STAGES:
            folder = Path(name, stage)
            if stage != "pretrain" and stage != (arguments.stage or stage):
                continue
            reference = Reference(stage, folder, base)
            base = base or str(reference.final)
            if arguments.stage in (stage, None):
                table, found = disturb_often(reference, folder, arguments.kills, choose)
                problems += found
                for (kind, phase), counts in table.items():
                    numbers = (counts[column] for column in columns)
                    print(
                        "|", " | ".join(map(str, (stage, kind, phase, *numbers))), "|", flush=True
                    )
    for problem in problems:
        print(f"VIOLATION {problem}", file=sys.stderr)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
