"""The numbers of a run: metrics.jsonl holds them all, wandb is a mirror."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.children import unheard
from engine.disk import write_whole
from engine.extras import Extras

# What WANDB_MODE can be. dryrun and run are its older names.
MODES = {"online": "online", "run": "online", "shared": "shared"}
MODES |= {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}
UPLOAD_SECONDS = 20  # that the end of a run waits for wandb; `wandb sync` uploads what is left


class Tracker:
    """Writes every logged number to metrics.jsonl and mirrors it to wandb. It never asks anything.

    A resumed run first drops the lines behind its checkpoint. Only the first rank has one.
    Neither ends a training: lines that the disk cannot take wait in memory, and wandb is left out.
    """

    def __init__(self, run, project_name: str, config: dict, extras: Extras | None = None):
        self.path, self.extras = run.folder / "metrics.jsonl", extras or Extras()
        self.waiting = ""  # lines that are not written yet
        step = run.state.get("step", -1)  # without a checkpoint step 0 comes again too
        kept = [m for m in read_metrics(self.path) if m["step"] <= step]
        write_whole(self.path, "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in kept))
        self.mirror = Mirror(run, project_name, config, self.extras)
        print(f"Metrics: {self.path}; wandb: {self.mirror.mode}", flush=True)

    @property
    def wandb_id(self) -> str | None:
        return self.mirror.id

    def log(self, metrics: dict, step: int):
        self._write({"step": step, **metrics})
        self.mirror.log(lambda: metrics, step)

    def log_samples(self, prompts: list[str], samples: list[str], step: int):
        """Generated texts, into metrics.jsonl and a wandb Table."""
        rows = [list(row) for row in zip(prompts, samples, strict=True)]
        self._write({"step": step, "samples": rows})
        self.mirror.log(lambda: {"samples": make_table(["prompt", "sample"], rows)}, step)

    def _write(self, record: dict):
        self.waiting += json.dumps(record, ensure_ascii=False) + "\n"
        with self.extras.attempt("metrics.jsonl"):
            append_whole(self.path, self.waiting.encode())
            self.waiting = ""
            self.extras.works_again("metrics.jsonl")

    def finish(self):
        if self.waiting:
            with self.extras.attempt("metrics.jsonl"):
                append_whole(self.path, self.waiting.encode())
                self.extras.works_again("metrics.jsonl")
        self.mirror.finish()


def append_whole(path: Path, content: bytes):
    """Append to a file, all or nothing. It is opened for each: an error leaves no open file."""
    with open(path, "ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            if (written := stream.write(content)) < len(content):  # the disk became full
                stream.write(content[written:])
        except OSError:
            stream.truncate(before)
            raise


class Mirror:
    """A run's page on wandb. Whatever fails there is said once; from then on it is left out."""

    def __init__(self, run, project_name: str, config: dict, extras: Extras):
        self.id: str | None = run.state.get("wandb_id")
        self.extras, self.mode = extras, "none"
        self.wandb: Any = None
        # A table goes through this folder. Its default is the home folder.
        os.environ.setdefault("WANDB_DATA_DIR", str(run.folder.absolute() / "wandb"))
        options = {
            "project": project_name,
            "name": run.folder.name,
            "config": config,
            "dir": str(run.folder),
            "id": self.id,
            "resume": "allow" if self.id else None,
        }
        with extras.attempt("wandb"), unheard():
            self._start(choose_mode(), options)

    def _start(self, mode: str, options: dict):
        import wandb  # takes 0.7 s: only where it is used

        settings = wandb.Settings(silent=True, init_timeout=20, finish_timeout=UPLOAD_SECONDS)
        begin: Any = wandb.init
        try:
            self.wandb = begin(mode=mode, settings=settings, **options)
        except Exception as error:  # a server that cannot be reached must not stop a run
            cause = (str(error) or repr(error)).splitlines()[0]
            print(f"wandb cannot be reached ({cause}): logging offline.")
            mode = "offline"
            self.wandb = begin(mode=mode, settings=settings, **options)
        self.id, self.mode = self.wandb.id, mode

    def log(self, make_values: Callable[[], dict], step: int):
        self._call(lambda run: run.log(make_values(), step=step))

    def finish(self):
        self._call(lambda run: run.finish())

    def _call(self, action: Callable[[Any], None]):
        if self.wandb is None:
            return
        with self.extras.attempt("wandb"):
            action(self.wandb)
            return
        self.wandb = None
        with self.extras.attempt("wandb"):  # otherwise it complains once more when Python ends
            end_wandb()


def end_wandb():
    import wandb

    wandb.teardown()


def make_table(columns: list[str | int], rows: list[list]):
    import wandb

    return wandb.Table(columns=columns, data=rows)


def choose_mode() -> str:
    """What WANDB_MODE and WANDB_DISABLED ask for, as far as it can be had without a question."""
    asked = os.environ.get("WANDB_MODE", "").strip().lower()
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on"):
        mode = "disabled"
    elif asked and asked not in MODES:
        print(f"WANDB_MODE={asked!r} is none of {', '.join(MODES)}: logging offline.")
        mode = "offline"
    else:
        mode = MODES.get(asked, "online")
    if mode in ("online", "shared") and not is_logged_in():
        if asked:
            print(
                f"WANDB_MODE={asked} needs `wandb login` or WANDB_API_KEY first: logging offline."
            )
        mode = "offline"
    if asked:
        os.environ["WANDB_MODE"] = mode  # wandb reads it too
    return mode


def is_logged_in() -> bool:
    """Whether wandb has a key for the server in use, which may be one's own (WANDB_BASE_URL)."""
    import wandb

    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError:  # a key in a wrong form: wandb.init says what is wrong
        return True
    except Exception:  # a broken setting: without a key wandb.init would ask for one
        return False


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
