"""One run on two hosts that come and go, under an elastic torchrun. Skips where network namespaces can't be made."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import TINY, assert_same_lines, read_run
from two_hosts import TwoHosts

RANK_TIMEOUT = 5


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    try:
        two_hosts = TwoHosts()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces: {error}")
    yield two_hosts
    two_hosts.close()


def wait_for(condition: Callable[[], bool], log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_outlives_its_hosts(hosts, run, data_dir: Path, tmp_path: Path):
    """50 ms of delay, a partition, a host lost and back, then the rendezvous host unplugged: each step was made
    once, on the data and with the losses of one undisturbed process."""
    out_dir = tmp_path / "elastic"
    logs = {host: tmp_path / f"log_{host}" for host in "ab"}
    shape = [*TINY, f"--data_dir={data_dir}", "--dataset=a", "--gradient_accumulation_steps=8", "--log_interval=1"]
    shape += ["--eval_interval=100000", "--log_data_hash"]
    flags = [*shape, f"--out_dir={out_dir}", "--max_iters=100000", "--checkpoint_interval=10"]
    flags += [f"--rank_timeout={RANK_TIMEOUT}"]

    def start(host: str) -> subprocess.Popen:
        return hosts.start_torchrun(host, flags, logs[host])

    def last_step() -> int:
        metrics = out_dir / "metrics.jsonl"
        return len(re.findall('"event": "train"', metrics.read_text())) if metrics.exists() else 0

    def count(text: str) -> int:
        return logs["a"].read_text().count(text)

    def advance(steps: int, log: Path) -> None:
        goal = last_step() + steps
        wait_for(lambda: last_step() >= goal, log)

    # 1. Both hosts, far apart, then a partition that is shorter than the timeout.
    hosts.delay = 0.05
    first, second = start("a"), start("b")
    advance(5, logs["a"])
    hosts.is_cut = True
    time.sleep(2)
    hosts.is_cut = False
    hosts.delay = 0.0
    advance(10, logs["a"])

    # 2. Host b is lost; a goes on alone, from the newest checkpoint.
    hosts.kill("b")
    wait_for(lambda: count("on each of 1 rank") == 1, logs["a"])
    advance(5, logs["a"])

    # 3. Host b is back.
    second = start("b")
    wait_for(lambda: count("on each of 2 ranks") == 2, logs["a"])
    advance(5, logs["a"])

    # 4. Host a, which keeps the rendezvous, is unplugged. What is left ends within the timeout, and says why.
    hosts.is_cut = True
    first.kill()
    hosts.kill("a")
    wait_for(lambda: "lost the connection" in logs["b"].read_text(), logs["b"], seconds=RANK_TIMEOUT + 10)
    hosts.kill("b")
    second.wait(10)
    hosts.is_cut = False

    # 5. The same command continues on both.
    first, second = start("a"), start("b")
    wait_for(lambda: count("on each of 2 ranks") == 3, logs["a"])
    advance(5, logs["a"])
    first.terminate()
    second.terminate()
    first.wait(60)
    second.wait(60)

    steps = read_run(out_dir).train
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    undisturbed = run(*shape, f"--max_iters={len(steps)}").train
    assert [line["data_hash"] for line in steps] == [line["data_hash"] for line in undisturbed]
    assert_same_lines(steps, undisturbed, ["tokens", "loss"])
