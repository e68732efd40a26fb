"""Training with Megatron-Core: tensor, pipeline, context and expert parallelism over an optimizer that data
ranks share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn
from transformers import AutoConfig
from typing_extensions import override

from verl.config.placement import ParallelConfig
from verl.config.roles import RoleConfig
from verl.data.batch import Batch, ModelInput, Trajectory, present_mask
from verl.engines.base import ForwardEngine, Objective, Outputs, UpdateTotals
from verl.engines.hf.hf_io import model_folder
from verl.engines.local import LocalEngine, LossScale, lr_factor
from verl.engines.megatron.checkpoint import (
    agreed,
    begin_save,
    digest,
    optimizer_parts,
    publish_weights,
    read_parts,
    read_progress,
    set_steps,
)
from verl.engines.megatron.grad_buffers import GradBuffers
from verl.engines.megatron.hf_io import export_folder, fill_from_folder, full_tensors
from verl.engines.megatron.model import (
    MegatronPolicy,
    MegatronValue,
    PackedSequence,
    PipelineStages,
    make_stages,
    transformer_config,
)
from verl.engines.megatron.parallel_dims import ParallelSizes, RankCoordinates, make_coordinates
from verl.engines.megatron.weight_mapping import MegatronModelSpec, Share, check_divisible
from verl.utils.sampling_types import Prompt
from verl.weight_sync.layout import TensorShard

# Options of this engine, and fields of Megatron-Core's TransformerConfig that pass through to it.
OWN_OPTIONS = (
    "virtual_pipeline",
    "expert",
    "make_vocab_size_divisible_by",
    "bucket_size",
    "overlap_grad_reduce",
)
PASSED_OPTIONS = (
    "sequence_parallel",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "microbatch_group_size_per_vp_stage",
    "moe_router_dtype",
)
# What the last stage makes of a micro-batch, see `_MicroBatch`.
Evaluate = Callable[[Sequence[int], Batch, ModelInput], Any]


def megatron_engine(
    source: str,
    kind: Literal["policy", "value", "reward"],
    role: RoleConfig,
    parallel: ParallelConfig,
    *,
    device: torch.device,
    total_updates: int | None,
) -> MegatronForwardEngine:
    """The engine of a model that is spread over all ranks of the default process group; made on all of them
    at once.

    Each rank reads from the folder only the slices that it holds.

    Args:
        source: folder or hub name of a causal language model.
        kind: what it becomes.
        role: precision, optimizer.
        parallel: sizes of the grid (`sequence` are Megatron-Core's context parallel ranks), and the options
            of this engine.
        device: of this rank.
        total_updates: of the whole run, for the schedule; None: the model is only read.

    Raises:
        ValueError: sizes or options that do not fit the model, the ranks or this engine, or no model.
    """
    if kind == "reward":
        raise ValueError(
            "need engine fsdp for a reward model: engine megatron trains policies and value models"
        )
    own, passed = _options(role, parallel)
    folder = model_folder(source)
    anatomy = _anatomy(folder, kind, own["make_vocab_size_divisible_by"] * parallel.tensor)
    expert = own["expert"] if anatomy.is_mixture else 0
    extents = ParallelSizes(
        parallel.tensor, parallel.pipeline, parallel.sequence, expert, own["virtual_pipeline"]
    )
    is_even = not any(name.startswith("num_layers_in_") for name in passed)
    check_divisible(
        anatomy,
        tensor=extents.tensor,
        context=extents.context,
        expert=own["expert"],
        chunks=extents.pipeline * extents.virtual if is_even else 1,
        packing=role.packing,
    )
    if anatomy.is_mixture and extents.tensor > 1:
        # Megatron-Core's dispatchers of tokens to experts want each token on one tensor rank.
        passed.setdefault("sequence_parallel", True)
    grid = make_coordinates(extents, device)
    precision: Any = role.precision
    with grid.active():
        megatron_config = transformer_config(anatomy, grid, precision, passed)
        chunks = PipelineStages(make_stages(megatron_config, anatomy, grid), anatomy.config)
        if kind == "value":
            model: MegatronPolicy | MegatronValue = MegatronValue(chunks, precision, has_head=grid.is_last)
        else:
            model = MegatronPolicy(chunks, anatomy, precision, has_head=grid.is_last)
        model.sequence, model.compute_device = grid.sequence, device
        if total_updates is None:
            model.requires_grad_(False)
        engine = MegatronForwardEngine(model, role, anatomy, grid, megatron_config)
        fill_from_folder(engine.all_local_shards(), engine.local_parameters(), folder, anatomy)
        if total_updates is None:
            return engine
        return MegatronEngine(engine, total_updates=total_updates, own_options=own)


def _anatomy(folder: Path, kind: Literal["policy", "value"], multiple: int) -> MegatronModelSpec:
    """The model of a folder, its vocabulary filled up to a multiple."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a model from {str(folder)!r}: {error}") from error
    return MegatronModelSpec(config, kind, -(-config.vocab_size // multiple) * multiple)


def _options(role: RoleConfig, parallel: ParallelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of this engine, and those for Megatron-Core's configuration of a model.

    Raises:
        ValueError: an unknown option, or a setting that this engine would ignore.
    """
    given = parallel.engine.options
    known = (*OWN_OPTIONS, *PASSED_OPTIONS)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"engine megatron has no option {', '.join(unknown)}; it has {', '.join(known)}")
    if role.precision == "fp16":
        raise ValueError("need precision fp32 or bf16 for engine megatron, got fp16")
    ignored = {
        "replicas": parallel.replicas > 1,
        "offload": parallel.offload,
        "lora.rank": role.lora.rank > 0,
    }
    if unfit := [name for name, is_set in ignored.items() if is_set]:
        raise ValueError(f"engine megatron has no {', '.join(unfit)}; leave them out, or use engine fsdp")
    defaults: dict[str, Any] = {
        "virtual_pipeline": 1,
        "expert": 1,
        "make_vocab_size_divisible_by": 128,
        "bucket_size": None,
        "overlap_grad_reduce": False,
    }
    own = {name: given.get(name, default) for name, default in defaults.items()}
    for name in ("virtual_pipeline", "expert", "make_vocab_size_divisible_by"):
        if type(own[name]) is not int or own[name] < 1:
            raise ValueError(f"need an integer from 1 for {name} of engine megatron, got {own[name]!r}")
    if own["virtual_pipeline"] > 1 and parallel.pipeline == 1:
        raise ValueError(
            f"need pipeline above 1 for virtual_pipeline={own['virtual_pipeline']}, got 1; interleaved stages need stages"
        )
    passed = {name: value for name, value in given.items() if name in PASSED_OPTIONS}
    if passed.get("sequence_parallel") and parallel.tensor == 1:
        raise ValueError(
            "need tensor above 1 for sequence_parallel: it shares the places of a line among tensor ranks"
        )
    if role.gradient_checkpointing and "recompute_granularity" not in passed:
        passed |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return own, passed


def _one_token() -> Batch:
    """A row that asks nothing of a model but to take part."""
    return Batch.from_trajectories([Trajectory(Prompt(""), [0], [0], [True], None, [0], 0)])


@dataclass(frozen=True)
class _MicroBatch:
    """Rows that are read together: their numbers, themselves (one token if there are none), as read, and end
    to end.
    """

    rows: Sequence[int]
    batch: Batch
    inputs: ModelInput
    line: PackedSequence


class MegatronForwardEngine(ForwardEngine):
    """A model of Megatron-Core that is only read.

    Args:
        model: its chunks on this rank, and its head.
        role: precision, optimizer.
        anatomy: of the model.
        grid: of its ranks.
        megatron_config: of the model, as Megatron-Core has it.
    """

    can_generate = False
    model: MegatronPolicy | MegatronValue

    def __init__(
        self,
        model: MegatronPolicy | MegatronValue,
        role: RoleConfig,
        anatomy: MegatronModelSpec,
        grid: RankCoordinates,
        megatron_config: TransformerConfig,
    ) -> None:
        self.model = model
        self.model.eval()
        self.dispatch_ranks, self.mesh = grid.dispatch_ranks, grid.mesh
        self._role = role
        self._anatomy = anatomy
        self._grid = grid
        self._megatron_config = megatron_config
        # What the schedule runs, in the order of the chunks.
        self._running: list[nn.Module] = list(model.transformer.children())
        self._share = self._share_of_rank()
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, self._share)
        self._first_with: dict[Share, int] = {}
        for rank, share in enumerate(shares):
            self._first_with.setdefault(share, rank)

    def _share_of_rank(self) -> Share:
        grid, config, virtual = self._grid, self._megatron_config, self._grid.extents.virtual
        chunks = []
        for number in range(virtual):
            stage = number if virtual > 1 else None
            start = get_transformer_layer_offset(config, stage, grid.stage)
            chunks.append((start, start + get_num_layers_to_build(config, stage, grid.stage)))
        experts = self._anatomy.num_experts // max(1, grid.extents.expert)
        own_experts = (grid.expert_rank * experts, (grid.expert_rank + 1) * experts)
        return Share(
            grid.tensor_rank, grid.extents.tensor, tuple(chunks), grid.stage == 0, grid.is_last, own_experts
        )

    @torch.no_grad()
    def infer(self, batch: Batch, micro_batches: Sequence[Sequence[int]], outputs: Outputs) -> Tensor:
        """See `ForwardEngine.infer`; the same on all ranks that have the rows."""
        present = present_mask(batch.response_lengths)
        written: list[tuple[Sequence[int], Tensor]] = []

        def evaluate(rows: Sequence[int], micro: Batch, inputs: ModelInput) -> Tensor:
            values = outputs(inputs).cpu()
            if rows:
                written.append((rows, values))
            return values

        with self._grid.active():
            self._run(batch, micro_batches, evaluate, forward_only=True)
        result = torch.zeros(present.shape)
        for rows, values in written:
            if values.ndim >= result.ndim:
                result = result.new_zeros(*present.shape, *values.shape[1:])
            block = result.new_zeros(len(rows), *result.shape[1:])
            block[present[list(rows)]] = values
            result[list(rows)] = block
        received: Tensor = self._from_collector(result)
        return received

    @override
    def export(self, folder: Path) -> None:
        export_folder(folder, self._anatomy, self.full_tensors(), self._all_whole(self._anatomy.head_shapes))

    @override
    def gather_over_data(self, thing: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size(self._grid.data_ranks)
        dist.all_gather_object(gathered, thing, group=self._grid.data_ranks)
        return gathered

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `ForwardEngine.shapes`; the head of a value model is not among them."""
        return dict(self._anatomy.shapes)

    @override
    def local_shards(self) -> list[TensorShard]:
        return self._anatomy.pieces(self._share)

    @override
    def local_tensors(self) -> dict[str, Tensor]:
        return {
            name: parameter.detach()
            for name, parameter in self.local_parameters().items()
            if "value_head" not in name
        }

    @override
    def full_tensors(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        return self._all_whole(
            {name: shape for name, shape in self.shapes().items() if wanted is None or name in wanted}
        )

    def all_local_shards(self) -> list[TensorShard]:
        """What of the whole tensors, and of the head of a value model, lies on this rank."""
        return self.local_shards() + self._anatomy.head_pieces(self._share)

    def local_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of this rank, as `CHUNK.NAME`."""
        return dict(self.model.transformer.named_parameters())

    def _all_whole(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
        by_rank = {
            rank: self._anatomy.pieces(share) + self._anatomy.head_pieces(share)
            for share, rank in self._first_with.items()
        }
        return full_tensors(shapes, by_rank, self.local_parameters())

    def _run(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]], evaluate: Evaluate, *, forward_only: bool
    ) -> None:
        """Brings every micro-batch through the pipeline; the last stage evaluates it, with its states in the
        model.
        """
        is_interleaved = len(self._running) > 1
        prepared = self._prepared(batch, list(micro_batches) or [[]])

        def forward(
            micro_batches: Iterator[_MicroBatch], chunk: nn.Module
        ) -> tuple[Tensor, Callable[..., Any]]:
            micro = next(micro_batches)
            states = chunk(
                micro.line.input_ids, micro.line.position_ids, None, packed_seq_params=micro.line.params
            )
            return states, partial(
                self._evaluated, partial(evaluate, micro.rows, micro.batch, micro.inputs), micro.line
            )

        get_forward_backward_func(
            self._grid.extents.pipeline, len(self._running) if is_interleaved else None
        )(
            forward_step_func=forward,
            data_iterator=[iter(prepared) for _ in self._running] if is_interleaved else iter(prepared),
            model=self._running if is_interleaved else self._running[0],
            num_microbatches=len(prepared),
            seq_length=prepared[0].line.num_places,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _prepared(self, batch: Batch, micro_batches: list[Sequence[int]]) -> list[_MicroBatch]:
        """The micro-batches as every stage reads them."""
        extents = self._grid.extents
        if extents.virtual > 1:
            # Interleaved stages take them in groups.
            group = self._megatron_config.microbatch_group_size_per_vp_stage or extents.pipeline
            micro_batches = micro_batches + [[]] * (-len(micro_batches) % group)
        batches = [batch.select(rows) if rows else _one_token() for rows in micro_batches]
        inputs = [ModelInput.from_batch(micro, packed=True, device=self.model.device) for micro in batches]
        multiple = extents.tensor * extents.context
        places = [-(-given.input_ids.shape[1] // multiple) * multiple for given in inputs]
        places = [max(places)] * len(places) if extents.virtual > 1 else places
        lines = [
            PackedSequence.of(given, self._grid.sequence, length)
            for given, length in zip(inputs, places, strict=True)
        ]
        return [_MicroBatch(*parts) for parts in zip(micro_batches, batches, inputs, lines, strict=True)]

    def _evaluated(
        self, evaluate: Callable[[], Any], line: PackedSequence, states: Tensor, non_loss_data: bool = False
    ) -> Any:
        self.model.line, self.model.states = line, states
        try:
            result = evaluate()
        finally:
            del self.model.states
        return (
            result if non_loss_data else (result, torch.zeros((), dtype=torch.int, device=states.device), {})
        )

    def _from_collector(self, thing: Any) -> Any:
        """What the rank whose results count has, on all ranks with its rows."""
        sent = [thing]
        dist.broadcast_object_list(sent, src=self._grid.collector, group=self._grid.replica)
        return sent[0]


class MegatronEngine(MegatronForwardEngine, LocalEngine):
    """A model of Megatron-Core that is trained; gradients are fp32, and each data rank updates its share of
    the weights.

    Args:
        engine: of the same model, filled; nothing else may use it.
        total_updates: of the whole run, for the schedule.
        own_options: of this engine.
    """

    def __init__(
        self, engine: MegatronForwardEngine, *, total_updates: int, own_options: Mapping[str, Any]
    ) -> None:
        vars(self).update(vars(engine))
        self._config = self._role
        self._total_updates, self._updates, self._bad_updates = total_updates, 0, 0
        self._scale = LossScale(enabled=False)
        self._gradients = GradBuffers(
            list(self.model.transformer.children()),
            self._megatron_config,
            bucket_size=own_options["bucket_size"],
            overlap=own_options["overlap_grad_reduce"],
        )
        self._running = list(self._gradients.replicated)
        self.model.train()
        self._optimizer: Any = self._new_optimizer()

    def _new_optimizer(self) -> Any:
        config = self._role.optimizer
        settings = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.max_grad_norm,
            use_distributed_optimizer=True,
            bf16=self._role.precision == "bf16",
            params_dtype=self._megatron_config.params_dtype,
        )
        optimizer = get_megatron_optimizer(settings, self._gradients.replicated)
        for group in optimizer.param_groups:
            # Vectors do not decay (https://arxiv.org/abs/1711.05101); Megatron-Core leaves that to its own
            # scheduler.
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
        return optimizer

    @override
    def update(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective
    ) -> dict[str, float]:
        self._begin()
        self._add(batch, micro_batches, objective)
        return self._finished(1.0)

    def accumulate(self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective) -> None:
        """See `TrainEngine.accumulate`; data ranks sum their gradients in `finish`."""
        if self._accumulated is None:
            self._begin()
        with self._gradients.apart():
            self._add(batch, micro_batches, objective)

    @override
    def finish(self, scale: float = 1.0) -> dict[str, float]:
        assert self._accumulated is not None, "an update is finished once, after its portions"
        with self._grid.active():
            self._gradients.sum()
        return self._finished(scale)

    def _begin(self) -> None:
        self._accumulated = UpdateTotals()
        with self._grid.active():
            self._gradients.zero()
            self._optimizer.zero_grad()

    def _add(self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective) -> None:
        """Forward and backward; gradients are added to those that are there."""
        so_far = self._accumulated
        assert so_far is not None
        so_far.rows += batch.row_ids[[row for rows in micro_batches for row in rows]].tolist()

        def evaluate(rows: Sequence[int], micro: Batch, inputs: ModelInput) -> Tensor:
            if not rows:
                return self.model.zero_loss(inputs)
            loss, monitors = objective(micro, inputs)
            if not torch.isfinite(loss):
                so_far.bad.extend(batch.row_ids[list(rows)].tolist())
            so_far.add(loss, monitors)
            return loss

        with self._grid.active():
            self._run(batch, micro_batches, evaluate, forward_only=False)

    def _finished(self, scale: float) -> dict[str, float]:
        """Makes the update, with gradients that are summed over ranks."""
        so_far, self._accumulated = self._accumulated, None
        assert so_far is not None
        with self._grid.active():
            own = self._over_ranks({name: float(value) for name, value in so_far.totals.items()}, so_far.bad)
            metrics, bad = self._from_collector(own)
            if bad:
                return self._skipped("loss", bad)
            if scale != 1:
                self._gradients.scale(scale)
                metrics["loss"] *= scale
            lr = self._role.optimizer.lr * lr_factor(self._updates, self._role.optimizer, self._total_updates)
            grad_norm = self._step_at(lr)
        if not math.isfinite(grad_norm):
            return metrics | self._skipped("gradient", so_far.rows)
        self._bad_updates = 0
        return metrics | {"grad_norm": grad_norm, "lr": lr, "skipped_updates": 0.0}

    @torch.no_grad()
    def _step_at(self, lr: float) -> float:
        """Clips, steps if the gradient is finite, and returns its norm before clipping."""
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return norm
        limit = self._role.optimizer.max_grad_norm
        for part in self._optimizer.chained_optimizers:
            if norm > limit and part.get_parameters():
                clip_grad_by_total_norm_fp32(part.get_parameters(), limit, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step_with_ready_grads()
        self._updates += 1
        return norm

    @override
    def save(self, folder: Path) -> Callable[[], None]:
        if dist.get_rank() == 0:
            self.config.save_pretrained(folder)
        # The head of the last stage, if it is the embedding of the first, is saved there.
        is_double = self._anatomy.is_tied and not self._share.is_first
        parts = [
            part
            for part in self._parts()
            if not (is_double and part[0].local_name.endswith("output_layer.weight"))
        ]
        return begin_save(
            folder, parts, {**self._identity(), "updates": self._updates, "bad_updates": self._bad_updates}
        )

    def load(self, folder: Path) -> None:
        """See `TrainEngine.load`; the learning rate is that of the settings at the update that was reached."""
        error = None
        try:
            progress = read_progress(folder, self._identity())
            updates, self._bad_updates = progress["updates"], progress["bad_updates"]
            set_steps(self._optimizer, updates)
            self._updates = updates
            read_parts(folder, progress["num_files"], self._parts())
        except ValueError as found:
            error = found
        agreed(error)
        with self._grid.active():
            publish_weights(self._optimizer, self._gradients.replicated)

    def _parts(self) -> list[Any]:
        """What of the weights this rank updates, with the optimizer's states for it."""
        return list(
            optimizer_parts(
                self._optimizer,
                self.local_parameters(),
                self.all_local_shards(),
                with_states=self._updates > 0,
            )
        )

    def _identity(self) -> dict[str, str]:
        """What a checkpoint must say of its model."""
        shapes = {**self._anatomy.shapes, **self._anatomy.head_shapes}
        return {"kind": f"{self.config.model_type} {self._anatomy.kind}", "shapes": digest(shapes)}
