"""The same recipe on one device and on pools of several: what it learns, what runs at the same time, and what
is refused.
"""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training import logged, toy_config, toy_trainer
from verl.engines.hf.pretrained import as_reward_model
from verl.trainer.rl_trainer import Trainer

LEARNED = (
    "reward",
    "loss",
    "kl",
    "entropy",
    "grad_norm",
    "critic/loss",
    "critic/grad_norm",
    "explained_variance",
    "response_tokens",
)
# With its usual eps Adam takes the rounding errors of the first values, all but 0, for a direction.
RUN = [
    "steps=3",
    "sampling.max_tokens=6",
    "policy.optimizer.eps=1e-4",
    "critic.optimizer.eps=1e-4",
    "checkpoint.every_steps=2",
    "evaluation.every_steps=3",
    "evaluation.at_start=false",
]
ON_CPUS = "placement.address=local"

PLACEMENTS = {
    "colocated": ["placement={name: colocated, devices: [2]}"],
    "split": ["placement={name: split, devices: [2, 2], policy: {tensor: 2}}"],
    "standalone": ["placement={name: standalone, devices: [2, 1, 2, 2], policy: {sequence: 2}}"],
}


def fitted(folder, model, *overrides: str) -> list[dict]:
    trainer = toy_trainer("ppo", model, folder, *overrides)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return logged(folder / "run")


@pytest.fixture(scope="module")
def judged(letters, tmp_path_factory) -> str:
    """Settings of a run whose rewards are in part those of a reward model."""
    folder = tmp_path_factory.mktemp("judge")
    model = as_reward_model(AutoModelForCausalLM.from_pretrained(letters))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(letters).save_pretrained(folder)
    return f"rewards.functions=[position_share, {{name: model, path: {folder}, weight: 0.1}}]"


@pytest.fixture(scope="module")
def alone(letters, judged, tmp_path_factory) -> list[dict]:
    """The run in one process."""
    return fitted(tmp_path_factory.mktemp("alone"), letters, *RUN, judged)


@pytest.mark.ray
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_run_learns_the_same_wherever_its_four_roles_are(name, alone, letters, judged, tmp_path):
    lines = fitted(tmp_path, letters, *PLACEMENTS[name], ON_CPUS, *RUN, judged)
    for ours, theirs in zip(lines, alone, strict=True):
        assert {key: ours[key] for key in LEARNED} == pytest.approx(
            {key: theirs[key] for key in LEARNED}, rel=2e-4, abs=1e-5
        )
    assert lines[-1]["eval/reward"] == pytest.approx(alone[-1]["eval/reward"], abs=1e-6)
    spans = json.loads((tmp_path / "run" / "timeline.json").read_text().rstrip().removesuffix(",") + "]")
    calls = {(span["cat"], span["name"].partition(".")[2]) for span in spans}
    assert {
        ("policy", "generate"),
        ("policy", "update"),
        ("critic", "write"),
        ("critic", "update"),
        ("reference", "write"),
        ("reward", "score"),
    } <= calls
    at_once = overlap_us(spans, "critic.write", "reference.write")
    assert (at_once > 0) == (name != "colocated")
    # Alone again, from the checkpoint that the ranks left.
    again = toy_trainer("ppo", letters, tmp_path, *RUN, judged, "steps=4")
    assert len(again.fit()) == 1 and again.version == 4


def overlap_us(spans: list[dict], one: str, other: str) -> float:
    """Time that calls of both names ran at once."""
    first, second = (
        [(s["ts"], s["ts"] + s["dur"]) for s in spans if s["name"] == name] for name in (one, other)
    )
    return sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)


@pytest.mark.ray
def test_low_rank_additions_need_no_reference_of_their_own(letters, tmp_path):
    settings = ["policy.lora.rank=4", "steps=2", "sampling.max_tokens=6"]
    alone = toy_trainer("grpo", letters, tmp_path / "alone", *settings)
    expected = [alone.step() for _ in range(2)]
    assert alone.groups.reference is None
    spread = toy_trainer(
        "grpo", letters, tmp_path / "spread", *settings, "placement={name: colocated, devices: [2]}", ON_CPUS
    )
    try:
        for theirs, ours in zip(expected, [spread.step() for _ in range(2)], strict=True):
            keys = ("reward", "loss", "kl", "grad_norm")
            assert {key: ours[key] for key in keys} == pytest.approx(
                {key: theirs[key] for key in keys}, rel=2e-4, abs=1e-6
            )
    finally:
        spread.close()


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (
            "{name: split, devices: [2]}",
            r"need a number in placement.devices for each pool of .* split \(policy and reference; critic\)",
        ),
        (
            "{name: colocated, devices: [3], policy: {tensor: 2}}",
            "got 3 for the policy, which is spread over 2",
        ),
    ],
)
def test_devices_that_do_not_fit_are_refused_before_anything_starts(placement, message, letters, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(
            toy_config("ppo", letters, tmp_path, f"placement={placement}"),
            console=Console(file=io.StringIO()),
        )
