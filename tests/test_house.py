"""The layout of the project: few files at the top, imports in one direction, small files."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("corpus", "engine", "kernels", "web")
STAGES = ("train_llm", "sft_train", "dpo_train")
# From the top to the bottom. A module imports from its own layer and from the layers below it.
LAYERS = [
    {"chat", "evaluate", "export_gguf", "plan", "curves"},
    {"web"},
    {*STAGES, "train_data", "sft_data", "dpo_data"},
    {"corpus"},
    {"engine"},
    {"models", "model_config", "tokenizer"},
    {"kernels"},
]


def modules() -> dict[str, Path]:
    """Dotted names of the project's own modules, and their files."""
    paths = [*ROOT.glob("*.py"), *(p for name in PACKAGES for p in (ROOT / name).glob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[str]:
    """The project's modules that a piece of code imports, by dotted name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & modules().keys()


def without_main(tree: ast.Module) -> ast.Module:
    """A file's main() is a command, and stands above every layer."""
    body = [n for n in tree.body if not (isinstance(n, ast.FunctionDef) and n.name == "main")]
    return ast.Module(body, [])


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def layer_of(module: str) -> int:
    top = module.partition(".")[0]
    return next(number for number, layer in enumerate(LAYERS) if top in layer)


def test_every_module_has_a_layer_and_imports_only_downwards():
    upward = {
        f"{name} -> {other}"
        for name, path in modules().items()
        for other in imported(without_main(parse(path)))
        if layer_of(other) < layer_of(name)
    }
    assert upward == set()


def test_no_import_leads_back_to_where_it_started():
    graph = {name: imported(parse(path)) - {name} for name, path in modules().items()}
    graph |= {"tokenizer": imported(without_main(parse(ROOT / "tokenizer.py")))}
    graph |= {package: graph[package] for package in PACKAGES}
    while leaves := [name for name in graph if not graph[name] & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph == {}, "what is left imports itself in a circle"


def test_few_files_stand_at_the_top_and_none_is_long():
    assert len(list(ROOT.glob("*.py"))) <= 14
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    files = [ROOT / name for name in listed.stdout.split()] or list(modules().values())
    long = [p.name for p in files if p.exists() and len(p.read_text("utf-8").splitlines()) > 350]
    assert long == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_opens_with_at_most_25_lines_of_imports(stage):
    imports = [
        n for n in parse(ROOT / f"{stage}.py").body if isinstance(n, (ast.Import, ast.ImportFrom))
    ]
    assert sum(map(lines_of, imports)) <= 25


@pytest.mark.parametrize("stage", STAGES)
def test_a_loop_is_about_60_lines(stage):
    loops = [n for n in ast.walk(parse(ROOT / f"{stage}.py")) if isinstance(n, ast.For)]
    assert 30 < max(map(lines_of, loops)) <= 60


def test_pretraining_and_fine_tuning_have_the_same_loop():
    def loop(stage: str) -> str:
        found = [n for n in ast.walk(parse(ROOT / f"{stage}.py")) if isinstance(n, ast.For)]
        return ast.unparse(max(found, key=lines_of))

    assert loop("train_llm") == loop("sft_train")


def bound_modules(nodes: list[ast.AST]) -> set[str]:
    """Names by which a file knows modules of the project."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name for alias in node.names if alias.name in modules()}
        elif isinstance(node, ast.ImportFrom):
            found = [a for a in node.names if f"{node.module}.{a.name}" in modules()]
            names |= {alias.asname or alias.name for alias in found}
    return names


def test_no_local_variable_bears_the_name_of_an_imported_module():
    clashes = []
    for name, path in modules().items():
        tree = parse(path)
        nodes = list(ast.walk(tree))
        functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
        inside = [node for function in functions for node in ast.walk(function)]
        stored = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        stored |= {node.arg for node in inside if isinstance(node, ast.arg)}
        known = bound_modules(nodes)
        clashes += [f"{name}: {variable}" for variable in known & stored]
    assert clashes == []


def test_no_function_tells_stages_apart_by_the_names_of_their_files():
    scripts = {f"{stage}.py" for stage in STAGES}
    compared = []
    for name, path in modules().items():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
                compared += [
                    name for p in parts if isinstance(p, ast.Constant) and p.value in scripts
                ]
    assert compared == []
