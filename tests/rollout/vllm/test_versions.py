"""What is asked of each version of vLLM, and which ones are refused before they are started."""

from __future__ import annotations

import asyncio
import venv
from pathlib import Path

import pytest

from tests.tiny import tiny_transformer
from verl.rollout.inference_server import ServerSpec
from verl.rollout.vllm.launch import server_flags
from verl.rollout.vllm.server import VLLMServer
from verl.rollout.vllm.versions import (
    BEGIN_UPDATE,
    check_version,
    cpu_environment,
    has_update_calls,
    worker_method,
)

LATER = [
    "--worker-extension-cls",
    "verl.rollout.vllm.worker.WorkerExtension",
    "--weight-transfer-config",
    '{"backend": "verl"}',
]
OLD = ["--worker-extension-cls", "verl.rollout.vllm.worker_compat.LegacyWorkerExtension"]


@pytest.mark.parametrize("version", ["0.8.2", "0.9.2", "0.19.1+cpu", "0.19.2rc1"])
def test_a_version_without_a_way_for_weights_is_refused_with_what_to_do(version):
    found = version.replace("+", ".")
    message = rf"need vLLM 0.20 or newer, got {found} here: .*upgrade it, or name .* rollout.python"
    with pytest.raises(ValueError, match=message):
        check_version(version, "here")


@pytest.mark.parametrize("version", ["0.20.0", "0.21.0+cpu", "0.24.1", "0.25.0", "0.32.0", "1.0", "dev", ""])
def test_later_versions_and_those_without_a_number_are_taken(version):
    check_version(version, "here")
    assert has_update_calls(version) == (version not in ("0.20.0", "0.21.0+cpu", "0.24.1"))
    assert worker_method(version, BEGIN_UPDATE) == (
        "start_weight_update" if has_update_calls(version) else "verl_start_weight_update"
    )


def test_each_version_is_started_with_what_it_has():
    flags = {
        version: " ".join(server_flags(ServerSpec("a", "b"), version, port=1))
        for version in ("0.20.2", "0.21.0", "0.22.1", "0.24.0", "0.25.0", "")
    }
    later, old = " ".join(LATER), " ".join(OLD)
    assert [version for version in flags if later in flags[version]] == ["0.25.0", ""]
    assert [version for version in flags if old in flags[version]] == ["0.20.2", "0.21.0", "0.22.1", "0.24.0"]
    # There a request that is kept over an update would lose a token.
    assert [version for version in flags if "--no-async-scheduling" in flags[version]] == ["0.20.2", "0.21.0"]
    with pytest.raises(ValueError, match="cannot set async-scheduling"):
        server_flags(ServerSpec("a", "b", {"async_scheduling": True}), "0.21.0", port=1)
    assert "--async-scheduling" in server_flags(
        ServerSpec("a", "b", {"async_scheduling": True}), "0.22.0", port=1
    )
    assert "VLLM_CPU_OMP_THREADS_BIND" not in cpu_environment(
        "0.20.0"
    ) and "VLLM_CPU_OMP_THREADS_BIND" in cpu_environment("0.21.0")


def test_an_environment_that_has_an_old_version_is_refused_before_it_is_started(tmp_path):
    venv.create(tmp_path / "old", with_pip=False)
    site = next((tmp_path / "old" / "lib").glob("python*/site-packages"))
    (site / "vllm-0.19.1.dist-info").mkdir()
    (site / "vllm-0.19.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.19.1\n"
    )
    tiny_transformer("llama").save_pretrained(tmp_path / "model")
    python = str(tmp_path / "old" / "bin" / "python")
    log = tmp_path / "log"
    with pytest.raises(
        ValueError, match=rf"need vLLM 0.20 or newer, got 0.19.1 in the environment of {python}"
    ):
        asyncio.run(VLLMServer(ServerSpec("old", str(tmp_path / "model"), python=python, log=log)).open())
    assert not Path(log).exists()
