"""The shape of the code itself: floors, sizes, imports, docstrings, unsafe calls."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import verl
from tests.structure import FUNCTIONS, MEASURES, Sources, functions, is_override
from verl.config import load_config
from verl.config.fields import Section
from verl.config.run import SFTConfig, TrainerConfig

ROOT = Path(verl.__file__).parent
SOURCES = Sources()
TREES = SOURCES.trees
RECIPES = sorted((ROOT / "config" / "recipes").glob("*.yaml"))

# A module imports from its own floor or a lower one.
FLOORS = {
    "__version__": 0,
    "config": 0,
    "settings": 0,
    "weight_sync": 1,
    "utils": 1,
    "tools": 1,
    "monitoring": 2,
    "data": 3,
    "algorithms": 4,
    "planner": 5,
    "controller": 5,
    "engines": 6,
    "rollout": 7,
    "rewards": 8,
    "agents": 9,
    "trainer": 10,
    "cli": 11,
    "__main__": 11,
}
MAX_NESTING, MAX_SETTINGS = 3, 220
IMPORTS = (ast.Import, ast.ImportFrom)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    return ((ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of verl that a file imports; `from verl import x` counts as verl.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("verl."))
        elif isinstance(node, ast.ImportFrom) and node.module == "verl":
            yield from (f"verl.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("verl."):
            yield node.module


def nesting(node: ast.AST) -> int:
    """Depth of blocks below a node; an elif is as deep as its if, a nested function starts again."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.Lambda, ast.ClassDef)):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        deepest = max(deepest, nesting(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def num_settings(section: type[Section]) -> int:
    """Settings of a section and of the sections below it."""
    defaults = [field.default for field in section.model_fields.values()]
    return sum(num_settings(type(default)) if isinstance(default, Section) else 1 for default in defaults)


def over_all(check) -> list[str]:
    """Messages that a check (path, tree) -> messages gives for the whole package."""
    return [f"verl/{path}: {message}" for path, tree in TREES.items() for message in check(path, tree)]


def test_a_module_imports_only_from_its_own_floor_or_a_lower_one():
    def upward(path: str, tree: ast.AST) -> Iterator[str]:
        floor = FLOORS[Path(path).parts[0].removesuffix(".py")]
        return (
            f"floor {floor} imports {name}"
            for name in imported(tree)
            if FLOORS.get(name.split(".")[1], 99) > floor
        )

    found = [
        f"verl/{path}: {message}"
        for path, tree in TREES.items()
        if path != "__init__.py"
        for message in upward(path, tree)
    ]
    assert found == []


def test_weight_sync_is_a_library_that_imports_nothing_else_of_the_package():
    def outside(path: str, tree: ast.AST) -> Iterator[str]:
        if path.startswith("weight_sync/"):
            yield from (name for name in imported(tree) if not name.startswith("verl.weight_sync."))

    assert over_all(outside) == []


def test_the_package_itself_imports_its_parts_only_for_type_checkers():
    tree = TREES["__init__.py"]
    guards = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert list(imported(tree)) == [name for guard in guards for name in imported(guard)] != []


@pytest.mark.parametrize("path", ["config/run.py", "config/loader.py"])
def test_settings_are_read_without_torch(path):
    module = f"verl.{path.removesuffix('.py').replace('/', '.')}"
    loaded = loaded_after(f"import {module}")
    assert module in loaded and not loaded & {"torch", "transformers", "datasets"}


def test_the_version_is_read_without_any_library():
    loaded = loaded_after("import verl; verl.__version__")
    assert "verl" in loaded and not loaded & {"torch", "transformers", "numpy", "pydantic", "rich"}


def loaded_after(code: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after the code."""
    program = f"{code}\nimport sys; print(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        ).stdout.split()
    )


def test_every_public_name_exists():
    assert [name for name in verl.__all__ if getattr(verl, name, None) is None] == []


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_the_form_of_the_code_is_within_its_budget(measure):
    figure = measure(SOURCES)
    assert figure.is_reached, f"{figure.name}: {', '.join(figure.places)}"


def test_blocks_nest_at_most_three_deep():
    assert (
        over_all(
            lambda _, tree: [
                f"{f.name} nests {nesting(f)} deep" for f in functions(tree) if nesting(f) > MAX_NESTING
            ]
        )
        == []
    )


def test_no_import_hides_in_a_function():
    def hidden(_: str, tree: ast.AST) -> Iterator[str]:
        for function in functions(tree):
            yield from (
                f"{function.name}: {ast.unparse(node)}"
                for node in ast.walk(function)
                if isinstance(node, IMPORTS)
            )

    assert over_all(hidden) == []


def test_only_the_command_line_prints():
    assert (
        over_all(
            lambda path, tree: [
                f"line {c.lineno}" for name, c in calls(tree) if name == "print" and path != "cli/main.py"
            ]
        )
        == []
    )


def test_the_settings_fit_their_budget():
    only_fine_tuning = SFTConfig.model_fields.keys() - TrainerConfig.model_fields.keys()
    assert num_settings(TrainerConfig) + len(only_fine_tuning) <= MAX_SETTINGS


def test_every_module_class_and_public_function_says_what_it_is():
    def silent(path: str, tree: ast.Module) -> Iterator[str]:
        if tree.body and not ast.get_docstring(tree):
            yield "no docstring"
        scopes = [
            tree,
            *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")),
        ]
        members = (
            node for scope in scopes for node in scope.body if isinstance(node, (*FUNCTIONS, ast.ClassDef))
        )
        yield from (
            f"{m.name} has no docstring"
            for m in members
            # An override inherits its docstring.
            if not m.name.startswith("_") and not ast.get_docstring(m) and not is_override(m)
        )

    assert over_all(silent) == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe):
    assert isinstance(load_config(recipe), TrainerConfig)


def test_there_are_recipes():
    assert {"ppo", "grpo", "dapo"} <= {recipe.stem for recipe in RECIPES}


def is_safe_loader(loader: str, tree: ast.AST) -> bool:
    """True for PyYAML's safe loader, or a class of the file that derives from it."""
    own = {
        node.name: ast.unparse(node.bases[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.bases
    }
    return own.get(loader, loader).rpartition(".")[2] in {"SafeLoader", "CSafeLoader"}


def unsafe_calls(tree: ast.AST) -> Iterator[str]:
    for name, call in calls(tree):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        module, _, function = name.rpartition(".")
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"line {call.lineno}: torch.load without weights_only=True unpickles"
        if module.endswith(("pickle", "dill")) and function in {"load", "loads", "Unpickler"}:
            yield f"line {call.lineno}: {name} runs what it reads"
        if given.get("trust_remote_code", "False") != "False":
            yield f"line {call.lineno}: trust_remote_code runs what it downloads"
        if name in {"yaml.load", "yaml.load_all"} and not is_safe_loader(given.get("Loader", ""), tree):
            yield f"line {call.lineno}: {name} needs a Loader that derives from SafeLoader"


def test_nothing_read_from_outside_can_run_code():
    # A pipe between the trainer and a process of its own is not outside.
    own_pipes = {"rewards/execution/call_worker.py"}
    assert over_all(lambda path, tree: () if path in own_pipes else unsafe_calls(tree)) == []


def test_the_checks_see_what_they_look_for():
    deep = "def f(x):\n for a in x:\n  if a:\n   pass\n  elif x:\n   with a:\n    while a:\n     print(a)\n"
    tree = ast.parse(deep + "from verl import cli\nimport verl.data.batch\n")
    assert nesting(next(functions(tree))) == 4
    assert list(imported(tree)) == ["verl.cli", "verl.data.batch"]
    bad = [
        "torch.load(f)",
        "pickle.loads(b)",
        "load(trust_remote_code=True)",
        "yaml.load(f, Loader=yaml.Loader)",
    ]
    good = ["torch.load(f, weights_only=True)", "yaml.load(f, Loader=yaml.SafeLoader)"]
    assert [len(list(unsafe_calls(ast.parse(line)))) for line in bad + good] == [1, 1, 1, 1, 0, 0]
