"""Figures of the form of `verl/`, each beside its goal, from the sources alone."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import verl
from verl.data.columns import COLUMNS

ROOT = Path(verl.__file__).parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef

MAX_COLUMNS = 110
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_ENTRIES = 16
MAX_MEMBERS = 20
MAX_PRIVATE = 25
MAX_POSITIONAL = 4
MAX_STEP_LINES, MAX_STEP_BRANCHES, MAX_STEP_METHODS = 12, 2, 3
MAX_HOPS, MAX_TRACED_FILES = 7, 25

# Recipes are data, one file each.
_DATA_FOLDERS = {"recipes", "__pycache__"}
# Packages of one kind: each backend has a file for each part.
_SAME_KIND = ({"rollout/vllm", "rollout/sglang"}, {"engines/hf", "engines/megatron"})
# Called with positional arguments by a library, which defines the signature.
_LIBRARY_CALLS = {"attention_forward", "forward"}
_QUESTION = re.compile(r"(What|Which|Who|Whose|How|Where|Whether)\b")
_ONLY_SEE = re.compile(r"See `[^`]+`\.?")


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        name: of the measure.
        value: measured.
        goal: largest value that meets it; None: no goal, for information.
        places: where it is missed, or what the value comes from.
    """

    name: str
    value: float
    goal: float | None = None
    places: tuple[str, ...] = ()

    @property
    def is_reached(self) -> bool:
        """True if the value meets the goal, or if there is none."""
        return self.goal is None or self.value <= self.goal


class Sources:
    """The files of a package, read and parsed once.

    Attributes:
        root: folder of the package.
        texts: path below the root -> text.
        trees: path below the root -> syntax tree.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        paths = sorted(root.rglob("*.py"))
        self.texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
        self.trees = {path: ast.parse(text) for path, text in self.texts.items()}

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Every function and method with its file."""
        return ((path, node) for path, tree in self.trees.items() for node in functions(tree))

    def classes(self) -> Iterator[tuple[str, ast.ClassDef]]:
        """Every class with its file."""
        return (
            (path, node)
            for path, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        )

    def docstrings(self) -> Iterator[tuple[str, str]]:
        """File and line of every docstring, and its text."""
        kinds = (ast.Module, ast.ClassDef, *FUNCTIONS)
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                text = ast.get_docstring(node) if isinstance(node, kinds) else None
                if text:
                    yield f"{path}:{getattr(node, 'lineno', 1)}", text

    def num_code_lines(self) -> int:
        """Lines that are neither empty nor a comment alone."""
        lines = (line.strip() for text in self.texts.values() for line in text.splitlines())
        return sum(bool(line) and not line.startswith("#") for line in lines)


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function and method of a tree."""
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def is_override(node: ast.AST) -> bool:
    """True for a method under `@override`, whose signature and docstring are those of its base class."""
    return "override" in map(ast.unparse, getattr(node, "decorator_list", ()))


def num_lines(node: ast.AST) -> int:
    """Lines of a definition, from its `def` on."""
    return (node.end_lineno or 0) - node.lineno + 1  # type: ignore[attr-defined]


def _over(name: str, found: Mapping[str, float], goal: float) -> Figure:
    """The largest of some values, with every place over the goal."""
    value = max(found.values(), default=0)
    over = sorted((place for place in found if found[place] > goal), key=lambda place: -found[place])
    return Figure(name, value, goal, tuple(f"{place} {found[place]:g}" for place in over))


def _none(name: str, places: list[str]) -> Figure:
    """The number of places that must not exist."""
    return Figure(name, len(places), 0, tuple(places))


def wide_lines(s: Sources) -> Figure:
    """Lines over 110 columns."""
    return _none(
        f"lines over {MAX_COLUMNS} columns",
        [
            f"{path}:{number}"
            for path, text in s.texts.items()
            for number, line in enumerate(text.splitlines(), 1)
            if len(line) > MAX_COLUMNS
        ],
    )


def file_lines(s: Sources) -> Figure:
    """Lines of the longest file."""
    return _over(
        "lines of the longest file", {p: len(t.splitlines()) for p, t in s.texts.items()}, MAX_FILE_LINES
    )


def function_lines(s: Sources) -> Figure:
    """Lines of the longest function."""
    found = {f"{path}:{f.lineno} {f.name}": num_lines(f) for path, f in s.functions()}
    return _over("lines of the longest function", found, MAX_FUNCTION_LINES)


def folder_entries(s: Sources) -> Figure:
    """Files and folders of the largest folder, `__init__` apart."""
    folders = [s.root, *(path for path in s.root.rglob("*") if path.is_dir())]
    found = {
        folder.relative_to(s.root).as_posix(): sum(
            path.name not in {"__init__.py", "__pycache__"} for path in folder.iterdir()
        )
        for folder in folders
        if not _DATA_FOLDERS & set(folder.relative_to(s.root).parts)
    }
    return _over("entries of the largest folder", found, MAX_ENTRIES)


def class_members(s: Sources) -> Figure:
    """Methods and properties of the largest class."""
    found = {
        f"{path}:{c.lineno} {c.name}": sum(isinstance(member, FUNCTIONS) for member in c.body)
        for path, c in s.classes()
    }
    return _over("members of the largest class", found, MAX_MEMBERS)


def repeated_classes(s: Sources) -> Figure:
    """Class names that occur more than once."""
    counts = Counter(c.name for _, c in s.classes())
    return _none("class names twice", [name for name, count in counts.items() if count > 1])


def repeated_files(s: Sources) -> Figure:
    """File names that occur more than once, except between packages of one kind."""
    # A section of settings has the name of what it configures; `base` is the base classes of a package.
    folders: dict[str, set[str]] = {}
    for path in s.texts:
        if not path.endswith("__init__.py") and not path.startswith("config/"):
            folders.setdefault(Path(path).name, set()).add(Path(path).parent.as_posix())
    twice = {
        name: places
        for name, places in folders.items()
        if len(places) > 1 and name != "base.py" and not any(places <= kind for kind in _SAME_KIND)
    }
    return _none("file names twice", [f"{name}: {', '.join(sorted(where))}" for name, where in twice.items()])


def is_private(function: Function) -> bool:
    """True for a name with one leading underscore."""
    return function.name.startswith("_") and not function.name.startswith("__")


def private_functions(s: Sources) -> Figure:
    """Private functions and methods per 1000 lines of code."""
    private = sum(is_private(function) for _, function in s.functions())
    value = round(1000 * private / s.num_code_lines(), 1)
    return Figure("private functions per 1000 lines of code", value, MAX_PRIVATE, (f"{private} in all",))


def private_with_one_caller(s: Sources) -> Figure:
    """Share of the private functions that one place alone refers to."""
    names = [function.name for _, function in s.functions() if is_private(function)]
    words = Counter(word for text in s.texts.values() for word in re.findall(r"\w+", text))
    defined = Counter(names)
    once = sum(words[name] - defined[name] == 1 for name in names)
    return Figure("private functions with one caller", once, None, (f"of {len(names)}",))


def positional_parameters(s: Sources) -> Figure:
    """Functions with more than four positional parameters.

    Left out: an override and a function that a library calls, whose signatures are given, and a function of
    an algorithm, whose positional parameters are the columns that it reads, bound by name.
    """
    found = []
    for path, function in s.functions():
        parameters = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
        own = [name for name in parameters if name not in ("self", "cls")]
        is_given = is_override(function) or function.name in _LIBRARY_CALLS or set(own) <= set(COLUMNS)
        if len(own) > MAX_POSITIONAL and not is_given:
            found.append(f"{path}:{function.lineno} {function.name} {len(own)}")
    return _none(f"functions with more than {MAX_POSITIONAL} positional parameters", found)


def question_docstrings(s: Sources) -> Figure:
    """Docstrings that begin with What, Which, Who, Whose, How, Where or Whether."""
    places = [place for place, text in s.docstrings() if _QUESTION.match(text)]
    return _none("docstrings that begin with What, Which, Who, ...", places)


def see_docstrings(s: Sources) -> Figure:
    """Docstrings that only refer to another one."""
    places = [place for place, text in s.docstrings() if _ONLY_SEE.fullmatch(text.strip())]
    return _none("docstrings that are only See", places)


def comment_share(s: Sources) -> Figure:
    """Comment lines in percent of the lines of code."""
    comments = sum(
        token.type == tokenize.COMMENT
        for text in s.texts.values()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )
    return Figure("comments per 100 lines of code", round(100 * comments / s.num_code_lines(), 1))


def step_of(s: Sources) -> Function:
    """`Trainer.step`."""
    trainer = next(c for path, c in s.classes() if path == "trainer/rl_trainer.py" and c.name == "Trainer")
    return next(m for m in trainer.body if isinstance(m, FUNCTIONS) and m.name == "step")


def step_lines(s: Sources) -> Figure:
    """Lines of the body of `Trainer.step`, below its docstring."""
    _, *body = step_of(s).body
    return Figure("lines of Trainer.step", sum(map(num_lines, body)), MAX_STEP_LINES)


def step_branches(s: Sources) -> Figure:
    """Branches of `Trainer.step`."""
    kinds = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.Match, ast.BoolOp)
    count = sum(isinstance(node, kinds) for node in ast.walk(step_of(s)))
    return Figure("branches of Trainer.step", count, MAX_STEP_BRANCHES)


MEASURES: tuple[Callable[[Sources], Figure], ...] = (
    step_lines,
    step_branches,
    private_functions,
    private_with_one_caller,
    wide_lines,
    comment_share,
    question_docstrings,
    see_docstrings,
    folder_entries,
    class_members,
    repeated_classes,
    repeated_files,
    positional_parameters,
    function_lines,
    file_lines,
)
