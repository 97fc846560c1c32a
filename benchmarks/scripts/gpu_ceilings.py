"""What a GPU can do at most: a copy, matrix products, attention, and what a launch costs.

    python gpu_ceilings.py OPTIONS

OPTIONS is JSON: device, sizes (of each measurement), done (names not to measure again). Prints each figure as a line
of JSON. On a CPU it rehearses the lines; CUDA graphs and attention kernels are left out there.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend

N_TIMED = 10
N_LAUNCHES = 200
Record = dict[str, Any]


class Ceilings:
    """The device, the sizes, and how to time a call there."""

    def __init__(self, device: str, sizes: dict[str, Any]):
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.sizes = sizes

    def randn(self, *shape: int) -> Tensor:
        """Random numbers: GPUs multiply zeros and ones faster."""
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object], times: int = N_TIMED) -> list[float]:
        """Seconds of each call, after three that warm up."""
        for _ in range(3):
            call()
        seconds = []
        for _ in range(times):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return seconds

    # -- the figures

    def machine(self) -> Record:
        """Versions, and the clocks and power limits as they are: nothing is set."""
        cudnn = torch.backends.cudnn.version() if self.on_gpu else None
        record: Record = {"value": torch.__version__, "unit": "torch", "cuda": torch.version.cuda, "cudnn": cudnn}
        if self.on_gpu:
            query = ["nvidia-smi", "-q", "-d", "CLOCK,POWER"]
            record["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout[:4000]
            record["gpu"] = torch.cuda.get_device_name()
            record["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        return record

    def copy(self) -> Record:
        """A large tensor to another place: bytes read and bytes written."""
        source = self.randn(self.sizes["copy"])
        target = torch.empty_like(source)
        seconds = self.time(lambda: target.copy_(source))
        return rate([2 * source.nbytes / second / 1e9 for second in seconds], "GB/s", f"{source.nbytes:,} bytes")

    def product(self, m: int, k: int, n: int) -> Record:
        a, b = self.randn(m, k), self.randn(k, n)
        seconds = self.time(lambda: a @ b)
        return rate(
            [2 * m * k * n / second / 1e12 for second in seconds], "TFLOP/s", f"{m} x {k} x {n}, bfloat16, randn"
        )

    def launch(self) -> Record:
        """A kernel that does next to nothing, started from Python."""
        number = torch.zeros(1, device=self.device)

        def launch_many() -> None:
            for _ in range(N_LAUNCHES):
                number.add_(1)

        return rate([second / N_LAUNCHES * 1e6 for second in self.time(launch_many)], "us", "add_ to one number, eager")

    def graph_kernel(self) -> Record:
        """The same kernel in a CUDA graph."""
        number = torch.zeros(1, device=self.device)
        number.add_(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(N_LAUNCHES):
                number.add_(1)
        seconds = self.time(graph.replay)
        return rate([second / N_LAUNCHES * 1e6 for second in seconds], "us", "add_ to one number, in a CUDA graph")

    def attention(self, kernel: SDPBackend, batch: int, heads: int, length: int, width: int) -> Record:
        """Forward and backward of causal attention by one kernel."""
        q, k, v = (self.randn(batch, heads, length, width).requires_grad_() for _ in range(3))
        gradient = self.randn(batch, heads, length, width)

        def forward_backward() -> None:
            with sdpa_kernel(kernel):
                torch.autograd.grad(attend(q, k, v, is_causal=True), (q, k, v), gradient)

        ran = f"{kernel.name}, forward and backward, causal, {(batch, heads, length, width)}, bfloat16"
        return rate([second * 1e3 for second in self.time(forward_backward)], "ms", ran)

    def growing_attention(self, *, cudnn: bool) -> Record:
        """One query against keys of lengths that were never seen before, as eager decoding has them."""
        first, last = self.sizes["growing"]
        k, v = self.randn(1, 12, last, 64), self.randn(1, 12, last, 64)
        q = self.randn(1, 12, 1, 64)
        torch.backends.cuda.enable_cudnn_sdp(enabled=cudnn)
        attend(q, k[:, :, : first - 1], v[:, :, : first - 1])
        rounds = []
        for _ in range(2):
            milliseconds = []
            for length in range(first, last + 1):
                self.wait()
                start = time.perf_counter()
                attend(q, k[:, :, :length], v[:, :, :length])
                self.wait()
                milliseconds.append((time.perf_counter() - start) * 1e3)
            rounds.append(statistics.median(milliseconds))
        torch.backends.cuda.enable_cudnn_sdp(enabled=True)
        ran = (
            f"one query, keys of {first} to {last}, cuDNN {'allowed' if cudnn else 'off'}; then the same lengths again"
        )
        return {"value": rounds[0], "unit": "ms a new length", "ran": ran, "ms_when_seen": rounds[1]}

    def all(self) -> Iterator[tuple[str, Callable[[], Record]]]:
        """The name of each figure, and what measures it."""
        yield "machine", self.machine
        yield "copy", self.copy
        for m, k, n in self.sizes["products"]:
            yield f"product {m}x{k}x{n}", partial(self.product, m, k, n)
        yield "launch", self.launch
        if self.on_gpu:
            yield "kernel in a graph", self.graph_kernel
            for shape in self.sizes["attention"]:
                for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                    name = f"attention {kernel.name.split('_')[0].lower()} {'x'.join(map(str, shape))}"
                    yield name, partial(self.attention, kernel, *shape)
        yield "growing attention", partial(self.growing_attention, cudnn=True)
        yield "growing attention without cuDNN", partial(self.growing_attention, cudnn=False)


def rate(values: list[float], unit: str, ran: str) -> Record:
    return {"value": statistics.median(values), "unit": unit, "ran": ran, "windows": values}


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.manual_seed(0)
    for name, measure in Ceilings(options["device"], options["sizes"]).all():
        if name not in options["done"]:
            try:
                record = measure()
            except RuntimeError as error:  # a kernel that this GPU lacks costs only its own figure
                record = {"value": None, "unit": "", "error": str(error).strip().partition("\n")[0]}
            print("json", json.dumps({"name": name, **record}), flush=True)


if __name__ == "__main__":
    main()
