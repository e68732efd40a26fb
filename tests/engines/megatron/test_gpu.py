"""The engine on Megatron-Core on a GPU, where nothing of Megatron-Core is replaced."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from tests.engines.sharded_runs import local_engine_on, steps, worker_on
from tests.tiny import tiny_transformer

pytestmark = pytest.mark.gpu

_PROGRAM = """
import json, sys
from tests.engines.megatron.megatron_runs import on_gpu
print(json.dumps(on_gpu(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
"""


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.1)])
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_steps_on_a_gpu_are_those_on_a_cpu(family, precision, tolerance, tmp_path):
    pytest.importorskip("megatron.core")
    source = str(tmp_path)
    tiny_transformer(family, initializer_range=0.05, vocab_size=100).save_pretrained(source)
    expected = steps(worker_on(local_engine_on(source, {}), {}), 1, {}, -1, updates=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, source, str(port), precision]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    for ours, theirs in zip(json.loads(done.stdout.splitlines()[-1]), expected, strict=True):
        assert ours["skipped_updates"] == 0
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance, abs=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=tolerance)
