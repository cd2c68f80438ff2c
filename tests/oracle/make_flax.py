"""Records what the reference's Flax classes save (`tests/data/flax/`), and opens with them what formax wrote.

It needs an environment with transformers 4.57.6 and Flax, but no PyTorch; `oracle/frameworks.py` has the cases.

    python tests/oracle/make_flax.py
    python tests/oracle/make_flax.py --check FOLDER     # which `frameworks.py flax FOLDER` has made
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax.numpy as jnp
import numpy as np
import transformers
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers.modeling_flax_pytorch_utils import rename_key_and_reshape_tensor

from oracle.frameworks import CASES, DATA, Case, dump, path_of, record, turned

_clip: Any = jnp.clip


def clip(x: Any, *limits: Any, a_min: Any = None, a_max: Any = None, **others: Any) -> Any:
    """`jnp.clip` as it was when the reference was written: later versions of JAX call the limits otherwise."""
    named = {"min": a_min, "max": a_max}
    return _clip(x, *limits, **others, **{name: value for name, value in named.items() if value is not None})


jnp.clip = clip  # type: ignore[assignment]


def build(case: Case) -> tuple[Any, dict[str, np.ndarray]]:
    """The reference's model, and the case's weights by its own names."""
    found = getattr(transformers, f"Flax{case.meta['architecture']}", None) or transformers.FlaxBertForCausalLM
    model = found(found.config_class.from_dict(case.config))
    flat = flatten_dict(model.params, sep="/")
    plain = {name.removeprefix("params/").removeprefix("batch_stats/"): name for name in flat}
    keys = {tuple(name.split("/")): None for name in plain}
    values: dict[str, np.ndarray] = {}
    for name, (shape, _) in case.meta["keys"].items():
        # What the reference's own conversion does not find: Whisper's head, and the parts of ResNet's basic layers.
        spelled = name.replace("proj_out", "lm_head")
        if case.config.get("layer_type") == "basic":
            spelled = name.replace(".layer.", ".layer.layer_")
        parts = tuple(spelled.split("."))
        key, _ = rename_key_and_reshape_tensor(parts, np.zeros(shape, np.int8), keys, model.base_model_prefix)
        if "/".join(key) not in plain:
            continue
        there = plain["/".join(key)]
        own = turned("/".join(key), flat[there].shape)
        value = case.weight(name, own)
        _, values[there] = rename_key_and_reshape_tensor(parts, value, keys, model.base_model_prefix)
    absent = flat.keys() - values.keys()
    assert not absent, (case.name, sorted(absent))
    assert all(values[name].shape == flat[name].shape for name in flat), case.name
    return model, {name: values[name] for name in flat}


def stored(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the files in a folder."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.msgpack")):
        tensors |= flatten_dict(msgpack_restore(path.read_bytes()), sep="/")
    return tensors


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", metavar="FOLDER")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    (DATA / "flax").mkdir(parents=True, exist_ok=True)
    failed = []
    for case in CASES["flax"]:
        model, values = build(case)
        if arguments.check:
            opened = type(model).from_pretrained(Path(arguments.check) / case.name / "flax")
            found = flatten_dict(opened.params, sep="/")
            wrong = [name for name in values if not np.array_equal(found[name], values[name])]
            wrong += sorted(map(str, opened._missing_keys)) + sorted(found.keys() - values.keys())
            print(case.name, "ok" if not wrong else wrong[:5])
            failed += [case.name] * bool(wrong)
            continue
        model.params = unflatten_dict({name: jnp.asarray(value) for name, value in values.items()}, sep="/")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, max_shard_size=case.shard_size)
            tensors = stored(Path(folder))
            head = {"golden": case.golden, "changes": case.changes}
            path_of("flax", case).write_text(dump({**head, "tensors": record(tensors)}))
            if case.kept:
                kept = path_of("flax", case).with_suffix("")
                shutil.rmtree(kept, ignore_errors=True)
                kept.mkdir()
                for path in Path(folder).iterdir():
                    if path.name != "generation_config.json":
                        shutil.copy(path, kept)
                (kept / "config.json").write_text(json.dumps(case.config, indent=1) + "\n")
        print(case.name, len(tensors))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
