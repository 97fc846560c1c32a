"""Two hosts on one machine: network namespaces joined by a wire that delays packets and can be cut. Linux, as root."""

import ctypes
import fcntl
import heapq
import itertools
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from helpers import ROOT

ADDRESSES = {"a": "10.78.0.1", "b": "10.78.0.2"}
TUN_REQUEST = (0x400454CA, 0x1001)  # TUNSETIFF; IFF_TUN without packet headers
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3"),
    *("--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES['a']}:29400", "--rdzv_id=story"),
]
RDZV_CONF = "join_timeout=120,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=4"


def ip(*args: str) -> str:
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True).stdout


class TwoHosts:
    """The hosts a and b. `delay` (seconds, one way) and `is_cut` of their wire may be changed at any time."""

    def __init__(self) -> None:
        """Raises OSError or CalledProcessError where namespaces can't be made."""
        self.delay = 0.0
        self.is_cut = False
        self.closed = False
        self.names = {host: f"nf{os.getpid()}{host}" for host in ADDRESSES}
        try:
            for name in self.names.values():
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            self.ends = [self.open_tun(host) for host in ADDRESSES]
        except BaseException:
            self.remove_namespaces()
            raise
        self.wire = threading.Thread(target=self.forward, daemon=True)
        self.wire.start()

    def open_tun(self, host: str) -> int:
        """The file of a network interface in a host's namespace: what is read from it, the host has sent."""
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        away = os.open(f"/run/netns/{self.names[host]}", os.O_RDONLY)
        try:
            if libc.setns(away, 0):
                raise OSError(ctypes.get_errno(), "setns")
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(end, TUN_REQUEST[0], struct.pack("16sH", b"wire", TUN_REQUEST[1]))
        finally:
            libc.setns(home, 0)
            os.close(home)
            os.close(away)
        ip("-n", self.names[host], "addr", "add", f"{ADDRESSES[host]}/24", "dev", "wire")
        ip("-n", self.names[host], "link", "set", "wire", "up")
        return end

    def forward(self) -> None:
        """Carry packets from end to end until the hosts are closed."""
        on_the_way: list[tuple[float, int, int, bytes]] = []
        numbers = itertools.count()
        while not self.closed:
            wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else 0.1
            for end in select.select(self.ends, [], [], wait)[0]:
                packet = os.read(end, 65536)
                other = self.ends[1 - self.ends.index(end)]
                if not self.is_cut:
                    heapq.heappush(on_the_way, (time.monotonic() + self.delay, next(numbers), other, packet))
            while on_the_way and on_the_way[0][0] <= time.monotonic():
                *_, end, packet = heapq.heappop(on_the_way)
                os.write(end, packet)

    def start_torchrun(self, host: str, flags: list[str], log: Path) -> subprocess.Popen:
        """An elastic torchrun of train.py over one or two hosts; host a keeps the rendezvous."""
        command = [*TORCHRUN, f"--local-addr={ADDRESSES[host]}", f"--rdzv_conf={RDZV_CONF},is_host={host == 'a'}"]
        # torch 2.13's shared store lets no host join a rendezvous whose rank 0 has been in one before.
        env = os.environ | {"GLOO_SOCKET_IFNAME": "wire", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *command, str(ROOT / "train.py"), *flags],
            stdout=log.open("a"),
            stderr=subprocess.STDOUT,
            env=env,
        )

    def kill(self, host: str) -> None:
        """All processes of a host, at once."""
        for pid in ip("netns", "pids", self.names[host]).split():
            os.kill(int(pid), signal.SIGKILL)

    def remove_namespaces(self) -> None:
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def close(self) -> None:
        for host in ADDRESSES:
            self.kill(host)
        self.closed = True
        self.wire.join()
        for end in self.ends:
            os.close(end)
        self.remove_namespaces()
