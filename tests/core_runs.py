"""Run pytest many times, each time in a copy of one process that has loaded what pytest needs.

Reads a list of [folder, arguments] as JSON from stdin. Prints a line [folder, status] when a run
has ended; what it has printed is in its folder, in the file "output".
"""
import gc
import json
import os
import signal
import sys
import traceback

import pytest

import conftest  # noqa: F401 - it imports aiproxy, and that most of the standard library

# One CPU is left to the process of the tests that run beside these.
AT_ONCE = max(1, (os.cpu_count() or 1) - 1)

MOST_SECONDS = 300


def main():
    runs = json.load(sys.stdin)
    forget_what_differs()
    gc.freeze()                 # nothing of it will be freed, so the copies need not look
    running = {}
    for folder, arguments in runs:
        if len(running) == AT_ONCE:
            report_one(running)
        process = os.fork()
        if not process:
            run(folder, arguments)
        running[process] = folder
    while running:
        report_one(running)


def forget_what_differs():
    """Each run imports the modules that are in its own folder."""
    for name in ("aiproxy", "conftest", "support"):
        del sys.modules[name]


def report_one(running):
    process, status = os.wait()
    print(json.dumps([running.pop(process), status]), flush=True)


def run(folder, arguments):
    """Run pytest in this process, which ends with it."""
    status = 1
    try:
        signal.alarm(MOST_SECONDS)
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, sys.stdout.fileno())
        os.dup2(output, sys.stderr.fileno())
        status = pytest.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
