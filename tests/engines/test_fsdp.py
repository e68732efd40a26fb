"""The sharded engine learns what one process learns, however its model is spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.distributed import on_ranks
from tests.engines.sharded_runs import generate_alone, local_engine_on, steps, trained_weights, worker_on
from tests.tiny import random_prompts, tiny_transformer
from tests.training import rows_to_learn
from verl.data.packing import balance

pytestmark = pytest.mark.distributed

D2, D4, T2, S2 = {}, {}, {"tensor": 2}, {"sequence": 2}
TWO: dict[str, dict[str, Any]] = {
    "data 2": {"parallel": D2},
    "data 2, low rank": {"parallel": D2, "lora": True},
    "data 2, value": {"parallel": D2, "kind": "value"},
    "data 2, recomputed": {"parallel": D2, "recompute": True, "chunk": 3},
    "data 2, whole minibatch": {"parallel": D2, "loss": "clip_cov"},
    "data 2, offloaded": {"parallel": {"offload": True}},
    "tensor 2": {"parallel": T2},
    "tensor 2, low rank": {"parallel": T2, "lora": True},
    "tensor 2, value": {"parallel": T2, "kind": "value"},
    "tensor 2, recomputed": {"parallel": T2, "recompute": True},
    "tensor 2, qwen3": {"parallel": T2, "family": "qwen3"},
    "tensor 2, llama": {"parallel": T2, "family": "llama"},
    "tensor 2, gemma3": {"parallel": T2, "family": "gemma3"},
    "tensor 2, gemma2": {"parallel": T2, "family": "gemma2"},
    "sequence 2": {"parallel": S2},
    "sequence 2, low rank": {"parallel": S2, "lora": True},
    "sequence 2, one key-value head": {"parallel": S2, "family": "llama_one_kv_head"},
    "sequence 2, windows": {"parallel": S2, "family": "gemma3"},
    "sequence 2, recomputed": {"parallel": S2, "recompute": True, "chunk": 2},
    "bf16": {"parallel": D2, "precision": "bf16"},
    "fp16": {"parallel": T2, "precision": "fp16"},
    "experts": {"parallel": D2, "family": "mixtral"},
    "recurrent": {"parallel": D2, "family": "qwen3_next", "recompute": True},
    "sequence 2, sinks": {"parallel": S2, "family": "gpt_oss"},
    "layers of another name": {"parallel": D2, "family": "gpt2"},
}
FOUR: dict[str, dict[str, Any]] = {
    "data 4": {"parallel": D4},
    "data 4, low rank": {"parallel": D4, "lora": True},
    "data 4, fewer rows than ranks": {"parallel": D4, "minibatches": 3},
    "tensor 2 x data 2": {"parallel": T2},
    "tensor 2 x data 2, low rank": {"parallel": T2, "lora": True},
    "sequence 2 x data 2": {"parallel": S2},
    "sequence 2 x tensor 2": {"parallel": {"tensor": 2, "sequence": 2}},
    "hybrid shard 2 x 2": {"parallel": {"replicas": 2}},
    "hybrid shard 2 x 2, low rank": {"parallel": {"replicas": 2}, "lora": True},
    "replicas 2 x tensor 2": {"parallel": {"replicas": 2, "tensor": 2}},
}
CASES = {**dict.fromkeys(TWO, 2), **dict.fromkeys(FOUR, 4)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """A saved model of each family."""
    root = tmp_path_factory.mktemp("families")
    for family in sorted({case.get("family", "qwen2") for case in [*TWO.values(), *FOUR.values()]}):
        tiny_transformer(family, initializer_range=0.05, vocab_size=100).save_pretrained(root / family)
    return {folder.name: str(folder) for folder in root.iterdir()}


@pytest.fixture(scope="module")
def ran(sources, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Every case on its ranks; the results of all ranks."""
    results: dict[str, list[dict[str, Any]]] = {}
    for num_ranks, table in ((2, TWO), (4, FOUR)):
        cases = [
            {**case, "name": name, "source": sources[case.get("family", "qwen2")]}
            for name, case in table.items()
        ]
        folder = str(tmp_path_factory.mktemp("exported"))
        ranks = on_ranks("tests.engines.sharded_runs:run_cases", num_ranks, cases, folder)
        results |= {name: [rank[name] for rank in ranks] for name in table}
    return results


def case_of(name: str, sources: dict[str, str]) -> dict[str, Any]:
    case = {**TWO, **FOUR}[name]
    return {**case, "source": sources[case.get("family", "qwen2")]}


@pytest.mark.parametrize("name", [name for name in CASES if "precision" not in {**TWO, **FOUR}[name]])
def test_five_steps_are_those_of_one_process(name, ran, sources, tmp_path):
    case = case_of(name, sources)
    engine = local_engine_on(case["source"], case)
    worker = worker_on(engine, case)
    expected = steps(worker, ran[name][0]["data"], case, -1)
    for rank in ran[name]:
        for ours, theirs in zip(rank["history"], expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    weights = trained_weights(engine.model, tmp_path)
    for ours in (rank["weights"] for rank in ran[name]):
        assert ours.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=2e-6)
    batch = rows_to_learn(with_padding=True)
    plan = balance(batch.num_tokens, num_ranks=1, micro_batch_tokens=100)
    written = worker.write(batch, plan)
    rows = {row: values for rank in ran[name] for row, values in rank["written"].items()}
    assert rows.keys() == set(range(6))
    for row, values in rows.items():
        torch.testing.assert_close(values, written.ragged(written.names[0]).row(row), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_in_16_bits_steps_are_near_those_of_32_and_weights_stay_fp32(name, ran, sources):
    case = case_of(name, sources)
    engine = local_engine_on(case["source"], {**case, "precision": "fp32"})
    expected = steps(worker_on(engine, case), ran[name][0]["data"], case, -1)
    for rank in ran[name]:
        for ours, theirs in zip(rank["history"], expected, strict=True):
            assert ours["skipped_updates"] == 0
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
        assert rank["history"][0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.03)
        assert {value.dtype for value in rank["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("name", [name for name in CASES if "low rank" in name])
def test_with_its_adapter_disabled_a_policy_is_what_it_started_from(name, ran, sources):
    case = case_of(name, sources)
    start = worker_on(local_engine_on(case["source"], {**case, "lora": False}), case)
    batch = rows_to_learn(with_padding=True)
    written = start.write(batch, balance(batch.num_tokens, num_ranks=1, micro_batch_tokens=100))
    for rank in ran[name]:
        for row, values in rank["reference"].items():
            torch.testing.assert_close(
                values, written.ragged("trainer_logprobs").row(row), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize(
    ("num_ranks", "parallel"), [(2, {}), (2, {"tensor": 2}), (4, {"tensor": 2}), (2, {"sequence": 2})]
)
def test_ranks_generate_what_one_process_does_each_as_much_as_it_is_asked(num_ranks, parallel, sources):
    prompts = random_prompts([3, 5, 2, 4])
    expected, before, after = generate_alone(sources["qwen2"], prompts)
    for answers, *learned in on_ranks(
        "tests.engines.sharded_runs:generate", num_ranks, sources["qwen2"], parallel, prompts
    ):
        for ours, theirs in zip(answers, expected, strict=False):
            for (ids, logprobs), (expected_ids, expected_logprobs) in zip(ours, theirs, strict=True):
                assert ids == expected_ids
                assert logprobs == pytest.approx(expected_logprobs, abs=1e-5)
        for steps_made, theirs in zip(learned, (before, after), strict=True):
            assert steps_made[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-7)


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(sources):
    for bad, good in on_ranks("tests.engines.sharded_runs:not_finite", 2, sources["qwen2"]):
        assert bad == {"skipped_updates": 1.0}
        assert good["skipped_updates"] == 0 and good["grad_norm"] > 0


def test_a_checkpoint_of_four_ranks_goes_on_at_two_by_two_and_at_one(sources, tmp_path):
    source, model = sources["qwen2"], tmp_path / "model"
    model.mkdir()
    going_on = on_ranks("tests.engines.sharded_runs:save_at", 4, source, {"parallel": {}}, str(model))[0]
    for num_ranks, parallel in ((4, {"tensor": 2}), (2, {})):
        for history in on_ranks(
            "tests.engines.sharded_runs:load_at", num_ranks, source, {"parallel": parallel}, str(model)
        ):
            assert history[0] == pytest.approx(going_on[0], rel=1e-5, abs=1e-7)
    alone = local_engine_on(source, {})
    alone.load(Path(model))
    assert steps(worker_on(alone, {}), 4, {}, -1, updates=1)[0] == pytest.approx(
        going_on[0], rel=1e-5, abs=1e-7
    )


STREAMED = {
    2: ["data 2", "data 2, value", "data 2, low rank", "tensor 2"],
    4: ["data 4", "tensor 2 x data 2", "hybrid shard 2 x 2"],
}


@pytest.mark.parametrize("num_ranks", STREAMED)
def test_a_step_in_portions_is_that_of_one_process_over_all_rows(num_ranks, sources):
    cases = [{**case_of(name, sources), "name": name, "minibatches": 1} for name in STREAMED[num_ranks]]
    ranks = on_ranks("tests.engines.sharded_runs:stream_cases", num_ranks, cases, 3)
    for case in cases:
        engine = local_engine_on(case["source"], case)
        expected = steps(worker_on(engine, case), ranks[0][case["name"]]["data"], case, -1, updates=3)
        weights = dict(engine.full_tensors())
        for rank in (rank[case["name"]] for rank in ranks):
            for ours, theirs in zip(rank["history"], expected, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
            for key, value in weights.items():
                torch.testing.assert_close(rank["weights"][key], value, rtol=1e-5, atol=2e-6)
            # Ranks that cannot ask each row alone name its micro-batch.
            assert (
                "not finite in 3 updates in a row, the last time for row" in rank["error"]
                and " 3" in rank["error"]
            )


def test_adapters_of_sharded_models_are_written_as_they_compute(sources, tmp_path):
    kinds: dict[str, dict[str, Any]] = {
        "head": {"rank": 4, "targets": ("lm_head", "q_proj")},
        "whole head": {"rank": 4, "modules_to_save": ("lm_head",)},
        "dora": {"rank": 4, "use_dora": True},
        "continued": {"path": str(tmp_path / "dora/adapter")},
    }
    source, folder = sources["qwen2"], str(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    for logits in on_ranks("tests.engines.sharded_runs:run_adapters", 2, source, kinds, folder):
        torch.testing.assert_close(logits["continued"], logits["dora"], rtol=0, atol=1e-5)
        for name in kinds:
            whole = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
            base = AutoModelForCausalLM.from_pretrained(source)
            alone = PeftModel.from_pretrained(base, tmp_path / name / "adapter")
            for model in (whole, alone):
                torch.testing.assert_close(model(ids).logits, logits[name], rtol=0, atol=1e-4)
