"""Weight files too large to be held in memory a second time: written tensor by tensor.

A .safetensors file is the length of its header (8 bytes, little-endian), the header (JSON), and the
tensors one behind the other.

Source: the format as https://github.com/huggingface/safetensors describes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastppt.outputs.files import whole_file

# What the format calls the types that are written.
NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file; the same input gives the same bytes.

    Args:
        path: Where to.
        tensors: On any device, of any strides; they may share memory.
        metadata: What the file says of itself.

    Raises:
        UserError: the file cannot be written.
    """
    # The widest first: each then begins at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            values = tensors[name].detach().cpu().contiguous().flatten()
            file.write(values.view(torch.uint8).numpy().data)
