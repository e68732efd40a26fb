"""Environments from PyPI, unmodified: one step of training in each, and the table of the documentation.

Their packages are in environments of their own, which `make environments` builds; the episodes run in them by
the option `python`. Refresh the results: `python -m tests.agents.environments.public_environments`.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from verl.config import load_config
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.rl_trainer import Trainer

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
RESULTS = FOLDER / "public_environments.json"
# Environments of Python, each with packages that do not clash: folder -> requirements.
PYTHONS: dict[str, tuple[str, ...]] = {
    ".venv-environments": (
        "gymnasium==1.4.0",
        "minigrid==3.2.0",
        "textarena==0.7.4",
        "skyrl-gym==0.4.0",
        "openenv==0.10.0",
    ),
    ".venv-verifiers": ("verifiers==0.4.0",),
    # Of tests/agents/programs/test_frameworks.py: agents that play over the endpoint of an episode.
    ".venv-frameworks": (
        "openai-agents==0.24.0",
        "smolagents[openai]==1.26.0",
        "langgraph==1.2.24",
        "langchain-openai>=1",
    ),
    ".venv-verifiers-0": ("verifiers==0.1.14", "textarena==0.7.4", "reasoning-gym==0.1.25"),
}
MAIN, V1, _, V0 = PYTHONS
_MATH = [{"prompt": [{"role": "user", "content": f"{n}+{n}="}], "answer": str(2 * n)} for n in range(4)]


@dataclass(frozen=True)
class Case:
    """One environment.

    Attributes:
        name: in `agent.environment`.
        package: that it is from.
        options: of the environment.
        python: folder of the interpreter's environment; "": that of the trainer.
        rows: of the data; none: the environment's own.
        serves: folder of an OpenEnv server that is started for it.
        fails: cause for which it cannot be used here; "": it is to work.
    """

    name: str
    package: str
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = MAIN
    rows: tuple[dict[str, Any], ...] = ()
    serves: str = ""
    fails: str = ""


CASES: tuple[Case, ...] = (
    Case("gym:FrozenLake-v1", "gymnasium"),
    Case("gym:Taxi-v4", "gymnasium"),
    Case("gym:Blackjack-v1", "gymnasium"),
    Case("gym:CliffWalking-v1", "gymnasium"),
    Case("gym:CartPole-v1", "gymnasium"),
    Case("gym:Pendulum-v1", "gymnasium"),
    Case("gym:minigrid:MiniGrid-Empty-5x5-v0", "minigrid"),
    Case("gym:minigrid:MiniGrid-DoorKey-5x5-v0", "minigrid"),
    Case("textarena:GuessTheNumber-v0", "textarena"),
    Case("textarena:Mastermind-v0", "textarena"),
    Case("textarena:Minesweeper-v0", "textarena"),
    Case("textarena:TowerOfHanoi-v0", "textarena"),
    Case("textarena:TicTacToe-v0", "textarena"),
    Case("textarena:KuhnPoker-v0", "textarena"),
    Case("textarena:Nim-v0", "textarena", {"opponent": ["[0 1]", "[1 1]", "[2 1]"], "player": 0}),
    Case("skyrl-gym:gsm8k", "skyrl-gym", rows=tuple(_MATH)),
    Case("skyrl-gym:gsm8k_multi_turn", "skyrl-gym", {"max_turns": 3}, rows=tuple(_MATH)),
    Case("skyrl-gym:aime", "skyrl-gym", rows=tuple(_MATH)),
    Case("reasoning-gym:chain_sum", "reasoning-gym", python=""),
    Case("reasoning-gym:countdown", "reasoning-gym", {"tries": 2}, python=""),
    Case("openenv:ADDRESS", "openenv", serves="echo"),
    Case("verifiers:verifiers_games", "verifiers 0.1.14", {"kind": "reasoning-gym"}, python=V0),
    Case("verifiers:verifiers_games", "verifiers 0.1.14", {"kind": "tools"}, python=V0),
    Case("verifiers:sums_taskset", "verifiers", python=V1),
    Case("textarena:Wordle-v0", "textarena", fails="downloads word lists of nltk when it starts"),
    Case("textarena:WordLadder-v0", "textarena", fails="downloads word lists of nltk when it starts"),
    Case(
        "skyrl-gym:text2sql", "skyrl-gym", rows=tuple(_MATH), fails="needs databases that it does not bring"
    ),
    Case("skyrl-gym:search", "skyrl-gym", rows=tuple(_MATH), fails="needs a search server"),
)


def title(case: Case) -> str:
    """Name of a case in the table."""
    return case.name + (f" ({case.options['kind']})" if "kind" in case.options else "")


def interpreter(case: Case, root: Path = ROOT) -> dict[str, str]:
    """Option of the environment with its interpreter."""
    return {"python": str(root / case.python / "bin" / "python")} if case.python else {}


def make_model(folder: Path) -> Path:
    """A random model with the character tokenizer, whose context is long enough for rules of games."""
    make_tiny_model(folder, hidden=32, layers=1)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 8192}))
    return folder


@contextmanager
def openenv_server(folder: Path, python: str) -> Iterator[str]:
    """Address of a server of the environment that `openenv init` makes."""
    subprocess.run(
        [str(Path(python).with_name("openenv")), "init", "echo_env", "--output-dir", str(folder)],
        check=True,
        capture_output=True,
    )
    app = folder / "echo_env" / "server" / "app.py"
    app.write_text(app.read_text().replace("max_concurrent_envs=1", "max_concurrent_envs=16"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "uvicorn", "server.app:app", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        command, cwd=folder / "echo_env", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, "the server does not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def train_once(case: Case, model: Path, folder: Path, address: str = "") -> dict[str, Any]:
    """One step of GRPO with a random policy; facts about its episodes."""
    name = case.name.replace("ADDRESS", address)
    settings = {
        "recipe": "grpo",
        "device": "cpu",
        "steps": 1,
        "prompts_per_step": 2,
        "samples_per_prompt": 2,
        "policy": {"path": str(model)},
        "output_dir": str(folder / "run"),
        # A random policy hardly ever ends a turn by itself: it ends with one of these.
        "sampling": {"max_tokens": 64, "stop": [*"0123456789aeiou]"]},
        "agent": {"environment": {"name": name, **case.options, **interpreter(case)}, "max_turns": 3},
        "data": {} if case.rows else {"train": {"path": "environment", "options": {"size": 4}}},
        "tracking": {"sinks": ["jsonl"]},
    }
    trainer = Trainer(
        load_config(settings),
        train_dataset=list(case.rows) or None,
        console=Console(file=io.StringIO()),
    )
    try:
        trainer.load_train_data()
        trainer.step()
        last, failed = trainer.last, trainer.failed
    finally:
        trainer.collector.close()
    assert len(last) == 4 and not failed, [(t.outcome, t.detail) for t in failed]
    episodes = [t.episode for t in last]
    return {
        "environment": title(case),
        "package": case.package,
        "result": "trained",
        "turns": sum(e.counts["turns"] for e in episodes if e) / 4,
        "tools": len(episodes[0].tools) if episodes[0] else 0,
        "endings": sorted({e.ending for e in episodes if e}),
    }


def result_of(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    """Facts about a step of training in an environment, or the cause for which it cannot be used."""
    try:
        if not case.serves:
            return train_once(case, model, folder)
        with openenv_server(folder, interpreter(case)["python"]) as address:
            return train_once(case, model, folder, address)
    except Exception as error:
        if not case.fails:
            raise
        cause = str(error) or type(error).__name__
        return {
            "environment": title(case),
            "package": case.package,
            "result": case.fails,
            "cause": " ".join(cause.split())[:200],
        }


def documented_table(results: list[dict[str, Any]]) -> str:
    """The table of docs/environments.md."""
    lines = ["| environment | package | tools | turns of 3 | one step of training |", "|---|---|---|---|---|"]
    for row in results:
        figures = f"{row['tools']} | {row['turns']:.2g}" if row["result"] == "trained" else "- | -"
        lines.append(f"| `{row['environment']}` | {row['package']} | {figures} | {row['result']} |")
    return "\n".join(lines)


def main() -> None:
    """Write the results of all cases, or of those named; `--requirements` lists the interpreters instead."""
    wanted = sys.argv[1:]
    if wanted == ["--requirements"]:
        for folder, requirements in PYTHONS.items():
            print(folder, *requirements)
        return
    known = {row["environment"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER / "packages"), str(ROOT)])
        for number, case in enumerate(CASES):
            if wanted and not any(one in title(case) for one in wanted):
                continue
            own = Path(folder) / str(number)
            own.mkdir()
            begun = time.monotonic()
            try:
                row = result_of(case, model, own)
            except Exception as error:
                print("FAILED", title(case), " ".join(str(error).split())[:400], flush=True)
                continue
            known[row["environment"]] = row
            print(f"{time.monotonic() - begun:5.1f} s", row, flush=True)
    rows = [known[title(case)] for case in CASES if title(case) in known]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(documented_table(rows))


if __name__ == "__main__":
    main()
