"""Run a script, unmodified, and print the seconds that it spent in one function.

    python stopwatch.py FOLDER MODULE FUNCTION SCRIPT [ARGUMENT ...]

FOLDER holds SCRIPT and MODULE. FUNCTION may be a method (GPT.generate). Of a tensor that it returns the last column is
read: that waits for the device. Whatever else it returns has waited. Before its first call it is called once outside
the time, which compiles what it compiles, with a copy of what follows its first argument, the model or the decoder.
"""

import copy
import functools
import importlib
import runpy
import sys
import time
from typing import Any

folder, module_name, function_path, script, *arguments = sys.argv[1:]
sys.path[0] = folder
*owner_names, function_name = function_path.split(".")
owner = importlib.import_module(module_name)
for name in owner_names:
    owner = getattr(owner, name)
function = getattr(owner, function_name)
spent: list[float] = []


def call(*args: Any, **kwargs: Any) -> Any:
    result = function(*args, **kwargs)
    if hasattr(result, "sum"):
        result[..., -1].sum().item()
    return result


@functools.wraps(function)
def timed(*args: Any, **kwargs: Any) -> Any:
    if not spent:
        call(*args[:1], *copy.deepcopy(args[1:]), **kwargs)
    start = time.perf_counter()
    result = call(*args, **kwargs)
    spent.append(time.perf_counter() - start)
    return result


setattr(owner, function_name, timed)
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
print("stopwatch", sum(spent))
