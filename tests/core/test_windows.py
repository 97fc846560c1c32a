"""Windows, as far as a stand-in shows it: its missing modules, functions and signals, its folders that can't be opened,
its files that must be writable to be synced, and its mandatory locks."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY

STAND_IN = """
import contextlib, errno, io, os, runpy, signal, sys, types
import asyncio, multiprocessing, shutil, subprocess, tempfile  # Python itself looks for Windows too

ROOT = sys.argv[1]
sys.path.insert(0, ROOT)
real_open, real_fsync, real_rename = os.open, os.fsync, os.rename
writable, locked = set(), {}

def open_file(path, flags, *args, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    handle = real_open(path, flags, *args, **options)
    (writable.add if flags & (os.O_RDWR | os.O_WRONLY) else writable.discard)(handle)
    return handle

def fsync(handle):
    if handle not in writable:
        raise OSError(errno.EBADF, "Bad file descriptor")
    real_fsync(handle)

def rename(source, target):
    if os.path.exists(target):
        raise FileExistsError(errno.EEXIST, "File exists", str(target))
    real_rename(source, target)

def locking(handle, mode, size):
    file = os.fstat(handle).st_ino
    holder = locked.get(file)
    if holder not in (None, handle) and holds(holder, file):
        raise PermissionError(errno.EACCES, "Permission denied")
    locked[file] = handle

def holds(handle, file):
    try:
        return os.fstat(handle).st_ino == file
    except OSError:  # closed
        return False

def become_windows():
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules[name] = None
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGKILL", "SIGQUIT"):
        delattr(signal, name)
    for name in ("pread", "fork", "killpg", "getuid", "geteuid"):
        delattr(os, name)
    os.rename = rename
    shutil._use_fd_functions = False
    sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
"""

HELP = """
become_windows()
for script in ("train", "sample", "evaluate", "export", "sweep", "report", "bench"):
    sys.argv = [script, "--help"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            runpy.run_path(f"{ROOT}/{script}.py", run_name="__main__")
        except SystemExit as end:
            assert not end.code, script
    assert "--" in output.getvalue(), script
"""

TRAIN = """
import torch.distributed.checkpoint
become_windows()
import train, train_args
from nanoforge import files, run_dir, run_state
from nanoforge.errors import UserError

os.open, os.fsync = open_file, fsync
flags, out_dir = sys.argv[2:], sys.argv[2].partition("=")[2]
assert train.main(train_args.parse(flags)).step == 4
resumed = ["--init_from=resume", f"--out_dir={out_dir}", "--max_iters=6"]
assert train.main(train_args.parse(resumed)).step == 6
with run_dir.RunLock(run_dir.Path(out_dir)) as lock:
    lock.acquire()
    assert run_state.is_running(run_dir.Path(out_dir))
    try:
        train.main(train_args.parse(resumed))
    except UserError as error:
        assert "is training there" in str(error), error
    else:
        raise AssertionError("a second run was let in")
assert train.main(train_args.parse([*flags, "--overwrite"])).step == 4
"""


def run_stand_in(code: str, *argv: str) -> None:
    command = [sys.executable, "-c", STAND_IN + code, str(ROOT), *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]


@pytest.mark.slow
def test_commands_start_on_windows():
    run_stand_in(HELP)


@pytest.mark.slow
def test_runs_train_save_resume_and_lock_on_windows(data_dir: Path, tmp_path: Path):
    run_stand_in(TRAIN, f"--out_dir={tmp_path / 'x'}", *TINY, f"--data_dir={data_dir}", "--dataset=a")
