"""Linear layers for decoding on a CPU: they read their weights as fast as the memory gives them.

A decoding step reads every weight once, so the bytes of the weights over the memory's bandwidth are the least time that
it can take. PyTorch's product of one row reaches a part of that, and its product of 16 rows half of what the processor
can compute. Here they are a few lines of C, streamed_linear.c, which the machine's own compiler builds at the first use
and a cache folder keeps. Without a compiler all stays PyTorch's.

A processor that multiplies bfloat16 matrices itself, as Intel's with AMX, is faster still, once the weights lie in
memory as it wants them: PyTorch moves them there at every product, `PackedLinear` once.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoforge.device import find_bfloat16_units
from nanoforge.models.adapters import FrozenLinear

MAX_STREAMED = 4  # rows of x for which the memory is the limit; more are computed in tiles
MAX_VALUES = 2**16  # of these rows, which each thread keeps on its stack
TILE_WIDTH = 16  # rows of x
MAX_ROWS = 64  # of x; more are PyTorch's
PACKED_ROWS = 16  # of x, for which oneDNN chooses the place of a packed weight; it serves any number
MAX_CACHED = 2**24  # weights of a model that stay in the processor's cache: there one row of x is faster streamed

SOURCE = Path(__file__).with_suffix(".c")
# not -ffast-math: loading such a library makes the whole process flush small numbers to zero
FLAGS = ("-O3", "-march=native", "-funroll-loops", "-fopenmp", "-shared", "-fPIC")

# ---------------------------------------------------------------------------------------------------------------------
# the library


def describe_processor() -> str:
    """What a library that is built for this processor depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def library_path() -> Path:
    """Where the library is kept: in the user's cache folder, by a hash of all that it is made of."""
    made_of = "\0".join((SOURCE.read_text(), *FLAGS, describe_processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoforge"
    return folder / f"streamed_linear_{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"


def build_library(path: Path) -> None:
    """Compile the library into this file, whole or not at all. Raises OSError, CalledProcessError."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(built)], check=True, capture_output=True)
        built.replace(path)


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library, built where it isn't yet; None where it can't be built."""
    path = library_path()
    try:
        if not path.exists():
            build_library(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError):
        return None


NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def find_function(kind: str, weight_dtype: torch.dtype, dtype: torch.dtype) -> Callable[..., None]:
    """The library's function, linear or tiled, for these dtypes of the weight and of x."""
    library = load_library()
    assert library is not None
    function = getattr(library, f"{kind}_{NAMES[weight_dtype]}_{NAMES[dtype]}")
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_void_p] * (kind == "tiled")
    function.restype = None
    return function


# ---------------------------------------------------------------------------------------------------------------------
# the layers


class StreamedLinear(nn.Module):
    """A linear layer, (..., in) -> (..., out), without gradients."""

    needs_exact_weights = True  # they are read in the dtype that they have

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.rows, self.cols = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        batch = x.numel() // self.cols
        if not 0 < batch <= MAX_ROWS:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.rows)
        places = (self.weight.data_ptr(), x.data_ptr(), y.data_ptr(), self.rows, self.cols, batch)
        if batch <= MAX_STREAMED and x.numel() <= MAX_VALUES:
            find_function("linear", self.weight.dtype, x.dtype)(*places)
        else:
            tiles = x.new_empty(-(-batch // TILE_WIDTH) * TILE_WIDTH * self.cols, dtype=torch.float32)
            find_function("tiled", self.weight.dtype, x.dtype)(*places, tiles.data_ptr())
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Module):
    """A linear layer in bfloat16, (..., in) -> (..., out), without gradients: oneDNN's product of a weight that it has
    packed. The numbers are those of F.linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None, one_row: StreamedLinear | None):
        """one_row: the same layer for a single row of x, if it is faster there."""
        super().__init__()
        self.cols = weight.size(1)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16).contiguous(), PACKED_ROWS)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)
        self.one_row = one_row

    def forward(self, x: Tensor) -> Tensor:
        if self.one_row is not None and x.numel() == self.cols:
            return self.one_row(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def is_exact_in_bfloat16(weight: Tensor) -> bool:
    """Whether bfloat16 has all of its values, as of a model that was published in it."""
    return weight.dtype == torch.bfloat16 or torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight)


def stream_linears(model: nn.Module) -> None:
    """Replace the model's linear layers, where this CPU has faster ones: for a model that is only sampled from.

    Weights whose values bfloat16 has are kept in it, which changes no product and halves their bytes.
    """

    def halve(weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16) if is_exact_in_bfloat16(weight) else weight

    replace_linears(model, halve)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed products are faster."""
    return dtype == torch.bfloat16 and bool(find_bfloat16_units(torch.device("cpu")))


def find_linears(model: nn.Module) -> dict[str, nn.Linear | FrozenLinear]:
    """The linear layers, by name, that this CPU has faster ones for: not those that are quantized, or replaced."""
    dtype: Any = model.compute_dtype
    if not (can_pack(dtype) or (dtype in NAMES and load_library() is not None)):
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, FrozenLinear) and not module.is_quantized and module.streamed is None)
    }


def replace_linears(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Put faster layers, of the converted weights, in the place of linear layers and of frozen ones' products."""
    linears = find_linears(model)
    dtype: Any = model.compute_dtype
    packs = can_pack(dtype)
    is_cached = sum(linear.weight.numel() for linear in linears.values()) <= MAX_CACHED

    def replacement(linear: nn.Linear | FrozenLinear) -> nn.Module:
        weight = convert(linear.weight.detach())
        if not packs:
            return StreamedLinear(weight, linear.bias)
        one_row = StreamedLinear(weight, linear.bias) if is_cached and load_library() is not None else None
        return PackedLinear(weight, linear.bias, one_row)

    for name, linear in linears.items():
        if isinstance(linear, FrozenLinear):
            linear.streamed = replacement(linear)
        else:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, replacement(linear))
