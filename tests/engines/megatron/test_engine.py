"""The Megatron-Core engine makes the updates of one process, in every parallel layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import on_ranks
from tests.engines.sharded_runs import CPU, local_engine_on, steps, trained_weights, worker_on
from tests.tiny import tiny_transformer
from tests.training import rows_to_learn
from verl.config.placement import ParallelConfig
from verl.config.roles import RoleConfig
from verl.data.packing import balance
from verl.engines.hf.pretrained import load_language_model

pytestmark = pytest.mark.megatron

UPDATES = 2

T2, P2, T2P2, C2 = {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}, {"sequence": 2}
SHARED = {"sequence_parallel": True}
RECOMPUTED = {"recompute": True, "chunk": 3}
# Cases of the same layout are adjacent, so that its process groups are made once.
TWO: dict[str, dict[str, Any]] = {
    "data 2": {},
    "data 2, overlapped": {"options": {"overlap_grad_reduce": True, "bucket_size": 1000}},
    "tensor 2, value": {"parallel": T2, "kind": "value", "options": SHARED},
    "tensor 2, qwen3, vocabulary not filled up": {
        "parallel": T2,
        "family": "qwen3",
        "options": {"make_vocab_size_divisible_by": 1},
    },
    "tensor 2, shared places, recomputed": {
        "parallel": T2,
        "family": "llama",
        "options": SHARED,
        **RECOMPUTED,
    },
    "tensor 2, bf16": {"parallel": T2, "precision": "bf16"},
    "pipeline 2, recomputed": {"parallel": P2, **RECOMPUTED},
    "pipeline 2, llama": {"parallel": P2, "family": "llama"},
    "pipeline 2, selected recomputation": {"parallel": P2, "options": {"recompute_granularity": "selective"}},
    "pipeline 2, interleaved": {
        "parallel": P2,
        "family": "qwen2_four_layers",
        "options": {"virtual_pipeline": 2},
    },
    "pipeline 2, interleaved, value": {
        "parallel": P2,
        "family": "qwen2_four_layers",
        "kind": "value",
        "options": {"virtual_pipeline": 2, "microbatch_group_size_per_vp_stage": 4},
    },
    "pipeline 2, three layers": {
        "parallel": P2,
        "family": "qwen2_three_layers",
        "options": {"num_layers_in_first_pipeline_stage": 1},
    },
    "context 2": {"parallel": C2},
    "context 2, value, recomputed": {"parallel": C2, "kind": "value", **RECOMPUTED},
    "experts 1": {"family": "qwen3_moe"},
    "experts 2": {"family": "qwen3_moe", "options": {"expert": 2, "moe_router_dtype": "fp32"}},
}
FOUR: dict[str, dict[str, Any]] = {
    "data 4, fewer rows than ranks": {"minibatches": 3},
    "tensor 2 x pipeline 2": {"parallel": T2P2},
    "tensor 2 x pipeline 2, value": {"parallel": T2P2, "kind": "value", "options": SHARED},
    "tensor 2 x data 2": {"parallel": T2, "family": "qwen3", "options": SHARED},
    "pipeline 2 x data 2, whole minibatch": {"parallel": P2, "loss": "clip_cov"},
    "tensor 2 x context 2": {"parallel": {**T2, **C2}, "options": SHARED},
    "experts 2 x tensor 2": {"parallel": T2, "family": "mixtral", "options": {"expert": 2}},
    "experts 2 x pipeline 2": {"parallel": P2, "family": "mixtral", "options": {"expert": 2}},
}
CASES = {**TWO, **FOUR}
# Cases whose steps also come in portions, by their number of ranks.
STREAMED = {
    2: ["data 2", "data 2, overlapped", "tensor 2, value", "pipeline 2, interleaved", "experts 2"],
    4: ["tensor 2 x pipeline 2", "tensor 2 x data 2", "pipeline 2 x data 2", "data 4"],
}
# Checkpoints: ranks and layout that write each of them, and those that read one.
SAVED: dict[str, tuple[int, dict[str, Any]]] = {
    "policy": (4, {"parallel": T2P2}),
    "critic": (2, {"parallel": P2, "kind": "value"}),
    "experts": (2, {"family": "mixtral", "options": {"expert": 2}}),
    "bf16": (2, {"parallel": T2, "precision": "bf16"}),
}
LOADED: list[tuple[int, dict[str, Any]]] = [
    (4, {"saved": "policy", "parallel": T2P2}),
    (4, {"saved": "policy"}),
    (2, {"saved": "policy", "parallel": T2}),
    (2, {"saved": "policy", "parallel": P2}),
    (2, {"saved": "critic", "kind": "value", "parallel": T2}),
    (2, {"saved": "experts", "family": "mixtral", "parallel": P2}),
    (2, {"saved": "bf16", "parallel": T2, "precision": "bf16"}),
]


def case_for(name: str) -> dict[str, Any]:
    """A case of the tables, or one of a layout alone."""
    own = {"pipeline 2 x data 2": {"parallel": P2}, "data 4": {}}
    return own[name] if name in own else CASES[name]


def named(table: dict[str, dict[str, Any]], sources: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {**case, "name": name, "source": sources[case.get("family", "qwen2")]} for name, case in table.items()
    ]


def checkpoints(num_ranks: int, sources: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    saved = {name: {**case, "saved": name} for name, (ranks, case) in SAVED.items() if ranks == num_ranks}
    loaded = {str(i): case for i, (ranks, case) in enumerate(LOADED) if ranks == num_ranks}
    return {"save": named(saved, sources), "load": named(loaded, sources)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """A saved model of each family."""
    root = tmp_path_factory.mktemp("families")
    sizes: dict[str, dict[str, Any]] = {
        "qwen2": {},
        "qwen2_three_layers": {"num_hidden_layers": 3},
        "qwen2_four_layers": {"num_hidden_layers": 4},
        "qwen3": {},
        "llama": {},
        "mixtral": {},
        "qwen3_moe": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "head_dim": 16,
        },
    }
    for name, changes in sizes.items():
        family = name if name.endswith("moe") else name.partition("_")[0]
        tiny_transformer(family, initializer_range=0.05, vocab_size=100, **changes).save_pretrained(
            root / name
        )
    return {folder.name: str(folder) for folder in root.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of exports and checkpoints."""
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def ran(sources, folder) -> dict[str, list[Any]]:
    """Results of all ranks, by kind and case; two ranks run after four, whose checkpoints they read."""
    policy = {"name": "policy", "source": sources["qwen2"], "parallel": T2P2}
    four = {
        "run": named(FOUR, sources),
        **checkpoints(4, sources),
        "broken": [{**policy, "saved": "policy"}],
        "not_finite": [{**policy, "parallel": P2}],
        "stream": named({name: case_for(name) for name in STREAMED[4]}, sources),
    }
    two = {"run": named(TWO, sources), **checkpoints(2, sources), "together": [{**policy, "parallel": T2}]}
    two["stream"] = named({name: case_for(name) for name in STREAMED[2]}, sources)
    results: dict[str, list[Any]] = {}
    for num_ranks, groups in ((4, four), (2, two)):
        ranks = on_ranks(
            "tests.engines.megatron.megatron_runs:run_all", num_ranks, groups, str(folder), limit_s=400
        )
        results |= {name: [rank[name] for rank in ranks] for name in ranks[0]}
    return results


def case_of(name: str, sources: dict[str, str]) -> dict[str, Any]:
    case = CASES[name]
    return {**case, "source": sources[case.get("family", "qwen2")]}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "precision" not in case])
def test_steps_are_those_of_one_process(name, ran, sources, folder, tmp_path):
    case, ranks = case_of(name, sources), ran[f"run {name}"]
    engine = local_engine_on(case["source"], case)
    worker = worker_on(engine, case)
    expected = steps(worker, ranks[0]["data"], case, -1, updates=UPDATES)
    for rank in ranks:
        for ours, theirs in zip(rank["history"], expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    batch = rows_to_learn(with_padding=True)
    written = worker.write(batch, balance(batch.num_tokens, num_ranks=1, micro_batch_tokens=100))
    rows = {row: values for rank in ranks for row, values in rank["written"].items()}
    assert rows.keys() == set(range(6))
    for row, values in rows.items():
        torch.testing.assert_close(values, written.ragged(written.names[0]).row(row), rtol=1e-5, atol=1e-5)
    theirs, ours = trained_weights(engine.model, tmp_path), exported(folder / name)
    if case.get("kind") == "value":
        theirs = exported(tmp_path)
        assert "head.weight" in theirs
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=2e-6)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of a policy as Transformers loads them, or the tensors of a value model and its head."""
    head = folder / "value_head.safetensors"
    if head.exists():
        return load_file(folder / "model.safetensors") | {
            f"head.{name}": tensor for name, tensor in load_file(head).items()
        }
    return {
        name: parameter.detach() for name, parameter in load_language_model(str(folder)).named_parameters()
    }


@pytest.mark.parametrize("name", CASES)
def test_weights_are_given_as_they_were_read(name, ran, sources):
    case = case_of(name, sources)
    source = {name: p.detach() for name, p in load_language_model(case["source"]).named_parameters()}
    if case.get("kind") == "value":
        source = {
            key.removeprefix("model."): tensor for key, tensor in source.items() if key != "lm_head.weight"
        }
    for rank in ran[f"run {name}"]:
        assert rank["read"].keys() == rank["shapes"].keys() == source.keys()
        assert rank["one"] == [key for key in source if key.endswith("norm.weight") and "layers" not in key]
        for key, tensor in source.items():
            assert rank["shapes"][key] == tensor.shape
            assert torch.equal(rank["read"][key], tensor.to(rank["read"][key].dtype))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("kind") != "value"])
def test_an_export_has_the_tensors_and_the_configuration_of_its_source(name, ran, sources, folder):
    source = Path(case_of(name, sources)["source"])
    ours, theirs = (load_file(where / "model.safetensors") for where in (folder / name, source))
    assert {key: tensor.shape for key, tensor in ours.items()} == {
        key: tensor.shape for key, tensor in theirs.items()
    }
    assert json.loads((folder / name / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_in_bf16_steps_are_near_those_of_fp32(ran, sources):
    case = case_of("tensor 2, bf16", sources)
    expected = steps(
        worker_on(local_engine_on(case["source"], {**case, "precision": "fp32"}), case),
        1,
        case,
        -1,
        updates=UPDATES,
    )
    for rank in ran["run tensor 2, bf16"]:
        for ours, theirs in zip(rank["history"], expected, strict=True):
            assert ours["skipped_updates"] == 0
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
        assert rank["history"][0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.03)


@pytest.mark.parametrize("number", range(len(LOADED)))
def test_a_checkpoint_goes_on_at_any_sizes(number, ran):
    going_on = ran[f"save {LOADED[number][1]['saved']}"][0]
    for history in ran[f"load {number}"]:
        for ours, theirs in zip(history, going_on, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def test_all_ranks_refuse_a_checkpoint_from_which_a_file_is_lost(ran):
    messages = ran["broken policy"]
    assert len(set(messages)) == 1
    assert "is broken" in messages[0] and "rank-00001" in messages[0] and "checkpoint.resume" in messages[0]


@pytest.mark.parametrize("name", [name for names in STREAMED.values() for name in names])
def test_a_step_in_portions_is_that_of_one_process_over_all_rows(name, ran, sources):
    case, ranks = {**case_for(name), "minibatches": 1}, ran[f"stream {name}"]
    engine = local_engine_on(sources[case.get("family", "qwen2")], case)
    expected = steps(worker_on(engine, case), ranks[0]["data"], case, -1, updates=1 + UPDATES)
    weights = dict(engine.full_tensors())
    for rank in ranks:
        for ours, theirs in zip(rank["before"] + rank["history"], expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
        for key, value in weights.items():
            torch.testing.assert_close(rank["weights"][key], value, rtol=1e-5, atol=2e-6)
        assert (
            "not finite in 3 updates in a row, the last time for row" in rank["error"]
            and " 3" in rank["error"]
        )


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(ran):
    for rank in ran["not_finite policy"]:
        first, second, good, third, fourth, last = rank["losses"]
        assert [first, second, third, fourth] == [{"skipped_updates": 1.0}] * 4
        assert good["skipped_updates"] == 0 and good["grad_norm"] > 0
        assert (
            last.startswith("the loss was not finite in 3 updates in a row, the last time for row")
            and " 3" in last
        )


def test_a_gradient_that_is_not_finite_changes_nothing(ran):
    for rank in ran["not_finite policy"]:
        assert (
            rank["gradient"]["skipped_updates"] == 1
            and "loss" in rank["gradient"]
            and "grad_norm" not in rank["gradient"]
        )
        assert rank["weights_stayed"]


def test_models_in_other_layouts_share_the_ranks_and_leave_nothing_behind(ran, sources):
    source = sources["qwen2"]
    cases = {"policy": {}, "critic": {"kind": "value"}}
    expected = {
        name: steps(worker_on(local_engine_on(source, case), case), 1, case, -1, updates=1)
        for name, case in cases.items()
    }
    start, batch = worker_on(local_engine_on(source, {}), {}), rows_to_learn(with_padding=True)
    written = start.write(batch, balance(batch.num_tokens, num_ranks=1, micro_batch_tokens=100))
    for rank in ran["together policy"]:
        assert rank["policy"][0] == pytest.approx(expected["policy"][0], rel=1e-5, abs=1e-7)
        assert rank["critic"][0] == pytest.approx(expected["critic"][0], rel=1e-5, abs=1e-7)
        for row, values in rank["reference"].items():
            torch.testing.assert_close(
                values, written.ragged("trainer_logprobs").row(row), rtol=1e-5, atol=1e-5
            )
        assert rank["policy"][1]["skipped_updates"] == 0
        assert rank["patched"] == [] and rank["same_random_state"]


def test_nothing_is_replaced_by_an_import_or_where_a_gpu_is():
    program = """
import torch
from verl.engines.megatron import cpu_patches
owners = [torch.cuda, torch.Tensor, torch.nn.Module]
owners += [cpu_patches.megatron_random, cpu_patches.token_dispatcher]
before = [dict(vars(owner)) for owner in owners]
import verl.engines.megatron.engine
with cpu_patches.megatron_on(torch.device("cuda")):
    assert [dict(vars(owner)) for owner in owners] == before
with cpu_patches.megatron_on(torch.device("cpu")):
    assert [dict(vars(owner)) for owner in owners] != before
assert [dict(vars(owner)) for owner in owners] == before
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engine": {"name": "megatron", "tensors": 2}},
            "has no option tensors; it has virtual_pipeline, expert, ",
        ),
        (
            {"engine": {"name": "megatron", "expert": 0}},
            "need an integer from 1 for expert of engine megatron, got 0",
        ),
        ({"replicas": 2}, "has no replicas"),
        ({"offload": True}, "has no offload"),
        (
            {"engine": {"name": "megatron", "virtual_pipeline": 2}},
            "need pipeline above 1 for virtual_pipeline=2",
        ),
        (
            {"engine": {"name": "megatron", "sequence_parallel": True}},
            "need tensor above 1 for sequence_parallel",
        ),
        ({"engine": {"name": "megatron", "expert": 2}}, "need experts that expert=2 divides, got 0"),
        ({"pipeline": 3}, "need layers that pipeline . virtual_pipeline divides, got 2 for 3"),
        (
            {"tensor": 3},
            "need sizes of the model that tensor=3 divides, got 4 heads, 2 key-value heads, 64 MLP width",
        ),
        ({"tensor": 2, "sequence": 4}, "need heads that sequence divides, got 4 heads"),
        ({"kind": "reward"}, "need engine fsdp for a reward model"),
        ({"precision": "fp16"}, "need precision fp32 or bf16"),
        ({"packing": False}, "need packing true"),
        (
            {"family": "gemma2"},
            "need a family of qwen2, qwen3, llama, qwen3_moe, mixtral for engine megatron, got 'gemma2'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(changes, message, tmp_path):
    # Where the engine is made, Megatron-Core is imported.
    from verl.engines.megatron.build import megatron_engine

    source = str(tmp_path)
    changes = dict(changes)
    tiny_transformer(changes.pop("family", "qwen2")).save_pretrained(source)
    role = RoleConfig(**{name: changes.pop(name) for name in ("precision", "packing") if name in changes})
    kind = changes.pop("kind", "policy")
    with pytest.raises(ValueError, match=message):
        megatron_engine(source, kind, role, ParallelConfig(**changes), device=CPU, total_updates=1)
