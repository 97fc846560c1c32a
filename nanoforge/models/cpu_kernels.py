"""Layers for decoding on a CPU, written in C: they read their weights as fast as the memory gives them.

A decoding step reads every weight once, so the bytes of the weights over the memory's bandwidth are the least time that
it can take. PyTorch's products of a few rows reach a part of that, its RMSNorm passes over the memory several times,
and around the attention of one token it runs a dozen small operations. Here they are a few lines of C, cpu_kernels.c,
which the machine's own compiler builds at the first use and a cache folder keeps. Without a compiler, and where they
would be slower, all stays PyTorch's.
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

from nanoforge.models.adapters import FrozenLinear

MAX_STREAMED = 3  # rows of x for which the memory is the limit; more are computed in tiles
MAX_VALUES = 2**16  # of these rows, which each thread keeps on its stack
MAX_ROWS = 64  # of x; more are PyTorch's
TILE_ROWS = 16  # of x in a tile, and of W with AMX

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
    return folder / f"cpu_kernels_{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"


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
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS: dict[str, list[Any]] = {
    "linear": [POINTER] * 3 + [INTEGER] * 3,
    "tiled": [POINTER] * 3 + [INTEGER] * 3 + [POINTER],
    "paired": [POINTER] * 3 + [INTEGER] * 3 + [POINTER],
    "rms_norm": [POINTER] * 3 + [INTEGER] * 2 + [ctypes.c_float],
    "attend": [POINTER] * 8 + [INTEGER] * 10 + [ctypes.c_float],
}


@functools.cache
def find_function(kind: str, *dtypes: torch.dtype) -> Callable[..., None]:
    """The library's function, an entry of ARGUMENTS, for these dtypes."""
    library = load_library()
    assert library is not None
    function = getattr(library, "_".join((kind, *(NAMES[dtype] for dtype in dtypes))))
    function.argtypes = ARGUMENTS[kind]
    function.restype = None
    return function


@functools.cache
def has_amx() -> bool:
    """Whether the processor, the compiler and the system let the library multiply bfloat16 matrices."""
    library = load_library()
    return library is not None and bool(library.prepare_amx())


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether the library's layers are faster than PyTorch's: for bfloat16, on a CPU with AMX, if they use it too."""
    if dtype not in NAMES or load_library() is None:
        return False
    return dtype == torch.float32 or has_amx() or not torch.cpu.get_capabilities().get("amx_bf16")


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
        self.is_paired = weight.dtype == torch.bfloat16 and self.cols % 2 == 0 and self.rows >= TILE_ROWS and has_amx()

    def forward(self, x: Tensor) -> Tensor:
        batch = x.numel() // self.cols
        if not 0 < batch <= MAX_ROWS:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.rows)
        places = (self.weight.data_ptr(), x.data_ptr(), y.data_ptr(), self.rows, self.cols, batch)
        tiled_values = -(-batch // TILE_ROWS) * TILE_ROWS * self.cols
        if self.is_paired and x.dtype == torch.bfloat16:
            tiles = x.new_empty(tiled_values)
            find_function("paired", self.weight.dtype, x.dtype)(*places, tiles.data_ptr())
        elif batch <= MAX_STREAMED and x.numel() <= MAX_VALUES:
            find_function("linear", self.weight.dtype, x.dtype)(*places)
        else:
            tiles = x.new_empty(tiled_values, dtype=torch.float32)
            find_function("tiled", self.weight.dtype, x.dtype)(*places, tiles.data_ptr())
        return y if self.bias is None else y + self.bias


def fused_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension, times a gain of the same dtype if there is one: one pass over the memory."""
    x = x.contiguous()
    y = torch.empty_like(x)
    places = [None if tensor is None else tensor.data_ptr() for tensor in (x, gain, y)]
    width = x.size(-1)
    find_function("rms_norm", x.dtype)(*places, x.numel() // width, width, eps)
    return y


def fused_attention(attention: Any, q: Tensor, k: Tensor, v: Tensor, reading: Any) -> Tensor:
    """`attend` of a model's attention, for one token of each sequence, with rotary embedding and the cache's update."""
    B = len(q)
    positions = reading.positions
    if isinstance(positions, slice):
        positions = torch.tensor(positions.start)
    positions = positions.expand(B, 1).contiguous()
    cos, sin = reading.angles or (None, None)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    tensors = (q, k, v, cos, sin, positions, reading.cache.layers[attention.layer], y)
    places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    strides = [0 if tensor is None or len(tensor) < B else tensor.stride(0) for tensor in (q, k, v, cos)]
    sizes = (B, attention.n_head, attention.n_kv_head, reading.cache.size, attention.head_dim, attention.span)
    find_function("attend", q.dtype)(*places, *strides, *sizes, attention.scale)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# a model's layers


def is_exact_in_bfloat16(weight: Tensor) -> bool:
    """Whether bfloat16 has all of its values, as of a model that was published in it."""
    return weight.dtype == torch.bfloat16 or torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight)


def stream_layers(model: nn.Module) -> None:
    """Replace the model's layers, where this CPU has faster ones: for a model that is only sampled from.

    Weights whose values bfloat16 has are kept in it, which changes no product and halves their bytes.
    """

    def halve(weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16) if is_exact_in_bfloat16(weight) else weight

    replace_layers(model, halve)


def find_linears(model: nn.Module) -> dict[str, nn.Linear | FrozenLinear]:
    """The linear layers, by name, that this CPU has faster ones for: not those that are quantized, or replaced."""
    if not has_kernels(model.compute_dtype):  # type: ignore[arg-type]
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, FrozenLinear) and not module.is_quantized and module.streamed is None)
    }


def replace_layers(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Put faster layers, of converted weights, in the place of linear layers and of frozen ones' products. The library
    computes norms and attention, too."""
    if not has_kernels(model.compute_dtype):  # type: ignore[arg-type]
        return
    for name, linear in find_linears(model).items():
        streamed = StreamedLinear(convert(linear.weight.detach()), linear.bias)
        if isinstance(linear, FrozenLinear):
            linear.streamed = streamed
        else:
            replace_module(model, name, streamed)
    modules: Any = model.modules()
    for module in modules:
        if hasattr(module, "fused_norm"):
            module.fused_norm = fused_norm
        if hasattr(module, "fused_attention"):
            module.fused_attention = fused_attention


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
