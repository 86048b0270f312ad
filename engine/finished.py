"""The models of finished runs, and which script makes them. Nothing here needs torch."""

import contextlib
from pathlib import Path

# From the last stage to the first.
SCRIPTS = {"dpo": "dpo_train.py", "sft": "sft_train.py", "pretrain": "train_llm.py"}


def find_final(output_dir: str, stage: str, option: str = "init_from") -> Path:
    """The newest finished run of a stage.

    Raises:
        ValueError: there is none. The message names the command that makes one, and the option
            that names another folder.
    """
    finals = list(Path(output_dir, stage).glob("*/final"))
    if not finals:
        raise ValueError(
            f"No finished {stage} run under {output_dir}/{stage}: run `python {SCRIPTS[stage]}` "
            f"first, or set {option} to a model folder."
        )
    return max(finals, key=lambda folder: folder.stat().st_mtime)


def find_newest_final(output_dir: str, stage: str | None = None) -> Path:
    """The newest finished run of the last stage that has one, or of the stage that is named.

    Raises:
        ValueError: none is finished.
    """
    if stage:
        return find_final(output_dir, stage, "--model")
    for name in SCRIPTS:
        with contextlib.suppress(ValueError):
            return find_final(output_dir, name)
    raise ValueError(
        f"No finished run under {output_dir}: run `python train_llm.py` first, or set --model to a "
        "model folder."
    )
