"""Checkpoints of models on one device: restored values and storage, and refused folders."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_policy, tiny_transformer
from tests.training import local_engine, rows_to_learn
from verl.config.roles import LoraConfig, RoleConfig
from verl.engines.dcp_checkpoint import read_saved
from verl.engines.hf.pretrained import value_model
from verl.engines.local import LocalEngine

WHOLE = [list(range(6))]


def engine_on(model) -> LocalEngine:
    return LocalEngine(model, RoleConfig(), device=torch.device("cpu"), total_updates=10)


def likely(engine):
    return lambda rows, inputs: (
        -engine.model.token_logprobs(inputs, temperature=1.0, chunk=100)[0].mean(),
        {},
    )


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "llama"])
def test_a_policy_is_restored_in_place_tied_or_not(family, tmp_path):
    first, other = engine_on(tiny_policy(family)), engine_on(tiny_policy(family, seed=1))
    first.save(tmp_path)()
    places = [p.data_ptr() for p in other.model.parameters()]
    other.load(tmp_path)
    assert [p.data_ptr() for p in other.model.parameters()] == places
    assert all(
        torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True)
    )


def test_a_value_model_is_restored_with_its_head(tmp_path):
    first, other = (engine_on(value_model(tiny_transformer(seed=seed), "fp32")) for seed in (0, 1))
    torch.nn.init.normal_(first.model.head.weight)
    first.save(tmp_path)()
    other.load(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny_policy(num_hidden_layers=3),
        lambda: tiny_policy(intermediate_size=96),
        lambda: tiny_policy("llama"),
        lambda: value_model(tiny_transformer(), "fp32"),
    ],
    ids=["layers", "width", "family", "value"],
)
def test_weights_of_another_model_are_not_restored(other, tmp_path):
    engine_on(other()).save(tmp_path)()
    engine = engine_on(tiny_policy())
    before = [p.detach().clone() for p in engine.model.parameters()]
    with pytest.raises(ValueError, match="is of another model .*; start with `checkpoint.resume=never`"):
        engine.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


def test_an_optimizer_that_has_not_stepped_is_saved_as_such_and_left_alone(tmp_path):
    engine = local_engine()
    engine.save(tmp_path)()
    assert not engine._optimizer.state and not [
        name for name in read_saved(tmp_path) if name.startswith("optimizer.")
    ]
    stepped = local_engine()
    stepped.update(rows_to_learn(), WHOLE, likely(stepped))
    stepped.load(tmp_path)
    updates = [e.update(rows_to_learn(), WHOLE, likely(e)) for e in (engine, stepped)]
    assert updates[0] == updates[1]


def test_training_that_goes_on_does_not_change_what_is_being_saved(tmp_path):
    engine = local_engine(optimizer={"lr": 0.1})
    before = {f"model.{name}": p.detach().clone() for name, p in engine.model.named_parameters()}
    wait = engine.save(tmp_path)
    engine.update(rows_to_learn(), WHOLE, likely(engine))
    wait()
    saved = read_saved(tmp_path)
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())


def test_of_a_lora_run_only_the_adapter_is_saved_and_it_comes_back(tmp_path):
    first, other = (local_engine(lora=LoraConfig(rank=2)) for _ in range(2))
    for _ in range(2):
        first.update(rows_to_learn(), WHOLE, likely(first))
    first.save(tmp_path)()
    assert all(".lora_" in name for name in read_saved(tmp_path))
    other.load(tmp_path)
    updates = [e.update(rows_to_learn(), WHOLE, likely(e)) for e in (first, other)]
    assert updates[0] == updates[1]


class Payload:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return Path.write_text, (Path("/tmp/verl-was-here"), "")


def test_metadata_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    engine = local_engine()
    engine.save(tmp_path)()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="does not belong into the metadata of a checkpoint"):
        engine.load(tmp_path)
    assert not Path("/tmp/verl-was-here").exists()


@pytest.mark.parametrize("damage", ["no metadata", "no tensors", "torn"])
def test_a_broken_checkpoint_is_said_to_be_one(damage, tmp_path):
    engine = local_engine()
    engine.save(tmp_path)()
    (tensors,) = tmp_path.glob("*.distcp")
    if damage == "no metadata":
        (tmp_path / ".metadata").unlink()
    elif damage == "no tensors":
        tensors.unlink()
    else:
        tensors.write_bytes(tensors.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"(cannot be read|is broken).*checkpoint.resume=never"):
        engine.load(tmp_path)
