"""Run a command, then print its seconds and the peak memory of the largest process among it and its children.

    python -IS meter.py COMMAND ...

Imports little, so that it is small when it forks: the command's peak memory counts from there.
"""

import resource
import subprocess
import sys
import time

start = time.perf_counter()
status = subprocess.call(sys.argv[1:])
seconds = time.perf_counter() - start
print("meter", seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True)
sys.exit(status)
