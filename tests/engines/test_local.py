"""The local engine: exact accumulation, weight decay, precision, and losses that are not finite."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.training import gradient, local_engine, one_update, rows_to_learn, weights
from tests.training import learn as train
from verl.algorithms.aggregations import AGGREGATIONS
from verl.algorithms.losses import POLICY_LOSSES
from verl.algorithms.objective import Algorithm
from verl.config.algorithm import AlgorithmConfig
from verl.config.fields import Choice
from verl.engines.base import NotFiniteError
from verl.engines.roles.policy import PolicyWorker

WHOLE = [[0, 1, 2, 3, 4, 5]]
SPLITS = [[[0], [1], [2], [3], [4], [5]], [[5, 0], [], [3, 4, 1], [2]], [[4], [2, 1, 0], [5, 3], []]]
# With its defaults clip_cov would find no token to choose among six short rows.
OPTIONS = {"seq_mean_token_sum_norm": {"length": 7}, "clip_cov": {"share": 0.2, "cov_low": 0.05}}


def learn(batch, micro_batches, *, loss="policy_gradient", aggregation="token_mean", chunk=100, **settings):
    """The engine after one update, and its metrics."""
    policy_loss, aggregated = (Choice(name=name, **OPTIONS.get(name, {})) for name in (loss, aggregation))
    config = AlgorithmConfig(policy_loss=policy_loss, aggregation=aggregated)
    engine = local_engine(**settings)
    worker = PolicyWorker(engine, Algorithm.bind(config), temperature=1.0, epochs=1, chunk=chunk)
    return engine, train(worker, batch, one_update(*micro_batches))


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_any_split_into_micro_batches_learns_what_the_whole_batch_does(loss, aggregation, packing):
    batch = rows_to_learn()
    # The bias of the keys has no gradient but rounding errors; with the usual eps Adam would take them for a
    # direction.
    settings = {"loss": loss, "aggregation": aggregation, "optimizer": {"eps": 1e-4}}
    whole, expected = learn(batch, WHOLE, **settings)
    for split in SPLITS:
        parts, metrics = learn(batch, split, packing=packing, **settings)
        assert distance(gradient(parts), gradient(whole)) < 1e-6
        assert distance(weights(parts), weights(whole)) < 1e-6
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_gradient_checkpointing_and_chunks_of_logits_change_memory_only():
    batch = rows_to_learn()
    plain, _ = learn(batch, WHOLE)
    for settings in (
        {"gradient_checkpointing": True},
        {"chunk": 3},
        {"gradient_checkpointing": True, "chunk": 3},
    ):
        assert distance(gradient(learn(batch, WHOLE, **settings)[0]), gradient(plain)) < 1e-6


def test_an_update_reports_the_rate_that_it_was_made_with():
    engine = local_engine(optimizer={"lr": 0.4, "warmup_steps": 3})
    zero = objective_of(engine, lambda logprobs: 0 * logprobs.sum())
    assert [engine.update(rows_to_learn(), WHOLE, zero)["lr"] for _ in range(4)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4]
    )


def test_a_long_gradient_is_scaled_down_and_a_short_one_left_alone():
    batch = rows_to_learn()
    free, metrics = learn(batch, WHOLE)
    for limit in (metrics["grad_norm"] / 2, metrics["grad_norm"] * 2):
        clipped, other = learn(batch, WHOLE, optimizer={"max_grad_norm": limit})
        assert other["grad_norm"] == metrics["grad_norm"]
        factor = min(1.0, limit / metrics["grad_norm"])
        torch.testing.assert_close(gradient(clipped), gradient(free) * factor, rtol=1e-4, atol=0)


def test_weight_decay_shrinks_matrices_only():
    engine = local_engine(optimizer={"lr": 0.1, "weight_decay": 0.5})
    before = copy.deepcopy(dict(engine.model.named_parameters()))
    engine.update(rows_to_learn(), WHOLE, objective_of(engine, lambda logprobs: 0 * logprobs.sum()))
    for name, parameter in engine.model.named_parameters():
        torch.testing.assert_close(
            parameter, before[name] * (0.95 if parameter.ndim >= 2 else 1.0), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_and_keeps_its_weights_in_fp32(precision):
    engine = local_engine(precision=precision)
    likely = objective_of(engine, lambda logprobs: -logprobs.mean())
    losses = [engine.update(rows_to_learn(), WHOLE, likely)["loss"] for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}


def test_an_overflow_of_fp16_halves_the_loss_scale_and_is_no_bad_update():
    engine = local_engine(precision="fp16", max_bad_updates=1)
    before, scale = weights(engine), engine._scale.value
    metrics = engine.update(
        rows_to_learn(), WHOLE, objective_of(engine, lambda logprobs: -1e6 * logprobs.mean())
    )
    assert metrics["skipped_updates"] == 1
    assert engine._scale.value == scale / 2
    assert torch.equal(weights(engine), before)


def test_an_overflow_that_no_loss_scale_mends_stops_the_run():
    engine = local_engine(precision="fp16", max_bad_updates=1)
    with pytest.raises(NotFiniteError):
        for _ in range(30):
            engine.update(rows_to_learn(), WHOLE, objective_of(engine, gradient_is_nan))
    assert engine._scale.value < 1


def objective_of(engine, loss):
    """An objective from a function of the logprobs [M]."""
    return lambda rows, inputs: (loss(engine.model.token_logprobs(inputs, temperature=1.0, chunk=100)[0]), {})


def gradient_is_nan(logprobs):
    """A loss of 0 with a gradient of infinity times 0."""
    return (logprobs - logprobs.detach()).abs().sqrt().sum()


def row_3_is_nan(rows, logprobs):
    return torch.where(rows["advantages"].isnan().any(), torch.nan, -logprobs.mean())


def bad_objective(engine, kind):
    if kind == "gradient":
        return objective_of(engine, gradient_is_nan)
    return lambda rows, inputs: (
        row_3_is_nan(rows, engine.model.token_logprobs(inputs, temperature=1.0, chunk=100)[0]),
        {},
    )


def rows_with_nan_in_row_3():
    batch = rows_to_learn()
    advantages = batch["advantages"]
    advantages[3, 1] = torch.nan
    batch.write("advantages", advantages)
    return batch


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_an_update_that_is_not_finite_changes_nothing(kind):
    engine = local_engine()
    engine.update(rows_to_learn(), WHOLE, objective_of(engine, lambda logprobs: -logprobs.mean()))
    before, optimizer = weights(engine), copy.deepcopy(engine._optimizer.state_dict())
    metrics = engine.update(rows_with_nan_in_row_3(), [[0, 1], [2, 3], [4, 5]], bad_objective(engine, kind))
    assert metrics["skipped_updates"] == 1
    assert torch.equal(weights(engine), before)
    torch.testing.assert_close(engine._optimizer.state_dict(), optimizer, rtol=0, atol=0)
    assert engine._schedule.last_epoch == 1


@pytest.mark.parametrize(
    ("kind", "named"), [("loss", r"row 3 of the step"), ("gradient", r"row 0, 1, 2, 3, 4, 5 of the step")]
)
def test_too_many_of_them_in_a_row_stop_the_run_and_name_the_rows(kind, named):
    engine, batch = local_engine(max_bad_updates=3), rows_with_nan_in_row_3()
    good, bad = objective_of(engine, lambda logprobs: -logprobs.mean()), bad_objective(engine, kind)
    for objective in (bad, bad, good, bad, bad):
        engine.update(batch, [[0, 1], [2, 3], [4, 5]], objective)
    with pytest.raises(NotFiniteError, match=f"the {kind} was not finite in 3 updates in a row, .* {named}"):
        engine.update(batch, [[0, 1], [2, 3], [4, 5]], bad)


def test_inference_puts_every_value_at_its_token_whatever_the_split():
    engine, batch = local_engine(), rows_to_learn()
    values = engine.infer(batch, WHOLE, lambda inputs: inputs.targets.float())
    assert torch.equal(values, batch["response_ids"].float())
    some = engine.infer(batch, [[5], [], [0, 3]], lambda inputs: inputs.targets.float())
    assert torch.equal(some[[0, 3, 5]], values[[0, 3, 5]])
    assert not some[[1, 2, 4]].any()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_that_was_saved_goes_on_as_if_it_never_stopped(precision, tmp_path):
    settings = {
        "precision": precision,
        "optimizer": {"schedule": "linear", "weight_decay": 0.1, "warmup_steps": 2},
    }
    first, second = local_engine(**settings), local_engine(seed=1, **settings)
    shared = next(second.model.parameters()).data_ptr()
    for _ in range(3):
        first.update(rows_to_learn(), WHOLE, objective_of(first, lambda logprobs: -logprobs.mean()))
    first.update(rows_to_learn(), WHOLE, objective_of(first, gradient_is_nan))
    first.save(tmp_path)()
    second.load(tmp_path)
    assert (second._bad_updates, second._scale.value) == {"fp32": (1, 1.0), "fp16": (0, 2.0**15)}[precision]
    assert next(second.model.parameters()).data_ptr() == shared
    results = [
        e.update(rows_to_learn(), WHOLE, objective_of(e, lambda logprobs: -logprobs.mean()))
        for e in (first, second)
    ]
    assert results[0] == results[1]
    assert torch.equal(weights(first), weights(second))


def test_an_engine_that_goes_on_under_other_settings_obeys_them(tmp_path):
    first = local_engine(optimizer={"lr": 1e-3, "warmup_steps": 4})
    other = local_engine(optimizer={"lr": 1e-2, "warmup_steps": 4, "weight_decay": 0.1, "betas": (0.8, 0.9)})
    first.update(rows_to_learn(), WHOLE, objective_of(first, lambda logprobs: -logprobs.mean()))
    first.save(tmp_path)()
    other.load(tmp_path)
    group = other._optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.8, 0.9))
    update = other.update(rows_to_learn(), WHOLE, objective_of(other, lambda logprobs: -logprobs.mean()))
    assert update["lr"] == pytest.approx(1e-2 * 2 / 5)
