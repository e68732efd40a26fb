"""Groups on Ray: results of calls, columns that stay with their ranks, ranks that fail, die or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from tests.controller.workers import Echo, refuses
from verl.controller.ray_cluster import connect
from verl.controller.ray_columns import ObjectStoreColumn
from verl.controller.ray_pool import RayPool
from verl.controller.worker_group import Timeline, WorkerError
from verl.data.batch import Batch
from verl.data.packing import balance

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    connected = connect("local", num_devices=8)
    yield connected
    connected.close()


def new_pool(
    cluster, folder: Path, name: str = "pool", num_devices: int = 4, hang_limit_s: float = 60.0
) -> RayPool:
    return RayPool(
        cluster, name, num_devices, hang_limit_s=hang_limit_s, log_folder=folder, timeline=Timeline()
    )


@pytest.fixture(scope="module")
def pool(cluster, tmp_path_factory):
    made = new_pool(cluster, tmp_path_factory.mktemp("logs"))
    yield made
    made.close()
    cluster.pools.remove(made)


@pytest.fixture(scope="module")
def echo(pool):
    return pool.start("echo", Echo)


@pytest.fixture
def doomed(cluster, tmp_path):
    """A pool of two for a test that breaks it."""
    made = new_pool(cluster, tmp_path, "doomed", 2, hang_limit_s=3.0)
    before = list(cluster.pools)
    cluster.pools = [made]
    yield made
    made.close()
    cluster.failure = None
    cluster.pools = [pool for pool in before if pool is not made]


def pids_of(pool) -> list[int]:
    return [rank.pid for rank in pool.ranks]


def gone(pids: list[int], limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    ):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_each_protocol_splits_and_joins_over_four_ranks(pool, echo):
    assert echo.call(Echo.one_to_all, "x").result() == [(rank, "x") for rank in range(4)]
    assert echo.call(Echo.all_to_all, ["a", "b", "c", "d"]).result() == list(enumerate("abcd"))
    assert echo.call(Echo.data, [1, 2, 3, 4, 5]).result() == [(0, 1), (0, 2), (1, 3), (2, 4), (3, 5)]
    grid = pool.start("grid", Echo, {"pipeline": 2, "tensor": 1, "data": 2, "micro_data": 2})
    assert grid.call(Echo.three_d, [1, 2, 3]).result() == [(1, 1), (1, 2), (3, 3)]
    assert grid.call(Echo.micro, [1, 2, 3, 4]).result() == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert grid.call(Echo.stages, "x").result() == [(0, "x"), (1, "x")]


def test_roles_of_a_pool_share_its_processes_and_its_world(pool, echo):
    other = pool.start("other", Echo)
    assert echo.call(Echo.where).result() == other.call(Echo.where).result()
    assert len({pid for pid, _ in other.call(Echo.where).result()}) == 4
    assert other.call(Echo.total, 1.0).result() == [10.0] * 4


def test_tokens_stay_with_the_ranks_that_made_them_until_they_are_read(echo):
    lengths, rows = echo.call(Echo.answer, [3, 0, 2, 5, 1]).result()
    assert lengths == rows.response_lengths.tolist() == [3, 0, 2, 5, 1]
    plan = balance(rows.response_lengths, num_ranks=4, micro_batch_tokens=6)
    written = echo.call(Echo.write, rows, plan).result()
    rows.update(written)
    assert isinstance(rows._columns["response_ids"], ObjectStoreColumn) and isinstance(
        rows._columns["doubled"], ObjectStoreColumn
    )
    taken = {row: rank for rank in range(4) for row in plan.rows_of(rank)}
    assert written["rank"].tolist() == [taken[row] for row in range(5)]
    metrics = echo.call(Echo.update, rows, plan).result()
    made = [[3.0] * 3, [], [102.0] * 2, [205.0] * 5, [301.0]]
    assert metrics == {"total": 2 * sum(map(sum, made))}
    assert rows.ragged("response_ids").values.tolist() == [value for row in made for value in row]
    assert rows.select([3, 0])["doubled"].tolist() == [[410.0] * 5, [6.0] * 3 + [0.0] * 2]
    both = Batch.concat([rows.keep(["doubled"]), rows.keep(["doubled"]).select([2])])
    assert both.ragged("doubled").row(5).tolist() == [204.0] * 2


def test_pools_work_at_the_same_time_and_one_pool_in_the_order_of_the_calls(cluster, pool, echo, tmp_path):
    other = new_pool(cluster, tmp_path, "other", 2)
    try:
        group = other.start("echo", Echo)
        pool.timeline.take()
        other.timeline.take()
        calls = [echo.call(Echo.sleep, 0.5), echo.call(Echo.sleep, 0.5), group.call(Echo.sleep, 1.0)]
        for call in calls:
            call.result()
        first, second = ([span for span in pool.timeline.spans if span.rank == 0][i] for i in (0, 1))
        (beside,) = [span for span in other.timeline.spans if span.rank == 0]
        assert first.end_s <= second.start_s
        assert beside.start_s < second.start_s and beside.end_s > first.end_s
    finally:
        other.close()
        cluster.pools.remove(other)


def test_what_a_factory_refuses_is_the_users_mistake(pool):
    with pytest.raises(ValueError, match="^need something else$"):
        pool.start("refused", refuses, "need something else")


def test_devices_that_are_not_there_are_said_to_be_missing(cluster, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"need \d+ devices for .*, but the cluster has 8 \(CPUs on 1 nodes\); lower placement.devices",
    ):
        new_pool(cluster, tmp_path, "large", 100)
    cluster.pools.pop().close()


def test_a_rank_that_raises_is_named_with_its_log_while_others_wait_for_it(doomed):
    echo, pids, start = doomed.start("echo", Echo), pids_of(doomed), time.monotonic()
    with pytest.raises(WorkerError) as error:
        echo.call(Echo.fail, 1).result()
    assert time.monotonic() - start < 10
    assert "rank 1 of pool doomed on node" in str(
        error.value
    ) and "failed in echo.fail: KeyError: 'a bug of rank'" in str(error.value)
    assert "about to fail on 1" in str(error.value) and 'raise KeyError("a bug of rank")' in str(error.value)
    assert gone(pids)


def test_a_rank_that_is_killed_is_named(doomed):
    echo, pids = doomed.start("echo", Echo), pids_of(doomed)
    call, start = echo.call(Echo.sleep, 100.0), time.monotonic()
    time.sleep(0.5)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(
        WorkerError, match=r"rank 0 of pool doomed on node .* \(process \d+\) died in echo.sleep"
    ):
        call.result()
    assert time.monotonic() - start < 10
    assert gone(pids)


def test_a_rank_that_does_not_come_to_a_collective_is_named_with_those_who_wait(doomed):
    echo, pids, start = doomed.start("echo", Echo), pids_of(doomed), time.monotonic()
    with pytest.raises(WorkerError) as error:
        echo.call(Echo.miss, 0).result()
    assert time.monotonic() - start < 3 + 10
    assert "rank 0 of pool doomed" in str(error.value) and "hangs in echo.miss" in str(error.value)
    assert "rank 1 waited 3 s in all_reduce (called at tests/controller/workers.py:" in str(error.value)
    assert "rank 0 is at tests/controller/workers.py:" in str(error.value)
    assert gone(pids)


def test_a_rank_that_is_stopped_is_named(doomed):
    echo, pids = doomed.start("echo", Echo), pids_of(doomed)
    os.kill(pids[1], signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 does not answer"):
        echo.call(Echo.total, 1.0).result()
    assert time.monotonic() - start < 3 + 10
    assert gone(pids)


def test_long_work_is_no_hang(doomed):
    echo = doomed.start("echo", Echo)
    assert echo.call(Echo.sleep, 6.0).result() == [None, None]
    assert echo.call(Echo.total, 1.0).result() == [3.0, 3.0]


def test_ranks_find_each_other_on_the_loopback_and_rays_own_port_asks_for_the_token(pool):
    for pid in pids_of(pool):
        listening = [
            c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN
        ]
        assert sum(address not in ("127.0.0.1", "::1") for address in listening) <= 1  # that of Ray itself
    script = f"import ray; ray.init(address={ray.get_runtime_context().gcs_address!r}); print('inside')"
    strangers = [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}]
    for settings in strangers:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")
        } | settings
        out = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
        assert out.returncode != 0 and "inside" not in out.stdout and "uthentication" in out.stderr


def test_a_cluster_that_is_closed_leaves_no_process_port_or_shared_memory(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import psutil\n"
        "from pathlib import Path\n"
        "from tests.controller.workers import Echo\n"
        "from verl.controller.worker_group import Timeline\n"
        "from verl.controller.ray_cluster import connect\n"
        "from verl.controller.ray_pool import RayPool\n"
        "cluster = connect('local', num_devices=2)\n"
        f"logs = Path({str(tmp_path)!r})\n"
        "pool = RayPool(cluster, 'pool', 2, hang_limit_s=60, log_folder=logs, timeline=Timeline())\n"
        "print(pool.start('echo', Echo).call(Echo.total, 1.0).result())\n"
        "children = [child.pid for child in psutil.Process().children(recursive=True)]\n"
        "cluster.close()\n"
        "print(*children)\n"
    )
    before = set(os.listdir("/dev/shm"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("RAY_ADDRESS", None)
    out = subprocess_output(script, environment)
    assert out.splitlines()[0] == "[3.0, 3.0]"
    assert gone([int(pid) for pid in out.splitlines()[1].split()])
    assert set(os.listdir("/dev/shm")) <= before


def subprocess_output(script: Path, environment: dict[str, str]) -> str:
    return subprocess.run(
        [sys.executable, script], env=environment, check=True, capture_output=True, text=True, timeout=120
    ).stdout
