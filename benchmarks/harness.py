"""What all benchmarks share: workers, turns taken in rounds, a check that all do the same work, the command line.

Frameworks live in environments of their own, so each contestant is a process there that waits on a pipe. Only one works
at a time: A, B, C, A, B, C, ... Whatever disturbs the machine for a while then disturbs all of them, and a ratio is
taken between neighbours of one round before anything is summarised.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from benchmarks.machine import busy_seconds, cores, machine, process_seconds
from benchmarks.tables import Section

ROOT = Path(__file__).resolve().parent.parent
# Between turns everyone has to be at rest for this long: pools of threads spin a while, freed memory is given back.
SETTLE = 0.05
SETTLE_TRIES = 20
IDLE_WINDOW = 0.5
# A round in which other programs used more than this share of the CPU was disturbed.
DISTURBED = 0.1
MAX_CALLS = 200
# A contestant whose numbers differ by more than this many standard deviations computes something else.
AGREEMENT = 1e-3

SIZES: Mapping[str, Mapping[str, int]] = {
    "base": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
    },
}
T = TypeVar("T")


class BenchmarkError(RuntimeError):
    """The benchmark cannot go on; the message says which contestant, and why."""


@dataclass(frozen=True)
class Contestant:
    """Someone who takes part.

    Attributes:
        name: as in the tables.
        framework: whose environment it needs, the key of `--python`.
        module: its tasks, below `benchmarks.contestants`.
        options: added to the options of every task.
        optional: it may be unable to do a task though it runs where formax does.
    """

    name: str
    framework: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False


FORMAX = Contestant("formax", "formax", "with_formax")
PLAIN = Contestant("plain", "formax", "plain")
TORCH = Contestant("torch eager", "torch", "with_torch")
COMPILED = Contestant("torch.compile", "torch", "with_torch", {"compile": True})
FLAX = Contestant("HF Flax", "flax", "with_flax")
FRAMEWORKS = ("formax", "torch", "flax")


@dataclass(frozen=True)
class Turn:
    """What a worker said after its turn: seconds of every call, resident bytes before and peak bytes after."""

    seconds: tuple[float, ...]
    resident: int | None
    peak: int | None


class Worker:
    """A contestant's process. Its standard error goes to a file that is shown when it fails."""

    def __init__(self, contestant: Contestant, python: str) -> None:
        self.contestant = contestant
        self._log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", f"benchmarks.contestants.{contestant.module}"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def prepare(self, task: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a task ready, compiled and warm; the answer has `digest` and `versions`, or `unavailable`."""
        return self._ask({"op": "prepare", "task": task, "options": {**self.contestant.options, **options}})

    def time(self, calls: int) -> Turn:
        """Calls the task so many times."""
        answer = self._ask({"op": "time", "calls": calls})
        if "unavailable" in answer:
            raise BenchmarkError(f"{self.contestant.name}: {answer['unavailable']}")
        return Turn(tuple(answer["seconds"]), answer["resident"], answer["peak"])

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far; 0 where the system does not say."""
        return process_seconds(self._process.pid)

    def close(self) -> None:
        """Ends the process by closing its pipe."""
        with suppress(BrokenPipeError):  # it has ended already, which its last answer told
            self._requests.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._log.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise BenchmarkError(f"{self.contestant.name} failed in {request}:\n{answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        return "the process ended; it said last:\n" + "".join(self._log.readlines()[-20:])


def environment() -> dict[str, str]:
    """Environment variables of a worker: this process's, on the CPU unless they say otherwise, and offline."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", **os.environ, **quiet}


@dataclass
class Watch:
    """How undisturbed the timings were.

    Attributes:
        wall: seconds that the timings took.
        foreign: CPU seconds of other programs meanwhile, None where the system does not say.
        repeated: rounds that were taken again because other programs disturbed them.
        idle: contestant -> the largest share of a core that it was seen to use while it waited.
    """

    wall: float = 0.0
    foreign: float | None = 0.0
    repeated: int = 0
    idle: dict[str, float] = field(default_factory=dict)

    def says(self) -> str:
        """A line for the report."""
        if self.foreign is None or not self.wall:
            return "how busy the machine was otherwise is unknown on this system"
        share = self.foreign / self.wall / cores()
        said = [f"while timing, other programs used {100 * share:.0f} % of the CPU"]
        if share > DISTURBED:
            said.append("**that is too much for the numbers to count**")
        if self.repeated:
            said.append(f"{self.repeated} rounds that they disturbed were taken again")
        if self.idle:
            name = max(self.idle, key=self.idle.__getitem__)
            said.append(f"a waiting contestant used at most {100 * self.idle[name]:.0f} % of a core ({name})")
        return "; ".join(said)


# --- the lab


@dataclass
class Lab:
    """What a topic works with.

    Attributes:
        size: a key of `SIZES`.
        rounds: how often each contestant has its turn.
        turn: seconds of a turn at least; short calls are repeated within it.
        pythons: framework -> interpreter of its environment.
        patience: seconds that may go into waiting for a quiet machine and taking disturbed rounds again.
        shapes: (batch, length) of the inputs, or None for the topic's own.
        folder: where the checkpoint is written.
        versions: what the workers said of their environments.
        unavailable: contestant -> why it did not take part.
    """

    size: str
    rounds: int
    turn: float
    pythons: Mapping[str, str]
    patience: float
    shapes: tuple[tuple[int, int], ...] | None
    folder: Path
    watch: Watch = field(default_factory=Watch)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    live: list[Worker] = field(default_factory=list)

    @property
    def config(self) -> Mapping[str, int]:
        """Sizes of the model."""
        return SIZES[self.size]

    def options(self, shape: tuple[int, int], **more: Any) -> dict[str, Any]:
        """Options of a task with inputs of this shape."""
        return {
            "checkpoint": str(self.checkpoint()),
            "shape": list(shape),
            "vocab_size": self.config["vocab_size"],
            **more,
        }

    def checkpoint(self) -> Path:
        """The folder with the checkpoint, written when first asked for."""
        path = self.folder / "checkpoint"
        if not path.exists():
            tell(f"writing a checkpoint of size {self.size}")
            with self.worker(FORMAX) as writer:
                self.prepare(writer, "checkpoint", {"checkpoint": str(path), "config": self.config})
                writer.time(1)
        return path

    @contextmanager
    def worker(self, contestant: Contestant) -> Iterator[Worker]:
        """A contestant's process, for as long as the context lasts."""
        worker = Worker(contestant, self.pythons[contestant.framework])
        self.live.append(worker)
        try:
            yield worker
        finally:
            self.live.remove(worker)
            worker.close()

    def prepare(self, worker: Worker, task: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """Makes a task ready; None, with the reason kept, when the contestant cannot.

        Raises:
            BenchmarkError: it failed, or it runs where formax does: without formax there is nothing to compare with.
        """
        name = worker.contestant.name
        optional = worker.contestant.optional
        if f"{name}, {task}" in self.unavailable and not optional:
            return None
        answer = worker.prepare(task, options)
        if "unavailable" in answer:
            if worker.contestant.framework == "formax" and not optional:
                raise BenchmarkError(f"{name} cannot do {task!r}: {answer['unavailable']}")
            self.unavailable[f"{name}, {task}"] = answer["unavailable"]
            return None
        self.versions[name] = answer["versions"]
        return answer

    def compare(
        self,
        workers: Iterable[Worker],
        task: str,
        options: Mapping[str, Any],
        *,
        same: bool = True,
        of: Callable[[Sequence[float]], float] = statistics.median,
        agreement: float = AGREEMENT,
    ) -> dict[str, list[float]]:
        """Seconds of a call, by contestant and round.

        Args:
            workers: who takes part.
            task: what they do.
            options: with what.
            same: all have to compute the same numbers.
            of: which of the calls of a turn counts.
            agreement: how far numbers may differ, in standard deviations.
        """
        answers = [(worker, self.prepare(worker, task, options)) for worker in workers]
        ready = {worker: answer for worker, answer in answers if answer is not None}
        if same:
            digests = {worker.contestant.name: answer["digest"] for worker, answer in ready.items()}
            check_agreement(digests, f"{task} {options}", agreement)
        turns: dict[str, Callable[[], Turn]] = {}
        for worker in ready:
            (once,) = worker.time(1).seconds
            calls = max(1, min(MAX_CALLS, round(self.turn / once)))
            turns[worker.contestant.name] = partial(worker.time, calls)
        return {name: [of(turn.seconds) for turn in found] for name, found in self.rounds_of(turns).items()}

    def rounds_of(self, turns: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
        """Lets everyone have a turn, one after the other, as many times as there are rounds."""
        results: dict[str, list[T]] = {name: [] for name in turns}
        for _ in range(self.rounds):
            for name, value in self._round(turns).items():
                results[name].append(value)
        self._check_idle()
        return results

    def _round(self, turns: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """One turn of each; taken again, as long as there is patience, when other programs disturbed it."""
        while True:
            values: dict[str, T] = {}
            start, foreign = time.perf_counter(), self._foreign_seconds()
            for name, turn in turns.items():
                self._settle()
                values[name] = turn()
            wall, foreign = time.perf_counter() - start, difference(self._foreign_seconds(), foreign)
            if foreign is None or foreign <= DISTURBED * wall * cores() or self.patience <= 0:
                self.watch.wall += wall
                self.watch.foreign = (
                    None if foreign is None or self.watch.foreign is None else self.watch.foreign + foreign
                )
                return values
            self.watch.repeated += 1
            self.patience -= wall
            self._await_quiet()

    def _await_quiet(self) -> None:
        """Waits until other programs leave the machine alone, as long as there is patience."""
        tell(f"waiting for a quiet machine, for {self.patience:.0f} s at most")
        while self.patience > 0:
            before = self._foreign_seconds()
            time.sleep(IDLE_WINDOW)
            self.patience -= IDLE_WINDOW
            if (difference(self._foreign_seconds(), before) or 0.0) <= DISTURBED * IDLE_WINDOW * cores():
                return

    def _check_idle(self) -> None:
        """Sees whether waiting workers are at rest."""
        if not self.live:
            return
        self._settle()
        before = [worker.cpu_seconds() for worker in self.live]
        time.sleep(IDLE_WINDOW)
        for worker, start in zip(self.live, before, strict=True):
            used = (worker.cpu_seconds() - start) / IDLE_WINDOW
            self.watch.idle[worker.contestant.name] = max(used, self.watch.idle.get(worker.contestant.name, 0.0))

    def _settle(self) -> None:
        """Waits until no live worker uses CPU time any more."""
        for _ in range(SETTLE_TRIES):
            before = [worker.cpu_seconds() for worker in self.live]
            time.sleep(SETTLE)
            if [worker.cpu_seconds() for worker in self.live] == before:
                return

    def _foreign_seconds(self) -> float | None:
        """CPU time so far that was spent neither by this process, nor by its ended children, nor by live workers."""
        busy = busy_seconds()
        own = sum(os.times()[:4]) + sum(worker.cpu_seconds() for worker in self.live)
        return None if busy is None else busy - own


def difference(end: float | None, start: float | None) -> float | None:
    """Of two readings, None when there is none; not negative, as the readings are rounded."""
    return None if end is None or start is None else max(0.0, end - start)


def check_agreement(digests: Mapping[str, Sequence[float]], what: str, agreement: float = AGREEMENT) -> None:
    """Checks that all contestants computed the same numbers: time for another computation means nothing.

    Raises:
        BenchmarkError: one differs from the first by more than `agreement` of the standard deviation.
    """
    names = list(digests)
    expected = digests[names[0]]
    scale = statistics.pstdev(expected) or 1.0
    for name in names[1:]:
        found = digests[name]
        # A NaN is the worst, though it compares as less than anything.
        off = max((abs(a - b) / scale for a, b in zip(expected, found, strict=True)), key=lambda x: (math.isnan(x), x))
        if not off <= agreement:
            raise BenchmarkError(f"{what}: {name} differs from {names[0]} by {off:.2g} standard deviations")


def tell(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)


# --- the command line


def run(topics: Mapping[str, Callable[[Lab], Section]], arguments: Sequence[str] | None = None) -> None:
    """Runs topics, prints what they found as Markdown, and writes it where `--out` says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=f"Measures {', '.join(topics)}; see docs/benchmarks.md."
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="FRAMEWORK=PATH",
        help=f"interpreter with a framework ({', '.join(FRAMEWORKS)}); this one by default",
    )
    parser.add_argument("--size", choices=SIZES, default="base", help="size of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each contestant (default: %(default)s)")
    parser.add_argument("--turn", type=float, default=0.5, help="seconds of a turn at least (default: %(default)s)")
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        help="seconds to spend on waiting for a quiet machine and on repeating rounds that other programs disturbed",
    )
    parser.add_argument("--shapes", type=parse_shapes, help="batch x length of the inputs, as 8x128,1x1")
    parser.add_argument("--out", type=Path, help="write the results to OUT.md and OUT.json")
    chosen = parser.parse_args(arguments)
    try:
        pythons = parse_pythons(chosen.python)
    except ValueError as error:
        parser.error(str(error))

    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
    # So that the checkpoint and the workers go away with a benchmark that is told to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sections: dict[str, Section] = {}
    with tempfile.TemporaryDirectory(prefix="formax-benchmarks-") as folder:
        lab = Lab(chosen.size, chosen.rounds, chosen.turn, pythons, chosen.patience, chosen.shapes, Path(folder))
        try:
            for name, measure in topics.items():
                sections[name] = measure(lab)
                # After each topic, so that a later one that fails costs no results.
                if chosen.out is not None:
                    write(chosen.out, report(lab, sections), as_data(lab, sections))
        except BenchmarkError as error:
            parser.exit(1, f"error: {error}\n")
    print(report(lab, sections), end="")


def positive(text: str) -> int:
    """An integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Reads "8x128,1x1" as ((8, 128), (1, 1))."""
    shapes = [tuple(positive(size) for size in shape.split("x")) for shape in text.split(",")]
    if any(len(shape) != 2 for shape in shapes):
        raise argparse.ArgumentTypeError(f"{text!r} should be batch x length, as 8x128,1x1")
    return tuple((shape[0], shape[1]) for shape in shapes)


def parse_pythons(items: Sequence[str]) -> dict[str, str]:
    """Reads ["torch=/path/to/python"] as {framework: interpreter}, this interpreter for those that are not named.

    Raises:
        ValueError: an unknown framework, or a path that is no program.
    """
    pythons = dict.fromkeys(FRAMEWORKS, sys.executable)
    for item in items:
        framework, _, path = item.partition("=")
        if framework not in FRAMEWORKS:
            raise ValueError(f"--python {item}: should be FRAMEWORK=PATH with one of {', '.join(FRAMEWORKS)}")
        if shutil.which(path) is None:
            raise ValueError(f"--python {item}: {path!r} is not a program")
        pythons[framework] = path
    return pythons


def report(lab: Lab, sections: Mapping[str, Section]) -> str:
    """Everything as Markdown."""
    versions = {
        f"{name}: " + ", ".join(f"{k} {v}" for k, v in found.items()): None for name, found in lab.versions.items()
    }
    lines = [
        *(f"- {name}: {value}" for name, value in machine().items()),
        *(f"- {line}" for line in versions),
        *(f"- not available: {name}: {reason}" for name, reason in lab.unavailable.items()),
        f"- size {lab.size}, float32; {lab.rounds} rounds; all spreads are minimum / median / maximum",
        f"- {lab.watch.says()}",
    ]
    return "\n\n".join(["\n".join(lines), *(section.markdown() for section in sections.values())]) + "\n"


def as_data(lab: Lab, sections: Mapping[str, Section]) -> dict[str, Any]:
    """Everything for programs: seconds of each round."""
    return {
        "machine": machine(),
        "versions": lab.versions,
        "unavailable": lab.unavailable,
        "settings": {"size": lab.size, "rounds": lab.rounds, "turn": lab.turn},
        "watch": vars(lab.watch),
        "topics": {name: section.data for name, section in sections.items()},
    }


def write(out: Path, text: str, data: Mapping[str, Any]) -> None:
    """Writes OUT.md and OUT.json."""
    out.with_name(out.name + ".md").write_text(text, encoding="utf-8")
    out.with_name(out.name + ".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
