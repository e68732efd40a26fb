"""Tensor proxies: reads are recorded, and shards with these reads alone pass for the whole tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from verl.weight_sync.layout import num_elements
from verl.weight_sync.shard_tracking import (
    MissingShardError,
    merge_overlapping,
    record_reads,
    shard_key,
    sharded_proxy,
    slices_of,
)

WHOLE = torch.arange(96.0).reshape(8, 12)
ALL = ((0, 8), (0, 12))


def loaded(tensor: Tensor, dim: int, start: int, size: int) -> Tensor:
    """A parameter as the loaders of engines fill it: its part of the whole tensor, the rest of it padding."""
    shape = list(tensor.shape)
    shape[dim] = 5
    param = torch.nn.Parameter(torch.full(shape, -1.0), requires_grad=False)
    param.data.narrow(dim, 0, size).copy_(tensor.narrow(dim, start, size))
    return param.data


READS = {
    "narrow": (lambda t: loaded(t, 0, 2, 3), [((2, 5), (0, 12))]),
    "narrow of the last dimension": (lambda t: loaded(t, 1, 4, 4), [((0, 8), (4, 8))]),
    "slices of slices": (lambda t: t[2:][:4, 3:9].contiguous(), [((2, 6), (3, 9))]),
    "one row": (lambda t: t[3] + 1, [((3, 4), (0, 12))]),
    "a cell": (lambda t: torch.tensor(t[3, 4].item()), [((3, 4), (4, 5))]),
    "transposed": (lambda t: t[:, 2:4].t().clone(), [((0, 8), (2, 4))]),
    "permuted": (lambda t: t.permute(1, 0)[2:4].to(torch.bfloat16), [((0, 8), (2, 4))]),
    "parts of fused rows": (
        lambda t: torch.cat([t.view(2, 4, 12)[1, :2], t.view(2, 4, 12)[0, :2]]),
        [((4, 6), (0, 12)), ((0, 2), (0, 12))],
    ),
    "heads": (lambda t: t.view(4, 2, 12)[1:3].reshape(4, 12), [((2, 6), (0, 12))]),
    "heads of columns": (lambda t: t.unflatten(1, (3, 4))[:, 1].clone(), [((0, 8), (4, 8))]),
    "chunks": (lambda t: t.chunk(4, dim=0)[2].clone(), [((4, 6), (0, 12))]),
    "unbound": (lambda t: t.unbind(0)[6].clone(), [((6, 7), (0, 12))]),
    "padded": (lambda t: torch.cat([t.narrow(0, 6, 2), torch.zeros(3, 12)]), [((6, 8), (0, 12))]),
    "as numbers": (lambda t: torch.tensor([t[2].tolist(), t[2].numpy().tolist()]), [((2, 3), (0, 12))]),
    "every other row": (lambda t: t[1:6:2].clone(), [((1, 6), (0, 12))]),
    "expanded": (lambda t: t[2:3].expand(4, 12).clone(), [((2, 3), (0, 12))]),
    "nothing": (lambda t: t[8:].clone(), []),
    "sizes alone": (lambda t: torch.tensor(t.data.shape), []),
    "flat across rows": (lambda t: t.reshape(-1)[10:30].clone(), [ALL]),
    "to where it is": (lambda t: t[1:2].to("cpu", torch.float32).contiguous().clone(), [((1, 2), (0, 12))]),
    "moved": (lambda t: torch.full((1,), float(t[1:2].to("meta").is_meta)), [((1, 2), (0, 12))]),
    "what is not known": (lambda t: torch.roll(t, 1, 0), [ALL]),
    "an index": (lambda t: t[torch.tensor([1, 3])], [ALL]),
}


@pytest.mark.parametrize("operation, expected", READS.values(), ids=READS)
@pytest.mark.parametrize("inference", [False, True])
def test_reads_are_recorded_and_a_proxy_with_these_shards_alone_passes_for_the_whole_tensor(
    operation, expected, inference
):
    reads: list = []
    with torch.inference_mode(inference):
        right = operation(WHOLE)
        assert torch.equal(operation(record_reads("w", WHOLE, reads)), right) and reads == expected
        parts = [(bounds, WHOLE[slices_of(bounds)].clone()) for bounds in merge_overlapping(reads)]
        passed = sharded_proxy("w", WHOLE.shape, parts, like=WHOLE)
        assert (passed.shape, passed.dtype, passed.device, passed.stride()) == (
            WHOLE.shape,
            WHOLE.dtype,
            WHOLE.device,
            WHOLE.stride(),
        )
        assert torch.equal(operation(passed), right)


@pytest.mark.parametrize(
    "operation",
    [lambda t: t.clone(), lambda t: t[1:3] + 1, lambda t: t[2:6], lambda t: torch.zeros(8, 12).copy_(t)],
    ids=range(4),
)
def test_reading_what_is_not_here_is_an_error_that_says_what(operation):
    part = sharded_proxy("w", (8, 12), [(((2, 5), (0, 12)), WHOLE[2:5])], like=WHOLE)
    with pytest.raises(
        MissingShardError, match=r"the engine reads \d:\d,0:12 of w, of which it was sent 2:5,0:12"
    ):
        operation(part).add(1)
    with pytest.raises(MissingShardError, match="was sent nothing"):
        operation(sharded_proxy("w", (8, 12), [], like=WHOLE)).add(1)


def test_a_part_in_a_loader_that_counts_what_is_copied_counts_as_the_whole_does():
    class Counter(TorchDispatchMode):
        copied = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.copied += args[1].numel() if func is torch.ops.aten.copy_.default else 0
            return func(*args, **(kwargs or {}))

    part = sharded_proxy("w", (8, 12), [(((2, 5), (0, 12)), WHOLE[2:5])], like=WHOLE)
    with Counter() as counter:
        torch.empty(3, 12, device="meta").copy_(part.narrow(0, 2, 3))
    assert counter.copied == 36


def test_a_scalar_is_a_tensor_too():
    reads: list = []
    assert record_reads("s", torch.tensor(3.0), reads).item() == 3 and reads == [()]
    assert float(sharded_proxy("s", (), [((), torch.tensor(3.0))], like=WHOLE).reshape(1) + 1) == 4


def test_reads_that_overlap_become_one_that_holds_them():
    boxes = [((0, 2), (0, 4)), ((4, 6), (0, 4)), ((1, 3), (2, 6)), ((2, 5), (0, 1)), ((7, 8), (0, 12))]
    found = merge_overlapping(boxes)
    assert found == (((0, 6), (0, 6)), ((7, 8), (0, 12))) and merge_overlapping(found) == found
    assert (
        merge_overlapping([]) == () and sum(map(num_elements, merge_overlapping([((0, 2),), ((2, 4),)]))) == 4
    )


def test_a_part_has_a_key_of_its_own():
    assert (
        shard_key("w", ALL, shape=(8, 12)) == "w"
        and shard_key("w", ((2, 5), (0, 12)), shape=(8, 12)) == "w@2:5,0:12"
    )
