"""Quantized weights of a frozen base, through bitsandbytes: NF4 (Dettmers et al. 2023) and int8 (Dettmers et al. 2022).

    nf4    4 bits a value and a float32 scale for each 64 of them: 0.5625 bytes a value
    int8   8 bits a value and a float32 scale for each row

Products are made with the weight in the dtype of the input, as it is unpacked: in forward, and again in backward.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanoforge.errors import UserError

Unpack = Callable[[Tensor, Any, torch.dtype], Tensor]  # (what is stored, its scales, dtype) -> (out, in)
BLOCK = 64  # values of NF4 that share a scale


def pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """((out, in / 2) bytes, scales)."""
    packed, scales = torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
    return packed.view(len(weight), -1), scales


def unpack_nf4(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in)."""
    shape = (packed.size(0), 2 * packed.size(1))
    return torch.ops.bitsandbytes.dequantize_4bit(packed.view(-1, 1), scales, BLOCK, "nf4", shape, dtype)


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """((out, in) int8, scales (out,)): the scale is the row's largest value, which is 127."""
    packed, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight.half(), 0.0)
    return packed, scales


def unpack_int8(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in)."""
    return (packed * (scales / 127.0)[:, None]).to(dtype)


class Format(NamedTuple):
    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Unpack
    values: int  # in an element of `packed`
    bytes: float  # a value, with its share of the scales of a long row


FORMATS = {
    "nf4": Format(pack_nf4, unpack_nf4, values=2, bytes=0.5 + 4 / BLOCK),
    "int8": Format(pack_int8, unpack_int8, values=1, bytes=1.0),
}


class QuantizedWeight(nn.Module):
    """What stands in the place of a linear layer's weight, (out, in)."""

    needs_exact_weights = True  # its scales

    def __init__(self, weight: Tensor, name: str):
        super().__init__()
        self.format = FORMATS[name]
        packed, scales = self.format.pack(weight.contiguous())
        if not scales.isfinite().all():
            raise UserError(f"--quantize_base={name}: a weight is not finite, or beyond float16; use --base_dtype")
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        vars(self.packed)["values_an_element"] = self.format.values  # for counts of parameters
        vars(self.scales)["values_an_element"] = 0


def check_package(name: str) -> None:
    """Raises UserError without bitsandbytes."""
    try:
        importlib.import_module("bitsandbytes")
    except ImportError:
        raise UserError(f"--quantize_base={name}: needs a package: pip install bitsandbytes") from None
