"""A checkpoint as a model for everyone: the same weights as the run's own, additions merged, tokenizer
beside.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.trainer.test_reward_model import reward_trainer
from tests.training import toy_trainer
from verl.cli.main import main
from verl.trainer.export import export_checkpoint


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
    ids = torch.tensor([[4, 5, 6, 12]])
    own, exported, start = (model(ids).logits for model in models)
    torch.testing.assert_close(exported, own, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(exported, start, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("abc=")["input_ids"] == [4, 5, 6, 12]


@pytest.mark.parametrize("overrides", [[], ["policy.lora.rank=4"]], ids=["weights", "low rank"])
def test_a_reward_model_learns_its_head_and_is_exported_with_it(overrides, letters, tmp_path):
    reward_trainer(letters, tmp_path, "steps=2", *overrides).fit()
    export_checkpoint(tmp_path / "run/checkpoints/step-00000002", tmp_path / "exported")
    folders = (tmp_path / "run/model", tmp_path / "exported")
    own, exported = (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1) for folder in folders
    )
    assert own.score.weight.any()
    ids = torch.tensor([[4, 5, 6, 12]])
    torch.testing.assert_close(exported(ids).logits, own(ids).logits, rtol=1e-6, atol=1e-6)


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "exported")]) == 2
    assert "is not a checkpoint: it has no state.pt" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not a checkpoint"):
        export_checkpoint(tmp_path, tmp_path / "exported")
