import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT

from engine.finished import find_final, find_newest_final


def finish(tmp_path, stage: str, name: str, age: int) -> Path:
    final = tmp_path / stage / name / "final"
    final.mkdir(parents=True)
    os.utime(final, (1000 + age, 1000 + age))
    return final


def test_the_newest_final_of_a_stage_is_found_and_none_names_the_command(tmp_path):
    message = r"run `python train_llm\.py` first, or set init_from to a model folder\."
    with pytest.raises(ValueError, match=message):
        find_final(str(tmp_path), "pretrain")
    for age, name in enumerate(("b", "a")):
        finish(tmp_path, "pretrain", name, age)
    assert find_final(str(tmp_path), "pretrain").parent.name == "a"
    with pytest.raises(ValueError, match=r"No finished sft run .*`python sft_train\.py` first"):
        find_final(str(tmp_path), "sft")


def test_the_newest_final_is_one_of_the_last_stage_that_has_any(tmp_path):
    message = r"No finished run under .*: run `python train_llm\.py` first, or set --model to a"
    with pytest.raises(ValueError, match=message):
        find_newest_final(str(tmp_path))
    pretrained = finish(tmp_path, "pretrain", "run", age=2)
    assert find_newest_final(str(tmp_path)) == pretrained
    tuned = finish(tmp_path, "sft", "run", age=1)
    assert find_newest_final(str(tmp_path)) == tuned
    assert find_newest_final(str(tmp_path), "pretrain") == pretrained
    with pytest.raises(ValueError, match=r"`python dpo_train\.py` first, or set --model to a"):
        find_newest_final(str(tmp_path), "dpo")


def test_pages_of_runs_need_neither_torch_nor_transformers():
    code = "import sys, curves; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
