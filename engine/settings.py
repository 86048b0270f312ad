"""The settings of a run: a script's wandb_config, a caller's keys, the command line."""

import argparse
import contextlib
import difflib
import inspect
import math
import os
import re
import sys

from engine import imports_are_done
from engine.extras import replace_unprintable

CHOICES = {
    "mixed_precision": ("fp16", "bf16", "no"),
    "optimizer": ("adamw", "muon"),
    "torch_compile": ("auto", True, False),
    "device": ("auto", "cpu"),
    "gradient_checkpointing": (False, "selective", "full", "attention", True),
    "resume": ("auto", False),
}
AT_LEAST_ONE = {"d_model", "n_heads", "n_layers", "d_ff", "batch_size", "num_epochs", "top_k"} | {
    "gradient_accumulation_steps", "keep_checkpoints", "max_seq_len", "max_length", "n_kv_heads",
    "moe_d_ff", "validation_tokens", "tokenizer_megabytes", "num_proc", "max_dataset_bytes",
}  # fmt: skip
# With batch_size "auto" a step has this number of rows times gradient_accumulation_steps.
AUTO_ROWS = 32
LARGEST = 2**31 - 1  # of any number: larger ones overflow int32
AT_MOST = dict.fromkeys(("warmup_ratio", "min_lr_ratio", "dropout"), 1)
AT_MOST |= dict.fromkeys(("max_seq_len", "max_length", "vocab_size"), 2**20)
AT_MOST |= {"batch_size": 2**20, "num_workers": 1024, "num_proc": 1024, "max_dataset_bytes": 2**63}
# Keys that may be None, with an example of another value.
OPTIONAL = {"n_kv_heads": 1, "moe_d_ff": 1, "tokenizer_path": "", "init_from": ""}
OPTIONAL |= {"time_limit": "", "stop_after": ""}
OPTIONAL |= {"text_column": "", "num_proc": 1, "max_dataset_bytes": 1.0}  # 2e9 is no int
# Keys that may be "auto", with an example of another value.
AUTO = dict.fromkeys(("log_every", "eval_every", "sample_every", "save_every"), 1)
AUTO |= {"batch_size": 1, "vocab_size": 6400}
DATASETS = ("dataset", "pretrain_dataset")  # one name, a list of names, or {name: share}
TRACKERS = ("wandb", "tensorboard", "swanlab")  # what the key `trackers` may list
LISTS = (*DATASETS, "trackers")  # keys that may have several words on the command line


def resolve(defaults: dict, overrides: dict | None, **arguments) -> dict:
    """The script's own wandb_config with the caller's keys put over it.

    arguments: keys that are also arguments of the stage's function; None: not given.

    Raises:
        ValueError: every unknown key (with the nearest known one) and wrong value, in one message.
    """
    named = {key: value for key, value in arguments.items() if value is not None}
    given = {
        key: os.fspath(value) if isinstance(value, os.PathLike) else value
        for key, value in ((overrides or {}) | named).items()
    }
    problems = []
    for key, value in given.items():
        if key not in defaults:
            near = difflib.get_close_matches(str(key), defaults, n=1, cutoff=0.0)
            problems.append(f"unknown key {shorten(key)}; the nearest is {near[0]!r}")
        elif problem := find_problem(key, value, defaults[key]):
            problems.append(problem)
    if problems:
        raise ValueError("wandb_config: " + "; ".join(problems) + ".")
    return defaults | given


def find_problem(key: str, value, default) -> str | None:
    """What is wrong with a value, judged by the key's choices and its default's type."""
    if key in CHOICES:
        allowed = CHOICES[key]
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            return f"{key}={shorten(value)} must be one of {', '.join(map(repr, allowed))}"
        return None
    may_be_auto = key in AUTO or default == "auto"
    if may_be_auto:
        if value == "auto":
            return None
        default = AUTO.get(key, 1.0)
    if key in DATASETS and isinstance(value, dict | list | tuple):
        rule = _broken_datasets_rule(value)
        return f"{key}={shorten(value)} must be {rule}" if rule else None
    if key == "trackers":
        known = isinstance(value, list | tuple) and all(name in TRACKERS for name in value)
        rule = f"a list of {', '.join(map(repr, TRACKERS))}, or [] for none of them"
        return None if known else f"{key}={shorten(value)} must be {rule}"
    if key in OPTIONAL:
        if value is None:
            return None
        default = OPTIONAL[key]
    rule = None
    if key in ("time_limit", "stop_after"):
        rule = None if parse_seconds(value) else "a time such as '8h', '90m' or '1h30m'"
    elif isinstance(default, bool):
        rule = None if isinstance(value, bool) else "True or False"
    elif isinstance(default, int | float):
        rule = _broken_number_rule(key, value, isinstance(default, int))
    elif isinstance(default, str):
        rule = _broken_text_rule(value)
    if rule and may_be_auto:
        rule = f'"auto" or {rule}'
    return f"{key}={shorten(value)} must be {rule}" if rule else None


def _broken_number_rule(key: str, value, whole: bool) -> str | None:
    kinds = int if whole else int | float
    is_nan_or_inf = isinstance(value, float) and not math.isfinite(value)
    if not isinstance(value, kinds) or isinstance(value, bool) or is_nan_or_inf:
        return "a whole number" if whole else "a number"
    if value < (smallest := 1 if key in AT_LEAST_ONE else 0):
        return f"at least {smallest}"
    if value > (largest := AT_MOST.get(key, LARGEST)):
        return f"at most {largest}"
    if key == "dropout" and value == 1:
        return "below 1"
    return None


def _broken_datasets_rule(value) -> str | None:
    """A list of names, or a dict of names with the share of each in the text."""
    shares = value.values() if isinstance(value, dict) else [1.0]
    numbers = [share for share in shares if isinstance(share, int | float) and 0 < share < math.inf]
    if not value or any(_broken_text_rule(name) for name in value) or len(numbers) < len(shares):
        return "a name, a list of names, or names with shares above 0: {'a.jsonl': 0.7, 'b/': 0.3}"
    return None


def _broken_text_rule(value) -> str | None:
    if not isinstance(value, str):
        return "text"
    if not value.strip():
        return "text that is not empty"
    # Neither can stand in a file name or in run.json.
    has_surrogate = any("\ud800" <= character <= "\udfff" for character in value)
    return "text without NULs and lone surrogates" if has_surrogate or "\0" in value else None


def length_key(config: dict) -> str:
    """The key with the tokens of a row, or of an answer with its prompt."""
    return "max_seq_len" if "max_seq_len" in config else "max_length"


def parse_seconds(value) -> float:
    """'8h' -> 28800, '1h30m' -> 5400; 0 for what is no length of time."""
    units = {"h": 3600, "m": 60, "s": 1}
    is_time = isinstance(value, str) and re.fullmatch(r"(\d+(\.\d+)?[hms])+", value)
    parts = re.findall(r"([\d.]+)([hms])", value) if is_time else []
    return sum(float(number) * units[unit] for number, unit in parts)


def shorten(value) -> str:
    """repr on one short line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


# --- the command line -----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, as for every other error, in place of usage and exit status 2."""
        raise ValueError(message)


def make_parser(stage_function, defaults: dict) -> argparse.ArgumentParser:
    """Options for every key of a script's wandb_config and the stage function's own arguments."""
    module = sys.modules[stage_function.__module__]
    parser = _Parser(
        usage="%(prog)s [--key VALUE | --key=VALUE] ...",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    comments = read_comments(inspect.getsource(module))
    keys = parser.add_argument_group("keys of wandb_config")
    for key, default in defaults.items():
        text = f"{comments.get(key, '')} (default: {default})".strip().replace("%", "%%")
        keys.add_argument(f"--{key}", type=_reader(key, default), metavar="VALUE", help=text)
    run = parser.add_argument_group("run")
    for name in own_arguments(stage_function):
        run.add_argument(f"--{name}", metavar="TEXT", help=f"{stage_function.__name__}'s argument")
    return parser


def read_comments(source: str) -> dict[str, str]:
    """The comment behind each key of the wandb_config in a script's source."""
    block = source.partition("wandb_config = {\n")[2].partition("\n}")[0]
    return dict(re.findall(r'^    "(\w+)": .*?  # (.*)$', block, flags=re.MULTILINE))


def own_arguments(stage_function) -> list[str]:
    return [name for name in inspect.signature(stage_function).parameters if name != "wandb_config"]


def _reader(key: str, default):
    keep_text = isinstance(default, str) and default != "auto" and key not in CHOICES

    def read(text: str):
        if key in DATASETS:
            return parse_datasets(text.split("\n"))
        if key == "trackers":
            return [name for name in text.split("\n") if name.lower() not in ("none", "[]")]
        return text if keep_text and text.lower() != "none" else parse_value(text)

    return read


def parse_value(text: str):
    """'16' -> 16, '1e-3' -> 0.001, 'true' -> True, 'none' -> None; other text stays text."""
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def parse_datasets(words: list[str]):
    """['a'] -> 'a'; ['a', 'b'] -> ['a', 'b']; ['a=0.7', 'b=0.3'] -> {'a': 0.7, 'b': 0.3}."""
    shares: dict = {}
    for word in words:
        name, sign, share = word.rpartition("=")
        with contextlib.suppress(ValueError):
            if sign and not os.path.exists(word):
                shares[name] = float(share)
    if len(shares) == len(words):
        return shares
    if shares:
        problem = f"{' '.join(words)}: write a share behind every name, or none."
        raise argparse.ArgumentTypeError(problem)  # argparse would hide a ValueError's message
    return words if len(words) > 1 else words[0]


def parse_arguments(words: list[str], stage_function, defaults: dict) -> dict:
    """['--batch_size', '16', '--use_moe=true'] -> {'batch_size': 16, 'use_moe': True}.

    Unknown keys are kept: resolve() names the nearest known one.
    """
    parsed, unknown = make_parser(stage_function, defaults).parse_known_args(join_values(words))
    known = vars(parsed)
    for word in unknown:
        if not word.startswith("--"):
            raise ValueError(f"expected --key value, found {word!r}. --help lists the keys.")
        known[word[2:].partition("=")[0]] = None
    return known


def join_values(words: list[str]) -> list[str]:
    """['--key', 'value'] -> ['--key=value']: argparse takes a value such as -1e-3 for an option.

    The names of several datasets or trackers become lines of one value.
    """
    joined: list[str] = []
    for word in words:
        last = joined[-1] if joined else ""
        is_value = last.startswith("--") and not word.startswith("--")
        if is_value and "=" not in last:
            joined[-1] = f"{last}={word}"
        elif is_value and last[2:].partition("=")[0] in LISTS:
            joined[-1] = f"{last}\n{word}"
        else:
            joined.append(word)
    return joined


def run_from_command_line(stage_function, defaults: dict):
    """Call a stage's function with the command line's keys. An error becomes one clear line."""
    import torch  # the stage has it; `curves.py`, which reads settings too, starts without it

    imports_are_done()
    replace_unprintable()
    try:
        overrides = parse_arguments(sys.argv[1:], stage_function, defaults)
        own = own_arguments(stage_function)
        passed = {name: overrides.pop(name) for name in own if name in overrides}
        stage_function(wandb_config=overrides, **passed)
    except torch.OutOfMemoryError as error:  # in a step the stage explains it better
        raise SystemExit(
            "error: The GPU's memory ended before training began. Does another program use it "
            "(nvidia-smi shows that)? `python plan.py` estimates what a model takes."
        ) from error
    except (ValueError, ArithmeticError, OSError, MemoryError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as error:  # before or after the loop, which saves first
        raise SystemExit(describe_interruption(error)) from None


def describe_interruption(error: KeyboardInterrupt, continues: bool = True) -> str:
    then = "; run the same command again, it continues from what is there" * continues
    return f"interrupted: {str(error) or 'Ctrl-C'}{then}"
