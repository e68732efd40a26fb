"""Layouts of language models: local tensors of each engine, and plans between any two layouts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed import on_ranks
from tests.weight_sync.arrays import assert_equal, executed, filled, replicated, tensors, window
from verl.planner.architectures import SIZES, Architecture, architecture, named_architecture
from verl.planner.model_layouts import (
    AxisRank,
    ModelParallelRank,
    fsdp_shards,
    generation_layout,
    model_shards,
    training_layout,
)
from verl.planner.traffic import received_share, traffic
from verl.weight_sync.layout import ShardLayout
from verl.weight_sync.meshes import Mesh
from verl.weight_sync.reshard_plan import make_plan

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 2,
    "vocab_size": 70,
}
DENSE = architecture({**SMALL, "model_type": "qwen3", "num_key_value_heads": 4})
TIED = architecture(
    {**SMALL, "model_type": "qwen2", "num_key_value_heads": 8, "tie_word_embeddings": True, "head_dim": 1}
)
SPARSE = architecture(
    {
        **SMALL,
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "num_experts": 8,
        "moe_intermediate_size": 8,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
    }
)

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 4, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_a_folder_that_transformers_writes(family, tmp_path):
    sizes = {**SMALL, "num_key_value_heads": 4, "num_hidden_layers": 2, **FAMILIES[family]}
    config = AutoConfig.for_model(
        family, **{name: size for name, size in sizes.items() if family != "qwen2" or name != "head_dim"}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert dict(named_architecture(str(tmp_path)).shapes) == written


def test_the_named_sizes_have_the_weights_of_their_models():
    assert {name: round(named_architecture(name).num_elements / 1e9, 2) for name in SIZES} == {
        "llama-7b": 6.74,
        "llama-13b": 13.02,
        "llama-34b": 33.74,
        "llama-70b": 68.98,
    }


@pytest.mark.parametrize("shards", [1, 3, 8, 11])
def test_fsdp_shards_are_the_chunks_of_pytorch(shards):
    shapes = {"w": (10, 3), "b": (4,), "one": (1, 2)}
    wholes, whole = tensors(shapes), replicated(shapes, 1).shards[0]
    layout = ShardLayout(shapes, tuple(fsdp_shards(whole, AxisRank(rank, shards)) for rank in range(shards)))
    for rank, local_tensors in enumerate(filled(layout, wholes)):
        for name, values in wholes.items():
            chunks = torch.from_numpy(values).chunk(shards)
            if rank < len(chunks):
                # The tests' local tensors end with padding in each dimension.
                np.testing.assert_array_equal(
                    local_tensors[name][tuple(slice(0, -1) for _ in values.shape)], chunks[rank].numpy()
                )
            else:
                assert name not in local_tensors


@pytest.mark.distributed
def test_layouts_of_fsdp_and_tensor_parallel_are_those_of_real_models():
    # 22 rows over 4 shards, or 11 over 2, are uneven; of 2 rows, two of 4 shards are empty.
    config = {
        **SMALL,
        "model_type": "qwen3",
        "num_key_value_heads": 4,
        "intermediate_size": 22,
        "num_hidden_layers": 1,
    }
    parallels = [{}, {"tensor": 2}, {"replicas": 2}, {"sequence": 2}]
    ranks = on_ranks("tests.weight_sync.layout_runs:shards_of", 4, config, parallels)
    for i, sizes in enumerate(parallels):
        tensor, replicas = sizes.get("tensor", 1), sizes.get("replicas", 1)
        expected = training_layout(
            architecture(config), Mesh(tensor=tensor, shards=4 // (tensor * replicas), replicas=replicas)
        )
        for rank in range(4):
            assert set(ranks[rank][i]) == set(expected.shards[rank]), (sizes, rank)


def parts(values: np.ndarray, size: int, rank: int, dim: int = 0) -> torch.Tensor:
    return torch.from_numpy(values).chunk(size, dim)[rank]


def local_tensor(model: Architecture, rank: ModelParallelRank, weight_format: str, name: str) -> np.ndarray:
    layout = ShardLayout(model.shapes, (model_shards(model, rank, weight_format=weight_format),))
    padded = filled(layout, tensors(model.shapes))[0][name]
    return padded[tuple(slice(0, -1) for _ in padded.shape)]


@pytest.mark.parametrize("rank", range(4))
def test_fused_local_tensors_have_queries_keys_and_values_one_after_the_other(rank):
    wholes = tensors(DENSE.shapes)
    prefix, model_rank = "model.layers.2", ModelParallelRank(AxisRank(rank, 4))
    qkv = torch.cat([parts(wholes[f"{prefix}.self_attn.{x}_proj.weight"], 4, rank) for x in "qkv"])
    np.testing.assert_array_equal(
        local_tensor(DENSE, model_rank, "vllm", f"{prefix}.self_attn.qkv_proj.weight"), qkv
    )
    gate_up = torch.cat([parts(wholes[f"{prefix}.mlp.{x}_proj.weight"], 4, rank) for x in ("gate", "up")])
    np.testing.assert_array_equal(
        local_tensor(DENSE, model_rank, "vllm", f"{prefix}.mlp.gate_up_proj.weight"), gate_up
    )
    down = parts(wholes[f"{prefix}.mlp.down_proj.weight"], 4, rank, dim=1)
    np.testing.assert_array_equal(
        local_tensor(DENSE, model_rank, "vllm", f"{prefix}.mlp.down_proj.weight"), down
    )


def test_fewer_key_value_heads_than_ranks_are_repeated():
    wholes = tensors(DENSE.shapes)
    for rank in range(8):
        found = local_tensor(
            DENSE, ModelParallelRank(AxisRank(rank, 8)), "vllm", "model.layers.0.self_attn.qkv_proj.weight"
        )
        key = wholes["model.layers.0.self_attn.k_proj.weight"].reshape(4, 2, 8)[rank // 2]
        np.testing.assert_array_equal(found[2:4], key)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_megatron_has_each_key_value_head_behind_its_queries(tensor):
    for kind in ("weight", "bias"):
        model = architecture(
            {**SMALL, "model_type": "llama", "num_key_value_heads": 4, "attention_bias": True}
        )
        wholes = {name: torch.from_numpy(values) for name, values in tensors(model.shapes).items()}
        grouped = [wholes[f"model.layers.1.self_attn.{x}_proj.{kind}"].unflatten(0, (4, -1)) for x in "qkv"]
        expected = torch.cat(grouped, 1).flatten(0, 1).chunk(tensor)
        for rank in range(tensor):
            found = local_tensor(
                model,
                ModelParallelRank(AxisRank(rank, tensor)),
                "megatron",
                f"model.layers.1.self_attn.qkv_proj.{kind}",
            )
            np.testing.assert_array_equal(found, expected[rank])


def test_the_vocabulary_is_padded_before_it_is_split_and_padding_is_part_of_nothing():
    for weight_format, tensor, rows in (
        ("vllm", 4, [32, 32, 6, 0]),
        ("megatron", 2, [70, 0]),
        ("transformers", 4, [18, 18, 18, 16]),
    ):
        found = []
        for rank in range(tensor):
            shards = {
                shard.name: shard
                for shard in model_shards(
                    DENSE, ModelParallelRank(AxisRank(rank, tensor)), weight_format=weight_format
                )
            }
            head = shards.get("lm_head.weight")
            found.append(head.bounds[0][1] - head.bounds[0][0] if head else 0)
            assert head is None or (head.bounds[0][0] == sum(rows[:rank]) and head.offset == (0, 0))
        assert found == rows


def test_experts_are_stacked_in_one_local_tensor_or_have_one_each():
    wholes, prefix = tensors(SPARSE.shapes), "model.layers.1.mlp.experts"
    split = local_tensor(SPARSE, ModelParallelRank(AxisRank(1, 2)), "vllm", f"{prefix}.gate_up_proj")
    of_experts = local_tensor(
        SPARSE, ModelParallelRank(AxisRank(1, 2), experts=AxisRank(1, 2)), "vllm", f"{prefix}.gate_up_proj"
    )
    assert split.shape == (8, 8, 8) and of_experts.shape == (4, 16, 8)
    for expert in range(8):
        gate, up = (wholes[f"{prefix}.{expert}.{x}_proj.weight"] for x in ("gate", "up"))
        np.testing.assert_array_equal(split[expert], torch.cat([parts(gate, 2, 1), parts(up, 2, 1)]))
        if expert >= 4:
            np.testing.assert_array_equal(of_experts[expert - 4], np.concatenate([gate, up]))
    single = local_tensor(
        SPARSE,
        ModelParallelRank(AxisRank(1, 2), experts=AxisRank(1, 2)),
        "megatron",
        f"{prefix}.5.down_proj.weight",
    )
    np.testing.assert_array_equal(single, wholes[f"{prefix}.5.down_proj.weight"])


def test_stages_have_their_layers_and_a_tied_embedding_is_the_head_of_the_last():
    stages = [
        model_shards(TIED, ModelParallelRank(stage=AxisRank(stage, 3)), weight_format="megatron")
        for stage in range(3)
    ]
    layers = [
        sorted({p.name.split(".")[2] for p in stage if p.name.startswith("model.layers")}) for stage in stages
    ]
    assert layers == [["0", "1"], ["2"], ["3"]]
    local_names = [
        {shard.local_name for shard in stage if shard.name == "model.embed_tokens.weight"} for stage in stages
    ]
    assert local_names == [{"model.embed_tokens.weight"}, set(), {"lm_head.weight"}]
    assert [{"model.norm.weight"} & {p.name for p in stage} for stage in stages] == [
        set(),
        set(),
        {"model.norm.weight"},
    ]


def layouts(model: Architecture) -> dict[str, ShardLayout]:
    """Layouts of a model on 16 ranks."""
    flat = Mesh(replicas=16)
    found = {"replicated": replicated(model.shapes, 16)}
    meshes = {
        "fsdp 16": Mesh(shards=16),
        "fsdp 4 x 4 replicas": Mesh(shards=4, replicas=4),
        "fsdp 4 x tensor 2 x 2": Mesh(shards=4, tensor=2, replicas=2),
        "tensor 8 x sequence 2": Mesh(tensor=8, sequence=2),
        "stages 4 x tensor 4": Mesh(tensor=4, pipeline=4),
    }
    found |= {name: training_layout(model, mesh) for name, mesh in meshes.items()}
    megatron = {
        "megatron 4 x 2 x 2": Mesh(tensor=4, pipeline=2, replicas=2),
        "megatron 2 x 4 x 2": Mesh(tensor=2, pipeline=4, replicas=2),
    }
    if model is SPARSE:
        # Its dense weights have the layouts of the dense model.
        found = {name: found[name] for name in ("fsdp 16", "fsdp 4 x tensor 2 x 2", "replicated")}
        megatron = {
            "megatron 4 x 2 x 2": megatron["megatron 4 x 2 x 2"],
            "experts over 8": Mesh(tensor=4, replicas=4, experts=8),
        }
    found |= {name: training_layout(model, mesh, weight_format="megatron") for name, mesh in megatron.items()}
    found["vllm 8"] = generation_layout(
        model, flat, tensor=8, grouping="consecutive", has_split_experts=model is not SPARSE
    )
    found["vllm 2 x 2"] = generation_layout(
        model, Mesh(tensor=4, pipeline=2, replicas=2), tensor=2, pipeline=2
    )
    return found


def mask(layout: ShardLayout, rank: int, wholes: dict[str, np.ndarray], size: int) -> np.ndarray:
    """True for each element that a rank has."""
    held = np.zeros(size, dtype=bool)
    for shard in layout.shards[rank]:
        held[window(wholes[shard.name], shard.bounds).ravel()] = True
    return held


@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_between_all_pairs_of_layouts_everything_arrives_and_only_what_is_lacking_travels(model):
    wholes = tensors(model.shapes)
    found = layouts(model)
    masks = {
        name: [mask(layout, rank, wholes, 1 + model.num_elements) for rank in range(16)]
        for name, layout in found.items()
    }
    values = {name: filled(layout, wholes) for name, layout in found.items()}
    for source, target in itertools.product(found, found):
        plan = make_plan(found[source], found[target], itemsize=4, bucket_bytes=2000)
        assert_equal(executed(plan, values[source], found[target]), values[target])
        for rank in range(16):
            lacking = int((masks[target][rank] & ~masks[source][rank]).sum())
            assert plan.received_bytes(rank) == 4 * lacking, (source, target, rank)


@pytest.mark.parametrize(
    "source", ["megatron 4 x 2 x 2", "fsdp 4 x tensor 2 x 2", "experts over 8", "replicated"]
)
def test_traffic_without_listing_copies_is_that_of_the_plan(source):
    found = layouts(SPARSE)
    for target, bucket_bytes in itertools.product(("vllm 8", "fsdp 16"), (300, 5000)):
        plan = make_plan(
            found[source], found[target], itemsize=2, bucket_bytes=bucket_bytes, ranks_per_node=4
        )
        counted = traffic(
            found[source], found[target], itemsize=2, bucket_bytes=bucket_bytes, ranks_per_node=4
        )
        for rank in range(16):
            assert counted.received[rank] == plan.received_bytes(rank) and counted.sent[
                rank
            ] == plan.sent_bytes(rank)
            assert counted.local[rank] == plan.local_bytes(rank) and counted.messages[
                rank
            ] == plan.num_messages(rank)
        assert len(counted.buckets) == len(plan.buckets)


@pytest.mark.parametrize(
    ("mesh", "tensor", "pipeline", "weight_format"),
    [
        (Mesh(tensor=4, replicas=2), 2, 1, "megatron"),
        (Mesh(tensor=4, pipeline=2), 2, 1, "megatron"),
        (Mesh(tensor=4, pipeline=4), 4, 1, "megatron"),
        (Mesh(tensor=2, pipeline=4, replicas=2), 1, 2, "megatron"),
        (Mesh(tensor=4, replicas=2), 4, 1, "megatron"),
    ],
)
def test_received_bytes_are_those_of_the_formula_for_weights_that_are_split(
    mesh, tensor, pipeline, weight_format
):
    model = architecture(
        {**SMALL, "model_type": "llama", "num_key_value_heads": 4, "vocab_size": 512, "num_hidden_layers": 8}
    )
    split = {name: shape for name, shape in model.shapes.items() if "norm" not in name and "layers" in name}
    source, target = (
        training_layout(model, mesh, weight_format=weight_format),
        generation_layout(model, mesh, tensor=tensor, pipeline=pipeline),
    )
    both = [
        ShardLayout(split, tuple(tuple(p for p in ranks if p.name in split) for ranks in layout.shards))
        for layout in (source, target)
    ]
    counted = traffic(*both, itemsize=2)
    total = 2 * sum(int(np.prod(shape)) for shape in split.values())
    assert set(counted.received) == {received_share(mesh, tensor=tensor, pipeline=pipeline) * total}
    # Nothing of training is left beside what generation has.
    assert set(counted.local) == {total // (mesh.tensor * mesh.pipeline)}


def test_the_most_loaded_sender_is_near_the_mean():
    model = named_architecture("llama-7b")
    for mesh, weight_format in (
        (Mesh(tensor=8, pipeline=2, replicas=2), "megatron"),
        (Mesh(shards=8, replicas=2), "transformers"),
    ):
        moved = traffic(
            training_layout(model, mesh, weight_format=weight_format),
            generation_layout(model, mesh, tensor=2),
            itemsize=2,
        )
        assert moved.sent.max() <= 1.1 * moved.sent.mean()


@pytest.mark.parametrize("replicas", [1, 2])
def test_all_stages_of_a_pipeline_send_at_a_time(replicas):
    model = named_architecture("llama-7b")
    mesh = Mesh(tensor=2, pipeline=8, replicas=replicas)
    moved = traffic(
        training_layout(model, mesh, weight_format="megatron"),
        generation_layout(model, mesh, tensor=2),
        itemsize=2,
    )
    # One stage after the other would take 8 times what the fullest rank receives; embedding and head make two
    # stages larger.
    assert moved.critical_bytes < 1.3 * moved.received.max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: architecture({"model_type": "mamba"}), "need a model of llama, .* got model_type 'mamba'"),
        (
            lambda: architecture({"model_type": "llama"}),
            "need hidden_size in the configuration of a model of family llama",
        ),
        (lambda: named_architecture("llama-7"), "or one of llama-7b, .*did you mean 'llama-7b'"),
        (
            lambda: training_layout(DENSE, Mesh(tensor=3)),
            "need tensor parallel sizes that divide .*got 8 queries for tensor=3",
        ),
        (
            lambda: training_layout(DENSE, Mesh(tensor=8), weight_format="megatron"),
            "need key-value heads that tensor=8 divides, got 4",
        ),
        (
            lambda: training_layout(DENSE, Mesh(pipeline=5)),
            "need at most as many stages as layers, got 5 for 4",
        ),
        (
            lambda: training_layout(
                architecture({**SMALL, "model_type": "llama"}, {"model.layers.0.mixer": (2, 2)}), Mesh()
            ),
            "need a tensor whose split is known, got model.layers.0.mixer",
        ),
    ],
)
def test_models_and_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
