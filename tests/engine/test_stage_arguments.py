"""Keys of the three stages: a limit that all have, and keys that are arguments, too."""

from pathlib import Path

import pytest

import dpo_train
import sft_train
import train_llm
from engine.settings import resolve

DEFAULTS = {"dataset": "a.jsonl"}


@pytest.mark.parametrize("script", [train_llm, sft_train, dpo_train])
def test_a_dropout_that_leaves_nothing_is_refused_in_every_stage(script):
    with pytest.raises(ValueError, match=r"dropout=1\.0 must be .*below 1"):
        resolve(script.DEFAULTS, {"dropout": 1.0})


def test_an_argument_of_a_stage_is_the_key_of_its_name_and_may_be_a_path():
    assert resolve(DEFAULTS, {}, dataset=Path("b.jsonl"))["dataset"] == "b.jsonl"
    assert resolve(DEFAULTS, {}, dataset=None)["dataset"] == "a.jsonl"
    with pytest.raises(ValueError, match="dataset=' ' must be text that is not empty"):
        resolve(DEFAULTS, {}, dataset=" ")
