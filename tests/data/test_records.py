"""Records as bytes: every value comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verl.data.records import decode_record, encode_record


def sent(record):
    return decode_record(bytearray(encode_record(record)))


def test_every_kind_of_value_comes_back_as_it_was():
    scalars = {
        "text": "ü\ud800 \U0001f600",
        "count": -(2**70),
        "reward": 0.1,
        "inf": float("inf"),
        "ok": True,
        "none": None,
        "raw": b"\0",
    }
    nested = {
        "messages": [{"role": "user", "content": ["list", 1]}, []],
        "pair": (1, {"deep": (b"", ())}),
        "": {},
    }
    assert sent(scalars | nested) == scalars | nested


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "float16", "float32", "float64", "int8", "int64", "bool", "complex64", "float8_e4m3fn"],
)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3)])
def test_tensors_keep_dtype_shape_and_bits(dtype, shape):
    tensor = torch.arange(1, 1 + int(np.prod(shape))).reshape(shape).to(getattr(torch, dtype))
    came = sent({"odd": b"x", "tensor": tensor})["tensor"]
    assert (came.dtype, came.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(came.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_strided_arrays_keep_dtype_and_order_and_are_writable():
    array = np.arange(12, dtype=">i2").reshape(3, 4).T[::2]
    record = sent(
        {
            "array": array,
            "view": torch.arange(12).reshape(3, 4).T,
            "scalar": np.float32(0.5),
            "zero": np.array(7),
        }
    )
    np.testing.assert_array_equal(record["array"], array, strict=True)
    assert record["view"][1].tolist() == [1, 5, 9]
    assert (record["scalar"], record["zero"].shape, int(record["zero"])) == (0.5, (), 7)
    record["array"][0] = record["view"][0] = 0
