"""What the server of forked processes loads once: a fork of it starts in a hundredth of a second."""

import gc

import helpers
import torch._dynamo
import torch.distributed.checkpoint

import evaluate
import export
import report
import sample
import sweep

gc.freeze()  # a collection in a fork would copy the memory of all that is loaded

__all__ = ["evaluate", "export", "helpers", "report", "sample", "sweep", "torch"]
