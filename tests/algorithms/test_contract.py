"""The contract of all tables: known columns, keyword-only options, sources, and unchanged inputs."""

from __future__ import annotations

import inspect

import pytest
import torch

from tests.oracles.columns import random_columns
from verl.algorithms.advantages import ADVANTAGES
from verl.algorithms.aggregations import AGGREGATIONS
from verl.algorithms.correction import CORRECTIONS
from verl.algorithms.kl import KL_ESTIMATORS
from verl.algorithms.losses import POLICY_LOSSES
from verl.algorithms.registry import bind
from verl.algorithms.value_losses import VALUE_LOSSES
from verl.config.algorithm import AlgorithmConfig
from verl.config.fields import Choice
from verl.data.columns import CHOSEN, readable_by

TABLES = [ADVANTAGES, POLICY_LOSSES, VALUE_LOSSES, AGGREGATIONS, KL_ESTIMATORS, CORRECTIONS]
ENTRIES = [(table, name) for table in TABLES for name in table]
REQUIRED = {"seq_mean_token_sum_norm": {"length": 7}}
EVERY_FUNCTION = pytest.mark.parametrize(("table", "name"), ENTRIES, ids=[name for _, name in ENTRIES])


def tensors(result):
    """Every tensor of what a function returned."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [tensor for part in parts if part is not None for tensor in tensors(part)]


@EVERY_FUNCTION
def test_parameters_are_known_columns_and_options_with_defaults(table, name):
    function = bind(Choice(name=name, **REQUIRED.get(name, {})), table, columns=readable_by(*CHOSEN)).function
    parameters = inspect.signature(function).parameters.values()
    required = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
    assert required == set(REQUIRED.get(name, {}))


@EVERY_FUNCTION
def test_the_row_is_named_like_its_function_which_gives_its_source(table, name):
    assert table[name].__name__ == name
    doc = inspect.getdoc(table[name])
    assert "http" in doc and "Args:" in doc and "Returns:" in doc
    assert all(f"{parameter}:" in doc for parameter in inspect.signature(table[name]).parameters)


@EVERY_FUNCTION
def test_results_have_the_shape_of_rows_or_of_the_response_and_inputs_stay_as_they_are(table, name):
    columns = random_columns(5)
    before = {key: column.clone() for key, column in columns.items()}
    results = tensors(bind(Choice(name=name, **REQUIRED.get(name, {})), table)(columns))
    assert results and all(result.shape in ((6,), (6, 7)) and result.isfinite().all() for result in results)
    assert all(torch.equal(columns[key], before[key]) for key in columns)


@EVERY_FUNCTION
def test_fp32_columns_give_fp32_results_near_those_of_fp64(table, name):
    columns = random_columns(8)
    single = {
        key: column.float() if column.is_floating_point() else column for key, column in columns.items()
    }
    function = bind(Choice(name=name, **REQUIRED.get(name, {})), table)
    for low, high in zip(tensors(function(single)), tensors(function(columns)), strict=True):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), high.double(), atol=1e-5, rtol=1e-5)


def test_the_defaults_of_the_settings_are_in_the_tables():
    config = AlgorithmConfig()
    chosen = [
        config.advantage,
        config.policy_loss,
        config.value_loss,
        config.aggregation,
        config.kl.estimator,
        config.correction,
    ]
    assert all(bind(choice, table).options == {} for choice, table in zip(chosen, TABLES, strict=True))
