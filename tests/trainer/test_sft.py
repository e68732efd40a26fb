"""Fine-tuning: the loss is on answers alone, in every form of a row, and falls."""

from __future__ import annotations

import io
import json
import math

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


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


TEMPLATE = (
    "{% for m in messages %}{{ '<bos>' + m['role'][0] + '=' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ '==' + call['function']['name'] }}{% endfor %}"
    "{{ '<eos>' }}{% endfor %}{% if add_generation_prompt %}{{ '<bos>a=' }}{% endif %}"
)
# Messages, and the text of each after its header where it is learned.
CHATS = [
    [
        ({"role": "user", "content": "abc"}, None),
        ({"role": "assistant", "content": "cab"}, "cab<eos>"),
        ({"role": "user", "content": "gg"}, None),
        (
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "fa", "arguments": {}}}],
            },
            "==fa<eos>",
        ),
        ({"role": "tool", "content": "dd"}, None),
        ({"role": "assistant", "content": "hhh"}, "hhh<eos>"),
        ({"role": "user", "content": "bye"}, None),
    ],
    [
        ({"role": "user", "content": "b"}, None),
        ({"role": "assistant", "content": "ee", "weight": 0}, None),
        ({"role": "user", "content": "e"}, None),
        ({"role": "assistant", "content": "f"}, "f<eos>"),
    ],
]


def chat_trainer(model, folder, *overrides):
    """A run on `CHATS`, two in a step."""
    (folder / "template.jinja").write_text(TEMPLATE)
    data = write_rows(folder / "chats.jsonl", *({"messages": [m for m, _ in chat]} for chat in CHATS))
    given = [f"data.train={data}", f"data.chat_template={folder / 'template.jinja'}", "rows_per_step=2"]
    trainer = sft(model, folder, *given, *overrides)
    trainer.load_train_data()
    return trainer


def labels_by_hand(codec):
    """Ids and labels of each chat, put together from the parts of its text."""
    for chat in CHATS:
        ids, labels = [], []
        for message, learned in chat:
            calls = "".join(f"=={call['function']['name']}" for call in message.get("tool_calls", ()))
            head = codec.encode(f"<bos>{message['role'][0]}=")
            body = codec.encode(f"{message['content']}{calls}<eos>")
            ids += [*head, *body]
            labels += [-100] * len(head) + (body if learned else [-100] * len(body))
            assert learned is None or codec.encode(learned) == body
        yield torch.tensor([ids]), torch.tensor([labels])


@pytest.mark.parametrize(
    "split", ["policy.packing=true", "policy.packing=false", "policy.micro_batch_rows=1"]
)
def test_every_answer_of_a_conversation_is_learned_as_transformers_own_loss_does(split, letters, tmp_path):
    trainer = chat_trainer(letters, tmp_path, split)
    own = AutoModelForCausalLM.from_pretrained(letters)
    given = list(labels_by_hand(trainer.codec))
    counts = [int((labels != -100).sum()) for _, labels in given]
    assert counts == [13, 2]
    # Its loss is a mean over the labels of a row.
    losses = [own(input_ids=ids, labels=labels).loss for ids, labels in given]
    loss = sum(count * part for count, part in zip(counts, losses, strict=True)) / sum(counts)
    loss.backward()
    metrics = trainer.learn(trainer.loader.prompts)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["response_tokens"] == 15 / 2
    expected = torch.cat([p.grad.flatten() for p in own.parameters()])
    torch.testing.assert_close(gradient(trainer.policy_engine), expected, rtol=1e-4, atol=1e-6)


def test_the_last_answer_alone_is_learned_if_that_is_asked(letters, tmp_path):
    trainer = chat_trainer(letters, tmp_path, "data.train_on=last")
    assert trainer.learn(trainer.loader.prompts)["response_tokens"] == (4 + 2) / 2


def test_held_out_examples_are_evaluated_at_the_start_between_and_at_the_end(letters, tmp_path):
    data = f"data.test={write_prompts(tmp_path / 'rows.jsonl')}"
    sft(letters, tmp_path, data, "evaluation.every_steps=2").fit()
    evaluated = {line["step"]: line for line in logged(tmp_path / "run") if "eval/loss" in line}
    assert list(evaluated) == [0, 2, 3]
    assert evaluated[3]["eval/loss"] < evaluated[0]["eval/loss"]
    trainer = sft(letters, tmp_path / "other", data)
    assert trainer.held_out == f"12 examples of {tmp_path / 'rows.jsonl'}"
    own, hits, total, count = AutoModelForCausalLM.from_pretrained(letters), 0, 0.0, 0
    for example in trainer.test_sets[0].prompts:
        prompt, answer = (
            trainer.codec.encode_prompt(example),
            trainer.codec.encode_answer(example.answer, example),
        )
        logits = own(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        target = torch.tensor(answer)
        total += F.cross_entropy(logits, target, reduction="sum").item()
        hits, count = hits + int((logits.argmax(-1) == target).sum()), count + len(answer)
    measured = trainer.evaluate()
    assert measured["eval/loss"] == pytest.approx(total / count, rel=1e-5)
    assert measured["eval/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert measured["eval/token_accuracy"] == pytest.approx(hits / count)
    assert measured["eval/loss"] == pytest.approx(evaluated[0]["eval/loss"], rel=1e-6)


def test_each_held_out_set_has_its_loss_and_its_share_of_the_samples(letters, tmp_path):
    first, second = (write_prompts(tmp_path / name) for name in ("first.jsonl", "second.jsonl"))
    second.write_text("".join(second.read_text().splitlines(keepends=True)[::-1]))
    sets = ["evaluation.prompts=3", f"data.test=[{first}, {second}]", "tracking.num_samples=4"]
    trainer = sft(letters, tmp_path, *sets)
    assert trainer.held_out == f"3 examples of {first}, 3 examples of {second}"
    measured = trainer.evaluate()
    alone = sft(letters, tmp_path / "alone", "evaluation.prompts=3", f"data.test={second}").evaluate()
    assert measured["eval/second/loss"] == pytest.approx(alone["eval/loss"], rel=1e-6)
    assert measured["eval/loss"] == (measured["eval/first/loss"] + measured["eval/second/loss"]) / 2
    heads = [json.loads(path.read_text().splitlines()[0])["prompt"] for path in (first, second)]
    assert [row["prompt"] for row in trainer.samples()[:2]] == heads


def test_evaluation_and_samples_do_not_change_what_is_learned(letters, tmp_path):
    plain = sft(letters, tmp_path / "plain")
    plain.fit()
    data = f"data.test={write_prompts(tmp_path / 'rows.jsonl')}"
    watched = sft(
        letters, tmp_path / "watched", data, "evaluation.every_steps=1", "tracking.samples_every_steps=1"
    )
    watched.fit()
    assert torch.equal(weights(plain.policy_engine), weights(watched.policy_engine))


def test_samples_are_answers_to_held_out_prompts(letters, tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    data = write_rows(tmp_path / "test.jsonl", *({"messages": [m for m, _ in chat]} for chat in CHATS))
    trainer = sft(
        letters,
        tmp_path,
        f"data.test={data}",
        f"data.chat_template={tmp_path / 'template.jinja'}",
        "tracking.samples_every_steps=1",
        "sampling.max_tokens=5",
        "evaluation.temperature=0",
    )
    first = trainer.samples()
    assert first == trainer.samples()
    assert [row["prompt"] for row in first] == ["dd", "e"] and [row["reference"] for row in first] == [
        "hhh",
        "f",
    ]
    assert all(0 < row["tokens"] <= 5 and row["reward"] is None for row in first)
    trainer.fit()
    assert (tmp_path / "run" / "samples" / "step-000003.jsonl").exists()


def test_fine_tuning_in_two_parts_is_the_same_as_in_one(letters, tmp_path):
    one = sft(letters, tmp_path / "one", "steps=4")
    one.fit()
    sft(letters, tmp_path / "two", "steps=2").fit()
    # What is evaluated and sampled for readers may change.
    watched = [f"data.test={write_prompts(tmp_path / 'rows.jsonl')}", "sampling.max_tokens=3"]
    two = sft(letters, tmp_path / "two", "steps=4", *watched)
    assert len(two.fit()) == 2
    assert torch.equal(weights(one.policy_engine), weights(two.policy_engine))


def test_fine_tuning_needs_answers_that_are_texts(letters, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "abc=", "answer": 3}\n')
    with pytest.raises(ValueError, match="need an answer that is a text"):
        sft(letters, tmp_path, f"data.train={tmp_path / 'bad.jsonl'}").fit()
    with pytest.raises(ValueError, match="need data.train"):
        sft(letters, tmp_path, "data.train=null").fit()
    assert not (tmp_path / "run").exists()


def test_an_answer_beyond_the_context_is_dropped_and_counted(letters, tmp_path):
    rows = [{"prompt": "ab=", "answer": "b" * length} for length in (1021, 3)]
    data = write_rows(tmp_path / "long.jsonl", *rows)
    trainer = sft(letters, tmp_path, f"data.train={data}")
    report = trainer.load_train_data()
    assert report.notes == (
        "7 tokens, 4 of them learned",
        "1 rows longer than 1024 tokens, the model's context, dropped",
    )
    assert [prompt.answer for prompt in trainer.loader.prompts] == ["bbb"]
    data = write_rows(tmp_path / "long.jsonl", rows[0])
    with pytest.raises(
        ValueError, match="at most 1024 tokens .the model's context., but the shortest of 1 has"
    ):
        sft(letters, tmp_path, f"data.train={data}")
