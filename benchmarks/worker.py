"""One contestant in a process of its own: `python -m benchmarks.worker MODULE`, driven through a pipe.

Requests and answers are lines of JSON on standard input and output:

    {"op": "prepare", "task": "forward", "options": {...}}  ->  {"digest": [...], "versions": {...}}
    {"op": "time", "calls": 3}                              ->  {"seconds": [...], "resident": bytes, "peak": bytes}

or {"unavailable": reason}, or {"error": traceback}. Between requests the process waits for a line and uses no CPU.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.task import Task, UnavailableError


def memory() -> dict[str, int | None]:
    """Resident bytes of this process now and at its highest; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return {"resident": None, "peak": None}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {key: int(fields[name].split()[0]) * 1024 for key, name in (("resident", "VmRSS"), ("peak", "VmHWM"))}


def prepare(module_name: str, request: dict[str, Any]) -> tuple[Task, dict[str, Any]]:
    """Imports the contestant and makes the task ready, compiled and warm."""
    module = importlib.import_module(module_name)
    task = module.TASKS[request["task"]](request["options"])
    return task, {"digest": list(task.digest), "versions": module.versions()}


def timed(task: Task, calls: int) -> dict[str, Any]:
    """Calls the task, one after the other: seconds of each, resident bytes before the first, peak after the last."""
    before = memory()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        result = task.run()
        seconds.append(time.perf_counter() - start)
        del result
    return {"seconds": seconds, "resident": before["resident"], "peak": memory()["peak"]}


def serve(module_name: str) -> None:
    """Answers requests until standard input ends."""
    # The pipe is ours alone: what libraries print goes to standard error.
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as answers:
        os.dup2(2, 1)
        task = Task(lambda: None)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if request["op"] == "prepare":
                    task = Task(lambda: None)  # lets go of the one before
                    task, answer = prepare(module_name, request)
                else:
                    answer = timed(task, request["calls"])
            except (UnavailableError, ImportError) as reason:
                answer = {"unavailable": str(reason).strip().splitlines()[0]}
            except Exception:  # told to the harness, which stops with it
                answer = {"error": traceback.format_exc()}
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1])
