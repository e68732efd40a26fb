"""Tests of ragged columns, batches of rows, and rows as a model reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from verl.data.batch import Batch, ModelInput, Ragged, present_mask
from verl.data.trajectory import Trajectory
from verl.utils.sampling_types import Prompt


def trajectory(prompt_ids, response_ids, **changes):
    logprobs = [-0.5 * i for i, _ in enumerate(response_ids)]
    row = Trajectory(
        Prompt("?"),
        prompt_ids,
        response_ids,
        [True] * len(response_ids),
        logprobs,
        [2] * len(response_ids),
        0,
        reward=1.0,
    )
    return replace(row, **changes)


ROWS = [
    trajectory([11, 12], [13, 14, 15], group=4, response_mask=[True, False, True]),
    trajectory([21], [], group=7, truncated=True, reward=-1.0),
    trajectory([31, 32, 33], [34], group=4, reward=0.5),
]


def batch():
    return Batch.from_trajectories(ROWS)


def inputs(packed, rows=ROWS):
    return ModelInput.from_batch(Batch.from_trajectories(rows), packed=packed, device=torch.device("cpu"))


def test_ragged_rows_are_picked_in_any_order_and_number():
    ragged = Ragged.from_rows([[1, 2], [], [3]], torch.int64)
    picked = ragged.select(torch.tensor([2, 0, 0, 1]))
    assert picked.values.tolist() == [3, 1, 2, 1, 2] and picked.lengths.tolist() == [1, 2, 2, 0]
    assert ragged.select(torch.tensor([], dtype=torch.int64)).values.shape == (0,)
    assert [ragged.row(i).tolist() for i in range(3)] == [[1, 2], [], [3]]


def test_ragged_rows_are_padded_on_the_right():
    ragged = Ragged.from_rows([[1, 2], [], [3]], torch.float32)
    assert ragged.padded().tolist() == [[1, 2], [0, 0], [3, 0]]
    assert ragged.padded(-1).tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert Ragged.from_rows([[], []], torch.float32).padded().shape == (2, 0)


def test_padding_keeps_the_gradient():
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (Ragged(values, torch.tensor([1, 2])).padded() * torch.tensor([[5.0, 9.0], [6.0, 7.0]])).sum().backward()
    assert values.grad.tolist() == [5, 6, 7]


def test_ragged_values_and_lengths_must_agree():
    with pytest.raises(
        ValueError, match="need one value per position, got 3 values and lengths that sum to 4"
    ):
        Ragged(torch.zeros(3), torch.tensor([1, 3]))


def test_present_positions_are_those_before_the_length():
    assert present_mask(torch.tensor([2, 0, 1])).tolist() == [[True, True], [False, False], [True, False]]
    assert present_mask(torch.tensor([], dtype=torch.int64)).shape == (0, 0)


def test_trajectories_become_columns():
    rows = batch()
    assert rows.num_rows == 3
    assert rows["prompt_ids"].tolist() == [[11, 12, 0], [21, 0, 0], [31, 32, 33]]
    assert rows["response_ids"].tolist() == [[13, 14, 15], [0, 0, 0], [34, 0, 0]]
    assert rows["mask"].tolist() == [[True, False, True], [False, False, False], [True, False, False]]
    assert rows["rollout_logprobs"].tolist() == [[0, -0.5, -1], [0, 0, 0], [0, 0, 0]]
    assert rows["versions"].tolist() == [[2, 2, 2], [0, 0, 0], [2, 0, 0]]
    assert rows["group_ids"].tolist() == [4, 7, 4] and rows["truncated"].tolist() == [False, True, False]
    assert rows["rewards"].tolist() == [1, -1, 0.5]
    assert rows.num_tokens.tolist() == [5, 1, 4] and rows.response_lengths.tolist() == [3, 0, 1]


def test_columns_have_the_types_that_training_needs():
    rows, kinds = (
        batch(),
        {
            "prompt_ids": torch.int64,
            "mask": torch.bool,
            "rollout_logprobs": torch.float32,
            "rewards": torch.float32,
        },
    )
    assert {name: rows[name].dtype for name in kinds} == kinds
    assert rows["truncated"].dtype == torch.bool and rows["group_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("missing", "column"), [({"reward": None}, "rewards"), ({"rollout_logprobs": None}, "rollout_logprobs")]
)
def test_a_column_is_there_only_if_every_trajectory_has_it(missing, column):
    rows = Batch.from_trajectories([ROWS[0], replace(ROWS[2], **missing)])
    assert column not in rows and "response_ids" in rows
    with pytest.raises(KeyError, match=f"no column '{column}'; there are .*'group_ids'"):
        rows[column]


def test_a_batch_needs_trajectories():
    with pytest.raises(ValueError, match="need at least one trajectory"):
        Batch.from_trajectories([])


def test_all_columns_have_the_same_number_of_rows():
    with pytest.raises(
        ValueError, match="need the same number of rows in every column, got {'a': 2, 'b': 3}"
    ):
        Batch({"a": torch.zeros(2), "b": Ragged.from_rows([[1], [], [2]], torch.int64)})


def test_rows_are_selected_in_any_order():
    rows = batch().select([2, 0])
    assert rows["response_ids"].tolist() == [[34, 0, 0], [13, 14, 15]] and rows["rewards"].tolist() == [
        0.5,
        1,
    ]
    assert rows.names == batch().names


def test_split_rows_concatenate_to_the_batch():
    parts = batch().split([1, 0, 2])
    assert [part.num_rows for part in parts] == [1, 0, 2]
    assert parts[2]["response_ids"].tolist() == [[0], [34]]
    joined = Batch.concat(parts)
    assert all(torch.equal(joined[name], batch()[name]) for name in batch().names)


def test_a_split_covers_all_rows():
    with pytest.raises(ValueError, match=r"need sizes that sum to 3 rows, got \[1, 1\]"):
        batch().split([1, 1])


def test_only_batches_of_the_same_columns_concatenate():
    other = batch()
    other.write("returns", torch.zeros(3))
    with pytest.raises(ValueError, match="need the same columns in every batch, got .*'returns'"):
        Batch.concat([batch(), other])


def test_a_written_column_loses_its_padding():
    rows = batch()
    rows.write("values", torch.tensor([[1.0, 2, 3], [9, 9, 9], [4, 9, 9]]))
    assert rows.ragged("values").values.tolist() == [1, 2, 3, 4]
    assert rows["values"].tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    assert rows.select([2])["values"].tolist() == [[4]]


def test_a_written_column_replaces_the_old_one():
    rows = batch()
    rows.write("rewards", torch.tensor([1.0, 2.0, 3.0]))
    assert rows["rewards"].tolist() == [1, 2, 3] and batch()["rewards"].tolist() == [1, -1, 0.5]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2,), r"need 3 rows for column 'values', got shape \(2,\)"),
        ((3, 4), r"need shape \(3, 3\) for column 'values', got \(3, 4\)"),
    ],
)
def test_a_column_of_another_shape_is_not_written(shape, message):
    with pytest.raises(ValueError, match=message):
        batch().write("values", torch.zeros(shape))


def test_a_column_per_row_is_not_ragged():
    with pytest.raises(ValueError, match="column 'rewards' has one value per row, not per token"):
        batch().ragged("rewards")


def test_packed_rows_lie_end_to_end_with_positions_from_0():
    packed = inputs(packed=True)
    assert packed.input_ids.tolist() == [[11, 12, 13, 14, 21, 31, 32, 33]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert packed.lengths == [4, 1, 3] and packed.response_lengths.tolist() == [3, 0, 1]
    # Token 13 at place 2 is predicted at place 1; the last token of an answer predicts nothing and is not
    # there.
    assert packed.predictors.tolist() == [1, 2, 3, 7] and packed.targets.tolist() == [13, 14, 15, 34]


def test_padded_rows_have_a_line_each():
    padded = inputs(packed=False)
    assert padded.input_ids.tolist() == [[11, 12, 13, 14], [21, 0, 0, 0], [31, 32, 33, 0]]
    assert padded.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert padded.lengths == [4, 1, 3] and padded.index is None
    assert padded.predictors.tolist() == [1, 2, 3, 10] and padded.targets.tolist() == [13, 14, 15, 34]


def test_packed_rows_with_one_prompt_share_it():
    shared = inputs(
        packed=True, rows=[trajectory([1, 2], [3, 4]), trajectory([1, 2], [5]), trajectory([1, 2], [6, 7, 8])]
    )
    assert shared.input_ids.tolist() == [[1, 2, 3, 6, 7]] and shared.position_ids.tolist() == [
        [0, 1, 2, 2, 3]
    ]
    assert shared.predictors.tolist() == [1, 2, 1, 1, 3, 4] and shared.targets.tolist() == [3, 4, 5, 6, 7, 8]
    to_padded, to_packed = shared.index
    assert to_padded.view(3, 4).tolist() == [
        [0, 1, 2, 0],
        [0, 1, 0, 0],
        [0, 1, 3, 4],
    ] and to_packed.tolist() == [0, 1, 2, 10, 11]


@pytest.mark.parametrize("packed", [True, False])
def test_every_response_token_is_predicted_from_the_token_before_it(packed):
    read = inputs(
        packed, rows=[trajectory([10 * i], list(range(10 * i + 1, 10 * i + 1 + i))) for i in range(1, 6)]
    )
    assert torch.equal(read.input_ids.flatten()[read.predictors] + 1, read.targets)


def test_rows_without_a_response_predict_nothing():
    assert inputs(packed=True, rows=[ROWS[1]]).predictors.tolist() == []


def test_a_row_without_a_prompt_is_an_error():
    with pytest.raises(
        ValueError, match="row 1 has an empty prompt; a model needs at least one token before the answer"
    ):
        inputs(packed=True, rows=[ROWS[0], trajectory([], [5])])
