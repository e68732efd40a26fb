"""Weights of a model by their names in a Hugging Face folder: whole tensors, and the shards on this rank."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PretrainedConfig, PreTrainedModel

from verl.engines.hf.lora import (
    POLICY,
    adapter_of,
    base_name,
    dequantized,
    has_lora,
    lora_scaling,
    row_norms,
)
from verl.weight_sync.layout import TensorShard


def shard_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Part of the whole tensor that is on this rank.

    Where several mesh dimensions shard one dimension of the tensor, tensor parallelism comes first and FSDP
    shards what is left: the strided placements of FSDP come last.
    """
    bounds = [(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return tuple(slice(*bound) for bound in bounds)
    coordinates = parameter.device_mesh.get_coordinate()
    assert coordinates is not None

    def is_strided(placement: object) -> bool:
        # By name: the strided placement is no public class, and no subclass of Shard in every version.
        return type(placement).__name__ == "_StridedShard"

    shards = [
        (mesh_dim, placement)
        for mesh_dim, placement in enumerate(parameter.placements)
        if placement.is_shard() or is_strided(placement)
    ]
    for mesh_dim, placement in sorted(shards, key=lambda shard: is_strided(shard[1])):
        assert isinstance(placement, Shard) or is_strided(placement)
        dim: int = placement.dim  # type: ignore[attr-defined]
        start, stop = bounds[dim]
        # Shards are of equal size, rounded up; the last ones may be smaller or empty.
        width = -(-(stop - start) // parameter.device_mesh.size(mesh_dim))
        first = min(stop, start + coordinates[mesh_dim] * width)
        bounds[dim] = (first, min(stop, first + width))
    return tuple(slice(*bound) for bound in bounds)


def to_local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full(tensor: Tensor) -> Tensor:
    """The whole tensor, detached and contiguous; a collective if it is sharded."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().contiguous()


@dataclass(frozen=True)
class PlainTensor:
    """A tensor of the model as it is without adapters, with the policy's adapter merged.

    Attributes:
        parameter: its storage, without the adapter.
        layer: whose adapter is merged; None: there is none.
    """

    parameter: Tensor
    layer: nn.Module | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.parameter.shape)

    def full(self) -> Tensor:
        """The whole tensor; a collective if it is sharded."""
        full = to_full(dequantized(self.parameter))
        return full if self.layer is None else merged(full, self.layer)

    def local(self) -> Tensor:
        """The part on this rank; of a layer with an adapter a new tensor, which takes a collective."""
        if self.layer is None:
            return to_local(self.parameter).detach()
        slices = shard_slices(self.parameter)
        if _magnitude(self.layer) is not None:
            return self.full()[slices].to(to_local(self.parameter).device)
        local = to_local(dequantized(self.parameter))
        return (local + lora_delta(self.layer)[slices].to(local.device)).detach()


def plain_tensors(transformer: nn.Module) -> dict[str, PlainTensor]:
    """The tensors of the model without adapters, by their names in a Hugging Face folder.

    A tensor that several layers share is there once, unless an adapter changes it in one of them.
    """
    adapted, tensors = lora_modules(transformer), {}
    saved = {base_name(n) for n, _ in transformer.named_parameters() if f".modules_to_save.{POLICY}." in n}
    seen: set[tuple[int, int]] = set()
    for name, parameter in transformer.named_parameters(remove_duplicate=False):
        owner, plain = adapter_of(name), base_name(name)
        is_saved = f".modules_to_save.{POLICY}." in name
        if (owner and not is_saved) or (".original_module." in name and plain in saved):
            continue
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        key = (id(parameter), id(layer))
        if key not in seen:
            seen.add(key)
            tensors[plain] = PlainTensor(parameter, layer)
    return tensors


def full_shapes(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that `full_tensors` yields, by name."""
    return {name: tensor.shape for name, tensor in plain_tensors(transformer).items()}


@torch.no_grad()
def full_tensors(
    transformer: nn.Module, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of a model, with the policy's adapter merged; a collective for each.

    Args:
        transformer: sharded or not.
        wanted: names of the tensors to yield, the same on all ranks; None: all.
    """
    for name, tensor in plain_tensors(transformer).items():
        if wanted is None or name in wanted:
            yield name, tensor.full()


def local_shards(transformer: nn.Module) -> list[TensorShard]:
    """Shards of the whole tensors on this rank, by the names of `full_tensors` and `local_tensors`."""
    shards = []
    for name, tensor in plain_tensors(transformer).items():
        bounds = tuple((part.start, part.stop) for part in shard_slices(tensor.parameter))
        if all(start < stop for start, stop in bounds):
            shards.append(TensorShard(name, bounds, name, (0,) * len(bounds)))
    return shards


@torch.no_grad()
def local_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """Local tensors of this rank, by name.

    They are the storage of the parameters. Only a matrix with a LoRA adapter is a new tensor, with the
    adapter merged, which takes a collective.
    """
    return {name: tensor.local() for name, tensor in plain_tensors(transformer).items()}


def unties_embeddings(transformer: PreTrainedModel) -> bool:
    """True if an adapter changes one of two embeddings that share their weights in the model's files."""
    config = transformer.config.get_text_config()
    if not config.tie_word_embeddings or not has_lora(transformer, POLICY):
        return False
    return plain_tensors(transformer).keys() >= {*embedding_names(transformer)}


def embedding_names(transformer: PreTrainedModel) -> tuple[str | None, str]:
    """Names of the weights of the output layer, if there is one, and of the input embeddings."""
    names = {id(module): f"{name}.weight" for name, module in transformer.named_modules()}
    head = transformer.get_output_embeddings()
    return names.get(id(head)), names[id(transformer.get_input_embeddings())]


def merged_config(transformer: PreTrainedModel) -> PretrainedConfig:
    """Configuration of the model with its adapter merged: its embeddings may be tied no longer."""
    if not unties_embeddings(transformer):
        return transformer.config
    config = copy.deepcopy(transformer.config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def lora_modules(transformer: nn.Module) -> dict[str, nn.Module]:
    """Layers that the policy's adapter changes, by name."""
    own = (name for name, _ in transformer.named_parameters() if adapter_of(name) == POLICY)
    names = {name.partition(".lora_")[0] for name in own if ".lora_" in name}
    return {name: module for name, module in transformer.named_modules() if name in names}


def lora_pair(module: nn.Module) -> tuple[Tensor, Tensor]:
    """A [rank, inputs] and B [outputs, rank] of the policy's adapter of a layer, whole."""
    if f"lora_A.{POLICY}.weight" in dict(module.named_parameters()):
        return to_full(module.get_parameter(f"lora_A.{POLICY}.weight")), to_full(
            module.get_parameter(f"lora_B.{POLICY}.weight")
        )
    # Of an embedding: A [rank, vocabulary], B [hidden, rank].
    a, b = (to_full(module.get_parameter(f"lora_embedding_{part}.{POLICY}")) for part in "AB")
    return b.T, a.T


def lora_delta(module: nn.Module) -> Tensor:
    """The matrix that the LoRA adapter of a layer adds to its weight, B A alpha / rank, whole."""
    a, b = lora_pair(module)
    return lora_scaling(module) * (b @ a)


def merged(weight: Tensor, module: nn.Module) -> Tensor:
    """The weight of a layer with its adapter merged.

    With DoRA the rows of W + B A alpha / rank get the trained norms; 2402.09353, equation 5.
    """
    total = weight + lora_delta(module)
    magnitude = _magnitude(module)
    if magnitude is None:
        return total
    return total * (to_full(magnitude) / row_norms(total))[:, None]


def _magnitude(module: nn.Module) -> Tensor | None:
    """The norms that DoRA trains; None: the adapter has none."""
    return dict(module.named_parameters()).get(f"lora_magnitude_vector.{POLICY}.weight")


def is_plain_lora(transformer: nn.Module) -> bool:
    """True if the policy's adapter is one pair of matrices of one rank and scale for linear layers.

    Then servers can load the adapter alone.
    """
    names = [name for name, _ in transformer.named_parameters() if adapter_of(name) == POLICY]
    is_pair = all(".lora_A." in name or ".lora_B." in name for name in names)
    kinds = {
        (module.get_parameter(f"lora_A.{POLICY}.weight").shape[0], lora_scaling(module))
        for module in lora_modules(transformer).values()
        if is_pair
    }
    return bool(names) and is_pair and len(kinds) == 1


@torch.no_grad()
def lora_adapter_files(transformer: nn.Module) -> dict[str, bytes]:
    """The two files of a PEFT folder with the LoRA adapter, name -> content; a collective for each tensor."""
    adapted = lora_modules(transformer)
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": matrix.cpu()
        for name, module in adapted.items()
        for part, matrix in zip("AB", lora_pair(module), strict=True)
    }
    first = next(iter(adapted.values()))
    rank = lora_pair(first)[0].shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": lora_scaling(first) * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
