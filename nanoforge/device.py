"""The device of this process: which one, in which precision, and how fast it multiplies matrices."""

import ctypes
import os
import time

import torch

from nanoforge.errors import UserError


def get_device(name: str) -> torch.device:
    """auto: the local rank's GPU, else Apple's, else the CPU. Raises UserError for a device that is not there."""
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"--device={name}: must be auto, cpu, cuda, cuda:N or mps")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device={name}: this machine has no CUDA GPU, or this torch was built without CUDA")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={name}: this machine has no Apple GPU")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (index or kind == "mps"):
        raise UserError(
            f"--device={name}: several ranks can't share one device; take --device=cuda, which gives each its own, or cpu"
        )
    if kind != "cuda":
        return torch.device(kind)
    number = int(index or os.environ.get("LOCAL_RANK", 0))
    needed = max(
        number + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )  # the same on all ranks, so that the main one tells it
    if needed > torch.cuda.device_count():
        raise UserError(
            f"--device={name}: {needed} GPUs are needed on this machine, {torch.cuda.device_count()} are there"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of activations, and why."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cpu":
        faster = measure_matmul_flops(device, torch.bfloat16, 256) / measure_matmul_flops(device, torch.float32, 256)
        found = (
            f"its matrix products take {1 / faster:.2g} of float32's time here"
            if faster > 1.2
            else f"bfloat16's matrix products take {1 / faster:.2g} of its time here"
        )
        return (torch.bfloat16 if faster > 1.2 else torch.float32), found
    if device.type != "cuda":
        return torch.float32, f"the default on {device.type}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU computes in it"
    return torch.float16, "this GPU has no bfloat16"


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, n: int = 0) -> float:
    """FLOPs a second of a product of n x n matrices here (0: large ones), the best of ten: no training step is faster."""
    n = n or (4096 if device.type == "cuda" else 512)
    square, seconds = torch.ones(n, n, device=device, dtype=dtype), []
    for _ in range(10):
        begin = time.perf_counter()
        float((square @ square)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / min(seconds)


ATTENTION_KERNELS = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}


def set_attention_kernel(name: str, device: torch.device) -> None:
    """Allow scaled_dot_product_attention only this one of its CUDA kernels (auto: all). Raises UserError where there is no choice."""
    if name != "auto" and device.type != "cuda":
        raise UserError(f"--attention_kernel={name}: only a CUDA GPU has a choice, not {device.type}")
    for kernel, enable in ATTENTION_KERNELS.items():
        enable(name in ("auto", kernel))


def tune_malloc() -> None:
    """Tell glibc's malloc, where that is the one, to keep what is freed: otherwise every step's large tensors are mapped, and their
    pages zeroed and faulted in, anew (mallopt(3))."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# Dense half-precision FLOPs a second, from the makers' data sheets; the more exact names first.
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
    """The device's peak in bfloat16 or float16, where it is known."""
    words = f" {device_name.replace('-', ' ').upper()} "
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in words), None)
