"""What the fuzz tests share: texts, files of them, and how many examples are drawn.

python -m pytest tests/stages/test_fuzz*.py                               some 600 cases
python -m pytest tests/stages/test_fuzz*.py --hypothesis-profile long     over 10,000
"""

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from engine.guards import NumericalError
from tokenizer import SPECIAL_TOKENS

# Drawn more often than chance would: look-alikes of control tokens, and what broke tokenizers.
AWKWARD = [*SPECIAL_TOKENS, "<|", "|>", "assistant\n", "\n", "\r\n", " ", "\0", "\ufeff"]
AWKWARD += ["\u200f", "\u202e", "e\u0301", "👩‍👩‍👧", "𠮷", "天地", "{{ x }}", "▁", "Ġ"]
ANY_CHARACTER = st.characters(exclude_categories=["Cs"])
PARTS = st.sampled_from(AWKWARD) | st.text(ANY_CHARACTER, max_size=8)
TEXT = st.lists(PARTS, max_size=6).map("".join)
SURROGATE = st.builds("{}{}{}".format, TEXT, st.characters(categories=["Cs"]), TEXT)


def cases(count: int) -> settings:
    """So many examples of a property in the suite; 16 times as many with the profile "long"."""
    count = count * settings().max_examples // 100
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, suppress_health_check=slow)


@contextmanager
def data_file(records):
    """(file of records, cache folder) for one example."""
    with tempfile.TemporaryDirectory() as name:
        lines = [json.dumps(record) + "\n" for record in records]  # escapes: surrogates survive
        path = Path(name, "data.jsonl")
        path.write_text("".join(lines))
        yield str(path), str(Path(name, "cache"))


def attempt(function, *arguments, **options) -> tuple:
    """(result, "") or (None, message of the refusal); other exceptions are failures."""
    try:
        return function(*arguments, **options), ""
    except (ValueError, NumericalError) as error:
        return None, str(error)
