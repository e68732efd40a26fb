"""Connection to a Ray cluster, and start of one on this machine that nobody else can reach."""

from __future__ import annotations

import os
import secrets
from typing import Any

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from verl.controller.worker_group import Pool, WorkerError
from verl.utils.network import proxy_exceptions, socket_folder


class RayCluster:
    """A connection to a Ray cluster, with the pools on it.

    Args:
        was_connected: this process was connected before, and stays so after `close`.

    Attributes:
        pools: that are open.
        failure: the first one of any pool; every later call raises it again.
    """

    def __init__(self, *, was_connected: bool = False) -> None:
        self.pools: list[Pool] = []
        self.failure: WorkerError | None = None
        self._was_connected = was_connected

    @property
    def devices(self) -> tuple[str, int]:
        """Kind of device that a rank takes, "GPU" or "CPU", and their number in the cluster."""
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") else "CPU"
        return kind, int(resources.get(kind, 0))

    def close(self) -> None:
        """End every worker and free all devices; stop the cluster if it was started here."""
        for pool in self.pools:
            pool.close()
        self.pools = []
        if not self._was_connected:
            ray.shutdown()


def connect(address: str, *, num_devices: int) -> RayCluster:
    """Join a Ray cluster, or start one on this machine.

    Args:
        address: auto: the cluster that `ray start` made here or that RAY_ADDRESS names, else a new one;
            local: a new one; or HOST:PORT.
        num_devices: ranks that will be asked for; on a machine without GPUs they share its cores.

    Raises:
        ValueError: there is no cluster at the address.
    """
    if ray.is_initialized():
        return RayCluster(was_connected=True)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address != "local":
        try:
            ray.init(address=address, **quiet)
            return RayCluster()
        except ConnectionError as error:
            if address != "auto":
                raise ValueError(
                    f"need a Ray cluster at placement.address {address}, got none: {error}; "
                    "start it with `ray start`"
                ) from error
    _require_token()
    os.environ |= proxy_exceptions()
    cores = os.cpu_count() or 1
    # Ray's own choice may be too long for its sockets.
    folder = f"{socket_folder()}/ray"
    ray.init(
        address="local", num_cpus=max(cores, num_devices), include_dashboard=False, _temp_dir=folder, **quiet
    )
    return RayCluster()


def _require_token() -> None:
    """Let only processes with the token of this run into a new cluster, and turn off Ray's usage reports."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_AUTH_MODE") is None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Ray reads these when it is imported, and has no public way to read them again.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
