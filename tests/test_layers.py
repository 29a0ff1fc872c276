"""Imports go downwards only, and what is below knows nothing of what is above."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "topkbench"
LAYERS = [
    ["operators", "nearest", "threads"],
    ["testing", "randomness", "topk", "losses"],
    ["methods", "tasks", "optimizers", "schedules", "choices"],
    ["step"],
    ["evaluate"],
    ["gradients"],
    ["train"],
    ["config", "records", "environment", "writable", "diagnose"],
    ["stats", "work"],
    ["tables", "plots"],
    ["frontier", "scores"],
    ["report", "catalogue"],
    ["callbacks"],
    ["cli"],
    ["__main__"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path):
    if path.stem == "__main__":
        return path.stem
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "topkbench":
            modules = [f"topkbench.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        yield from (module.split(".")[1] for module in modules if module.startswith("topkbench."))


@pytest.mark.parametrize(
    "path", [file for file in FILES if file.parent != PACKAGE or file.stem != "__init__"], ids=str
)
def test_imports_go_down(path):
    own = layer(path)
    for other in imported(path):
        assert other == own or HEIGHT[other] < HEIGHT[own], f"{own} imports {other}"


def test_operators_import_torch_and_nothing_of_ours():
    for path in (PACKAGE / "operators").glob("*.py"):
        assert set(imported(path)) <= {"operators"}


def test_the_loop_and_the_command_line_know_no_method_and_no_task_by_name():
    from topkbench.choices import available

    names = {*available("method"), *available("task")} - {
        "values"
    }  # a word of pandas and of dictionaries too
    files = ("train", "evaluate", "step", "cli", "__main__", "config", "report", "tables")
    for path in [*(PACKAGE / f"{name}.py" for name in files), *(PACKAGE / "gradients").glob("*.py")]:
        code = ast.parse(path.read_text())
        words = {node.value for node in ast.walk(code) if isinstance(node, ast.Constant)}
        assert not names & {word for word in words if isinstance(word, str)}, path.name


def test_files_are_short():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 300, path.name
