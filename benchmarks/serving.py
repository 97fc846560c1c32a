"""Load on a server (sample.py --serve): tokens per second of one client and of several, and whether all was answered.

    python sample.py --serve --out_dir=out/run
    python benchmarks/serving.py --clients 1 8 --seconds=20 --turns=3
    python benchmarks/serving.py --clients 8 --seconds=300 --pid=PID        and the server's memory

Each client sends a request as soon as its last one is answered. The numbers of clients take turns, so that what else
the machine does slows all of them. It exits with status 1 if a request was lost.
"""

import argparse
import http.client
import json
import os
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROMPTS = ("Once upon a time", "The capital of France is", "To be or not to be,", "In the beginning", "A small model")


@dataclass
class Load:
    """What the clients of one turn have got."""

    n_tokens: int = 0
    n_answered: int = 0
    lost: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, reply: dict[str, Any], expected: int) -> None:
        n_tokens = reply.get("usage", {}).get("completion_tokens", 0)
        with self.lock:
            self.n_tokens += n_tokens
            self.n_answered += 1
            if n_tokens != expected:
                self.lost.append(json.dumps(reply)[:200])

    def lose(self, error: Exception) -> None:
        with self.lock:
            self.lost.append(repr(error))


def run_client(args: argparse.Namespace, number: int, until: float, load: Load) -> None:
    """Send requests, one after the other, until a time."""
    host = urlsplit(args.url).netloc
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {args.token}"}
    with closing(http.client.HTTPConnection(host, timeout=600)) as connection:
        turn = 0
        while time.monotonic() < until:
            body = {
                "model": args.model,
                "prompt": PROMPTS[(number + turn) % len(PROMPTS)],
                "max_tokens": args.max_tokens,
                "seed": 1000 * number + turn,
                "ignore_eos": True,
            }
            try:
                connection.request("POST", "/v1/completions", json.dumps(body), headers)
                load.count(json.load(connection.getresponse()), args.max_tokens)
            except (OSError, http.client.HTTPException, ValueError) as error:
                load.lose(error)
                connection.close()
            turn += 1


def resident_mb(pid: int) -> float:
    """Memory of a process, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run_turn(args: argparse.Namespace, n_clients: int) -> tuple[Load, float]:
    """(what the clients got, tokens per second). Prints memory each tenth of the time, if there is a --pid."""
    load = Load()
    began = time.monotonic()
    until = began + args.seconds
    threads = []
    for number in range(n_clients):
        threads.append(threading.Thread(target=run_client, args=(args, number, until, load), daemon=True))
        threads[-1].start()
    for tenth in range(10):
        if args.pid:
            print(f"  {tenth * args.seconds / 10:5.0f} s: {resident_mb(args.pid):,.0f} MB", flush=True)
        time.sleep(args.seconds / 10)
    for thread in threads:
        thread.join()
    return load, load.n_tokens / (time.monotonic() - began)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--token", default="none")
    parser.add_argument("--model", default="", help="default: the server's only one")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--pid", type=int, default=0, help="process of the server, whose memory is printed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    speeds: dict[int, list[float]] = {n_clients: [] for n_clients in args.clients}
    n_lost = 0
    for _ in range(args.turns):
        for n_clients in args.clients:
            load, speed = run_turn(args, n_clients)
            speeds[n_clients].append(speed)
            n_lost += len(load.lost)
            print(f"{n_clients} clients: {speed:.1f} tokens/s, {load.n_answered} answered, {len(load.lost)} lost")
            print(*load.lost[:3], sep="\n", end="", flush=True)
    first = statistics.median(speeds[args.clients[0]])
    for n_clients, values in speeds.items():
        median = statistics.median(values)
        print(f"{n_clients} clients: median {median:.1f} tokens/s, {median / first:.2f} x")
    raise SystemExit(bool(n_lost))


if __name__ == "__main__":
    main()
