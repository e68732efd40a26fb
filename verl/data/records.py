"""Records as bytes, without pickle: mappings of names to numbers, texts, arrays and tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

_LENGTH = struct.Struct("=Q")
_TORCH_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
# Values that a text holds exactly: kind -> type, and the function that reads what `str` writes.
_TEXTS: dict[str, tuple[type, Callable[[str], Any]]] = {
    "datetime": (datetime, datetime.fromisoformat),  # before its base class
    "date": (date, date.fromisoformat),
    "time": (time, time.fromisoformat),
    "decimal": (Decimal, Decimal),
    "fraction": (Fraction, Fraction),
}


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Encode a record: length of a JSON part as u64, that part, and the raw arrays, each padded to 8 bytes.

    Raises:
        ValueError: a key is not a string, or a value is of a kind that a record cannot hold.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"need a mapping of names to values as record, got {type(record).__name__}")
    arrays = bytearray()
    tree = json.dumps(_to_json(record, "record", arrays), ensure_ascii=False, separators=(",", ":"))
    # surrogatepass: half a character, as a byte-level tokenizer may decode it, arrives as it is.
    text = tree.encode("utf-8", "surrogatepass")
    return b"".join([_LENGTH.pack(len(text)), text, bytes(-len(text) % 8), arrays])


def decode_record(body: bytearray) -> dict[str, Any]:
    """Decode what `encode_record` gave; arrays and tensors are writable views of `body`."""
    (length,) = _LENGTH.unpack_from(body)
    text = body[_LENGTH.size : _LENGTH.size + length].decode("utf-8", "surrogatepass")
    record: dict[str, Any] = _from_json(json.loads(text), body, _LENGTH.size + length + -length % 8)
    return record


def _to_json(value: Any, where: str, arrays: bytearray) -> Any:
    """JSON tree of a value: scalars and dicts as they are, all else as a list that begins with its kind.

    Raw bytes are appended to `arrays`.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            raise ValueError(f"need strings as keys, got {list(value)[:8]} at {where}")
        return {key: _to_json(item, f"{where}[{key!r}]", arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, *(_to_json(item, f"{where}[{i}]", arrays) for i, item in enumerate(value))]
    for kind, (exact, _) in _TEXTS.items():
        if isinstance(value, exact):
            return [kind, str(value)]
    if isinstance(value, bytes):
        raw, kind, shape, dtype = value, "bytes", [len(value)], ""
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        raw, kind, shape, dtype = value.tobytes(), "numpy", list(value.shape), value.dtype.str
    elif isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized:
        flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes()
        kind, shape, dtype = "torch", list(value.shape), str(value.dtype)
    else:
        raise ValueError(
            "need str, int, float, bool, None, bytes, dates, times, decimals, fractions, numeric numpy "
            "arrays, dense torch tensors, or lists, tuples and dicts of these, got "
            f"{type(value).__name__} at {where}; convert it first"
        )
    start = len(arrays)
    arrays += raw
    arrays += bytes(-len(raw) % 8)
    return [kind, start, shape, dtype]


def _from_json(tree: Any, body: bytearray, start: int) -> Any:
    """Value of a tree of `_to_json`; `start` is the position of the raw arrays in `body`."""
    if isinstance(tree, dict):
        return {key: _from_json(item, body, start) for key, item in tree.items()}
    if not isinstance(tree, list):
        return tree
    if tree[0] in ("list", "tuple"):
        items = [_from_json(item, body, start) for item in tree[1:]]
        return tuple(items) if tree[0] == "tuple" else items
    if tree[0] in _TEXTS:
        return _TEXTS[tree[0]][1](tree[1])
    kind, offset, shape, dtype = tree[0], start + tree[1], tree[2], tree[3]
    size = int(np.prod(shape, dtype=np.int64))
    if kind == "bytes":
        return bytes(body[offset : offset + size])
    if kind == "numpy":
        return np.frombuffer(body, dtype, size, offset).reshape(shape)
    if size == 0:  # torch.frombuffer refuses to read nothing.
        return torch.empty(shape, dtype=_TORCH_DTYPES[dtype])
    return torch.frombuffer(body, dtype=_TORCH_DTYPES[dtype], count=size, offset=offset).reshape(shape)
