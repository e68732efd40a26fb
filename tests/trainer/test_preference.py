"""Training on preferences: the loss of the pairs of a step whatever the split, references where they are
read, whole runs.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from tests.training import gradient, logged, weights
from verl.config import load_run
from verl.config.run import PreferenceConfig
from verl.data.preference_pairs import Pair
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.pairwise_trainer import plan_pairs
from verl.trainer.preference import PreferenceTrainer
from verl.utils.sampling_types import Prompt

PAIRS = [
    Prompt("abc=", Pair("abc", "acb")),
    Prompt("a=", Pair("hhhhhh", "b")),
    Prompt("hhhhh=", Pair("g", "hgfedcba")),
    Prompt("b=", Pair("ab", "ba")),
    Prompt("cd=", Pair("cd", "c")),
]


def write_pairs(path: Path, count: int = 24) -> Path:
    """Pairs to tell apart: the letters of the prompt, and the first of them twice."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        prompts = ["abcdefgh"[i % 8] + "abcdefgh"[(i // 8 + 1 + i) % 8] for i in range(count)]
        path.write_text(
            "".join(
                json.dumps({"prompt": f"{p}=", "chosen": p, "rejected": p[0] * 2}) + "\n" for p in prompts
            )
        )
    return path


def preference(model: Path, folder: Path, *overrides: str) -> PreferenceTrainer:
    """A small run on `write_pairs`."""
    data = write_pairs(folder / "pairs.jsonl")
    paths = [
        f"policy.path={model}",
        f"output_dir={folder / 'run'}",
        "device=cpu",
        "tracking.sinks=[jsonl]",
        f"data.train={data}",
    ]
    toy = ["pairs_per_step=6", "policy.optimizer.lr=3e-3", "policy.optimizer.max_grad_norm=1e9"]
    return PreferenceTrainer(
        load_run(PreferenceConfig, {"steps": 3}, [*paths, *toy, *overrides]),
        console=Console(file=io.StringIO()),
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same letters, to be the reference."""
    folder = tmp_path_factory.mktemp("models") / "other"
    make_tiny_model(folder, hidden=32, layers=1, seed=1, characters="abcdefgh=")
    return folder


def sums_by_hand(model, trainer):
    """Summed logprobs of all answers, [P] chosen and [P] rejected, by Transformers' own forward pass on one
    row at a time.
    """

    def total(prompt, answer):
        ids, target = trainer.codec.encode_prompt(prompt), trainer.codec.encode_answer(answer)
        logits = model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(target)[:, None]).sum()

    return [torch.stack([total(pair, pair.answer[side]) for pair in PAIRS]) for side in (0, 1)]


@pytest.mark.parametrize(
    "split", ["policy.packing=true", "policy.packing=false", "policy.micro_batch_rows=3"]
)
def test_the_loss_of_a_step_is_dpos_mean_over_its_pairs(split, letters, other, tmp_path):
    trainer = preference(letters, tmp_path, split, f"reference={other}", "loss={name: dpo, beta: 0.5}")
    own, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (letters, other))
    (chosen, rejected), (ref_chosen, ref_rejected) = (
        sums_by_hand(own, trainer),
        sums_by_hand(reference, trainer),
    )
    margin = 0.5 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    loss = torch.log1p(torch.exp(-margin)).mean()
    loss.backward()
    metrics = trainer.learn(PAIRS)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["margin"] == pytest.approx(margin.mean().item(), rel=1e-4)
    assert metrics["chosen_reward"] == pytest.approx(0.5 * (chosen - ref_chosen).mean().item(), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx((margin > 0).float().mean().item())
    assert metrics["chosen_logprobs"] == pytest.approx(
        chosen.sum().item() / 19, rel=1e-5
    )  # 14 letters and 5 ends
    assert metrics["rejected_logprobs"] == pytest.approx(rejected.sum().item() / 20, rel=1e-5)
    assert metrics["tokens"] == 2 * 17 + 39 and metrics["response_tokens"] == 3.9
    assert 0 < metrics["entropy"] <= math.log(16)
    expected = torch.cat([p.grad.flatten() for p in own.parameters()])
    torch.testing.assert_close(gradient(trainer.policy_engine), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(loss, letters, tmp_path):
    gradients, losses = [], []
    for split in ("policy.micro_batch_rows=100", "policy.micro_batch_rows=2", "policy.micro_batch_tokens=40"):
        trainer = preference(letters, tmp_path, f"loss={loss}", split)
        losses.append(trainer.learn(PAIRS)["loss"])
        gradients.append(gradient(trainer.policy_engine).double())
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-6 * gradients[0].norm()
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_pair_is_never_split_and_every_pair_is_in_one_micro_batch(letters, tmp_path):
    trainer = preference(letters, tmp_path)
    rows = trainer.encode(PAIRS)
    for role in (
        {"micro_batch_rows": 1},
        {"micro_batch_rows": 5},
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 30},
    ):
        plan = plan_pairs(rows, trainer.config.policy.model_copy(update=role))
        assert sorted(row for micro in plan for row in micro) == list(range(10))
        assert all(
            micro[1::2] == [row + 1 for row in micro[::2]] and all(row % 2 == 0 for row in micro[::2])
            for micro in plan
        )
        assert all(len(micro) <= max(2, role.get("micro_batch_rows", 10)) for micro in plan)
    assert rows["group_ids"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_reference_is_there_if_and_only_if_the_loss_reads_it(letters, tmp_path):
    trainers = {loss: preference(letters, tmp_path, f"loss={loss}") for loss in ("dpo", "ipo", "simpo")}
    assert [trainer.reference is not None for trainer in trainers.values()] == [True, True, False]
    # Still the policy of the start when that has moved on.
    before = weights(trainers["dpo"].reference)
    metrics = [trainers["dpo"].learn(PAIRS) for _ in range(2)]
    assert torch.equal(before, weights(trainers["dpo"].reference)) and not torch.equal(
        before, weights(trainers["dpo"].policy_engine)
    )
    assert (
        metrics[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
        and metrics[0]["margin"] == 0 != metrics[1]["margin"]
    )


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<bos>' + m['role'][0] + '=' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>a=' }}{% endif %}"
)


def test_answers_of_several_turns_count_by_their_own_tokens_alone(letters, tmp_path):
    def said(role, content):
        return {"role": role, "content": content}

    asked = said("user", "abc")
    chosen = [asked, said("assistant", "cab"), said("user", "d"), said("assistant", "ee")]
    rejected = [asked, said("assistant", "f")]
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    (tmp_path / "template.jinja").write_text(CHAT_TEMPLATE)
    trainer = preference(letters, tmp_path, f"data.chat_template={tmp_path / 'template.jinja'}", "loss=simpo")
    own = AutoModelForCausalLM.from_pretrained(letters)
    sums = []
    for chat, learned in ((chosen, (4, 3)), (rejected, (2,))):
        parts = [(f"<bos>{m['role'][0]}=", f"{m['content']}<eos>", m["role"] == "assistant") for m in chat]
        ids, labels = [], []
        for head, body, is_learned in parts:
            head, body = trainer.codec.encode(head), trainer.codec.encode(body)
            ids += [*head, *body]
            labels += [-100] * len(head) + (body if is_learned else [-100] * len(body))
        loss = own(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        sums.append(-loss)
        assert sum(label != -100 for label in labels) == sum(learned)
    trainer.load_train_data()
    metrics = trainer.learn(trainer.loader.prompts)
    assert metrics["chosen_logprobs"] == pytest.approx(sums[0], rel=1e-5)
    assert metrics["rejected_logprobs"] == pytest.approx(sums[1], rel=1e-5)
    assert metrics["response_tokens"] == (7 + 2) / 2 and 0 < metrics["entropy"] <= math.log(16)


def test_equal_pairs_are_dropped_and_said_and_samples_are_of_held_out_prompts(letters, tmp_path):
    rows = [{"prompt": "ab=", "chosen": "ab", "rejected": other} for other in ("ab", "ba")]
    data = tmp_path / "some.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data.train={data}", f"data.test={data}", "sampling.max_tokens=3"]
    trainer = preference(letters, tmp_path, *given)
    note = "1 pairs of equal answers dropped, they have nothing to learn"
    assert trainer.load_train_data().notes[0] == note
    assert [(row["prompt"], row["reference"]) for row in trainer.samples()] == [("ab=", "ab")]
    data.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="need two different answers in a row, got 1 pairs of equal ones"):
        preference(letters, tmp_path, *given)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_the_loss_falls_and_the_margin_rises_on_held_out_pairs_too(loss, letters, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 40)
    trainer = preference(
        letters,
        tmp_path,
        f"loss={loss}",
        "steps=40",
        f"data.test={data}",
        "eval_every_steps=25",
        "pairs_per_step=16",
    )
    history = trainer.fit()
    assert history[-1]["loss"] < 0.7 * history[0]["loss"] and history[-1]["margin"] > history[0]["margin"]
    evaluated = [line for line in logged(tmp_path / "run") if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [0, 25, 40]
    assert evaluated[-1]["eval/loss"] < 0.7 * evaluated[0]["eval/loss"]
    assert evaluated[-1]["eval/accuracy"] >= 0.9 > evaluated[0]["eval/accuracy"]


def test_an_evaluation_is_the_mean_over_the_held_out_pairs(letters, other, tmp_path):
    rows = [{"prompt": p.content, "chosen": p.answer.chosen, "rejected": p.answer.rejected} for p in PAIRS]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"reference={other}", f"data.test={tmp_path / 'test.jsonl'}"]
    trainer = preference(letters, tmp_path, *given, "policy.micro_batch_rows=2")
    measured = trainer.evaluate()
    learned = preference(letters, tmp_path, *given).learn(PAIRS)
    assert measured["eval/loss"] == pytest.approx(learned["loss"], rel=1e-6)
    assert measured["eval/accuracy"] == pytest.approx(learned["accuracy"])


def test_training_in_two_parts_is_the_same_as_in_one(letters, tmp_path):
    one = preference(letters, tmp_path / "one", "steps=4")
    one.fit()
    preference(letters, tmp_path / "two", "steps=2").fit()
    two = preference(letters, tmp_path / "two", "steps=4", "eval_every_steps=1")
    assert len(two.fit()) == 2
    assert torch.equal(weights(one.policy_engine), weights(two.policy_engine))
    assert [line["loss"] for line in logged(tmp_path / "one" / "run")] == [
        line["loss"] for line in logged(tmp_path / "two" / "run")
    ]


def test_the_error_of_a_loss_that_is_not_finite_names_its_row(letters, tmp_path):
    trainer = preference(letters, tmp_path, "policy.max_bad_updates=1")
    with torch.no_grad():
        trainer.policy_engine.model.transformer.get_input_embeddings().weight[
            trainer.codec.encode("f")[0]
        ] = float("nan")
        trainer.policy_engine.model.transformer.config.tie_word_embeddings = False
    with pytest.raises(RuntimeError, match="the loss was not finite in 1 updates in a row"):
        trainer.learn(PAIRS)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss=dop", "need one of dpo, ipo, simpo"),
        ("loss.beta=-1", "dpo: need beta > 0, got -1"),
        ("loss.betta=1", "got 'betta'; did you mean 'beta'"),
        (
            "loss=verl.algorithms.preference_losses:bradley_terry",
            "reads 'chosen_rewards', which is no column",
        ),
        ("reference=/nowhere", "cannot load a causal language model from '/nowhere'"),
        ("data.train=null", "need data.train: rows {prompt, chosen, rejected}"),
        ("data.test=missing.jsonl", "missing.jsonl"),
        ("data.max_prompt_tokens=1", "need a prompt of at most 1 tokens"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(override, message, letters, tmp_path):
    with pytest.raises(ValueError, match=message):
        preference(letters, tmp_path, override).fit()
    assert not (tmp_path / "run").exists()


def test_a_pair_beyond_the_limit_is_dropped_and_counted(letters, tmp_path):
    rows = [{"prompt": "ab=", "chosen": "a", "rejected": "b" * length} for length in (2, 7)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data.train={tmp_path / 'long.jsonl'}"
    trainer = preference(letters, tmp_path, data, "data.max_sequence_tokens=10")
    assert (
        "1 rows longer than 10 tokens, data.max_sequence_tokens, dropped" in trainer.load_train_data().notes
    )
    with pytest.raises(ValueError, match="data.max_sequence_tokens within the model's context of 1024"):
        preference(letters, tmp_path, data, "data.max_sequence_tokens=2000")


def test_a_reference_of_another_vocabulary_is_refused(letters, tmp_path):
    make_tiny_model(tmp_path / "digits", hidden=32, layers=1, characters="0123456789+-*/=()")
    with pytest.raises(ValueError, match="need the policy's vocabulary of 16 tokens in reference, got 24"):
        preference(letters, tmp_path, f"reference={tmp_path / 'digits'}")


def nothing_to_tell(chosen_logprobs, rejected_logprobs):
    """A loss of a user, without monitors."""
    return rejected_logprobs - chosen_logprobs, {}


def test_a_loss_of_a_user_must_say_which_answer_wins(letters, tmp_path):
    with pytest.raises(
        ValueError, match="tests.trainer.test_preference:nothing_to_tell: need a monitor 'accuracy'"
    ):
        preference(letters, tmp_path, "loss='tests.trainer.test_preference:nothing_to_tell'")
