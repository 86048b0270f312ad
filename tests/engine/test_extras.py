"""What is not training may fail: it is said, once and at the end, and nothing else happens."""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from tiny import cpu_runtime, tiny_model

from engine.extras import Extras, LastingStream, lasting_streams
from engine.report import Log
from engine.runs import Run
from engine.stop import GivenUp


def test_a_failure_is_said_once_and_again_at_the_end(capsys):
    extras = Extras()
    extras.summarize()
    for _ in range(3):
        with extras.attempt("wandb"):
            raise ConnectionResetError("lost\nmore of it")
    assert capsys.readouterr().out == (
        "WARNING: wandb: ConnectionResetError: lost; training goes on without it.\n"
    )
    extras.summarize()
    assert capsys.readouterr().out == (
        "WARNING: this run had to do without: wandb (ConnectionResetError: lost).\n"
    )


def test_what_works_again_is_not_said_at_the_end(capsys):
    extras = Extras()
    with extras.attempt("metrics.jsonl"):
        raise OSError("full")
    extras.works_again("metrics.jsonl")
    capsys.readouterr()
    extras.summarize()
    assert capsys.readouterr().out == ""


def test_another_rank_says_its_own_and_names_itself(capsys):
    extras = Extras(rank=3)
    with extras.attempt("samples"):
        raise OSError("lost")
    extras.summarize()
    assert capsys.readouterr().out == (
        "rank 3: WARNING: samples: OSError: lost; training goes on without it.\n"
        "rank 3: WARNING: this run had to do without: samples (OSError: lost).\n"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_run_on_purpose_is_no_failure(error):
    extras = Extras()
    with pytest.raises(error), extras.attempt("samples"):
        raise error
    assert extras.failures == {}


class Broken(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        self.write("")


def test_a_stream_without_a_reader_is_said_on_the_other_one_and_printing_goes_on(monkeypatch):
    other = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", other)
    with lasting_streams():
        for number in range(3):
            print(number, flush=True)
    assert other.getvalue().startswith("WARNING: the log cannot be written ([Errno 32] Broken pipe")
    assert other.getvalue().count("\n") == 1


def test_streams_that_were_closed_before_python_started_are_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_streams():
        print("nobody reads this", flush=True)
        assert not sys.stderr.isatty()
    assert sys.stdout is None


def test_a_lasting_stream_is_otherwise_the_stream():
    stream = io.StringIO()
    lasting = LastingStream(stream)
    assert lasting.write("字") == 1
    lasting.flush()
    assert stream.getvalue() == lasting.getvalue() == "字"


PRINTS = """
import sys
from engine.extras import lasting_streams
with lasting_streams():
    for number in range(100):
        print("⇒ 春眠不觉晓 é", number, flush=True)
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize("target", ["a pipe that is closed", "/dev/full", "ascii", "gbk"])
def test_a_program_prints_to_its_end_whatever_its_output_is(target):
    encoding = target if target in ("ascii", "gbk") else "utf-8"
    reading, writing = os.pipe()
    if target.startswith("a pipe"):
        os.close(reading)
    elif target == "/dev/full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), writing)
    done = subprocess.run(
        [sys.executable, "-c", PRINTS],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith(b"done\n")


# --- beside a loop -------------------------------------------------------------------------------

EVERY: dict = dict.fromkeys(("log_every", "eval_every", "sample_every", "save_every"), 1)
EVERY |= {"trackers": [], "max_seq_len": 32}


def test_a_picture_that_cannot_be_drawn_ends_no_run_and_a_fault_of_training_does(tmp_path, capsys):
    (tmp_path / "curves.png").mkdir()
    loader = SimpleNamespace(start_step=0, total_steps=10)
    with Log(Run(tmp_path), "project", EVERY, cpu_runtime(), tiny_model(), loader, 0) as log:
        with log.paused("eval"):
            raise GivenUp
        with pytest.raises(ValueError, match="a fault of training"), log.paused("save"):
            raise ValueError("a fault of training")
    log.draw()
    log.finish()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("WARNING: this run had to do without: curves.png (IsADirectoryError")
