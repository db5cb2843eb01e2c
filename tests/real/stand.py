"""What the scripts in this folder have in common: counted checks, and a program under test.

CI runs the scripts, pytest does not.
"""

import os
import sys
import traceback

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]

from support import Program  # noqa: E402


class Checks:
    """`with checks("what must be so"):` counts one.

    `end()` prints the closing line and exits with 1 if any has failed.
    """

    def __init__(self):
        self.passed, self.failed = 0, 0

    def __call__(self, name):
        self.name = name
        return self

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind and not issubclass(kind, Exception):
            return False
        self.passed, self.failed = self.passed + (not kind), self.failed + bool(kind)
        print("%-6s %s" % ("FAILED" if kind else "passed", self.name), flush=True)
        if kind:
            traceback.print_exception(kind, error, trace)
        return True

    def end(self):
        print("%d passed, %d failed" % (self.passed, self.failed), flush=True)
        # At once, without waiting for threads of libraries.
        os._exit(1 if self.failed or not self.passed else 0)


def start(upstream, **settings):
    """aiproxy.py as a process of its own in front of `upstream`."""
    env = {"AIPROXY_" + name: str(value) for name, value in settings.items()}
    return Program(env={"AIPROXY_UPSTREAM": upstream, **env})


def memory(program, name="VmHWM"):
    """A line of /proc/PID/status in MB: VmHWM is the peak, VmRSS what is resident now."""
    with open("/proc/%d/status" % program.process.pid) as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


def check_calm(program):
    """Neither a traceback nor a fault was printed."""
    said = "".join(program.errors)
    assert "Traceback" not in said and "fault" not in said, said[-2000:]
