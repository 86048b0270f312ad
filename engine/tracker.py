"""The numbers of a run: metrics.jsonl holds them all, wandb is a mirror."""

import json
import os
from pathlib import Path
from typing import Any

from engine.disk import explain_full_disk, write_whole


class Tracker:
    """Writes every logged number to metrics.jsonl and mirrors it to wandb. It never asks anything.

    A resumed run first drops the lines behind its checkpoint. Only the first rank has one.
    """

    def __init__(self, run, project_name: str, config: dict):
        self.path = run.folder / "metrics.jsonl"
        self.wandb_id: str | None = run.state.get("wandb_id")
        self.wandb: Any = None
        step = run.state.get("step", -1)  # without a checkpoint step 0 comes again too
        kept = [m for m in read_metrics(self.path) if m["step"] <= step]
        write_whole(self.path, "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in kept))
        self._start_wandb(run, project_name, config)

    def _start_wandb(self, run, project_name: str, config: dict):
        import wandb  # takes 0.7 s: only where it is used

        options = {
            "project": project_name,
            "name": run.folder.name,
            "config": config,
            "dir": str(run.folder),
            "id": self.wandb_id,
            "resume": "allow" if self.wandb_id else None,
        }
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if is_logged_in() else "offline")
        settings = wandb.Settings(silent=True, init_timeout=20)
        try:
            self.wandb = wandb.init(mode=mode, settings=settings, **options)
        except Exception as error:  # a server that cannot be reached must not stop a run
            cause = (str(error) or repr(error)).splitlines()[0]
            print(f"wandb cannot be reached ({cause}): logging offline.")
            self.wandb = wandb.init(mode="offline", settings=settings, **options)
            mode = "offline"
        self.wandb_id = self.wandb.id
        print(f"Metrics: {self.path}; wandb: {mode}", flush=True)

    def log(self, metrics: dict, step: int):
        self._write({"step": step, **metrics})
        self.wandb.log(metrics, step=step)

    def _write(self, record: dict):
        """Opens the file for each line: a run that an error ends leaves no open file behind."""
        with explain_full_disk(self.path), open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")

    def log_samples(self, prompts: list[str], samples: list[str], step: int):
        """Generated texts, into metrics.jsonl and a wandb Table."""
        import wandb

        rows = [list(row) for row in zip(prompts, samples, strict=True)]
        self._write({"step": step, "samples": rows})
        self.wandb.log({"samples": wandb.Table(columns=["prompt", "sample"], data=rows)}, step=step)

    def finish(self):
        self.wandb.finish()


def is_logged_in() -> bool:
    """Whether wandb has a key for the server in use, which may be one's own (WANDB_BASE_URL)."""
    import wandb

    try:
        return wandb.login(prompt=False, verify=False)
    except Exception:  # a key in a wrong form: wandb.init says what is wrong with it
        return True


def read_metrics(path: Path) -> list[dict]:
    """The objects of a metrics.jsonl. A last line that a kill cut short is left out."""
    if not path.exists():
        return []
    metrics = []
    for line in path.read_bytes().split(b"\n"):  # not splitlines: a sample may hold a U+2028
        try:
            metrics.append(json.loads(line))
        except ValueError:  # cut inside the JSON or inside a character
            break
    return metrics
