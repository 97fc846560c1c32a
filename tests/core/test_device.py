"""The process and its threads."""

import os
import time
from pathlib import Path

import pytest
import torch
from helpers import start_fork

from nanoforge.device import in_own_thread

THREADS = Path("/proc/self/task")


def add() -> float:
    """A sum of many numbers, for which PyTorch takes all its OpenMP threads."""
    return float(torch.ones(10**6).sum())


def check_threads() -> None:
    """What a fork does, which has no OpenMP threads yet."""
    torch.set_num_threads(2)
    n_before = len(os.listdir(THREADS))
    assert in_own_thread(add) == 10**6
    deadline = time.monotonic() + 10
    while len(os.listdir(THREADS)) > n_before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir(THREADS)) == n_before
    add()
    assert len(os.listdir(THREADS)) > n_before


@pytest.mark.skipif(not THREADS.exists(), reason="needs Linux")
def test_a_thread_of_its_own_leaves_no_openmp_threads_behind():
    process = start_fork(check_threads)
    process.join()
    assert process.exitcode == 0


def test_an_error_comes_out_of_it():
    with pytest.raises(ZeroDivisionError):
        in_own_thread(lambda: 1 // 0)
