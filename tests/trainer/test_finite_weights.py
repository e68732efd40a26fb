"""Numbers gone wrong: no checkpoint with them, the last good one named, and advice that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training import engine_of, local_engine, toy_trainer
from verl.config.roles import OptimizerConfig
from verl.engines.base import NotFiniteError, all_finite, not_finite_advice
from verl.engines.dcp_checkpoint import read_saved
from verl.trainer.rl_trainer import Trainer
from verl.trainer.run.finite_weights import check_finite, has_learned


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def spoiled(letters: Path, folder: Path, spoil) -> Trainer:
    """A run that keeps one checkpoint, and whose weights are spoiled after its third step."""
    trainer = toy_trainer("grpo", letters, folder, "steps=9", "checkpoint.every_steps=1", "checkpoint.keep=1")
    learn = trainer.step

    def step(*args):
        metrics = learn(*args)
        if trainer.version == 3:
            with torch.no_grad():
                for parameter in engine_of(trainer).model.parameters():
                    spoil(parameter)
        return metrics

    trainer.step = step
    return trainer


def test_the_error_of_weights_that_blew_up_names_the_last_good_checkpoint(letters, tmp_path):
    trainer, folder = spoiled(letters, tmp_path, lambda p: p.mul_(1e30)), tmp_path / "run/checkpoints"
    with pytest.raises(NotFiniteError) as raised:
        trainer.fit()
    message, good = str(raised.value), folder / "step-00000002"
    assert f"the last good checkpoint is {good}" in message and f"checkpoint.resume={good}" in message
    assert "it computes in fp32: lower optimizer.lr" in message and message.count("fp32") == 1
    assert "(step-00000003 has the weights that failed)" in message
    assert names(folder) == ["step-00000002", "step-00000003"]
    saved = read_saved(folder / "step-00000003/policy")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_weights_that_are_not_finite_are_not_saved_and_the_good_checkpoint_stays(letters, tmp_path):
    trainer = spoiled(letters, tmp_path, lambda p: p.view(-1)[:1].fill_(torch.nan))
    with pytest.raises(NotFiniteError, match=r"of policy are not finite after step 3, so they are not saved"):
        trainer.fit()
    assert not (tmp_path / "run/model").exists()
    assert names(tmp_path / "run/checkpoints")[-1] == "step-00000002"


def test_a_state_of_the_optimizer_counts_too(letters, tmp_path):
    trainer = toy_trainer("ppo", letters, tmp_path, "steps=1")
    trainer.step()
    check_finite(trainer)
    state = engine_of(trainer, "critic")._optimizer.state
    next(iter(state.values()))["exp_avg_sq"].view(-1)[0] = torch.inf
    with pytest.raises(NotFiniteError, match="optimizer states of critic are not finite after step 1"):
        check_finite(trainer)


def test_a_number_that_is_not_finite_is_found_wherever_it_is():
    good = torch.tensor([[3e38, -3e38], [0.0, 1e-40]])
    assert all_finite([good, torch.ones(0), torch.ones(2, dtype=torch.bfloat16)])
    for bad in (torch.nan, torch.inf, -torch.inf):
        wrong = good.clone()
        wrong[1, 0] = bad
        assert not all_finite([good, wrong])


def test_advice_fits_the_precision_and_the_clipping():
    clipped, free = OptimizerConfig(lr=1e-3), OptimizerConfig(lr=1e-3, max_grad_norm=1e9)
    assert not_finite_advice("fp32", clipped) == not_finite_advice("bf16", clipped)
    assert not_finite_advice("fp32", clipped) == "lower optimizer.lr (0.001 now)"
    assert not_finite_advice("fp32", free).endswith(", or set optimizer.max_grad_norm=1 (1e+09 now)")
    assert not_finite_advice("fp16").startswith("use policy.precision=bf16 or fp32")


def test_a_step_that_skipped_all_updates_of_a_model_has_learned_nothing():
    assert has_learned({"skipped_updates": 0.0, "grad_norm": 1.0}) and has_learned({"loss": 1.0})
    assert has_learned({"skipped_updates": 1.0, "grad_norm": 1.0})
    assert not has_learned({"skipped_updates": 1.0, "loss": 1.0})
    assert not has_learned({"critic/skipped_updates": 2.0, "skipped_updates": 0.0, "grad_norm": 1.0})


def test_bytes_of_a_checkpoint_are_those_that_are_written(tmp_path):
    engine = local_engine()
    estimated = engine.checkpoint_bytes()
    assert estimated == 3 * 4 * sum(p.numel() for p in engine.model.parameters())
    engine.export(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert 0 <= written - engine.model_bytes() < 10_000
