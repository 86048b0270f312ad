"""How often a run logs, validates, samples and saves. Numbers are steps, "auto" is a share of time.

Nobody knows beforehand what a validation costs on a card, or a save on a disk: both are measured
while the run goes on, and what comes next waits until the time that has passed pays for it. Nothing
here touches what is trained: two runs of one configuration may look at themselves at other steps.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.meter import Meter
from engine.runtime import Runtime
from engine.steps import StepLoader

AUTO = "auto"
LOOKING = 0.05  # of the time so far may go to validation and samples
SAVING = 0.02  # of the time may go to saves
VALIDATIONS, SAMPLES = 50, 10  # in a long run, where the time pays for them
AT_LEAST = 4  # validations in a run, also where it does not
DEARER = 1.5  # times the dearest so far is kept back for each of those: samples get longer
FIRST_LINES = 10  # of the first steps: each has one, and shows at once that the run works
LOG_STEPS, LOG_SECONDS = 10, 3.0  # between two lines, whichever is longer
SAVE_SECONDS = 15 * 60.0  # between two saves, at most


@dataclass
class Due:
    """What happens after a step."""

    log: bool
    eval: bool
    sample: bool
    save: bool
    stop: bool  # a signal asked for it: the run saves and ends


class Cadence:
    """Decides after each step what happens.

    meter: measures what "eval", "sample" and "save" cost, by Meter.paused.
    clock: seconds.
    """

    def __init__(
        self,
        config: dict,
        loader: StepLoader,
        meter: Meter,
        rt: Runtime,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.every = {name: config[f"{name}_every"] for name in ("log", "eval", "sample", "save")}
        self.total, self.start = loader.total_steps, loader.start_step
        self.quarter = max(1, self.total // AT_LEAST)  # steps between validations that must be
        self.meter, self.rt, self.clock = meter, rt, clock
        self.last_log = (self.start, -math.inf)  # step, time
        self.saved: float | None = None
        self.first: tuple[int, float, float] | None = None  # step, time, seconds of pauses
        self.dearest: dict[str, float] = {}  # seconds of the longest pause of each kind

    def due(self, step: int, stop: bool) -> Due:
        """What happens after a step. All ranks must call it; the first one's clock decides.

        Everything happens after the last step. A run that stops saves. No checkpoint is saved
        before its loss has been looked at.
        """
        self._note_costs(step)
        names = ("eval", "sample", "save", "log")
        here = [stop, *(self._is_due(name, step) for name in names)]
        stop, evaluate, sample, save, log = self.rt.any_of(here)
        is_last = step == self.total
        save = save or stop or is_last
        log = log or save
        if log:
            self.last_log = (step, self.clock())
        if save:
            self.saved = self.clock()
        if is_last:  # no training is left to write beside, and a busy core makes samples slow
            self.rt.writer.is_open = False
        return Due(log, evaluate or is_last, sample or is_last, save, stop)

    def _is_due(self, name: str, step: int) -> bool:
        every = self.every[name]
        if every != AUTO:
            return every > 0 and step % every == 0
        auto = {"log": self._log, "eval": self._eval, "sample": self._sample, "save": self._save}
        return self.rt.is_main and auto[name](step)

    def _log(self, step: int) -> bool:
        last_step, last_time = self.last_log
        is_first = step - self.start <= FIRST_LINES
        waited = step - last_step >= LOG_STEPS and self.clock() - last_time >= LOG_SECONDS
        return is_first or waited

    def _eval(self, step: int) -> bool:
        if step % self.quarter == 0 and step // self.quarter < AT_LEAST:
            return True
        return self._is_time(max(1, self.total // VALIDATIONS), step) and self._is_paid(
            "eval", step
        )

    def _sample(self, step: int) -> bool:
        return self._is_time(max(1, self.total // SAMPLES), step) and self._is_paid("sample", step)

    def _is_time(self, every: int, step: int) -> bool:
        """The end has all of it: nothing comes shortly before."""
        return step % every == 0 and self.total - step >= every

    def _note_costs(self, step: int):
        for name, seconds in self.meter.last_cost.items():
            self.dearest[name] = max(seconds, self.dearest.get(name, 0.0))
        if self.first is None:
            self.first = (step, self.clock(), sum(self.meter.spent.values()))

    def _is_paid(self, name: str, step: int) -> bool:
        """Whether the time so far pays for another one, and what is left for those that must be.

        The first one is taken in any case: its cost is not known.
        """
        if name not in self.dearest:
            return True
        cost = self.meter.spent["eval"] + self.meter.spent["sample"] + self.dearest[name]
        if name == "sample" and self._is_due("eval", step):
            cost += self.dearest.get("eval", 0.0)
        quarters = min(AT_LEAST - 1, step // self.quarter)
        must_be = AT_LEAST - quarters  # validations after this step
        kept_back = must_be * self.dearest.get("eval", 0.0) + self.dearest.get("sample", 0.0)
        passed = self.clock() - self.meter.started
        in_all = passed + (self.total - step) * self._step_seconds(step)
        return cost <= LOOKING * passed and cost + DEARER * kept_back <= LOOKING * in_all

    def _step_seconds(self, step: int) -> float:
        """Of a step, pauses and the first step left out: that one compiles."""
        assert self.first
        first, started, paused = self.first
        seconds = self.clock() - started - (sum(self.meter.spent.values()) - paused)
        return seconds / max(1, step - first)

    def _save(self, step: int) -> bool:
        waited = self.clock() - (self.saved or self.meter.started)
        stalled = self.meter.last_cost.get("save")  # None: there was no save yet
        # What is written beside training takes a core and the disk: it counts as a cost, too.
        pause = ((stalled or 0.0) + self.rt.writer.seconds) / SAVING
        # At a validation sooner: with its loss a checkpoint may be known as the best.
        is_early = stalled is not None and waited >= pause and self._is_due("eval", step)
        return is_early or waited >= max(SAVE_SECONDS, pause)

    def describe(self) -> list[str]:
        """What "auto" comes to."""
        looks = f"where {LOOKING:.0%} of the time pays for it"
        meanings = {
            "log": f"the first {FIRST_LINES} steps, then at least {LOG_STEPS} steps and "
            f"{LOG_SECONDS:.0f} s apart",
            "eval": f"every {max(1, self.total // VALIDATIONS):,} steps {looks}, and every "
            f"{self.quarter:,} steps",
            "sample": f"every {max(1, self.total // SAMPLES):,} steps {looks}",
            "save": f"every {SAVE_SECONDS / 60:.0f} minutes, later where a save takes more than "
            f"{SAVING:.0%} of them",
        }
        autos = [name for name, every in self.every.items() if every == AUTO]
        return [f"{name}_every auto: {meanings[name]}; and at the end." for name in autos]
