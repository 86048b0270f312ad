"""One run's configuration: the script's wandb_config, a caller's keys, the command line."""

import contextlib
import difflib
import inspect
import math
import os
import sys

CHOICES = {
    "mixed_precision": ("fp16", "bf16", "no"),
    "optimizer": ("adamw", "muon"),
    "torch_compile": ("auto", True, False),
    "gradient_checkpointing": (False, "attention", "full", True),
    "resume": ("auto", False),
}
AT_LEAST_ONE = {"d_model", "n_heads", "n_layers", "d_ff", "batch_size", "num_epochs", "top_k"} | {
    "gradient_accumulation_steps", "keep_checkpoints", "max_seq_len", "max_length", "n_kv_heads",
    "moe_d_ff",
}  # fmt: skip
# batch_size "auto": so many rows, times gradient_accumulation_steps, are a step.
AUTO_ROWS = 32
# Far beyond any sensible value, and below what overflows or exhausts the machine further down.
LARGEST = 2**31 - 1
AT_MOST = dict.fromkeys(("warmup_ratio", "min_lr_ratio", "validation_ratio"), 1)
AT_MOST |= dict.fromkeys(("max_seq_len", "max_length", "vocab_size"), 2**20) | {"num_workers": 1024}
# Keys that may be None, and an example of what else they take.
OPTIONAL = {"n_kv_heads": 1, "moe_d_ff": 1, "tokenizer_path": "", "init_from": ""}


def resolve_config(defaults: dict, overrides: dict | None) -> dict:
    """The script's own wandb_config with the caller's keys put over it.

    Raises:
        ValueError: every unknown key (with the nearest known one) and wrong value, in one message.
    """
    given = {
        key: os.fspath(value) if isinstance(value, os.PathLike) else value
        for key, value in (overrides or {}).items()
    }
    problems = []
    for key, value in given.items():
        if key not in defaults:
            near = difflib.get_close_matches(str(key), defaults, n=1, cutoff=0.0)
            problems.append(f"unknown key {shown(key)}; the nearest is {near[0]!r}")
        elif problem := find_problem(key, value, defaults[key]):
            problems.append(problem)
    if problems:
        raise ValueError("wandb_config: " + "; ".join(problems) + ".")
    return defaults | given


def parse_arguments(arguments: list[str], defaults: dict) -> dict:
    """['--batch_size', '16', '--use_moe=true'] -> {'batch_size': 16, 'use_moe': True}."""
    parsed = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"expected --key value, found {word!r}. Keys: {', '.join(defaults)}.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = next(words, None)
            if text is None:
                raise ValueError(f"--{key} needs a value.")
        keep_text = isinstance(defaults.get(key), str) and key not in CHOICES
        parsed[key] = text if keep_text and text.lower() != "none" else parse_value(text)
    return parsed


def parse_value(text: str):
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def find_problem(key: str, value, default) -> str | None:
    """What is wrong with a value, judged by the key's choices and its default's type."""
    if key in CHOICES:
        allowed = CHOICES[key]
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            return f"{key}={shown(value)} must be one of {', '.join(map(repr, allowed))}"
        return None
    if key == "batch_size" and value == "auto":
        return None
    if key in OPTIONAL:
        if value is None:
            return None
        default = OPTIONAL[key]
    rule = None
    if isinstance(default, bool):
        rule = None if isinstance(value, bool) else "True or False"
    elif isinstance(default, int | float):
        rule = _broken_number_rule(key, value, isinstance(default, int))
    elif isinstance(default, str):
        rule = _broken_text_rule(value)
    return f"{key}={shown(value)} must be {rule}" if rule else None


def _broken_number_rule(key: str, value, whole: bool) -> str | None:
    kinds = int if whole else int | float
    is_nan_or_inf = isinstance(value, float) and not math.isfinite(value)
    if not isinstance(value, kinds) or isinstance(value, bool) or is_nan_or_inf:
        return "a whole number" if whole else "a number"
    if value < (smallest := 1 if key in AT_LEAST_ONE else 0):
        return f"at least {smallest}"
    if value > (largest := AT_MOST.get(key, LARGEST)):
        return f"at most {largest}"
    return None


def _broken_text_rule(value) -> str | None:
    if not isinstance(value, str):
        return "text"
    if not value.strip():
        return "text that is not empty"
    # Neither can stand in a file name or in run.json.
    has_surrogate = any("\ud800" <= character <= "\udfff" for character in value)
    return "text without NULs and lone surrogates" if has_surrogate or "\0" in value else None


def shown(value) -> str:
    """repr on one short line."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:99]}…"


def run_from_command_line(stage_function, defaults: dict):
    """Call a stage's function with the command line's keys; an error becomes one clear line."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(sys.modules[stage_function.__module__].__doc__)
        print("Keys and defaults:")
        for key, value in defaults.items():
            print(f"  --{key} {value}")
        print("  --project_name, --run_name: of the wandb project and of the run's folder")
        return
    try:
        own = inspect.signature(stage_function).parameters.keys() - {"wandb_config"}
        overrides = parse_arguments(arguments, defaults | dict.fromkeys(own, ""))
        passed = {name: overrides.pop(name) for name in own & overrides.keys()}
        stage_function(wandb_config=overrides, **passed)
    except (ValueError, ArithmeticError, OSError, MemoryError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:  # before or after the loop, which saves first
        raise SystemExit(
            "interrupted: nothing was being trained; run the same command again"
        ) from None
