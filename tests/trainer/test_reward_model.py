"""Training reward models: scores are those of Transformers, the loss is that of the pairs of a step, whole
runs.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.tiny import FAMILIES, tiny_codec, tiny_transformer
from tests.trainer.test_preference import PAIRS, write_pairs
from tests.training import gradient, logged, weights
from verl.config import load_run, load_sft_config
from verl.config.run import RewardModelConfig
from verl.data.batch import ModelInput
from verl.engines.dcp_checkpoint import read_saved
from verl.engines.hf.attention import use_attention
from verl.engines.hf.models import RewardModel
from verl.engines.hf.pretrained import as_reward_model, load_reward_model
from verl.rewards.model_scoring import last_scores, rows_to_score
from verl.trainer.reward_model import RewardModelTrainer
from verl.trainer.sft import SFTTrainer
from verl.utils.sampling_types import Prompt


def reward_trainer(model: Path, folder: Path, *overrides: str, **given) -> RewardModelTrainer:
    """A small run on `write_pairs`."""
    data = write_pairs(folder / "pairs.jsonl")
    paths = [
        f"policy.path={model}",
        f"output_dir={folder / 'run'}",
        "device=cpu",
        "tracking.sinks=[jsonl]",
        f"data.train={data}",
    ]
    toy = ["pairs_per_step=6", "steps=3", "policy.optimizer.lr=3e-3", "policy.optimizer.max_grad_norm=1e9"]
    return RewardModelTrainer(
        load_run(RewardModelConfig, None, [*paths, *toy, *overrides]),
        console=Console(file=io.StringIO()),
        **given,
    )


def with_head(trainer: RewardModelTrainer) -> RewardModelTrainer:
    """The same with a head that says something, so that gradients reach all weights."""
    torch.nn.init.normal_(
        trainer.reward_model.transformer.score.weight, generator=torch.Generator().manual_seed(0)
    )
    return trainer


def scored(model: RewardModel, prompts, answers, *, packed: bool):
    rows = rows_to_score(prompts, answers, codec=tiny_codec(), pad_id=model.pad_id)
    with torch.no_grad(), model.forward_mode():
        scores = model.token_scores(ModelInput.from_batch(rows, packed=packed, device=torch.device("cpu")))
    return scores[rows.response_lengths.cumsum(0) - 1]


@pytest.mark.parametrize("pad_id", [0, 1], ids=["own pad", "pad is the end"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen2_untied_mha"])
def test_scores_are_those_of_transformers_own_forward_pass(family, packed, pad_id):
    transformer = as_reward_model(tiny_transformer(family)).eval()
    torch.nn.init.normal_(transformer.score.weight, generator=torch.Generator().manual_seed(0))
    transformer.config.pad_token_id = pad_id
    prompts = [Prompt("12+34="), Prompt("12+34="), Prompt("a rather long question?"), Prompt("x")]
    answers = ["46", "a longer answer", "no", "yes"]
    ours = scored(RewardModel(transformer, "fp32"), prompts, answers, packed=packed)
    codec = tiny_codec()
    rows = [codec.encode_prompt(p) + codec.encode_answer(a) for p, a in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
    # Eager is the family's definition, as for `check_forward`.
    with torch.no_grad(), use_attention(transformer, "eager"):
        own = transformer(
            ids, attention_mask=(torch.arange(longest) < torch.tensor([len(r) for r in rows])[:, None]).long()
        ).logits
    torch.testing.assert_close(ours, own.squeeze(1), atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.1


@pytest.mark.parametrize(
    "split", ["policy.packing=true", "policy.packing=false", "policy.micro_batch_rows=2"]
)
def test_the_loss_of_a_step_is_the_mean_over_its_pairs(split, letters, tmp_path):
    trainer = with_head(reward_trainer(letters, tmp_path, split, "loss.center_coef=0.01"))
    own = AutoModelForSequenceClassification.from_pretrained(letters, num_labels=1)
    own.load_state_dict(trainer.reward_model.transformer.state_dict())
    rows = [
        [
            trainer.codec.encode_prompt(p) + trainer.codec.encode_answer(a)
            for p in PAIRS
            for a in (p.answer[side],)
        ]
        for side in (0, 1)
    ]
    chosen, rejected = (torch.stack([own(torch.tensor([row])).logits[0, 0] for row in side]) for side in rows)
    loss = (torch.log1p(torch.exp(rejected - chosen)) + 0.01 * (chosen + rejected) ** 2).mean()
    loss.backward()
    metrics = trainer.learn(PAIRS)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert metrics["tokens"] == 2 * 17 + 39 and metrics["response_tokens"] == 3.9
    torch.testing.assert_close(
        gradient(trainer.policy_engine),
        torch.cat([p.grad.flatten() for p in own.parameters()]),
        rtol=1e-3,
        atol=1e-5,
    )


def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(letters, tmp_path):
    gradients = []
    for split in ("policy.micro_batch_rows=100", "policy.micro_batch_rows=2", "policy.micro_batch_tokens=40"):
        trainer = with_head(reward_trainer(letters, tmp_path, split))
        trainer.learn(PAIRS)
        gradients.append(gradient(trainer.policy_engine).double())
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


def test_a_new_head_knows_nothing_and_the_rest_is_the_language_model(letters, tmp_path):
    for given in (letters, AutoModelForCausalLM.from_pretrained(letters)):
        trainer = reward_trainer(letters, tmp_path, actor_model=given if given is not letters else None)
        assert not trainer.reward_model.transformer.score.weight.any()
        own = AutoModelForCausalLM.from_pretrained(letters).model.state_dict()
        assert all(
            torch.equal(own[name], value)
            for name, value in trainer.reward_model.transformer.model.state_dict().items()
        )
        assert trainer.learn(PAIRS)["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_the_loss_falls_and_held_out_pairs_are_told_apart(letters, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 40)
    trainer = reward_trainer(
        letters, tmp_path, "steps=60", f"data.test={data}", "eval_every_steps=25", "pairs_per_step=16"
    )
    trainer.fit()
    evaluated = [line for line in logged(tmp_path / "run") if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [0, 25, 50, 60]
    first, last = evaluated[0], evaluated[-1]
    assert (
        first["eval/loss"] == pytest.approx(math.log(2))
        and first["eval/brier_score"] == 0.25
        and first["eval/calibration_error"] == 0
    )
    assert last["eval/accuracy"] >= 0.9 and last["eval/loss"] < 0.4 and last["eval/brier_score"] < 0.1


def test_calibration_is_measured_on_both_orders_of_each_pair(letters, tmp_path):
    trainer = reward_trainer(letters, tmp_path)
    # Sure of all four and wrong once: of the eight orders two are wrong, all at probabilities near 0 and 1.
    columns = {
        "chosen_rewards": torch.tensor([50.0, 50.0, 50.0, 0.0]),
        "rejected_rewards": torch.tensor([0.0, 0.0, 0.0, 50.0]),
    }
    assert trainer.calibration_metrics(columns) == pytest.approx(
        {"eval/calibration_error": 0.25, "eval/brier_score": 0.25}
    )
    # Three to one, and right three times out of four: calibrated.
    odds = torch.full((4,), math.log(3))
    columns = {"chosen_rewards": odds * torch.tensor([1, 1, 1, -1]), "rejected_rewards": torch.zeros(4)}
    assert trainer.calibration_metrics(columns)["eval/calibration_error"] == pytest.approx(0, abs=1e-6)


def test_the_trained_model_is_one_of_transformers_and_can_be_trained_on(letters, tmp_path):
    trainer = reward_trainer(letters, tmp_path)
    trainer.fit()
    folder = tmp_path / "run" / "model"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id == 0
    rows = trainer.encode(PAIRS)
    ours = last_scores(
        trainer.policy_engine.infer(rows, [list(range(10))], trainer.reward_model.token_scores),
        rows.response_lengths,
    )
    texts = [f"{p.content}{answer}<eos>" for p in PAIRS for answer in p.answer]
    theirs = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.squeeze(1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    second = reward_trainer(folder, tmp_path / "second")
    assert torch.equal(weights(second.policy_engine), weights(trainer.policy_engine))


def test_training_in_two_parts_is_the_same_as_in_one(letters, tmp_path):
    one = reward_trainer(letters, tmp_path / "one", "steps=4")
    one.fit()
    data = f"data.test={write_pairs(tmp_path / 'two' / 'pairs.jsonl')}"
    reward_trainer(letters, tmp_path / "two", "steps=2", data).fit()
    two = reward_trainer(letters, tmp_path / "two", "steps=4", data, "eval_every_steps=1")
    assert len(two.fit()) == 2
    assert torch.equal(weights(one.policy_engine), weights(two.policy_engine))
    saved = [read_saved(tmp_path / run / "run/checkpoints/step-00000004/policy") for run in ("one", "two")]
    torch.testing.assert_close(*saved, rtol=0, atol=0)


def test_a_checkpoint_of_a_language_model_is_not_taken_for_one_of_a_reward_model(letters, tmp_path):
    language = SFTTrainer(
        load_sft_config({}, [f"policy.path={letters}", "device=cpu"]), console=Console(file=io.StringIO())
    )
    language.policy_engine.save(tmp_path)()
    trainer = reward_trainer(letters, tmp_path)
    with pytest.raises(ValueError, match="is of another model"):
        trainer.policy_engine.load(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss=dpo", "need one of bradley_terry"),
        ("loss.margin=-1", "bradley_terry: need margin >= 0, got -1"),
        ("policy.path=null", "need policy.path"),
        ("policy.path=/nowhere", "cannot load a reward model from '/nowhere': there is no such folder"),
        ("data.train=null", "need data.train: rows {prompt, chosen, rejected}"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(override, message, letters, tmp_path):
    with pytest.raises(ValueError, match=message):
        reward_trainer(letters, tmp_path, override).fit()
    assert not (tmp_path / "run").exists()


def test_a_classifier_of_several_labels_is_no_reward_model(letters, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(letters, num_labels=3).save_pretrained(
        tmp_path / "three"
    )
    with pytest.raises(
        ValueError,
        match=r"head named score with one label, got Qwen2ForSequenceClassification in "
        r".*do not fit in score.weight",
    ):
        load_reward_model(str(tmp_path / "three"), new_head=True)
    with pytest.raises(ValueError, match="there is no reward model on the family 'cohere'"):
        as_reward_model(tiny_transformer("cohere"))
