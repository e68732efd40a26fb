"""Hugging Face folders in and out: several files, merged LoRA weights, other names, refused models."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_policy, tiny_transformer
from tests.training import local_engine
from verl.config.roles import LoraConfig
from verl.engines.hf.hf_io import export_model, load_sharded, model_folder
from verl.engines.hf.meta_init import empty_transformer
from verl.engines.hf.models import PolicyModel, RewardModel
from verl.engines.hf.pretrained import as_reward_model, value_model

IDS = torch.tensor([[5, 6, 7, 8]])


def emptied(folder) -> PolicyModel:
    """A policy of the folder's configuration, with memory and nothing in it."""
    model = PolicyModel(empty_transformer(folder, AutoModelForCausalLM), "fp32")
    model._apply(lambda t: torch.full_like(t, torch.nan, device="cpu") if t.is_meta else t)
    model.transformer.tie_weights()
    return model


@pytest.mark.parametrize("family", ["qwen2", "qwen2_untied_mha", "gemma3", "llama"])
@pytest.mark.parametrize("max_file_bytes", [2**30, 20_000], ids=["one file", "many files"])
def test_what_was_exported_is_loaded_slice_by_slice_and_by_transformers(family, max_file_bytes, tmp_path):
    policy = tiny_policy(family)
    export_model(policy, tmp_path, max_file_bytes=max_file_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_file_bytes < 2**30)
    expected = policy.transformer(IDS).logits
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected, rtol=1e-5, atol=1e-5
    )
    model = emptied(tmp_path)
    load_sharded(model, str(tmp_path))
    torch.testing.assert_close(model.transformer.eval()(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_families_whose_files_have_other_names_are_loaded_too(tmp_path):
    policy = tiny_policy("mixtral")
    policy.transformer.save_pretrained(tmp_path)
    model = emptied(tmp_path)
    load_sharded(model, str(tmp_path))
    torch.testing.assert_close(
        model.transformer(IDS).logits, policy.transformer(IDS).logits, rtol=1e-5, atol=1e-5
    )


def test_merged_lora_weights_are_the_model_that_was_trained(tmp_path):
    engine = local_engine(lora=LoraConfig(rank=4))
    for name, parameter in engine.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained = engine.model.transformer(IDS).logits
    engine.export(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-5)
    with engine.disable_adapter():
        start = engine.model.transformer(IDS).logits
    torch.testing.assert_close(start, local_engine().model.transformer(IDS).logits)
    assert not torch.allclose(start, merged, atol=1e-2)
    torch.testing.assert_close(engine.model.transformer(IDS).logits, trained)


def test_only_lora_weights_are_trained_and_at_first_they_change_nothing():
    engine = local_engine(lora=LoraConfig(rank=4, targets=("q_proj", "down_proj")))
    trained = {name for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all(".lora_" in name for name in trained)
    torch.testing.assert_close(
        engine.model.transformer(IDS).logits, local_engine().model.transformer(IDS).logits
    )


def test_lora_adapters_of_matrices_that_are_not_there_are_refused():
    with pytest.raises(
        ValueError, match=r"need names of matrices in lora.targets, got \['query'\]; this model has .*q_proj"
    ):
        local_engine(lora=LoraConfig(rank=4, targets=("query",)))
    with (
        pytest.raises(ValueError, match="need a LoRA adapter to switch off"),
        local_engine().disable_adapter(),
    ):
        pass


def test_value_and_reward_models_are_loaded_with_their_heads(tmp_path):
    critic = value_model(tiny_transformer(), "fp32")
    torch.nn.init.normal_(critic.head.weight)
    export_model(critic, tmp_path / "critic")
    other = value_model(tiny_transformer(seed=1), "fp32")
    load_sharded(other, str(tmp_path / "critic"))
    assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), other.parameters(), strict=True))
    judge = RewardModel(as_reward_model(tiny_transformer()), "fp32")
    torch.nn.init.normal_(judge.transformer.score.weight)
    export_model(judge, tmp_path / "judge")
    second = RewardModel(as_reward_model(tiny_transformer(seed=1)), "fp32")
    load_sharded(second, str(tmp_path / "judge"))
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), second.parameters(), strict=True))


def test_a_critic_from_a_language_model_begins_with_a_head_of_zeros(tmp_path):
    tiny_transformer(seed=2).save_pretrained(tmp_path)
    critic = value_model(tiny_transformer(), "fp32")
    torch.nn.init.normal_(critic.head.weight)
    load_sharded(critic, str(tmp_path))
    assert not critic.head.weight.any()


def test_tensors_of_another_shape_and_folders_without_any_are_refused(tmp_path):
    tiny_policy().transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ValueError, match="config.json is of another model"):
        load_sharded(emptied(tmp_path), str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="need model.safetensors or"):
        load_sharded(emptied(tmp_path), str(tmp_path))
    with pytest.raises(ValueError, match="cannot load a model from .*: there is no such folder"):
        model_folder("./nowhere/at/all")
