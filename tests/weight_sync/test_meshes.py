"""Coordinates of ranks in training and in generation."""

from __future__ import annotations

import pytest

from verl.weight_sync.meshes import (
    GenerationCoordinates,
    Mesh,
    TrainingCoordinates,
    generation_coordinates,
    generation_groups,
    stage_layers,
)


def test_ranks_of_training_are_numbered_tensor_first_then_shards_stages_and_replicas():
    mesh = Mesh(tensor=2, pipeline=3, replicas=2)
    assert mesh.num_ranks == 12
    assert [
        (mesh.coordinates(rank).replica, mesh.coordinates(rank).stage, mesh.coordinates(rank).tensor)
        for rank in (0, 1, 2, 5, 6, 11)
    ] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (0, 2, 1),
        (1, 0, 0),
        (1, 2, 1),
    ]
    assert Mesh(tensor=2, shards=3, sequence=2).coordinates(7) == TrainingCoordinates(
        0, 0, shard=1, sequence=1, tensor=1
    )


def test_the_example_of_the_paper_on_eight_devices():
    # Section 5.3: training 1-4-2, generation 1-2-2-2; devices are numbered from 1 there.
    mesh = Mesh(tensor=4, replicas=2)
    assert generation_groups(mesh, tensor=2) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert generation_groups(mesh, tensor=2, grouping="consecutive") == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_stages_that_one_rank_takes_over_are_next_to_each_other():
    mesh = Mesh(tensor=2, pipeline=4)
    assert generation_groups(mesh, tensor=2, pipeline=2) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert generation_groups(mesh, tensor=1, pipeline=2) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert generation_coordinates(7, mesh, tensor=1, pipeline=2) == GenerationCoordinates(
        replica=3, stage=1, tensor=0
    )


def test_shards_play_the_part_of_tensor_ranks():
    assert [generation_coordinates(rank, Mesh(shards=8), tensor=2).tensor for rank in range(8)] == [
        rank // 4 for rank in range(8)
    ]
    assert [generation_coordinates(rank, Mesh(shards=8), tensor=2).replica for rank in range(8)] == [
        rank % 4 for rank in range(8)
    ]
    # Shards lie within tensor ranks: of 2 x 2, tensor rank 0 has the first half of a column, in shards 0 and
    # 1.
    assert generation_groups(Mesh(tensor=2, shards=2), tensor=2) == [[0, 1], [2, 3]]
    assert generation_groups(Mesh(tensor=2, shards=2), tensor=4) == [[0, 2, 1, 3]]


@pytest.mark.parametrize("grouping", ["zero-redundancy", "consecutive"])
@pytest.mark.parametrize(
    ("mesh", "tensor", "pipeline"),
    [
        (Mesh(tensor=4, pipeline=2, replicas=2), 2, 1),
        (Mesh(tensor=2, shards=2, sequence=2, replicas=2), 4, 1),
        (Mesh(pipeline=4), 1, 2),
    ],
)
def test_every_place_of_generation_is_taken_by_one_rank(mesh, tensor, pipeline, grouping):
    coordinates = [
        generation_coordinates(rank, mesh, tensor=tensor, pipeline=pipeline, grouping=grouping)
        for rank in range(mesh.num_ranks)
    ]
    expected = {
        GenerationCoordinates(r, s, t)
        for r in range(mesh.num_ranks // (tensor * pipeline))
        for s in range(pipeline)
        for t in range(tensor)
    }
    assert len(coordinates) == len(expected) and set(coordinates) == expected


def test_layers_are_dealt_to_stages_in_order():
    assert stage_layers(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
    with pytest.raises(ValueError, match="need at most as many stages as layers, got 3 for 2"):
        stage_layers(2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mesh(tensor=0), "need sizes from 1, got Mesh.*tensor=0"),
        (lambda: Mesh(tensor=2, experts=4), "need experts that divide the ranks of a stage"),
        (lambda: Mesh(shards=4, experts=2), "no shards beside them"),
        (
            lambda: generation_coordinates(0, Mesh(tensor=4), tensor=3),
            "to divide those of training, got tensor=3 for 4 tensor ranks x 1 shards",
        ),
        (
            lambda: generation_coordinates(0, Mesh(pipeline=2, replicas=2), tensor=1, pipeline=4),
            "pipeline=4 for 2 stages",
        ),
        (lambda: generation_coordinates(0, Mesh(tensor=4), tensor=0), "need sizes from 1, got tensor=0"),
        (
            lambda: generation_coordinates(0, Mesh(tensor=6), tensor=4, grouping="consecutive"),
            r"to divide the 6 ranks, got 4 \* 1",
        ),
        (
            lambda: generation_coordinates(0, Mesh(), tensor=1, grouping="vanilla"),
            "need a grouping of zero-redundancy, consecutive, got 'vanilla'",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
