"""Every command and program of the README and the documentation runs as printed.

A page is run from top to bottom in one folder of its own, so a block finds the files of the blocks before it.
Its commands `verl` and `python` are forks of one process that has the imports done, see `command_server`.
The language decides: bash and python blocks run, a yaml block is a valid configuration; one with a title is a
file, written under that name. A comment in front of a block takes it out: `<!-- no-run: why -->`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command_server import commands
from verl.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- no-run: (?P<reason>[^\n]+) -->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>[^\s`]*)(?: title=\"(?P<title>[^\"\n]+)\")?(?P<rest>[^\n]*)\n"
    r"(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
TIMEOUT_S = 300
RUN = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": ["python", "-c"]}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, what it says, and how it is to be run."""

    line: int
    language: str
    title: str | None
    reason: str | None
    rest: str
    code: str


def blocks(text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        found.append(Block(line, match["language"], match["title"], match["reason"], match["rest"], code))
    return found


def environment(*folders: Path) -> dict[str, str]:
    """The reader's shell: these folders, then the installed package first on the path, no hub, one thread."""
    path = os.pathsep.join([*map(str, folders), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of all blocks, on Linux with the shared commands first on the path."""
    if sys.platform != "linux":
        yield environment()
        return
    with commands(tmp_path_factory.mktemp("commands"), environment()) as folder:
        yield environment(folder)


def run(block: Block, folder: Path, shell: Mapping[str, str]) -> None:
    if block.title:
        (folder / block.title).write_text(block.code, encoding="utf-8")
    if block.language == "yaml":
        path = folder / (block.title or "block.yaml")
        path.write_text(block.code, encoding="utf-8")
        load_config(path)
    elif not block.title:
        program, *options = RUN[block.language]
        command = [str(shutil.which(program, path=shell["PATH"])), *options, block.code]
        result = subprocess.run(
            command,
            cwd=folder,
            env=shell,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert result.returncode == 0, (
            f"line {block.line} ended with {result.returncode}\n{block.code}\n{result.stdout}{result.stderr}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page, tmp_path, shell):
    text = page.read_text(encoding="utf-8")
    for block in blocks(text):
        if block.language in {*RUN, "yaml"} and block.reason is None:
            run(block, tmp_path, shell)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_fence_is_understood(page):
    text = page.read_text(encoding="utf-8")
    found = blocks(text)
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE))
    assert [
        (b.line, b.language, b.rest) for b in found if b.language not in {*RUN, "yaml", "text"} or b.rest
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_of_a_clone(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_first_commands_of_the_readme_start_and_check_the_project():
    first = next(block for block in blocks(PAGES[0].read_text(encoding="utf-8")) if block.language == "bash")
    assert [line.split("#")[0].strip() for line in first.code.splitlines()] == [
        "make quickstart",
        ".venv/bin/verl quickstart --model smollm2",
        "make test",
    ]


def test_a_block_that_fails_is_reported(tmp_path, shell):
    text = "<!-- no-run: why -->\n```bash\nexit 3\n```\n\n- x\n\n  ```bash\n  exit 3\n  ```\n\n"
    text += "```bash\necho 1 > a\n```\n"
    marked, broken, good = blocks(text)
    assert marked.reason == "why" and broken.reason is None and broken.line == 8
    with pytest.raises(AssertionError, match="line 8 ended with 3"):
        run(broken, tmp_path, shell)
    run(good, tmp_path, shell)
    assert (tmp_path / "a").read_text() == "1\n"


def test_a_shared_command_behaves_as_one_with_a_process_of_its_own(tmp_path, shell):
    (tmp_path / "own.py").write_text("import os, sys\nprint(os.environ['X'], sys.argv[1:], __name__)\n")
    text = "X=1 python own.py a; X=2 python -c 'import own'; echo 'print(3)' | python -; verl --version"
    code = text + "; python -c 'print(4); raise KeyError(5)' || exit 6"
    shared, own = (
        subprocess.run(["bash", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
        for env in (shell, environment())
    )
    assert shared.stdout == own.stdout and shared.stdout.startswith("1 ['a'] __main__\n2 [] own\n3\nverl ")
    assert shared.returncode == own.returncode == 6
    assert shared.stderr.splitlines()[-1] == own.stderr.splitlines()[-1] == "KeyError: 5"


@pytest.mark.skipif(sys.platform != "linux", reason="commands are shared on Linux only")
def test_a_shared_command_ends_with_its_caller(tmp_path, shell):
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    python = str(shutil.which("python", path=shell["PATH"]))
    caller = subprocess.Popen([python, "-c", code], cwd=tmp_path, env=shell)
    path = tmp_path / "pid"
    wait_until(lambda: path.exists() and path.read_text())
    caller.terminate()
    caller.wait()
    wait_until(lambda: not Path(f"/proc/{path.read_text()}").exists())


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
