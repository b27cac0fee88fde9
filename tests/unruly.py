"""Techniques that misbehave in every way a plug-in can; their package is made by ``installed``."""

import ctypes
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from filelock import SoftFileLock

from widthbench import Outcome, Technique
from widthbench.experiment import adaptation, records
from widthbench.paths import cache_dir

WAYS = {
    "raises": "RuntimeError: on purpose",
    "hangs": "ran longer than the 6 s that its suite allows (time_limit)",
    "hangs-in-c": "ran longer than the 6 s that its suite allows (time_limit)",
    "segfaults": "its process crashed (SIGSEGV)",
    "aborts": "its process crashed (SIGABRT)",
    "exits": "SystemExit: 3",
    "ends": "its process ended with exit code 7 without a word",
    "eats": "MiB of memory, more than the 3000 MiB that its suite allows (memory_limit)",
    "asks-for-all": "RuntimeError: ",
    "recurses": "RecursionError",
    "interrupts": "KeyboardInterrupt",
    "is-killed": "its process was killed twice by SIGKILL, from outside (out of memory?)",
    "nan": "made it non-finite",
    "lone-surrogate": r"ValueError: \ud800",
    "waits-at-its-own-lock": "ran longer than the 6 s that its suite allows (time_limit)",
    "waits-at-a-lock-in-the-cache": "ran longer than the 6 s that its suite allows (time_limit)",
    "starts-others": "ran longer than the 6 s that its suite allows (time_limit)",
    "limits-file-sizes": "File too large",
    "leaves-traces-and-exits": "SystemExit: 3",
    "leaves-traces-and-interrupts": "KeyboardInterrupt",
    "leaves-others-and-ends": "its process ended with exit code 7 without a word",
    "closes-everything": "its process closed its pipe to the parent",
}


def _kind(fd):
    try:
        return os.fstat(fd).st_mode
    except OSError:
        return 0


class Unruly(Technique):
    """Does what its id says."""

    access = "none"

    def decide(self, task, state):
        getattr(self, self.id.replace("-", "_"))(task)
        return Outcome(
            task.keep_best(
                {n: torch.arange(g.channels, dtype=torch.float) for n, g in task.groups.items()}
            )
        )

    def raises(self, task):
        raise RuntimeError("on purpose")

    def hangs(self, task):
        time.sleep(1000)

    def hangs_in_c(self, task):
        signal.pthread_sigmask(
            signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}
        )
        ctypes.PyDLL(None).sleep(1000)  # with the interpreter's lock held

    def segfaults(self, task):
        ctypes.string_at(0)

    def aborts(self, task):
        os.abort()

    def exits(self, task):
        sys.exit(3)

    def ends(self, task):
        os._exit(7)

    def eats(self, task):
        self.kept = []
        while True:
            self.kept.append(torch.ones(100 * 2**18))  # 100 MiB, no more than 10 GiB a second
            time.sleep(0.01)

    def asks_for_all(self, task):
        torch.empty(2**50)

    def recurses(self, task):
        self.recurses(task)

    def interrupts(self, task):
        raise KeyboardInterrupt

    def is_killed(self, task):
        os.kill(os.getpid(), signal.SIGKILL)

    def nan(self, task):
        with torch.no_grad():
            next(task.model.parameters()).fill_(float("nan"))

    def lone_surrogate(self, task):
        raise ValueError("\ud800")

    def closes_everything(self, task):
        os.closerange(3, 4096)
        time.sleep(1000)

    def writes_everywhere(self, task):
        for fd in range(3, 64):
            if stat.S_ISFIFO(_kind(fd)):
                with suppress(OSError):
                    os.write(fd, b'hello\n{"at": "wait"}\n{"record": {}, "id": 1}x\n[]\n7\n')

    def forks(self, task):
        os.fork()

    def prints(self, task):
        print('{"record": "forged"}')
        os.write(1, b'{"record": "forged"}\n')
        for fd in range(3, 64):
            if stat.S_ISFIFO(_kind(fd)):
                with suppress(OSError):
                    os.write(fd, b"a line without an end")
        subprocess.run(["echo", '{"record": "forged"}'], check=True)
        assert sys.stdin.read() == ""

    def starts_others(self, task):
        subprocess.Popen(["sleep", os.environ.get("UNRULY_SLEEP", "98765")], start_new_session=True)
        time.sleep(1000)

    def waits_at_its_own_lock(self, task):
        SoftFileLock(tempfile.mkstemp()[1]).acquire()  # which nobody releases

    def waits_at_a_lock_in_the_cache(self, task):
        path = cache_dir() / "downloads.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        SoftFileLock(path).acquire()

    def limits_file_sizes(self, task):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    def changes_directory(self, task):
        os.chdir("/proc")

    def leaves_others_and_ends(self, task):
        subprocess.Popen(["sleep", "98763"], start_new_session=True)
        os._exit(7)

    def leaves_traces_and_exits(self, task):
        self.leaves_traces(task)
        sys.exit(3)

    def leaves_traces_and_interrupts(self, task):
        self.leaves_traces(task)
        raise KeyboardInterrupt

    def leaves_traces(self, task):
        torch.set_default_dtype(torch.float64)
        adaptation.score = lambda *_: records.Row(stage="resized", top1=100.0, loss=0.0, samples=1)
        os.environ["WIDTHBENCH_CACHE"] = "/nowhere"
        os.chdir("/")
        signal.setitimer(signal.ITIMER_REAL, 3)  # whose signal ends the process
        subprocess.Popen(["sleep", "98764"], start_new_session=True)


ALL = [
    *WAYS,
    "changes-directory",
    "prints",
    "writes-everywhere",
    "forks",
    "leaves-traces",
]
for _name in ALL:
    _attributes = {"id": _name, "__module__": __name__, "__doc__": Unruly.__doc__}
    globals()[_name.replace("-", "_").title()] = type(_name, (Unruly,), _attributes)


def installed(folder):
    """Make a folder, for PYTHONPATH, in which this module is an installed distribution."""
    info = folder / "unruly-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "unruly.py").write_text(Path(__file__).read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unruly\nVersion: 1.0\n")
    lines = [f"{n} = unruly:{n.replace('-', '_').title()}" for n in ALL]
    (info / "entry_points.txt").write_text("[widthbench.techniques]\n" + "\n".join(lines) + "\n")
    return folder
