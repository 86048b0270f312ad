"""A run's pages in other programs: wandb, TensorBoard, SwanLab. Each mirrors metrics.jsonl.

All have the same methods, and give every number the same name. They never ask anything, and may
raise anything: engine.tracker leaves out one that fails.
"""

import atexit
import contextlib
import json
import os
import sys
import textwrap
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil

# What WANDB_MODE can be. dryrun and run are its older names.
MODES = {"online": "online", "run": "online", "shared": "shared"}
MODES |= {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}
UPLOAD_SECONDS = 20  # that the start and the end of a run wait for a server


class Wandb:
    """wandb: online when logged in, otherwise offline."""

    name = "wandb"
    data_dir: str | None = None  # of the last run in this process

    def __init__(self, run, run_id: str | None, project_name: str, config: dict):
        # A table goes through this folder. Its default is the home folder.
        before, Wandb.data_dir = Wandb.data_dir, str(run.folder.absolute() / "wandb")
        if os.environ.get("WANDB_DATA_DIR") in (None, before):  # not a person's own
            os.environ["WANDB_DATA_DIR"] = Wandb.data_dir
        options = {
            "project": project_name,
            "name": run.folder.name,
            "config": config,
            "dir": str(run.folder),
            "id": run_id,
            "resume": "allow" if run_id else None,
        }
        self._start(choose_mode(), options)

    def _start(self, mode: str, options: dict):
        import wandb  # takes 0.7 s: only where it is used

        seconds: Any = {"init_timeout": UPLOAD_SECONDS, "finish_timeout": UPLOAD_SECONDS}
        settings = wandb.Settings(silent=True, **seconds)
        begin: Any = partial(wandb.init, settings=settings, **options)
        self.run, self.mode = begin_or_offline(self.name, mode, begin)
        self.id = self.run.id

    def log(self, metrics: dict, step: int):
        self.run.log(metrics, step=step)

    def log_samples(self, rows: list[list[str]], step: int):
        import wandb

        self.run.log({"samples": wandb.Table(columns=["prompt", "sample"], data=rows)}, step=step)

    def finish(self):
        self.run.finish()

    def abandon(self):
        """It has failed, or hangs. Otherwise it complains once more, or waits, when Python ends."""
        import wandb

        for process in psutil.Process().children():
            if process.name().startswith("wandb"):
                process.kill()
        with contextlib.suppress(SystemExit):  # with which the process that was killed has ended
            wandb.teardown()


class TensorBoard:
    """TensorBoard's files in the run's folder: `tensorboard --logdir checkpoints` shows them."""

    name, mode, id = "tensorboard", "files", None

    def __init__(self, run, run_id: None, project_name: str, config: dict):
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run logged behind its checkpoint comes again.
        purge_step = run.state["step"] + 1 if run.state else None
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge_step)
        text = json.dumps(config, indent=1, ensure_ascii=False)
        self.writer.add_text("config", f"```json\n{text}\n```")

    def log(self, metrics: dict, step: int):
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def log_samples(self, rows: list[list[str]], step: int):
        text = "\n\n".join(f"{prompt} ⇒ {sample}" for prompt, sample in rows)
        # A block of code: a sample's own Markdown stays text.
        self.writer.add_text("samples", textwrap.indent(text, " " * 4, lambda line: True), step)

    def finish(self):
        self.writer.close()

    def abandon(self):
        self.writer.close()


class SwanLab:
    """SwanLab: online when logged in, otherwise offline.

    It starts and ends in a thread of its own: there it takes no signal from the run, and the run
    waits for no server longer than UPLOAD_SECONDS. SwanLab itself would wait for ever.
    """

    name = "swanlab"

    def __init__(self, run, run_id: str | None, project_name: str, config: dict):
        import swanlab

        settings: Any = swanlab.Settings(interactive=False, terminal={"proxy_type": "none"})
        has_no_key = settings.mode == "online" and not settings.api_key
        mode = "offline" if has_no_key else settings.mode
        options = {
            "project": project_name,
            "name": run.folder.name,
            "config": config,
            "log_dir": str(run.folder / "swanlab"),
            "id": run_id,
            "resume": "allow",
            "settings": settings,
            "reinit": True,  # the run of a training that failed in this process may be open
        }
        hook = sys.excepthook
        begin: Any = partial(swanlab.init, **options)
        start = partial(begin_or_offline, self.name, mode, begin)
        self.run, self.mode = within(UPLOAD_SECONDS, start)
        sys.excepthook = hook
        self.id = self.run.id
        # Before SwanLab's own hook, which would wait for ever.
        atexit.register(self.abandon)

    def log(self, metrics: dict, step: int):
        self.run.log(metrics, step=step)

    def log_samples(self, rows: list[list[str]], step: int):
        import swanlab

        texts = [swanlab.Text(sample, caption=prompt) for prompt, sample in rows]
        self.run.log({"samples": texts}, step=step)

    def finish(self):
        atexit.unregister(self.abandon)
        within(UPLOAD_SECONDS, self.run.finish)

    def abandon(self):
        atexit.unregister(self.abandon)
        within(UPLOAD_SECONDS, lambda: self.run.finish("crashed", error="the log says why"))


Mirror = Wandb | TensorBoard | SwanLab
MIRRORS = {kind.name: kind for kind in (Wandb, TensorBoard, SwanLab)}


def within(seconds: float, action: Callable[[], Any]) -> Any:
    """What action() returns or raises, in another thread. Raises TimeoutError after `seconds`."""
    results: list[Any] = []
    errors: list[Exception] = []

    def work():
        try:
            results.append(action())
        except Exception as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer in {seconds:g} s")
    return results[0]


def begin_or_offline(name: str, mode: str, begin: Callable) -> tuple[Any, str]:
    """(what begin(mode=…) returns, its mode). A server that cannot be reached stops no run."""
    try:
        return begin(mode=mode), mode
    except Exception as error:
        if mode == "offline":
            raise
        cause = (str(error) or repr(error)).splitlines()[0]
        print(f"{name} cannot be reached ({cause}): logging offline.")
        return begin(mode="offline"), "offline"


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
        # Or it asks the server for the user's name, only to print it: 5 s without a network.
        wandb.setup(wandb.Settings(silent=True))
        return wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError:  # a key in a wrong form: wandb.init says what is wrong
        return True
    except Exception:  # a broken setting: without a key wandb.init would ask for one
        return False
