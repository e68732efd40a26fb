"""Fine-tuning: the loss is on answers alone, in every form of a row, and falls."""

from __future__ import annotations

import io
import json

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM

from tests.training import gradient, logged, weights, write_prompts
from verl.config import load_sft_config
from verl.trainer.sft import SFTTrainer
from verl.utils.sampling_types import Prompt

EXAMPLES = [Prompt("abc=", "abc"), Prompt("a=", "bbbbbb"), Prompt("hhhhhhh=", "h")]


def sft(model, folder, *overrides):
    paths = [f"policy.path={model}", f"output_dir={folder / 'run'}", "device=cpu", "tracking.sinks=[jsonl]"]
    toy = ["rows_per_step=4", "policy.optimizer.lr=0.01", "policy.optimizer.max_grad_norm=1e9"]
    if not any(override.startswith("data.train=") for override in overrides):
        paths.append(f"data.train={write_prompts(folder / 'rows.jsonl')}")
    return SFTTrainer(
        load_sft_config({"steps": 3}, [*paths, *toy, *overrides]), console=Console(file=io.StringIO())
    )


def by_hand(model, trainer, examples):
    """The masked cross entropy of the answers, its gradient, and the tokens that count."""
    own = AutoModelForCausalLM.from_pretrained(model)
    losses = []
    for example in examples:
        prompt, answer = trainer.codec.encode_prompt(example), trainer.codec.encode_answer(example.answer)
        labels = torch.tensor([-100] * len(prompt) + answer)
        logits = own(torch.tensor([prompt + answer])).logits[0]
        losses.append(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
    count = sum(len(example.answer) + 1 for example in examples)
    loss = sum(losses) / count
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in own.parameters()])


@pytest.mark.parametrize(
    "split", ["policy.packing=true", "policy.packing=false", "policy.micro_batch_rows=1"]
)
def test_only_answers_and_their_end_are_learned_however_rows_are_split(split, letters, tmp_path):
    trainer = sft(letters, tmp_path, split)
    loss, expected = by_hand(letters, trainer, EXAMPLES)
    metrics = trainer.learn(EXAMPLES)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["response_tokens"] == pytest.approx(13 / 3)
    assert metrics["tokens"] == 13 + 14
    torch.testing.assert_close(gradient(trainer.policy_engine), expected, rtol=1e-4, atol=1e-7)


def test_the_loss_falls_and_a_model_is_left(letters, tmp_path):
    trainer = sft(letters, tmp_path, "steps=30")
    losses = [metrics["loss"] for metrics in trainer.fit()]
    assert losses[-1] < 0.6 * losses[0]
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 31))
    assert not (tmp_path / "run" / "samples").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(torch.cat([p.flatten() for p in model.parameters()]), weights(trainer.policy_engine))


def test_chats_are_learned_as_prompts_with_an_answer(letters, tmp_path):
    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "cab"}]
    rows = [{"messages": chat}, {"prompt": chat[:1], "answer": "cab"}]
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(row) + "\n")
    runs = [
        sft(letters, tmp_path / str(i), f"data.train={tmp_path / str(i)}.jsonl", "rows_per_step=1")
        for i in range(2)
    ]
    losses = [[metrics["loss"] for metrics in trainer.fit()] for trainer in runs]
    assert losses[0] == losses[1]


def test_fine_tuning_in_two_parts_is_the_same_as_in_one(letters, tmp_path):
    one = sft(letters, tmp_path / "one", "steps=4")
    one.fit()
    sft(letters, tmp_path / "two", "steps=2").fit()
    two = sft(letters, tmp_path / "two", "steps=4")
    assert len(two.fit()) == 2
    assert torch.equal(weights(one.policy_engine), weights(two.policy_engine))


def test_fine_tuning_needs_answers_that_are_texts(letters, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "abc=", "answer": 3}\n')
    with pytest.raises(ValueError, match="need an answer that is a text"):
        sft(letters, tmp_path, f"data.train={tmp_path / 'bad.jsonl'}").fit()
    with pytest.raises(ValueError, match="need data.train"):
        sft(letters, tmp_path, "data.train=null").fit()
    assert not (tmp_path / "run").exists()


def test_an_answer_beyond_the_context_is_refused_before_the_first_step(letters, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "ab=", "answer": "b" * 1021}) + "\n")
    with pytest.raises(ValueError, match="context of 1024 tokens, got 1025 in row 0 of long"):
        sft(letters, tmp_path, f"data.train={tmp_path / 'long.jsonl'}").fit()
