"""The example of an engine on DeepSpeed ZeRO-3 learns what one process learns."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tests.distributed import on_ranks
from tests.engines.sharded_runs import (
    CPU,
    algorithm_of,
    answered,
    local_engine_on,
    role_config,
    steps,
    worker_on,
)
from tests.tiny import random_prompts, tiny_codec, tiny_transformer
from tests.training import rows_to_learn
from verl.config.placement import ParallelConfig
from verl.data.packing import balance
from verl.engines.hf.pretrained import load_language_model
from verl.rollout.actor_worker import ActorWorker
from verl.trainer.build.worker_factories import engine_maker

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed, see docs/deepspeed.md",
    ),
]

CASES: dict[str, dict[str, Any]] = {
    "divided": {},
    "small tensors whole": {"options": {}},
    "recomputed": {"recompute": True, "chunk": 3},
    "value": {"kind": "value"},
}
# The first start builds DeepSpeed's operators.
LIMIT_S = 400.0


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_transformer("qwen2", initializer_range=0.05, vocab_size=100).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ran(source) -> list[dict[str, Any]]:
    """Every case on two ranks."""
    return on_ranks(
        "tests.engines.deepspeed_runs:run_cases",
        2,
        source,
        CASES | {"bf16": {"precision": "bf16"}},
        limit_s=LIMIT_S,
    )


@pytest.mark.parametrize("name", CASES)
def test_five_steps_on_two_ranks_are_those_of_one_process(name, ran, source):
    engine = local_engine_on(source, CASES[name])
    worker = worker_on(engine, CASES[name])
    expected = steps(worker, 2, CASES[name], -1)
    weights = {key: weight.detach() for key, weight in engine.model.transformer.named_parameters()}
    batch = rows_to_learn(with_padding=True)
    written = worker.write(batch, balance(batch.num_tokens, num_ranks=1, micro_batch_tokens=100))
    for rank in (rank[name] for rank in ran):
        for ours, theirs in zip(rank["history"], expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
        assert rank["shapes"] == {key: tuple(weight.shape) for key, weight in weights.items()}
        assert rank["weights"].keys() == weights.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(rank["weights"][key], weight, rtol=1e-5, atol=2e-6)
        for row, values in rank["written"].items():
            torch.testing.assert_close(
                values, written.ragged(written.names[0]).row(row), rtol=1e-5, atol=1e-5
            )
    # No element is on two ranks.
    assert sum(rank[name]["held"] for rank in ran) == sum(weight.numel() for weight in weights.values())


def test_what_the_example_does_not_have_is_refused(source):
    for case, parallel, message in (
        ({}, {"tensor": 2}, "need no sizes in placement"),
        ({}, {"engine": {"name": "x", "stage": 2}}, "need ZeRO stage 3"),
        ({"lora": True}, {}, "no LoRA for this engine"),
        ({"precision": "fp16"}, {}, "need precision fp32 or bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            make = engine_maker("examples.deepspeed_engine:deepspeed_engine")
            make(source, "policy", role_config(case), ParallelConfig(**parallel), device=CPU, total_updates=1)


def test_in_bf16_steps_are_near_those_of_fp32_and_weights_stay_fp32(ran, source):
    engine = local_engine_on(source, {})
    expected = steps(worker_on(engine, {}), 2, {}, -1)
    for rank in (rank["bf16"] for rank in ran):
        assert rank["history"][0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.03)
        assert rank["history"][0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=0.1)
        assert all(step["skipped_updates"] == 0 for step in rank["history"])
        assert {weight.dtype for weight in rank["weights"].values()} == {torch.float32}


def test_it_generates_skips_what_is_not_finite_and_goes_on_from_a_checkpoint_on_other_ranks(source, tmp_path):
    prompts = random_prompts([3, 5, 2])
    alone = generated_alone(source, prompts)
    (tmp_path / "checkpoint").mkdir()
    for rank in on_ranks(
        "tests.engines.deepspeed_runs:generate_and_go_on", 2, source, str(tmp_path), prompts, limit_s=LIMIT_S
    ):
        for step in ("before", "after"):
            assert rank[step][0] == pytest.approx(alone[step][0], rel=1e-5, abs=1e-7)
        for answers in ("answers", "switched"):
            assert_same_answers(rank[answers], alone[answers])
        assert rank["bad"] == {"skipped_updates": 1.0}
        for row, logprobs in rank["reference"].items():
            torch.testing.assert_close(logprobs, alone["reference"].row(row), rtol=1e-5, atol=1e-5)
        exported = dict(load_language_model(str(tmp_path / "exported")).named_parameters())
        for name, weight in rank["weights"].items():
            torch.testing.assert_close(exported[name].detach(), weight, rtol=0, atol=0)
    (history,) = on_ranks("tests.engines.deepspeed_runs:load_at", 1, source, str(tmp_path), limit_s=LIMIT_S)
    assert history[0] == pytest.approx(alone["after"][0], rel=1e-5, abs=1e-7)


def generated_alone(source: str, prompts: list[list[int]]) -> dict[str, Any]:
    """A step, answers, a step, answers of one process."""
    engine, batch = local_engine_on(source, {}), rows_to_learn(with_padding=True)
    plan = balance(batch.num_tokens, num_ranks=1, micro_batch_tokens=100)
    out: dict[str, Any] = {"reference": worker_on(engine, {}).write(batch, plan).ragged("trainer_logprobs")}
    actor = ActorWorker(
        engine, algorithm_of({}), tiny_codec(), max_slots=8, temperature=1.0, epochs=1, chunk=100
    )
    out |= {"before": steps(actor, 2, {}, -1, updates=1), "answers": answered(actor, prompts)}
    return out | {"after": steps(actor, 2, {}, -1, updates=1), "switched": answered(actor, prompts)}


def assert_same_answers(ours: list[Any], theirs: list[Any]) -> None:
    """Compare the answers of a rank, which has the first prompts."""
    assert ours
    for answers, expected in zip(ours, theirs, strict=False):
        for (ids, logprobs), (expected_ids, expected_logprobs) in zip(answers, expected, strict=True):
            assert ids == expected_ids
            assert logprobs == pytest.approx(expected_logprobs, abs=1e-5)
