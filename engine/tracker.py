"""The numbers of a run: metrics.jsonl holds them all, wandb and others are mirrors."""

import contextlib
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.children import unheard
from engine.disk import append_whole, write_whole
from engine.extras import Extras
from engine.mirrors import MIRRORS, UPLOAD_SECONDS, Mirror, within


class Tracker:
    """Writes every logged number to metrics.jsonl and mirrors it to the configuration's trackers.

    A resumed run first drops the lines behind its checkpoint. Only the first rank has one.
    A full disk or a failing mirror ends no training: lines that the disk cannot take wait in
    memory, and a mirror that fails is said once and left out. No mirror asks a question.

    seconds: in which a mirror must have answered. One that hangs has failed.
    """

    def __init__(
        self,
        run,
        project_name: str,
        config: dict,
        extras: Extras | None = None,
        seconds: float = 1.5 * UPLOAD_SECONDS,
    ):
        self.path, self.extras = run.folder / "metrics.jsonl", extras or Extras()
        self.seconds = seconds
        self.waiting = ""  # lines that are not written yet
        step = run.state.get("step", -1)  # without a checkpoint step 0 comes again too
        kept = [m for m in read_metrics(self.path) if m["step"] <= step]
        write_whole(self.path, "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in kept))
        # The runs' names at wandb and SwanLab, by tracker. Older checkpoints have wandb's alone.
        self.ids = run.state.get("tracker_ids", {"wandb": run.state.get("wandb_id")})
        self.mirrors: list[Mirror] = []
        modes = ""
        for name in dict.fromkeys(config["trackers"]):
            self._start(name, run, project_name, config)
            modes += f"; {name}: {self.mirrors[-1].mode if name in self._names() else 'none'}"
        print(f"Metrics: {self.path}{modes}", flush=True)

    def _names(self) -> list[str]:
        return [mirror.name for mirror in self.mirrors]

    def _start(self, name: str, run, project_name: str, config: dict):
        if importlib.util.find_spec(name) is None:
            self.extras.warn(name, f"it is not installed (pip install {name})")
            return
        with self.extras.attempt(name), unheard():
            mirror = MIRRORS[name](run, self.ids.get(name), project_name, config)
            self.ids |= {name: mirror.id}
            self.mirrors.append(mirror)

    def log(self, metrics: dict, step: int):
        self._write({"step": step, **metrics})
        self._mirror(lambda mirror: mirror.log(metrics, step))

    def log_samples(self, prompts: list[str], samples: list[str], step: int):
        """Generated texts, under the name "samples"."""
        rows = [list(row) for row in zip(prompts, samples, strict=True)]
        self._write({"step": step, "samples": rows})
        self._mirror(lambda mirror: mirror.log_samples(rows, step))

    def _write(self, record: dict):
        self.waiting += json.dumps(record, ensure_ascii=False) + "\n"
        self._write_waiting()

    def _write_waiting(self):
        with self.extras.attempt("metrics.jsonl"):
            append_whole(self.path, self.waiting.encode())
            self.waiting = ""
            self.extras.works_again("metrics.jsonl")

    def _mirror(self, action: Callable[[Mirror], None]):
        """One that fails is left out from then on."""
        for mirror in list(self.mirrors):
            with self.extras.attempt(mirror.name):
                within(self.seconds, partial(action, mirror))
                continue
            self.mirrors.remove(mirror)
            with self.extras.attempt(mirror.name):
                within(self.seconds, mirror.abandon)

    def finish(self):
        if self.waiting:
            self._write_waiting()
        self._mirror(lambda mirror: mirror.finish())


def read_metrics(path: Path) -> list[dict]:
    """The objects of a metrics.jsonl. A line that is none, or was cut by a kill, is left out."""
    if not path.exists():
        return []
    metrics = []
    for line in path.read_bytes().split(b"\n"):  # not splitlines: a sample may hold a U+2028
        with contextlib.suppress(ValueError):  # cut inside the JSON or inside a character
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                metrics.append(record)
    return metrics
