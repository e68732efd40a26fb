"""Real servers of `verl serve` with tiny models, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import torch
from torch import Tensor

import verl
from verl.engines.hf.models import PolicyModel
from verl.engines.hf.pretrained import make_tiny_model
from verl.utils.network import free_port

KEY, SECRET = "a key of users", "a secret of the trainer"
START_S = 120.0


def tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Hidden 32, 2 layers, 100 tokens, context 1024."""
    make_tiny_model(folder, hidden=32, layers=2, seed=seed)
    return folder


def next_logprobs(model: PolicyModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Of each token of an answer, by the model's own forward."""
    with torch.no_grad():
        logits = model.transformer(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)


def environment() -> dict[str, str]:
    """Of a process that imports this very package, with one thread and no hub."""
    root = str(Path(verl.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def running(options: dict[str, Any], *, secret: bool = True, key: bool = True) -> Iterator[str]:
    """The address of a server that runs inside the block."""
    port = free_port()
    command = [sys.executable, "-m", "verl.rollout.server.app", json.dumps({**options, "port": port})]
    command += (["--secret-env", "TEST_SECRET"] if secret else []) + (
        ["--api-key-env", "TEST_KEY"] if key else []
    )
    with tempfile.TemporaryFile() as log:
        settings = {**environment(), "TEST_SECRET": SECRET, "TEST_KEY": KEY}
        process = subprocess.Popen(command, env=settings, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            assert process.wait(timeout=20) == 0, said(log)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Returns when it answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(url, timeout=1).ok:
                return
        except requests.exceptions.RequestException:
            time.sleep(0.05)
    raise AssertionError(f"no answer at {url}, exit code {process.poll()}")


def said(log: Any) -> str:
    """What the server wrote."""
    log.seek(0)
    return str(log.read().decode())
