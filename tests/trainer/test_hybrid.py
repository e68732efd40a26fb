"""Runs whose policy trains in one layout and generates in another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training import CHARACTERS, logged, toy_config, toy_trainer
from verl.config.placement import ParallelConfig
from verl.config.roles import RoleConfig
from verl.controller.worker_group import WorkerError
from verl.engines.fsdp import sharded_engine
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.build.worker_factories import engine_maker
from verl.trainer.rl_trainer import Trainer

RUN = ["steps=4", "sampling.max_tokens=6", "policy.optimizer.eps=1e-4", "checkpoint.every_steps=1"]
SPREAD = ["placement.address=local", "hybrid_engine.actor_repartition={enabled: true, tensor: 2}"]
KEYS = ("reward", "loss", "kl", "grad_norm", "response_tokens")


@pytest.fixture(scope="module")
def alone(letters, tmp_path_factory) -> list[dict]:
    trainer = toy_trainer("grpo", letters, tmp_path_factory.mktemp("alone"), *RUN)
    return trainer.fit()


def learned(lines: list[dict]) -> list[dict]:
    return [{key: line[key] for key in KEYS} for line in lines]


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    for our, their in zip(learned(ours), learned(theirs), strict=True):
        assert our == pytest.approx(their, rel=2e-4, abs=1e-5)


@pytest.mark.ray
def test_four_shards_that_generate_in_pairs_learn_what_one_process_does(alone, letters, tmp_path):
    trainer = toy_trainer(
        "grpo", letters, tmp_path, *RUN, *SPREAD, "placement={name: colocated, devices: [4]}"
    )
    try:
        assert_same(trainer.fit(), alone)
    finally:
        trainer.close()
    lines = logged(tmp_path / "run")
    assert all(line["hybrid/received_bytes"] > 0 and line["time/reshard_s"] > 0 for line in lines)


@pytest.mark.ray
def test_two_stages_of_two_tensor_ranks_on_megatron_learn_it_too_and_go_on_from_their_checkpoint(tmp_path):
    pytest.importorskip("megatron.core")
    placement = (
        "placement={name: colocated, devices: [4], policy: {tensor: 2, pipeline: 2, engine: megatron}}"
    )
    lines = []
    for steps in (2, 4):
        trainer = toy_trainer("grpo", deep(tmp_path), tmp_path, *RUN, *SPREAD, placement, f"steps={steps}")
        try:
            lines += trainer.fit()
        finally:
            trainer.close()
    expected = toy_trainer("grpo", deep(tmp_path), tmp_path / "alone", *RUN).fit()
    assert_same(lines, expected)
    assert all(line["hybrid/received_bytes"] > 0 for line in lines)


def deep(folder: Path) -> Path:
    """A model of two layers, one for each stage."""
    if not (folder / "deep").exists():
        make_tiny_model(folder / "deep", hidden=64, layers=2, characters=CHARACTERS)
    return folder / "deep"


@pytest.mark.ray
def test_a_rank_that_dies_in_the_middle_of_a_switch_is_named_and_the_run_goes_on_from_its_checkpoint(
    alone, letters, tmp_path
):
    when = tmp_path / "when"
    when.touch()
    policy = f"policy: {{engine: {{name: 'tests.trainer.dying:engine', when: {when}}}}}"
    placement = f"placement={{name: colocated, devices: [4], hang_limit_s: 20, {policy}}}"
    trainer = toy_trainer("grpo", letters, tmp_path, *RUN, *SPREAD, placement)
    try:
        with pytest.raises(WorkerError, match=r"rank 2 of pool .* died in policy\.(generate|is_saved)"):
            trainer.fit()
    finally:
        trainer.close()
    when.unlink()
    again = toy_trainer("grpo", letters, tmp_path, *RUN, *SPREAD, placement)
    try:
        # The checkpoint of the second step may have been on its way to the disk.
        lines = again.fit()
        assert len(lines) in (2, 3)
        assert_same(lines, alone[-len(lines) :])
        assert again.version == 4
    finally:
        again.close()


def test_the_yaml_of_the_founding_documents_needs_one_device_only(letters, tmp_path):
    mapping = "strategy_mapping: {rollout: tensor_parallel, training: fsdp}"
    given = f"hybrid_engine={{actor_repartition: {{enabled: true, {mapping}, communication_overlap: true}}}}"
    trainer = toy_trainer("grpo", letters, tmp_path, *RUN, given)
    plain = toy_trainer("grpo", letters, tmp_path / "plain", *RUN)
    # One layout: the weights are shared, and nothing travels.
    assert "hybrid/received_bytes" not in trainer.step()
    assert trainer.groups.policy.worker._hybrid is None
    plain.step()
    assert trainer.step()["loss"] == plain.step()["loss"]


def test_engines_that_are_not_there_and_sizes_that_one_does_not_have_are_refused(letters, tmp_path):
    with pytest.raises(
        ValueError,
        match="need placement=colocated, split or standalone for strategy_mapping.training=megatron",
    ):
        Trainer(
            toy_config(
                "grpo",
                letters,
                tmp_path,
                "hybrid_engine.actor_repartition={enabled: true, strategy_mapping: {training: megatron}}",
            )
        )
    with pytest.raises(
        ValueError, match="need an engine of fsdp, megatron, or package.module:function, got 'nothing'"
    ):
        engine_maker("nothing")
    for settings in ({"pipeline": 2}, {"engine": {"name": "fsdp", "speed": 3}}):
        with pytest.raises(ValueError, match="need pipeline=1 and no options for the engine fsdp"):
            parallel = ParallelConfig(**settings)
            sharded_engine(
                str(letters), "policy", RoleConfig(), parallel, device=torch.device("cpu"), total_updates=None
            )
