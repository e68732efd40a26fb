"""The table of columns, and what derives from it."""

from __future__ import annotations

import inspect

from verl.algorithms.dry_run import SIZES, example_columns
from verl.algorithms.objective import STEP_COLUMNS
from verl.config.checks.column_readers import COLUMN_READERS
from verl.data.batch import TRAJECTORY_COLUMNS
from verl.data.columns import COLUMNS, LOGPROB, readable_by, with_required, written_by
from verl.engines.roles.policy import POLICY_COLUMNS


def test_every_column_has_its_function_where_its_writer_computes_it():
    assert set(TRAJECTORY_COLUMNS) == {
        n for n in written_by("sampler", "rewards") if COLUMNS[n].axes[0] == "B" and n != "num_tokens"
    }
    assert set(POLICY_COLUMNS) == written_by("policy")
    assert {*STEP_COLUMNS, "token_rewards"} == written_by("step")


def test_examples_have_the_shape_type_and_bounds_of_the_table():
    columns = example_columns(COLUMNS)
    for name, spec in COLUMNS.items():
        column = columns[name]
        assert column.dtype == spec.values.dtype
        assert column.shape == tuple(SIZES[axis] for axis in spec.axes)
        assert spec.values.low <= column.double().min() and column.double().max() <= spec.values.high
    logprobs = [column for name, column in columns.items() if COLUMNS[name].values == LOGPROB]
    assert len(logprobs) > 8 and all(column.max() < 0 for column in logprobs)


def test_the_policys_logprobs_of_the_teachers_tokens_require_a_teacher():
    assert with_required(["top_logprobs"]) == {"top_logprobs", "teacher_top_ids"}
    assert with_required(["rewards"]) == {"rewards"} and with_required([]) == frozenset()


def test_readers_see_the_columns_of_their_time():
    assert not {"advantages", "returns", "logprobs", "new_values"} & set(readable_by("advantage"))
    assert {"advantages", "logprobs", "top_logprobs"} <= set(readable_by("policy_loss"))
    assert readable_by("length_penalty") == ("num_tokens", "rewards")
    assert readable_by("model") == ("prompt_ids", "response_ids", "mask", "row_ids")


def test_the_settings_know_who_reads_the_columns_of_other_models():
    models = written_by("reference", "critic", "process_reward_model", "teacher")
    chosen = models & set(readable_by("advantage", "policy_loss", "correction"))
    assert chosen <= set(COLUMN_READERS) <= set(COLUMNS)
    assert all(len(inspect.signature(f).parameters) == 3 for f in STEP_COLUMNS.values())
