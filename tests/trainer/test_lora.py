"""Runs with LoRA: adapters that a run starts from, what it writes, and several adapters on one base."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import peft
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training import engine_of, toy_config, toy_trainer
from verl.config import load_run
from verl.config.loader import ConfigError
from verl.config.run import PreferenceConfig
from verl.engines.hf.pretrained import load_language_model
from verl.trainer.export.exporting import export_checkpoint
from verl.trainer.preference import PreferenceTrainer
from verl.trainer.rl_trainer import Trainer

IDS = torch.tensor([[4, 5, 6, 12]])
BOTH = ["policy.lora.rank=4", "critic.lora.rank=4", "policy.optimizer.lr=0.01", "critic.optimizer.lr=0.01"]
STILL = ["policy.optimizer.lr=1e-12", "steps=1"]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def read(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture(scope="module")
def adapter(letters, tmp_path_factory) -> Path:
    """A folder with an adapter of PEFT's own and no tokenizer."""
    folder = tmp_path_factory.mktemp("adapter")
    options = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(letters), options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(letters, adapter) -> torch.Tensor:
    """Logits of the model with that adapter."""
    return logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(letters), adapter))


@pytest.mark.parametrize("lora", [[], ["policy.lora.rank=4"]], ids=["all weights", "new adapter"])
def test_an_adapter_as_policy_is_merged_and_written_as_one_model(lora, adapter, adapted, tmp_path):
    trainer = toy_trainer("grpo", adapter, tmp_path, *STILL, *lora)
    assert any("is merged into its base" in note for note in trainer.notes)
    assert sum("no folder `adapter` is written" in note for note in trainer.notes) == len(lora)
    trainer.fit()
    torch.testing.assert_close(read(tmp_path / "run/model"), adapted, rtol=0, atol=1e-4)
    assert not (tmp_path / "run/adapter").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "run/model")("abc=")["input_ids"] == IDS[0].tolist()


@pytest.mark.parametrize("overrides", [[], ["policy.path=null"]], ids=["base given", "base of the adapter"])
def test_an_adapter_is_trained_further_and_written_again(overrides, letters, adapter, adapted, tmp_path):
    trainer = toy_trainer(
        "grpo", letters, tmp_path, f"policy.lora.path={adapter}", "policy.optimizer.lr=0.01", *overrides
    )
    engine = engine_of(trainer)
    torch.testing.assert_close(logits(engine.model.transformer), adapted)
    with engine.as_reference():  # the policy as it was at the start, not its base
        torch.testing.assert_close(logits(engine.model.transformer), adapted)
    trainer.fit()
    trained = logits(engine.model.transformer)
    assert not torch.allclose(trained, adapted, atol=1e-3)
    with engine.as_reference():
        torch.testing.assert_close(logits(engine.model.transformer), adapted)
    export_checkpoint(tmp_path / "run", tmp_path / "exported")
    for folder in (tmp_path / "run/adapter", tmp_path / "exported/adapter"):
        base = AutoModelForCausalLM.from_pretrained(letters)
        again = peft.PeftModel.from_pretrained(base, folder)
        torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-4)
        assert AutoTokenizer.from_pretrained(folder)("abc=")["input_ids"] == IDS[0].tolist()


def test_the_additions_on_the_head_of_tied_embeddings_are_in_the_written_model(letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path, *BOTH[::2], "policy.lora.targets=[lm_head]")
    trainer.fit()
    trained = logits(engine_of(trainer).model.transformer)
    torch.testing.assert_close(read(tmp_path / "run/model"), trained, rtol=0, atol=1e-4)
    assert not torch.allclose(trained, read(letters), atol=1e-3)


def test_an_adapter_that_is_its_own_base_and_weights_in_4_bits_are_refused(letters, adapter, tmp_path):
    for overrides, problem in (
        ([f"policy.path={adapter}", f"policy.lora.path={adapter}"], "would be added twice"),
        (["policy.lora.path=nothing"], "need a folder or hub name with adapter_config.json"),
        (["policy.lora.rank=2", "policy.lora.quantize=4bit"], "need .*for lora.quantize=4bit"),
    ):
        with pytest.raises(ValueError, match=problem):
            toy_trainer("grpo", letters, tmp_path, *overrides)
    with pytest.raises(ConfigError, match="one process that trains and generates"):
        toy_config(
            "grpo",
            letters,
            tmp_path,
            "policy.lora.rank=2",
            "policy.lora.quantize=4bit",
            "placement=colocated",
        )


@pytest.fixture(scope="module")
def shared(letters, tmp_path_factory) -> Trainer:
    """A run of a policy and a critic on one base, after its steps."""
    trainer = toy_trainer("ppo", letters, tmp_path_factory.mktemp("shared"), *BOTH, "steps=2")
    trainer.fit()
    return trainer


def storages(*engines) -> set[int]:
    return {p.data_ptr() for engine in engines for p in engine.model.transformer.parameters()}


def test_policy_and_critic_are_two_adapters_on_one_base(shared, letters):
    policy, critic = engine_of(shared), engine_of(shared, "critic")
    num_weights = len(list(load_language_model(str(letters)).parameters()))
    num_adapters = 2 * 2 * 7
    assert len(storages(policy, critic)) == num_weights + num_adapters
    own = [{id(p) for p in engine.trained} for engine in (policy, critic)]
    assert not own[0] & own[1] and [len(ids) for ids in own] == [14, 16]


def test_a_shared_base_learns_what_two_copies_learn(shared, letters, tmp_path):
    shutil.copytree(letters, tmp_path / "copy")
    apart = toy_trainer("ppo", letters, tmp_path, *BOTH, "steps=2", f"critic.path={tmp_path / 'copy'}")
    apart.fit()
    for role in ("policy", "critic"):
        one, other = (engine_of(trainer, role) for trainer in (shared, apart))
        for ours, theirs in zip(one.trained, other.trained, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not storages(engine_of(apart)) & storages(engine_of(apart, "critic"))


def test_an_update_of_one_role_leaves_the_other_and_the_base_as_they_are(shared):
    policy, critic = engine_of(shared), engine_of(shared, "critic")
    before = {id(p): p.detach().clone() for e in (policy, critic) for p in e.model.parameters()}
    rows = shared.collect_data(shared.loader.prompts[:8]).rows
    shared.roles.write_columns(rows)
    values = rows["values"].clone()
    critic.discard()
    with torch.no_grad():
        for p in policy.trained:
            p.add_(1.0)
    shared.roles.write_columns(rows)  # the critic's values do not see the policy's adapter
    torch.testing.assert_close(rows["values"], values)
    with torch.no_grad():
        for p in policy.trained:
            p.copy_(before[id(p)])
    assert all(torch.equal(p, before[id(p)]) for e in (policy, critic) for p in e.model.parameters())


def test_the_checkpoint_of_a_shared_base_goes_into_two_copies(shared, letters, tmp_path):
    shutil.copytree(letters, tmp_path / "copy")
    newest = shared.run_folder / "checkpoints/step-00000002" if shared.run_folder else None
    folder = newest or Path(shared.config.output_dir) / "checkpoints/step-00000002"
    apart = toy_trainer("ppo", letters, tmp_path, *BOTH, f"critic.path={tmp_path / 'copy'}")
    apart.models.load(folder)
    for role in ("policy", "critic"):
        for ours, theirs in zip(engine_of(shared, role).trained, engine_of(apart, role).trained, strict=True):
            assert torch.equal(ours, theirs)


def test_a_reference_on_the_same_base_is_a_third_adapter(letters, adapter, adapted, tmp_path):
    trainer = toy_trainer(
        "grpo", letters, tmp_path, "policy.lora.rank=4", f"reference={adapter}", "algorithm.kl.where=loss"
    )
    assert trainer.groups.reference is None
    engine = engine_of(trainer)
    start = logits(engine.model.transformer)
    with engine.as_reference():
        torch.testing.assert_close(logits(engine.model.transformer), adapted)
    torch.testing.assert_close(logits(engine.model.transformer), start)
    assert len(engine.trained) == 14
    trainer.fit()


def test_preferences_are_learned_beside_a_reference_without_a_copy(letters, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "ab=", "chosen": "ab", "rejected": "ba"}\n' * 4)
    overrides = [f"policy.path={letters}", f"data.train={pairs}", "policy.lora.rank=4", "device=cpu"]
    sizes = ["pairs_per_step=4", "steps=2", "tracking.sinks=[jsonl]", f"output_dir={tmp_path / 'run'}"]
    config = load_run(PreferenceConfig, None, [*overrides, *sizes, "policy.optimizer.lr=0.01"])
    trainer = PreferenceTrainer(config, console=Console(file=io.StringIO()))
    assert storages(trainer.reference) == storages(trainer.policy_engine)
    history = trainer.fit()
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and history[1]["loss"] < 0.69
