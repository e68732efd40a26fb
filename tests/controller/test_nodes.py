"""Two nodes of Ray on one machine: a pool that spans both, rows read across, a node that goes down."""

from __future__ import annotations

import time

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.controller.workers import Echo
from verl.controller.ray_cluster import connect
from verl.controller.ray_columns import ObjectStoreColumn
from verl.controller.ray_pool import RayPool
from verl.controller.worker_group import Timeline, WorkerError
from verl.data.packing import balance

pytestmark = pytest.mark.ray


@pytest.fixture
def nodes(tmp_path):
    """A head and a second node with two CPUs each, a connection, and a pool of four."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    second = cluster.add_node(num_cpus=2)
    connection = connect(cluster.address, num_devices=4)
    try:
        yield (
            cluster,
            second,
            RayPool(connection, "wide", 4, hang_limit_s=60, log_folder=tmp_path, timeline=Timeline()),
        )
    finally:
        connection.close()
        cluster.shutdown()


def test_a_pool_spans_two_nodes_and_rows_are_read_across_them(nodes):
    _, _, pool = nodes
    places = [rank.node for rank in pool.ranks]
    assert len(set(places)) == 2 and places == sorted(places)  # ranks of a node are neighbours
    echo = pool.start("echo", Echo)
    assert echo.call(Echo.total, 1.0).result() == [10.0] * 4
    _, rows = echo.call(Echo.answer, [3, 1, 2, 5]).result()
    column = rows._columns["response_ids"]
    assert isinstance(column, ObjectStoreColumn) and {chunk.node for chunk in column.chunks} == set(places)
    # The longest row goes first: each row is taken by another rank than the one that made it.
    plan = balance(rows.response_lengths, num_ranks=4, micro_batch_tokens=8)
    assert [plan.rows_of(rank) for rank in range(4)] != [[0], [1], [2], [3]]
    rows.update(echo.call(Echo.write, rows, plan).result())
    assert rows.ragged("doubled").values.tolist() == [6.0] * 3 + [202.0] + [404.0] * 2 + [610.0] * 5


def test_a_node_that_goes_down_ends_the_run_and_is_named(nodes):
    cluster, second, pool = nodes
    echo = pool.start("echo", Echo)
    call, start = echo.call(Echo.sleep, 100.0), time.monotonic()
    time.sleep(1)
    lost = next(rank for rank, where in enumerate(pool.ranks) if where.node == second.node_id)
    cluster.remove_node(second, allow_graceful=False)
    with pytest.raises(
        WorkerError, match=rf"rank [{lost}{lost + 1}] of pool wide on node .* died in echo.sleep"
    ):
        call.result()
    assert time.monotonic() - start < 20
    assert ray.is_initialized()
