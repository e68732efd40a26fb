"""A checkpoint as a model for everyone: the trained weights, LoRA merged, and all files beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.trainer.test_reward_model import reward_trainer
from tests.training import engine_of, toy_trainer
from verl.cli.main import main
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.export import export_checkpoint
from verl.utils.tokens import TextCodec

IDS = torch.tensor([[4, 5, 6, 12]])


@pytest.mark.parametrize(
    "overrides", [[], ["policy.lora.rank=4", "policy.optimizer.lr=0.01"]], ids=["weights", "low rank"]
)
def test_the_policy_of_the_last_checkpoint_is_the_model_of_the_run(overrides, letters, tmp_path):
    toy_trainer("grpo", letters, tmp_path, "steps=2", *overrides).fit()
    assert main(["export", str(tmp_path / "run/checkpoints/step-00000002"), str(tmp_path / "exported")]) == 0
    models = [
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (tmp_path / "run/model", tmp_path / "exported", letters)
    ]
    own, exported, start = (model(IDS).logits for model in models)
    torch.testing.assert_close(exported, own, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(exported, start, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("abc=")["input_ids"] == [4, 5, 6, 12]


def test_an_adapter_alone_is_exported_for_the_base_that_it_was_trained_on(letters, tmp_path, capsys):
    settings = ["steps=2", "policy.lora.rank=4", "policy.optimizer.lr=0.01"]
    toy_trainer("grpo", letters, tmp_path / "lora", *settings).fit()
    out = tmp_path / "exported"
    assert main(["export", str(tmp_path / "lora/run"), str(out), "--adapter-only"]) == 0
    assert (out / "adapter_model.safetensors").exists() and not list(out.glob("model*.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(letters)
    start = base(IDS).logits
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "lora/run/model")(IDS).logits
    adapted = peft.PeftModel.from_pretrained(base, out)(IDS).logits
    torch.testing.assert_close(adapted, trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, start, atol=1e-4)
    toy_trainer("grpo", letters, tmp_path / "all", "steps=1").fit()
    assert main(["export", str(tmp_path / "all/run"), str(tmp_path / "none"), "--adapter-only"]) == 2
    assert "need a LoRA adapter" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("overrides", [[], ["policy.lora.rank=4"]], ids=["weights", "low rank"])
def test_a_reward_model_learns_its_head_and_is_exported_with_it(overrides, letters, tmp_path):
    trainer = reward_trainer(letters, tmp_path, "steps=2", *overrides)
    trainer.fit()
    export_checkpoint(tmp_path / "run/checkpoints/step-00000002", tmp_path / "exported")
    folders = (tmp_path / "run/model", tmp_path / "exported")
    own, exported = (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1) for folder in folders
    )
    assert own.score.weight.any()
    trained = trainer.reward_model.transformer(IDS).logits
    for model in (own, exported):
        torch.testing.assert_close(model(IDS).logits, trained, rtol=1e-5, atol=1e-5)
        assert model.config.dtype == torch.float32
    assert "Reward model trained from" in (tmp_path / "exported/README.md").read_text()


@pytest.fixture(scope="module")
def ppo(letters, tmp_path_factory):
    """A finished run of PPO from a model whose end tokens and temperature stand in its generation config."""
    folder = tmp_path_factory.mktemp("ppo")
    base = folder / "base"
    make_tiny_model(base, hidden=32, layers=1, characters="abcdefgh=")
    config = {"eos_token_id": [1, 7], "temperature": 0.6, "do_sample": False}
    (base / "generation_config.json").write_text(json.dumps(config))
    trainer = toy_trainer(
        "ppo", base, folder, "steps=2", "evaluation.every_steps=1", "critic.optimizer.lr=0.01"
    )
    trainer.fit()
    return trainer, folder


def test_end_tokens_of_the_generation_config_alone_are_in_every_written_model(ppo):
    trainer, folder = ppo
    export_checkpoint(folder / "run", folder / "policy")
    for written in (folder / "run/model", folder / "policy"):
        assert TextCodec.load(str(written)).stop_ids == trainer.codec.stop_ids == (1, 7)
        kept = json.loads((written / "generation_config.json").read_text())
        assert kept == json.loads((folder / "base/generation_config.json").read_text())
        assert AutoTokenizer.from_pretrained(written).chat_template == trainer.codec.tokenizer.chat_template
        model = AutoModelForCausalLM.from_pretrained(written)
        expected = engine_of(trainer).model.transformer(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_critic_is_a_transformer_and_a_head_beside_it(ppo, capsys):
    trainer, folder = ppo
    assert main(["export", str(folder / "run"), str(folder / "critic"), "--role", "critic"]) == 0
    assert "(critic of " in capsys.readouterr().out
    model = engine_of(trainer, "critic").model
    head = load_file(folder / "critic/value_head.safetensors")
    states = AutoModel.from_pretrained(folder / "critic")(IDS).last_hidden_state
    expected = model.head(model.transformer(IDS).last_hidden_state)
    assert expected.any()
    torch.testing.assert_close(states @ head["weight"].T + head["bias"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overrides", [[], ["policy.lora.rank=4"]], ids=["weights", "low rank"])
def test_the_type_of_the_weights_and_the_size_of_the_files_are_chosen(overrides, letters, tmp_path):
    toy_trainer("grpo", letters, tmp_path, "steps=1", *overrides).fit()
    options = ["--dtype", "bf16", "--max-shard-size", "10KB"]
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "bf16"), *options]) == 0
    files = sorted((tmp_path / "bf16").glob("*.safetensors"))
    assert len(files) > 1 and all(file.stat().st_size < 14_000 for file in files)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert written.dtype == written.config.dtype == torch.bfloat16
    torch.testing.assert_close(written(IDS).logits.float(), own(IDS).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_of_a_run_and_of_an_export_has_the_permissions_of_the_umask(umask, letters, tmp_path):
    before = os.umask(umask)
    try:
        toy_trainer("ppo", letters, tmp_path, "steps=1").fit()
        export_checkpoint(tmp_path / "run", tmp_path / "exported", role="critic")
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in written} == {
        path.name: oct(0o666 & ~umask) for path in written
    }


def test_a_closing_token_of_the_chat_template_becomes_an_end_token(letters, tmp_path):
    template = (
        "{% for m in messages %}{{ m['content'] }}{{ '<bos>' if m['role'] == 'assistant' }}{% endfor %}"
    )
    trainer = toy_trainer("grpo", letters, tmp_path, "steps=1", f"data.chat_template={json.dumps(template)}")
    closing = trainer.codec.tokenizer.bos_token_id
    assert trainer.codec.closing_ids == [closing]
    trainer.fit()
    export_checkpoint(tmp_path / "run", tmp_path / "exported")
    for written in (tmp_path / "run/model", tmp_path / "exported"):
        assert closing in AutoModelForCausalLM.from_pretrained(written).generation_config.eos_token_id
        assert AutoTokenizer.from_pretrained(written).chat_template == template


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "exported")]) == 2
    assert "is not a checkpoint: it has no state.pt" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not a checkpoint"):
        export_checkpoint(tmp_path, tmp_path / "exported")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="need a complete checkpoint in .*checkpoints, found none"):
        export_checkpoint(tmp_path, tmp_path / "exported")


def test_a_model_that_is_not_in_the_checkpoint_is_refused(letters, tmp_path):
    toy_trainer("grpo", letters, tmp_path, "steps=1").fit()
    with pytest.raises(ValueError, match="need a checkpoint with a critic, but .* has policy alone"):
        export_checkpoint(tmp_path / "run", tmp_path / "exported", role="critic")
    assert not Path(tmp_path / "exported").exists()
