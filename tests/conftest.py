"""What the data tests share: a tokenizer trained in a moment, the real corpora where they are."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

# Before torch is imported. Models this small are slower on two threads than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What tests start would inherit that SIGHUP is ignored, as under nohup. With a function it is still
# without effect here, and what is started has the default.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)

import pytest
import warm
from hypothesis import settings

from corpus.processes import count_cores
from tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
REAL_DATA = ROOT.parent / "shared" / "data" / "real"
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "tests").glob("**/*.py")]
SOURCES += [
    path
    for folder in ("corpus", "engine", "kernels", "web")
    for path in ROOT.glob(f"{folder}/*.py")
]
OWN = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
OWN += [path.stem for path in (ROOT / "tests").glob("**/*.py")]
TEXTS = ["天地玄黄，宇宙洪荒。", "The quick brown fox.", "user assistant system"]

# A shared machine may be slow: no example fails by its time, and nothing is left in the folder.
settings.register_profile("toolkit", deadline=None, database=None)
settings.register_profile("long", settings.get_profile("toolkit"), max_examples=1600)
settings.load_profile("toolkit")

# A warning that points at our own lines is an error; one inside a library is not. Set here for the
# scripts that tests run as a user does, and below for the tests' own process.
os.environ["PYTHONWARNINGS"] = ",".join(f"error:::{name}" for name in ["__main__", *OWN])


def pytest_configure(config):
    # One filter: pytest sets all of them anew around every test.
    names = "|".join(map(re.escape, OWN))
    config.addinivalue_line("filterwarnings", rf"error:::({names})\Z")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """-n auto: one more than cores. A test that waits for a disk or a process needs none."""
    return count_cores() + 1


@pytest.fixture(scope="session", autouse=True)
def _end_warm_processes():
    yield
    warm.end()


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS * 10, vocab_size=320)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def real_data():
    """Path of a real corpus or tokenizer; skips the test where it is absent."""

    def find(name: str) -> Path:
        if not (REAL_DATA / name).exists():
            pytest.skip(f"{name} is not bundled with the project")
        return REAL_DATA / name

    return find


@pytest.fixture
def run_script(tmp_path):
    """Run one of the project's scripts as a user does, in a folder of its own."""

    def run(script: str, *arguments) -> subprocess.CompletedProcess:
        return warm.run([sys.executable, str(ROOT / script), *map(str, arguments)], tmp_path)

    return run


@pytest.fixture
def run_python():
    """Run a line of Python with the project's modules, in a process of its own."""

    def run(code: str) -> subprocess.CompletedProcess:
        return warm.run([sys.executable, "-c", code], ROOT)

    return run


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> str:
    """Folder of a tiny pre-trained model with its tokenizer."""
    from tiny import pretrain_config

    from train_llm import train

    return train(wandb_config=pretrain_config(tmp_path_factory.mktemp("base"), num_epochs=1))
