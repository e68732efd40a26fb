"""Pools of devices for the roles of a run, from the section `placement`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from verl.config.placement import ParallelConfig, PlacementConfig
from verl.controller.worker_group import LocalPool, Pool, Timeline, WorkerFactory, WorkerGroup

# Roles that share a pool, pool by pool, in the order of `placement.devices`.
_POOLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "local": (("policy", "reference", "critic", "teacher", "reward"),),
    "colocated": (("policy", "reference", "critic", "teacher", "reward"),),
    "split": (("policy", "reference"), ("critic", "teacher", "reward")),
    "standalone": (("policy",), ("reference",), ("critic",), ("teacher",), ("reward",)),
}
# These modules import Ray: they are loaded only for more than one device.
_RAY_CLUSTER, _RAY_POOL = "verl.controller.ray_cluster", "verl.controller.ray_pool"


class Placement:
    """The pools of a run.

    Args:
        config: the section.
        roles: that the algorithm has.
        folder: of the run; ranks of other processes write their logs into `logs` there.
        timeline: takes the spans of all calls.

    Raises:
        ValueError: devices that do not fit the pools or the models, or that are not there.
    """

    def __init__(
        self, config: PlacementConfig, roles: Collection[str], folder: Path, timeline: Timeline
    ) -> None:
        self._config = config
        self._roles_of = [tuple(role for role in pool if role in roles) for pool in _POOLS[config.name]]
        self._roles_of = [pool for pool in self._roles_of if pool]
        self._close: Callable[[], None] = lambda: None
        if config.name == "local":
            self._pools: list[Pool] = [LocalPool(timeline=timeline)]
            return
        devices = self._devices()
        cluster = importlib.import_module(_RAY_CLUSTER).connect(config.address, num_devices=sum(devices))
        self._close = cluster.close
        options: dict[str, Any] = {
            "hang_limit_s": config.hang_limit_s,
            "log_folder": folder / "logs",
            "timeline": timeline,
        }
        try:
            make_pool = importlib.import_module(_RAY_POOL).RayPool
            self._pools = [
                make_pool(cluster, "+".join(pool), count, **options)
                for pool, count in zip(self._roles_of, devices, strict=True)
            ]
        except BaseException:
            self.close()
            raise

    def start(self, role: str, factory: WorkerFactory, *args: Any) -> WorkerGroup:
        """Start a role on its pool."""
        number = next(i for i, pool in enumerate(self._roles_of) if role in pool)
        return self._pools[number].start(role, factory, *args)

    def parallel(self, role: str) -> ParallelConfig | None:
        """Parallel sizes of the model of a role; None: it is in this process."""
        config = self._config
        if config.name == "local":
            return None
        return {"policy": config.policy, "critic": config.critic}.get(role, config.reference)

    def close(self) -> None:
        """End all workers and release all devices."""
        self._close()

    def _devices(self) -> list[int]:
        """Number of devices of each pool, which the sizes of its models must divide."""
        needs = [[(role, self._least(role)) for role in pool] for pool in self._roles_of]
        given = list(self._config.devices) or [max(least for _, least in pool) for pool in needs]
        if len(given) != len(needs):
            pools = "; ".join(" and ".join(pool) for pool in self._roles_of)
            raise ValueError(
                f"need a number in placement.devices for each pool of placement {self._config.name} "
                f"({pools}), "
                f"got {given}; give {len(needs)}"
            )
        for count, pool in zip(given, needs, strict=True):
            for role, least in pool:
                if count % least:
                    raise ValueError(
                        "need devices that tensor * pipeline * sequence * replicas of every model divides, "
                        "got "
                        f"{count} for the {role}, which is spread over {least}; change placement.devices or "
                        f"placement.{role}"
                    )
        return given

    def _least(self, role: str) -> int:
        parallel = self.parallel(role)
        assert parallel is not None
        return parallel.tensor * parallel.pipeline * parallel.sequence * parallel.replicas
