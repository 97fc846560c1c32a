"""What torchrun, or another launcher, says of this process in its environment. Imports no torch."""

import os

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SECONDS_FOR_MAIN_RANK = 3.0  # until it has reported an error that all ranks have


def world_size() -> int:
    """The processes that were started together; 1 where this one was started alone, whatever is left over of RANK."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1


def is_main_process() -> bool:
    """Whether this process prints what is the same on all ranks."""
    return world_size() == 1 or environment_error() is not None or os.environ["RANK"] == "0"


def local_rank() -> int:
    """The number of this process among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def local_world_size() -> int:
    """The processes on this machine that were started together."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def environment_error() -> str | None:
    """What is wrong with the variables that a launcher sets, and how to correct it."""
    if world_size() == 1:
        return None
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    size, rank = os.environ["WORLD_SIZE"], os.environ.get("RANK", "")
    if missing:
        return f"WORLD_SIZE={size}: set without {', '.join(missing)}; start with torchrun, or unset WORLD_SIZE"
    if not rank.isdecimal() or int(rank) >= int(size):
        return f"RANK={rank}: not below WORLD_SIZE={size}; start with torchrun, or unset both"
    return None
