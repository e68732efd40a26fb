"""The program of the integration tutorial runs to its end, unchanged, against a real server without a key or
a trainer.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import requests

from tests.rollout.servers import environment, running, tiny_model

PROGRAM = Path(__file__).parents[1] / "programs" / "external_rollouts.py"


def test_a_users_own_workers_over_a_server_train_a_policy(tmp_path):
    folder = str(tiny_model(tmp_path / "model"))
    with running({"model": folder}, secret=False, key=False) as url:
        command = [sys.executable, str(PROGRAM), folder, f"{url}/v1/chat/completions"]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200
        )
        assert result.returncode == 0, result.stderr
        # Without a secret there is nothing for a trainer.
        assert [
            requests.post(f"{url}/control/{name}", json={}).status_code for name in ("pause", "load")
        ] == [404, 404]
    lines = [line for line in result.stdout.splitlines() if line.startswith("Epoch")]
    assert [re.match(r"Epoch (\d) \{.*\}", line)[1] for line in lines] == ["0", "1"]
