"""A safetensors file written one tensor at a time.

A tensor is cast and turned into bytes only when its turn comes, so a model mapped from the disk can
be written in another dtype without a second model in memory, which `safetensors.torch` needs.

    8 bytes    length of the header, little-endian
    header     JSON: dtype, shape and place of each tensor; padded with spaces to a multiple of 8
    data       the tensors, without gaps
"""

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}
FLOATS = {dtype for dtype in DTYPE_NAMES if dtype.is_floating_point}
"""Dtypes of weights that are no whole numbers; floats of 8 bits are none."""


class Digest(Protocol):
    """A hash like those of `hashlib`."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Add bytes to the hash."""


def write_safetensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype],
    digest: Digest | None = None,
) -> None:
    """Write tensors to `file`, casting those that `dtypes` names.

    digest: Hash to update with every byte of the file. Raises OSError if the file cannot be
    written; the part that was written stays.
    """
    dtypes = {name: dtypes.get(name, tensor.dtype) for name, tensor in tensors.items()}
    # Wide elements first: each tensor then starts where its dtype can be mapped.
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtypes[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "wb") as out:
        for part in (len(encoded).to_bytes(8, "little"), encoded):
            _write(out, part, digest)
        for name in order:
            _write(out, _bytes(tensors[name], dtypes[name]), digest)


def _write(out: BinaryIO, part: bytes | memoryview, digest: Digest | None) -> None:
    out.write(part)
    if digest is not None:
        digest.update(part)


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    flat = tensor.detach().to("cpu", dtype).contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def misfits(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], wide: Container[str] = ()
) -> str:
    """Return the first differences to the expected names and shapes, and tensors that are no
    floats of 16 bits or more; empty if there are none.

    wide: Names of tensors that need 32 bits.
    """
    found = [f"{name} is missing" for name in expected if name not in tensors]
    found += [f"{name} is unknown" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        if name not in expected:
            continue
        shape, bits = list(expected[name].shape), 32 if name in wide else 16
        is_wide = tensor.dtype in FLOATS and torch.finfo(tensor.dtype).bits >= bits
        if not is_wide or list(tensor.shape) != shape:
            own = f"{tensor.dtype} {list(tensor.shape)}"
            found.append(f"{name} is {own}, not floats of {bits} bits or more {shape}")
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more
