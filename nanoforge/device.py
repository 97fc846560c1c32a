"""The device of this process: which one, in which precision, and how fast it multiplies matrices."""

import ctypes
import functools
import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch.nn.attention.flex_attention import flex_attention

from nanoforge import environment, launcher
from nanoforge.errors import UserError

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# which device


def get_device(name: str) -> torch.device:
    """The device of `--device=name`; auto: the local rank's GPU, else Apple's, else the CPU.

    A CUDA device becomes the current one. Raises UserError for a device that is not there.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"--device={name}: not one of auto, cpu, cuda, cuda:N, mps")
    if kind == "auto":
        kind = best_device_type()
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device={name}: this machine has no CUDA GPU, or this torch was built without CUDA")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={name}: this machine has no Apple GPU")
    if launcher.world_size() > 1 and (index or kind == "mps"):
        raise UserError(
            f"--device={name}: several ranks can't share one device; "
            "take --device=cuda, which gives each rank its own, or --device=cpu"
        )
    return cuda_device(name, index) if kind == "cuda" else torch.device(kind)


def best_device_type() -> str:
    """cuda, mps or cpu: the first of them that is here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def cuda_device(name: str, index: str) -> torch.device:
    """The GPU of this index, or of the local rank; it becomes the current one. Raises UserError if GPUs are missing."""
    gpu = int(index) if index else launcher.local_rank()
    # Counted for all local ranks, so that they all fail alike and the main one prints the error.
    needed = max(gpu + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if needed > torch.cuda.device_count():
        raise UserError(f"--device={name}: needs {needed} GPUs; this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


# ---------------------------------------------------------------------------------------------------------------------
# which precision


# Instructions that multiply bfloat16 matrices, as torch.cpu.get_capabilities names them: Intel's Cooper Lake and later
# Xeons, AMD's Zen 4 and later, and ARM. Every other CPU emulates bfloat16, at a thirtieth of float32's speed or less.
CPU_BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")


AUTO_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the first that a device can compute in, for --dtype=auto


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of activations for `--dtype=name`, and why.

    `auto` follows from what the device can do, never from a measurement: the same command is the same run every time.
    """
    if name != "auto":
        return getattr(torch, name), "as asked"
    bfloat16_units = find_bfloat16_units(device)
    if bfloat16_units:
        return torch.bfloat16, f"auto: {bfloat16_units}"
    if device.type == "cuda":
        return torch.float16, "auto: this GPU has no bfloat16"
    if device.type == "cpu":
        return torch.float32, "auto: this CPU has no bfloat16 instructions"
    return torch.float32, f"the default on {device.type}"


def find_bfloat16_units(device: torch.device) -> str:
    """What multiplies bfloat16 matrices on this device; empty if nothing does, or if it is only emulated."""
    if device.type == "cuda":
        return "this GPU has bfloat16 units" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return ""
    capabilities = torch.cpu.get_capabilities()
    found = [name for name in CPU_BFLOAT16_INSTRUCTIONS if capabilities.get(name)]
    return f"this CPU has {', '.join(found)}" if found else ""


# ---------------------------------------------------------------------------------------------------------------------
# how fast


MATMUL_ROWS = 4096  # as of a layer that reads so many tokens: AMX multiplies small squares at a third of its speed


@functools.cache
def measure_matmul_flops(device: torch.device, dtype: torch.dtype, n: int = 0) -> float:
    """FLOP/s of a product of MATMUL_ROWS rows with an n x n matrix here, the best of ten; 0: of a matrix that is large
    enough for this device.

    A process measures once."""
    n = n or (4096 if device.type == "cuda" else 512)
    generator = torch.Generator(device).manual_seed(0)  # of its own: the run's random numbers stay as they are
    x, weight = (  # GPUs multiply ones and zeros faster
        torch.randn(rows, n, generator=generator, device=device, dtype=dtype) for rows in (MATMUL_ROWS, n)
    )
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        float((x @ weight)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2 * MATMUL_ROWS * n**2 / min(seconds)


# Dense half-precision FLOP/s from the makers' data sheets; of names that contain each other, the longer one first.
PEAK_FLOPS = {
    "H100 PCIE": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device_name: str) -> float | None:
    """The device's peak in bfloat16 or float16; None where it is not known."""
    padded = f" {device_name.replace('-', ' ').upper()} "
    for name, flops in PEAK_FLOPS.items():
        if f" {name} " in padded:
            return flops
    return None


# ---------------------------------------------------------------------------------------------------------------------
# how much memory


def peak_memory_mb(device: torch.device) -> float | None:
    """The most memory that tensors took on a GPU so far, or this process on a CPU, in MB; None where it isn't known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def available_memory(device: torch.device) -> int | None:
    """Bytes that tensors can still take on a device; None where it isn't known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return environment.available_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a tensor found no memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Raises UserError, with what needs less memory, where a tensor finds none."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {advice}") from None


# ---------------------------------------------------------------------------------------------------------------------
# settings of the process

ATTENTION_KERNELS = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}

# mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def set_attention_kernel(name: str, device: torch.device) -> None:
    """Allow scaled_dot_product_attention only this one of its CUDA kernels. Raises UserError off CUDA.

    auto: all of them, in PyTorch's order.
    """
    if name != "auto" and device.type != "cuda":
        raise UserError(f"--attention_kernel={name}: only a CUDA GPU has a choice, not {device.type}")
    for kernel, enable in ATTENTION_KERNELS.items():
        enable(name in ("auto", kernel))


@contextmanager
def varying_shapes() -> Iterator[None]:
    """For attention whose lengths or batches vary from call to call: without cuDNN, which PyTorch prefers on an H100.

    It plans each new shape for tens of milliseconds. A kernel that `--attention_kernel` names is kept. To be entered
    outside compiled functions: a graph keeps the kernel that was allowed when it was made.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    has_others = torch.backends.cuda.math_sdp_enabled()  # not if set_attention_kernel allowed cuDNN alone
    torch.backends.cuda.enable_cudnn_sdp(was_enabled and not has_others)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def tune_malloc() -> None:
    """Make glibc's malloc, where it is the one, keep freed memory.

    Otherwise the large tensors of every step are mapped anew, and their pages zeroed and faulted in.
    """
    if os.name != "posix":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def in_own_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread that ends with it, and with it the OpenMP threads that PyTorch keeps for each thread.

    For what prepares the work of another thread. While a process has more OpenMP threads than cores, libgomp puts those
    that wait to sleep at once; a small model then takes twice as long for a token.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function, *args).result()


def compile_flex_attention() -> Callable[..., torch.Tensor]:
    """torch's flex_attention as one kernel, in eager models too. Shapes that are too many end the run with an error:
    uncompiled it would make all T x T scores."""
    return torch.compile(flex_attention, fullgraph=True)


def is_kernel_error(error: BaseException) -> bool:
    """Whether none of the allowed kernels can compute this attention."""
    return str(error).startswith(("No available kernel", "No viable backend for scaled_dot_product_attention"))


def missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks on this machine: a C++ compiler for a CPU, triton or a C compiler for CUDA."""
    if device.type == "cuda":
        compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
        has_compiler = find_spec("triton") is not None and any(map(shutil.which, compilers))
        return "" if has_compiler else "triton and a C compiler (gcc)"
    try:
        importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    except Exception:  # of torch's own
        return "a C++ compiler (g++)"
    return ""


def check_compiler(device: torch.device) -> None:
    """Raises UserError where `--compile` can't work."""
    missing = missing_compiler(device)
    if missing:
        raise UserError(f"--compile: needs {missing}, which this machine lacks; install it, or run without --compile")


def is_compile_error(error: BaseException) -> bool:
    """Whether torch.compile failed, and not what it compiled."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
