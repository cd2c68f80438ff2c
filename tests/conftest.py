"""Settings that hold for the whole suite: eight CPU devices, no network, repeatable property tests in CI.

Compiling is most of the suite's time. So it is done the quick way, a quarter of the work of what users get, and what is
compiled is kept in `.cache/jax` for the next run. `FORMAX_TEST_COMPILER=full` compiles as for users.
"""

# ruff: noqa: E402 (what jax reads when it starts is set before it is imported)

import mmap
import os
from importlib.util import find_spec
from pathlib import Path

# {flag of XLA: value}
FLAGS = {"xla_force_host_platform_device_count": "8"}
QUICK = {
    "xla_backend_optimization_level": "0",  # LLVM makes nothing fast
    "xla_cpu_use_fusion_emitters": "false",  # loops are emitted as LLVM's, not by way of MLIR
    "xla_cpu_parallel_codegen_split_count": "1",  # a program is not cut up for several threads to compile
}


def known_flags(flags: dict[str, str]) -> dict[str, str]:
    """Those whose names this jaxlib holds: at one that it does not know, it ends the process."""
    found = find_spec("jaxlib")
    library = Path(*(found.submodule_search_locations or [])) / "libjax_common.so" if found else Path()
    if not library.is_file():
        return {}
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        return {flag: value for flag, value in flags.items() if held.find(f"\0{flag}\0".encode()) >= 0}


if os.environ.get("FORMAX_TEST_COMPILER") != "full":
    FLAGS |= known_flags(QUICK)
given = os.environ.get("XLA_FLAGS", "")
added = [f"--{flag}={value}" for flag, value in FLAGS.items() if flag not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *added])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax
import pytest
from hypothesis import settings

# The first call of a jitted function takes as long as its compilation: a deadline would judge the compiler.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# More processes than this would mostly wait for each other's imports, and each takes up to 1.5 GB.
MOST_PROCESSES = 8


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes share the tests: one a core, or 0 (all in pytest's own) where it would not pay or not work."""
    option = config.option
    chosen = option.keyword or option.markexpr or not all(Path(one).is_dir() for one in config.args)
    looked_into = option.trace or option.capture == "no" or option.collectonly
    if chosen or looked_into or config.getoption("families_page", default=False):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES) if cores > 1 else 0


# Every compiled program is some forty mappings of memory, of which Linux grants a process 65,530: the suite would crash
# when they are used up, since JAX keeps all programs for good.
KEPT_TESTS = 100
_since_cleared = 0


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Lets compiled programs go now and then; those needed again are read from the cache on disk."""
    global _since_cleared
    _since_cleared += 1
    if _since_cleared >= KEPT_TESTS:
        jax.clear_caches()
        _since_cleared = 0
