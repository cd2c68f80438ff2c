"""Every topic in one run."""

from benchmarks import archetypes, attention, forward, generate, import_time, load, train_step
from benchmarks.harness import run

if __name__ == "__main__":
    run(
        {
            "forward": forward.measure,
            "archetypes": archetypes.measure,
            "attention": attention.measure,
            "generate": generate.measure,
            "train_step": train_step.measure,
            "load": load.measure,
            "import_time": import_time.measure,
        }
    )
