"""Loads weight updates into a model, chunk by chunk, and checks that they are complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from verl.engines.hf.pretrained import load_language_model
from verl.weight_sync.fingerprint import digest, fingerprint
from verl.weight_sync.layout import Bounds, full_bounds
from verl.weight_sync.receiver import WeightReceiver
from verl.weight_sync.shard_tracking import shard_key, slices_of
from verl.weight_sync.shared_memory import dtype_of
from verl.weight_sync.types import TensorInfo, WeightChunk

# Names in PEFT's files: base_model.model.NAME.lora_A.weight
_PEFT_PREFIX = "base_model.model."


class WeightLoader:
    """Loads updates into the weights of a model, in place.

    Between `begin` and a successful `end` the model has a mix of old and new weights.

    Attributes:
        is_torn: the model has such a mix.
        is_open: an update was begun and not ended.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.is_torn = self.is_open = False
        self._weights: dict[str, Tensor] = dict(transformer.state_dict(keep_vars=True))
        # Of this update: digests by `shard_key`, and the names of the loaded tensors.
        self._digests: dict[str, int] = {}
        self._loaded: set[str] = set()
        # Bounds of the parts of each tensor that have a digest of their own; a folder has whole tensors.
        self._digest_bounds: dict[str, list[Bounds]] = {}
        # Tensors need not be kept: the model copies them into its own weights.
        self._receiver = WeightReceiver(None, copies_tensors=False)
        # Weights without the LoRA adapter, of the matrices that it changes.
        self._base_weights: dict[str, Tensor] = {}

    def join_group(
        self, address: str, port: int, rank: int, *, num_ranks: int, backend: str, timeout_s: float
    ) -> None:
        """Join the process group that carries chunks, in place of an earlier one."""
        self._receiver.join_group(
            address, port, rank=rank, num_ranks=num_ranks, backend=backend, timeout_s=timeout_s
        )

    def begin(self) -> None:
        """Begin an update; one that was not ended is forgotten."""
        self._digests, self._loaded, self._digest_bounds = {}, set(), {}
        self.is_open = self.is_torn = True

    def receive(self, chunk: WeightChunk) -> list[tuple[TensorInfo, Tensor]]:
        """Receive the tensors of a chunk without loading them; waits for the sender over a process group.

        Raises:
            ValueError: no update was begun.
            RuntimeError: bytes are missing, there is no group, or it failed.
        """
        if not self.is_open:
            raise ValueError("need begin_update before weights are loaded")
        if chunk.transport == "disk":
            return list(read_tensors(Path(chunk.location["folder"]), chunk.tensors, self._weights))
        if chunk.transport not in ("shm", "group", "direct", "ipc"):
            raise ValueError(f"need weights via shm, disk, group or direct, got {chunk.transport!r}")
        tensors = []
        for batch in self._receiver.received(chunk):
            for received in batch:
                ((_, tensor),) = received.shards
                tensors.append((received.info, tensor))
                self._digest_bounds[received.info.name] = received.digest_bounds
        return tensors

    @torch.no_grad()
    def load(self, tensors: Sequence[tuple[TensorInfo, Tensor]]) -> None:
        """Copy received tensors into the model.

        Raises:
            ValueError: the model has no such tensor, or one of another shape.
        """
        for info, tensor in tensors:
            weight = self._weights.get(info.name)
            if weight is None or tuple(weight.shape) != tuple(tensor.shape):
                found = "no such tensor" if weight is None else f"one of shape {tuple(weight.shape)}"
                raise ValueError(
                    f"need tensors that the model has, got {info.name} of shape {tuple(tensor.shape)};"
                    f" the model has {found}"
                )
            weight.copy_(tensor)
            self._loaded.add(info.name)
            # Digests are of the model's weights, in the dtype that was sent: they show a copy that lost bits.
            loaded = weight.to(tensor.dtype)
            for bounds in self._digest_bounds.get(info.name) or [full_bounds(tuple(weight.shape))]:
                key = shard_key(info.name, bounds, shape=weight.shape)
                self._digests[key] = digest(loaded[slices_of(bounds)])

    def end(self) -> str:
        """End the update and return the fingerprint of what was loaded.

        Raises:
            ValueError: no update was begun, or tensors of the model were not sent; the weights stay torn.
        """
        if not self.is_open:
            raise ValueError("need begin_update before end_update")
        self.is_open = False
        # Names that share storage, such as those of a tied head, count as one. Buffers need not be sent,
        # since no optimizer changes them.
        loaded = {self._weights[name].data_ptr() for name in self._loaded}
        missing = [
            name
            for name, tensor in self._weights.items()
            if isinstance(tensor, nn.Parameter) and tensor.numel() > 0 and tensor.data_ptr() not in loaded
        ]
        if missing:
            raise ValueError(
                f"need all weights in an update, but {len(missing)} were not sent: {first_names(missing)}"
            )
        self._base_weights = {}
        self.is_torn = False
        return fingerprint(self._digests)

    @torch.no_grad()
    def load_lora_adapter(self, folder: Path) -> str:
        """Merge a LoRA adapter in PEFT format into the weights, in place of an earlier one.

        Returns:
            Fingerprint of the tensors in its file.

        Raises:
            ValueError: the adapter does not fit the model, is of a kind that is not supported, or the weights
                are torn.
        """
        if self.is_torn:
            raise ValueError("need complete weights before a LoRA adapter; the last update was not completed")
        scaling, tensors = read_lora_adapter(folder)
        pairs = self._lora_pairs(tensors)
        for name, base in self._base_weights.items():
            self._weights[name].copy_(base)
        for name, (lora_a, lora_b) in pairs.items():
            weight = self._weights[name]
            self._base_weights.setdefault(name, weight.detach().clone())
            down, up = (tensors[side].to(weight.device, torch.float32) for side in (lora_a, lora_b))
            weight.add_((up @ down) * scaling)
        return fingerprint({name: digest(tensor) for name, tensor in tensors.items()})

    def _lora_pairs(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
        """Names of the lora_A and lora_B tensors of each weight that an adapter changes.

        Raises:
            ValueError: a tensor belongs to no weight of the model, or has another shape.
        """
        pairs = {}
        for lora_a in (name for name in tensors if ".lora_A." in name):
            weight = lora_a.removeprefix(_PEFT_PREFIX).replace(".lora_A.", ".")
            pairs[weight] = (lora_a, lora_a.replace(".lora_A.", ".lora_B."))
        sides = {side for pair in pairs.values() for side in pair}
        unknown = [name for name in tensors if name not in sides]
        unknown += [
            lora_a
            for name, (lora_a, lora_b) in pairs.items()
            if name not in self._weights or lora_b not in tensors
        ]
        if unknown:
            raise ValueError(
                f"need lora_A and lora_B of matrices of the model in an adapter, got {first_names(unknown)}"
            )
        for name, (lora_a, lora_b) in pairs.items():
            needed = tuple(self._weights[name].shape)
            shape = (tensors[lora_b].shape[0], tensors[lora_a].shape[1])
            if needed != shape:
                raise ValueError(f"need a LoRA adapter of the shape of {name}, {needed}, got {shape}")
        return pairs


def read_lora_adapter(folder: Path) -> tuple[float, dict[str, Tensor]]:
    """Read the scaling alpha / r and the tensors of a LoRA adapter in PEFT format.

    Raises:
        ValueError: it is of a kind that is not supported.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if any(config.get(name) for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")):
        raise ValueError(
            "need a plain LoRA adapter of one rank, without DoRA, rank-stabilized scaling or patterns"
        )
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return config["lora_alpha"] / config["r"], tensors


def read_tensors(
    folder: Path, wanted: Sequence[TensorInfo], weights: Mapping[str, Tensor]
) -> Iterator[tuple[TensorInfo, Tensor]]:
    """Read tensors of a Hugging Face folder.

    Args:
        folder: with *.safetensors.
        wanted: tensors to read, in the dtype to convert them to; none: all.
        weights: of the model, by the names that it has for them.

    Raises:
        RuntimeError: a wanted tensor is not there.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"need *.safetensors in {folder}, got none")
    infos = {info.name: info for info in wanted}
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not infos or name in infos]  # noqa: SIM118
            found |= {name: file.get_tensor(name) for name in names}
    if not set(infos or found) <= found.keys() or not found.keys() <= weights.keys():
        # Some families have other names in files than in the model; Transformers converts them.
        state = load_language_model(str(folder)).state_dict()
        found = {name: tensor for name, tensor in state.items() if not infos or name in infos}
    if missing := sorted(infos.keys() - found.keys()):
        raise RuntimeError(
            f"need the tensors of the update in {folder}, but {len(missing)} are not there:"
            f" {first_names(missing)}"
        )
    for name, tensor in found.items():
        own = TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        yield infos.get(name, own), tensor.to(dtype_of(infos[name])) if name in infos else tensor


def first_names(names: Sequence[str], limit: int = 3) -> str:
    """The first names of a list, for messages."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
