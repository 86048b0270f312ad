import importlib
import re
from pathlib import Path

import pytest

from engine.settings import parse_arguments, resolve

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README_en.md")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)


def commands() -> list[list[str]]:
    return [line.split() for block in blocks("README.md", "bash") for line in block.splitlines()]


def without_comments(code: str) -> str:
    return re.sub(r"  #.*", "", code)


def test_both_languages_show_the_same_commands_and_code():
    chinese, english = (blocks(name, "bash") for name in READMES)
    assert chinese == english
    chinese, english = (blocks(name, "python") for name in READMES)
    assert [without_comments(code) for code in chinese] == [without_comments(c) for c in english]


@pytest.mark.parametrize("name", READMES)
def test_every_link_and_every_file_of_the_structure_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    files = re.findall(r"\b[a-z_]+\.py\b", text)
    assert len(links) >= 3
    assert len(set(files)) >= 14
    for path in {*links, *files}:
        assert (ROOT / path).exists(), path


def test_every_script_and_folder_is_named_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [path.name for path in ROOT.glob("*.py")]
    names += ["engine/", "corpus/", "kernels/", "web/", "benchmarks/", "data/", "tests/"]
    assert [name for name in names if name not in text] == []


def test_the_stage_commands_have_keys_and_values_that_the_scripts_take():
    stages = {"train_llm.py": "train", "sft_train.py": "train_sft", "dpo_train.py": "train_dpo"}
    seen = set()
    for words in commands():
        if words[0] == "python" and words[1] in stages:
            stage = importlib.import_module(words[1].removesuffix(".py"))
            function = getattr(stage, stages[words[1]])
            resolve(stage.wandb_config, parse_arguments(words[2:], function, stage.wandb_config))
            seen.add(words[1])
    assert seen == stages.keys()


def test_the_code_blocks_use_names_that_exist():
    imports = [
        line
        for code in blocks("README.md", "python")
        for line in code.splitlines()
        if line.startswith("from ")
    ]
    assert len(imports) >= 4
    for line in imports:
        module, names = re.match(r"from (\S+) import (.+)", line).groups()
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), line


def test_the_configuration_block_is_the_scripts_own():
    import train_llm

    code = next(c for c in blocks("README.md", "python") if c.startswith("wandb_config = {"))
    shown = eval(code.removeprefix("wandb_config = "))
    assert shown.items() <= train_llm.wandb_config.items()


def test_the_samples_are_what_their_script_builds(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    build_samples = importlib.import_module("build_samples")
    source = (ROOT / "data" / "pretrain_sample.jsonl").read_bytes()
    (tmp_path / "pretrain_sample.jsonl").write_bytes(source)
    build_samples.main(tmp_path)
    for name in ("sft_sample.jsonl", "dpo_sample.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()
