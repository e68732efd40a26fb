"""Training loops side by side, each in a process of its own that runs while the others are stopped."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import string
import subprocess
import venv
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from stepping import Workload
from transformers import AutoTokenizer

from verl.engines.hf.pretrained import make_tiny_model

HERE = Path(__file__).parent
ROOT = HERE.parent
TRL = "trl==1.16.*"
TRL_FOLDER = ROOT / ".bench/trl"
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class Side:
    """A worker process with an open training loop.

    Args:
        worker: `verl` or `trl`; the script of that name is run.
        python: its interpreter.
        work: the workload; its name is that of the side.

    Attributes:
        name: of the side.
    """

    def __init__(self, worker: str, python: Path, work: Workload) -> None:
        self.name = work.name
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(work.threads))
        # No network access: everything is in the folder.
        env = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._log_path = Path(work.folder, f"{work.name}.log")
        self._log = self._log_path.open("w")
        self._servers: list[int] = []
        self._process = subprocess.Popen(
            [str(python), str(HERE / f"{worker}_worker.py"), work.command_line()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env=env,
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()
        self._log.close()

    def answer(self) -> dict[str, Any]:
        """The next answer of the worker; the first one says that it is ready.

        Raises:
            RuntimeError: the worker ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log_path.read_text().splitlines()[-15:])
            raise RuntimeError(
                f"the {self.name} worker ended before it answered; the end of its log:\n{tail}"
            )
        answer: dict[str, Any] = json.loads(line)
        self._servers = answer.get("servers", self._servers)
        return answer

    def ask(self, what: str | int) -> dict[str, Any]:
        """Send `stop` or a number of steps, and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self.answer()

    def burst(self, steps: int) -> dict[str, list[float]]:
        """Make some steps, then stop the processes; return the readings of the clocks for each step."""
        self._signal(signal.SIGCONT)
        try:
            return self.ask(steps)
        finally:
            self._signal(signal.SIGSTOP)

    def stop(self) -> dict[str, Any]:
        """Let the loop end; return its report."""
        self._signal(signal.SIGCONT)
        return self.ask("stop")

    def _signal(self, number: signal.Signals) -> None:
        for pid in (self._process.pid, *self._servers):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def trl_python(folder: Path) -> Path:
    """Python of an environment with TRL and this project's versions of PyTorch and Transformers.

    The environment is made if it does not exist.
    """
    python, stamp = folder / "bin/python", folder / "installed.txt"
    wanted = f"torch=={torch.__version__} {TRL}"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {wanted} into {folder}, some minutes the first time", flush=True)
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "-qq",
        "--disable-pip-version-check",
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    # PyTorch first, in the build of this environment: TRL would install gigabytes of CUDA libraries.
    index = ["--retries", "1", "--extra-index-url", _CPU_INDEX] if torch.__version__.endswith("+cpu") else []
    subprocess.run([*pip, *index, f"torch=={torch.__version__}"], check=True)
    subprocess.run([*pip, TRL], check=True)
    stamp.write_text(wanted)
    return python


def write_workload(
    work: Workload, *, num_prompts: int, hidden: int = 256, prompt_characters: int = 8, seed: int = 0
) -> int:
    """Write the model and the prompts; return the number of parameters.

    The tokenizer knows the end token, but the model has no output for it. All sides look for it after every
    token, as usual, and never find it, so every answer has the same length.
    """
    make_tiny_model(work.model, hidden=hidden, layers=4, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(work.model)
    path = work.model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": tokenizer.eos_token_id}))
    vocabulary = json.loads((work.model / "config.json").read_text())["vocab_size"]
    assert tokenizer.eos_token_id >= vocabulary, (
        f"the end token {tokenizer.eos_token_id} is one of the {vocabulary} outputs"
    )
    rng = random.Random(seed)
    texts = ["".join(rng.choices(string.ascii_lowercase, k=prompt_characters)) for _ in range(num_prompts)]
    work.prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    # Each fp32 weight has four bytes; the file's header is some kilobytes.
    return (work.model / "model.safetensors").stat().st_size // 4


def cpu_name() -> str:
    """The model of the processor, as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """Processor, cores and interpreter."""
    return f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}"
