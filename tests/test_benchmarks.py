"""The benchmarks at toy size: they run, measure what they say, and stop when something is wrong."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import formax

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"torch eager", "torch.compile", "HF Flax"}


@pytest.fixture(scope="module")
def module() -> Iterator[Callable[[str], Any]]:
    """Gives the modules of `benchmarks/`, which is a package of the repository and not of the install."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def lab(module: Callable[[str], Any], tmp_path: Path) -> Any:
    harness = module("harness")
    pythons = dict.fromkeys(harness.FRAMEWORKS, sys.executable)
    return harness.Lab("tiny", 2, 0.0, pythons, 0.0, None, tmp_path)


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_all_topics_run_and_are_written(tmp_path: Path) -> None:
    options = ["--size", "tiny", "--rounds", "1", "--turn", "0", "--shapes", "1x4", "--out", str(tmp_path / "new/all")]
    finished = run_benchmarks(*options)
    assert finished.returncode == 0, finished.stderr
    text = (tmp_path / "new/all.md").read_text()
    assert text == finished.stdout
    data = json.loads((tmp_path / "new/all.json").read_text())

    topics = data["topics"]
    assert list(topics) == ["forward", "archetypes", "attention", "generate", "train_step", "load", "import_time"]
    (forward,) = topics["forward"]["cases"]
    without, with_dropout = topics["train_step"]["cases"]
    assert (without["dropout"], with_dropout["dropout"]) == (0.0, 0.1)
    for case in (forward, without, with_dropout):
        (seconds,) = case["seconds"]["formax"]
        assert 0 < seconds < 10
        assert "| formax " in text
    # Whoever did not take part is named with a reason.
    for task, case in (("forward", forward), ("train_step", without)):
        absent = {name for name in PEERS if f"{name}, {task}" in data["unavailable"]}
        assert case["seconds"].keys() == {"formax"} | (PEERS - absent)
    assert all(data["unavailable"].values())

    assert topics["load"]["file_bytes"] > 4 * formax.AutoConfig.for_model("bert").type_vocab_size
    assert {"plain", "formax"} <= topics["load"]["cases"][0]["seconds"].keys()
    imports = topics["import_time"]["seconds"]
    assert imports["jax, formax"][0] < imports["jax"][0] + 5
    assert data["settings"] == {"size": "tiny", "rounds": 1, "turn": 0.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--python", "tensorflow=python"], "FRAMEWORK=PATH with one of formax, torch, flax"),
        (["--python", "torch=/no/such/python"], "'/no/such/python' is not a program"),
        (["--shapes", "8x128x2"], "batch x length"),
        (["--rounds", "0"], "0 is not positive"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments: list[str], said: str, tmp_path: Path) -> None:
    finished = run_benchmarks(*arguments, "--out", str(tmp_path / "folder" / "name"))
    assert finished.returncode == 2
    assert said in finished.stderr
    assert not (tmp_path / "folder").exists()


def test_flops_are_those_that_the_compiler_counts(module: Callable[[str], Any]) -> None:
    sizes = {**module("harness").SIZES["base"], "num_hidden_layers": 2}
    config = formax.AutoConfig.for_model("bert", **sizes)
    model = jax.eval_shape(lambda key: formax.AutoModel.from_config(config, key=key), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)  # so few that attention has no loop, which is counted as one turn
    counted = jax.jit(lambda model, ids: model(input_ids=ids)).lower(model, ids).cost_analysis()
    assert counted is not None
    # The compiler also counts what is no matrix product, a few percent.
    assert 1.0 < counted["flops"] / module("forward").flops(sizes, 2, 64) < 1.05


def test_rounds_interleave(lab: Any) -> None:
    order: list[str] = []

    def turn(name: str) -> int:
        order.append(name)
        return len(order)

    results = lab.rounds_of({name: partial(turn, name) for name in "abc"})
    assert order == list("abcabc")
    assert results == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}


def test_disturbed_rounds_are_taken_again(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another program uses 100 s of CPU during the first round, and none after it.
    readings = iter([0.0, 100.0])
    monkeypatch.setattr(lab, "_foreign_seconds", lambda: next(readings, 100.0))
    lab.patience = 5.0
    calls = iter(range(10))
    assert lab.rounds_of({"a": lambda: next(calls)}) == {"a": [1, 2]}
    assert lab.watch.repeated == 1
    assert lab.watch.foreign == 0.0


def test_a_disturbed_run_says_so(module: Callable[[str], Any]) -> None:
    harness = module("harness")
    cores = harness.cores()
    assert "used 5 % of the CPU" in harness.Watch(wall=10.0, foreign=0.5 * cores).says()
    assert "too much" not in harness.Watch(wall=10.0, foreign=0.5 * cores).says()
    assert "used 20 % of the CPU; **that is too much" in harness.Watch(wall=10.0, foreign=2.0 * cores).says()


def test_another_computation_is_not_timed(module: Callable[[str], Any]) -> None:
    harness = module("harness")
    harness.check_agreement({"formax": [0.0, 1.0, 2.0], "peer": [0.0, 1.0, 2.0005]}, "forward")
    with pytest.raises(harness.BenchmarkError, match=r"forward: peer differs from formax by 0\.06"):
        harness.check_agreement({"formax": [0.0, 1.0, 2.0], "peer": [0.0, 1.0, 2.05]}, "forward")
    with pytest.raises(harness.BenchmarkError, match="peer differs from formax by nan"):
        harness.check_agreement({"formax": [0.0, 1.0], "peer": [0.0, float("nan")]}, "forward")


def test_a_worker_that_fails_says_why(module: Callable[[str], Any], lab: Any) -> None:
    harness = module("harness")
    with lab.worker(harness.PLAIN) as worker:
        with pytest.raises(harness.BenchmarkError, match=r"(?s)plain failed in .*KeyError: 'no such task'"):
            lab.prepare(worker, "no such task", {})
        lab.prepare(worker, "load", {"checkpoint": str(lab.folder)})
        with pytest.raises(harness.BenchmarkError, match=r"(?s)plain failed in .*No such file"):
            worker.time(1)
    broken = harness.Contestant("broken", "torch", "with_nothing")
    with lab.worker(broken) as worker:
        assert lab.prepare(worker, "forward", {}) is None
    assert lab.unavailable == {"broken, forward": "No module named 'benchmarks.contestants.with_nothing'"}
    assert lab.live == []


def test_a_worker_that_dies_shows_its_last_words(module: Callable[[str], Any], lab: Any) -> None:
    harness = module("harness")
    lab.pythons = {**lab.pythons, "formax": "false"}
    with lab.worker(harness.PLAIN) as worker, pytest.raises(harness.BenchmarkError, match="the process ended"):
        lab.prepare(worker, "matmul", {"n": 8})


def test_what_a_contestant_prints_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(
        "from benchmarks.task import Task\n"
        "print('imported')\n"
        "def versions(): return {'noise': '1'}\n"
        "TASKS = {'shout': lambda options: Task(lambda: print('called', flush=True), [options['n']])}\n"
    )
    program = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(tmp_path)]}; from benchmarks.worker import serve; serve('noisy')"
    )
    requests = [{"op": "prepare", "task": "shout", "options": {"n": 7}}, {"op": "time", "calls": 3}]
    finished = subprocess.run(
        [sys.executable, "-c", program],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    prepared, timed = map(json.loads, finished.stdout.splitlines())
    assert prepared == {"digest": [7], "versions": {"noise": "1"}}
    assert len(timed["seconds"]) == 3
    assert all(seconds > 0 for seconds in timed["seconds"])
    assert finished.stderr.split() == ["imported", *["called"] * 3]


def test_adamw_is_the_published_one(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    training, task = module("contestants.training"), module("task")
    # Large, so that every term shows.
    (a, b), rate, decay = task.BETAS, 0.1, 0.5
    monkeypatch.setattr(training, "LEARNING_RATE", rate)
    monkeypatch.setattr(training, "WEIGHT_DECAY", decay)
    start, first, second = 2.0, 0.5, -0.25
    params = {"w": jnp.float32(start)}
    params, state = training.adamw(params, {"w": jnp.float32(first)}, training.adamw_state(params))
    # After one step the moments, made unbiased, are the gradient and its square: the direction is its sign.
    expected = start - rate * (1 + decay * start)
    assert float(params["w"]) == pytest.approx(expected, rel=1e-5)
    params, _ = training.adamw(params, {"w": jnp.float32(second)}, state)
    mean = (a * (1 - a) * first + (1 - a) * second) / (1 - a**2)
    square = (b * (1 - b) * first**2 + (1 - b) * second**2) / (1 - b**2)
    expected -= rate * (mean / (square**0.5 + task.EPS) + decay * expected)
    assert float(params["w"]) == pytest.approx(expected, rel=1e-5)


def test_statistics_and_tables(module: Callable[[str], Any]) -> None:
    tables = module("tables")
    spread = tables.Spread.of_ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert spread == tables.Spread(1.0, 2.0, 3.0)
    assert f"{spread:.1f}" == "1.0 / 2.0 / 3.0"
    assert tables.Spread(0.0012, 0.0034, 0.5).seconds() == "1.2 / 3.4 / 500 ms"
    assert tables.Spread(1.0, 2.345, 3.0).seconds() == "1 / 2.35 / 3 s"
    assert tables.table(("a", "bc"), [("123", "4")]) == "| a   | bc |\n| --- | -- |\n| 123 | 4  |"
    assert tables.target("load", 1.6, 1.5, at_least=False).endswith("1.60, asked for at most 1.5: **missed**")
    assert tables.target("forward", 1.8, 1.7, at_least=True).endswith("1.80, asked for at least 1.7: reached")
