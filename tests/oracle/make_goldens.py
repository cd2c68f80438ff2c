"""Makes the goldens: what the reference (PyTorch transformers) writes to disk and computes, for small known weights.

    python tests/oracle/make_goldens.py [family ...] [--check | --sensitivity | --switches FOLDER] [--any-version]

Runs in an environment of its own (see README.md beside this file), on one CPU thread, in float32, with eager attention.
Every case goes the way a user goes: a directory with config.json and model.safetensors, opened by `from_pretrained`.
"""

import argparse
import copy
import importlib
import importlib.metadata
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `oracle` has the name that it has in the test suite

from oracle import compare, weights
from oracle.families import Case

HERE = Path(__file__).resolve().parent
GOLDENS = HERE.parent / "goldens"
Tensors = dict[str, npt.NDArray[Any]]
# Two CPUs sum in different orders; a tenth of what the test suite allows is left for that.
AGREE = 1e-5
SCALES = (".weight", ".gamma")  # what is one, not zero, when it is neutral (if it has one dimension)


@dataclass(frozen=True)
class Golden:
    """What is stored of a case: `meta` as <case>.json, `arrays` as <case>.npz."""

    meta: dict[str, Any]
    arrays: Tensors


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="family", help="modules in families/ (default: all)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with the stored goldens, write nothing")
    mode.add_argument("--sensitivity", action="store_true", help="show how far each known bug moves the outputs")
    mode.add_argument("--switches", type=Path, metavar="FOLDER", help="make goldens of each field's other values")
    parser.add_argument("--any-version", action="store_true", help="do not insist on the versions of requirements.txt")
    args = parser.parse_args()
    known = sorted(path.stem for path in (HERE / "families").glob("[!_]*.py"))
    if unknown := sorted(set(args.families) - set(known)):
        parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(known)}")
    if not args.any_version:
        refuse_other_versions()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    act = check if args.check else sensitivity if args.sensitivity else write
    if args.switches:
        act = partial(switches, args.switches)
    return max(act(family, importlib.import_module(f"oracle.families.{family}")) for family in args.families or known)


def refuse_other_versions() -> None:
    """Exits unless the installed packages are those of requirements.txt."""
    for line in (HERE / "requirements.txt").read_text().splitlines():
        name, pinned, wanted = line.partition("==")
        installed = importlib.metadata.version(name).partition("+")[0] if pinned else wanted
        if installed != wanted:
            sys.exit(f"{name} {installed} is installed, the goldens are made with {wanted} (or pass --any-version)")


# ---- running the reference ------------------------------------------------------------------------------------------


def make(case: Case) -> Golden:
    """Runs one case and returns its golden."""
    config, keys = written_by_reference(case)
    tensors = checkpoint(case, keys)
    outputs, saved = run(case, config, tensors, case.inputs)
    for name, array in outputs.items():
        if not np.isfinite(array).all() or (array.size > 1 and np.std(array) < 1e-3):
            raise ValueError(f"{case.name}: output {name} is not finite, or the same everywhere: it shows nothing")
    meta: dict[str, Any] = {
        "architecture": case.architecture,
        "versions": {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__},
        "call": dict(case.call),
        "config": config,
        "keys": {name: described(array) for name, array in tensors.items()},
    }
    for name in tensors.keys() & saved.keys():
        if not np.array_equal(tensors[name], saved[name]):
            raise ValueError(f"{case.name}: {name} was not saved as it was loaded; is it tied to another key?")
    resaved = {name: described(array) for name, array in saved.items()}
    optional = {
        "copies": dict(case.copies),
        "missing": list(case.missing),
        "unexpected": list(case.unexpected),
        "saved_keys": resaved if resaved != meta["keys"] else {},
    }
    arrays = (
        {f"in.{name}": np.asarray(array) for name, array in case.inputs.items()}
        | {f"key.{name}": np.asarray(array) for name, array in case.buffers.items()}
        | {f"out.{name}": array for name, array in outputs.items()}
    )
    return Golden(meta | {name: value for name, value in optional.items() if value}, arrays)


def written_by_reference(case: Case) -> tuple[dict[str, Any], dict[str, tuple[list[int], str]]]:
    """Returns the config.json and the on-disk keys, with shape and dtype, that the reference saves for the case."""
    writer = getattr(transformers, case.writer or case.architecture)
    with tempfile.TemporaryDirectory() as folder:
        # copied, because the configuration class keeps (and changes) the containers that it is given
        config = copy.deepcopy(dict(case.config))
        writer(writer.config_class(**config)).save_pretrained(folder)
        if not case.literal_config:
            config = json.loads(Path(folder, "config.json").read_text())
        return config, {name: described(array) for name, array in read(Path(folder)).items()}


def checkpoint(case: Case, keys: Mapping[str, tuple[list[int], str]]) -> Tensors:
    """Returns the tensors of the case's checkpoint, under the names that it has on disk."""
    tensors = {}
    for name, (shape, dtype) in keys.items():
        for old, new in case.rename:
            name = name.replace(old, new)
        tensors[name] = weights.tensor(name, shape, dtype)
    for name in case.drop:
        del tensors[name]
    tensors |= {name: tensors[source] for name, source in case.copies.items()}
    tensors |= {name: np.asarray(array) for name, array in case.buffers.items()}
    return dict(sorted(tensors.items()))


def run(case: Case, config: Mapping[str, Any], tensors: Tensors, inputs: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    """Opens the checkpoint with the case's class, calls it, and saves it again.

    Returns:
        The recorded outputs, where `hidden_states.0` is an entry of a tuple; and the tensors that were saved again.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        torch.manual_seed(0)  # for what the checkpoint lacks
        model, report = getattr(transformers, case.architecture).from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
    expected = {"missing_keys": set(case.missing), "unexpected_keys": set(case.unexpected), "mismatched_keys": set()}
    if (found := {name: set(report[name]) for name in expected}) != expected:
        raise ValueError(f"{case.name}: loading reported {found}, the case states {expected}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = read(Path(folder))
    with torch.inference_mode():
        out = model.eval()(**arguments(inputs), **case.call)
    return dict(flattened(case, out)), saved


def arguments(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the call's tensors; `labels.boxes` [B, N, ...] and the like as a dict a row of `labels.count` entries."""
    out: dict[str, Any] = {}
    for name, array in inputs.items():
        argument, _, part = name.partition(".")
        if not part:
            out[name] = torch.from_numpy(np.array(array))
        elif part != "count":
            counts = inputs[f"{argument}.count"]
            rows = out.setdefault(argument, [{} for _ in counts])
            for row, entries, count in zip(rows, array, counts, strict=True):
                row[part] = torch.from_numpy(np.array(entries[:count]))
    return out


def flattened(case: Case, out: Any) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yields the outputs that the case asks for by (dotted) name, the entries of a tuple one by one."""
    for name in case.outputs:
        value = out
        for part in name.split("."):
            value = value[int(part)] if part.isdigit() else getattr(value, part, None)
        if value is None:
            raise ValueError(f"{case.name}: {case.architecture} returned no {name}; it returned {', '.join(out)}")
        yield from entries(name, value)


def entries(name: str, value: Any) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yields the tensors of an output, those inside tuples, lists and dicts by their place: `hidden_states.0`."""
    if isinstance(value, tuple | list):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from entries(f"{name}.{key}", entry)
    else:
        yield name, value.numpy()


def read(folder: Path) -> Tensors:
    """Returns the tensors of a folder's model.safetensors."""
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def described(array: npt.NDArray[Any]) -> tuple[list[int], str]:
    """Returns what a golden says of a tensor: shape and dtype."""
    return list(array.shape), array.dtype.name


# ---- the three things to do with them -------------------------------------------------------------------------------


def write(family: str, module: ModuleType) -> int:
    """Writes the family's goldens, and removes those of cases that are no more."""
    folder = GOLDENS / family
    for case in module.CASES:
        golden = make(case)
        # files that agree stay as they are: the last bits of another CPU are no reason for a commit
        if difference(folder, case.name, golden, versions=True):
            store(folder, case.name, golden)
    for path in leftover(folder, module):
        path.unlink()
        print(f"{family}/{path.name}: removed, no case makes it")
    files = list(folder.iterdir())
    print(f"{family}: {len(module.CASES)} goldens, {sum(f.stat().st_size for f in files) / 1000:.0f} kB")
    return 0


def store(folder: Path, name: str, golden: Golden) -> None:
    """Writes one golden as <name>.json and <name>.npz."""
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / f"{name}.json", folder / f"{name}.npz"
    files[0].write_text(dumps(golden.meta))
    np.savez_compressed(files[1], allow_pickle=False, **golden.arrays)
    print(f"{folder.name}/{name}: {sum(file.stat().st_size for file in files) / 1000:.1f} kB")


def check(family: str, module: ModuleType) -> int:
    """Compares the family's stored goldens with what the reference does now, whatever its version says it is."""
    folder = GOLDENS / family
    found = {case.name: difference(folder, case.name, make(case), versions=False) for case in module.CASES}
    wrong = [f"{name}: {why}" for name, why in found.items() if why]
    wrong += [f"{path.name}: no case makes this file" for path in leftover(folder, module)]
    print("\n".join(f"{family}/{line}" for line in wrong) or f"{family}: all {len(module.CASES)} goldens agree")
    return 1 if wrong else 0


def leftover(folder: Path, module: ModuleType) -> list[Path]:
    """Returns the files of a family's folder that belong to none of its cases."""
    names = {case.name for case in module.CASES}
    return sorted(path for path in folder.iterdir() if path.stem not in names)


def difference(folder: Path, name: str, golden: Golden, versions: bool) -> str:
    """Says how the stored golden differs from `golden` (in `versions`, too?); empty if it does not."""
    if not all(folder.joinpath(name + end).is_file() for end in (".json", ".npz")):
        return "there is no such golden"
    stored = json.loads(folder.joinpath(f"{name}.json").read_text())
    fresh = json.loads(dumps(golden.meta))
    if not versions:
        for meta in (stored, fresh):
            del meta["versions"]
            meta.get("config", {}).pop("transformers_version", None)
    for key in sorted(stored.keys() | fresh.keys()):
        if stored.get(key) != fresh.get(key):
            return f"{key!r} in the json differs"
    with np.load(folder / f"{name}.npz") as file:
        arrays = dict(file)
    if arrays.keys() != golden.arrays.keys():
        return f"other arrays are stored: {', '.join(sorted(arrays.keys() ^ golden.arrays.keys()))}"
    for key, array in golden.arrays.items():
        if described(array) != described(arrays[key]):
            return f"{key} is stored as {described(arrays[key])}, not {described(array)}"
        if key.startswith("out."):
            if (far := compare.error(arrays[key], array)) > AGREE:
                return f"{key} is {far:.1e} away, more than {AGREE:.0e}"
        elif not np.array_equal(array, arrays[key]):
            return f"{key} differs"
    return ""


def sensitivity(family: str, module: ModuleType) -> int:
    """Tries the family's known bugs, and takes its parameters out one by one; prints how far the outputs move."""
    cases = {case.name: case for case in module.CASES}
    hidden = []
    for bug in module.BUGS:
        for name in bug.cases:
            config, tensors, right = baseline(cases[name])
            inputs = {key: np.array(value) for key, value in cases[name].inputs.items()}
            bug.apply(config, tensors, inputs)
            moved = errors(cases[name], right, run(cases[name], config, tensors, inputs)[0])
            fields = by_field(moved)
            judged = bug.outputs or tuple(key for key in fields if not key.startswith("loss"))
            moved |= fields
            hidden += [f"{bug.name} | {name}: {key} {moved[key]:.1e}" for key in judged if moved[key] < bug.least]
            print(f"{bug.name} | {name}: {', '.join(f'{key} {value:.1e}' for key, value in moved.items())}", flush=True)
    shown: dict[str, float] = {}
    for case in module.CASES:
        config, tensors, right = baseline(case)
        for name in tensors.keys() - case.copies.keys() - case.buffers.keys():
            neutral = np.ones_like if tensors[name].ndim == 1 and name.endswith(SCALES) else np.zeros_like
            wrong = tensors | {name: neutral(tensors[name])}
            wrong |= {copy: wrong[source] for copy, source in case.copies.items()}
            moved = errors(case, right, run(case, config, wrong, case.inputs)[0])
            shown[name] = max(shown.get(name, 0.0), *moved.values())
    # A case may leave a part of the model unused; that no case of the family shows it must have a reason.
    dark = {name: value for name, value in shown.items() if value < 1e-2}
    for name, value in sorted(dark.items()):
        known = any(re.search(pattern, name) for pattern in module.INVISIBLE)
        print(f"{name} made neutral moves no output by more than {value:.1e}{', as it should be' if known else ''}")
        hidden += [] if known else [name]
    print(f"{family}: {len(shown)} parameters, the least visible of which moves an output by", end=" ")
    print(f"{min(value for name, value in shown.items() if name not in dark):.1e}")
    print("\n".join(f"HIDDEN {line}" for line in hidden) or f"{family}: every bug and every parameter shows")
    return 1 if hidden else 0


# Fields of a case that say how its checkpoint is not as the reference saves it, without that.
BARE: dict[str, Any] = {"writer": "", "literal_config": False} | dict.fromkeys(
    ("rename", "drop", "missing", "unexpected"), ()
)
# Fields that are no switch of a computation: how a call returns what it computes, labels, names.
NO_SWITCH = re.compile(r"return_dict|output_|id2label|label2id|pruned_heads|torchscript|_attn_impl|is_encoder_decoder")
# Settings of `generate`, which old configurations held. Tokens are of the model, too: which is padding, and the last.
OF_GENERATION = {name for name in transformers.GenerationConfig().to_dict() if not name.endswith("_token_id")}
ACTIVATIONS = ("relu", "silu", "gelu_new", "quick_gelu")
WORDS = {
    "position_embedding_type": ("absolute", "relative_key", "relative_key_query"),
    "summary_type": ("last", "first", "mean", "cls_index"),
    "feat_extract_norm": ("group", "layer"),
    "layer_type": ("basic", "bottleneck"),
}


def switches(root: Path, family: str, module: ModuleType) -> int:
    """Makes goldens of every field's other values, one field at a time and one case for each architecture.

    What the reference refuses is printed and left out.
    """
    as_saved = [case for case in module.CASES if replace(case, **BARE) == case]
    cases = {case.architecture: case for case in reversed(as_saved)}
    count = 0
    for case in cases.values():
        fields = getattr(transformers, case.architecture).config_class(**copy.deepcopy(dict(case.config))).to_dict()
        for label, config in changed(dict(case.config), fields):
            name = f"{case.name}-{label}"
            try:
                golden = make(replace(case, name=name, config=config))
            except Exception as error:  # whatever the reference raises on a configuration that it cannot have
                print(f"{family}/{name}: none, {type(error).__name__}: {str(error).splitlines()[0]}")
            else:
                store(root / family, name, golden)
                count += 1
    print(f"{family}: {count} goldens of {len(cases)} architectures")
    return 0


def changed(config: dict[str, Any], fields: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a label and the arguments of the configuration for each other value of each field, also of inner ones."""
    for name, value in fields.items():
        if NO_SWITCH.match(name) or name in OF_GENERATION:
            continue
        if isinstance(value, Mapping):
            for label, inner in changed(dict(config.get(name, {})), value):
                yield f"{name}.{label}", config | {name: inner}
        else:
            for other in other_values(name, value):
                yield f"{name}={other}", config | {name: other}


def other_values(name: str, value: Any) -> list[Any]:
    """Returns values that a field could have as well."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return sorted({2 * value, value + 1})
    if isinstance(value, float):
        return [0.05 if "eps" in name and value != 0.05 else 1.7 * value or 0.3]
    if isinstance(value, str):
        words = ACTIVATIONS if value in transformers.activations.ACT2FN else WORDS.get(name, ())
        return [word for word in words if word != value]
    return []


def baseline(case: Case) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Returns the case's config.json, checkpoint and outputs."""
    config, keys = written_by_reference(case)
    tensors = checkpoint(case, keys)
    return config, tensors, run(case, config, tensors, case.inputs)[0]


def errors(case: Case, right: Tensors, wrong: Tensors) -> dict[str, float]:
    """Returns how far each output is off, where tokens are real."""
    return {
        name: compare.error(compare.visible(right[name], case.inputs), compare.visible(wrong[name], case.inputs))
        for name in right
    }


def by_field(moved: Mapping[str, float]) -> dict[str, float]:
    """Of a tuple's entries the one that moves most: a mistake in the second layer leaves those of the first alone."""
    fields: dict[str, float] = {}
    for name, value in moved.items():
        field = re.sub(r"\.\d+$", "", name)
        fields[field] = max(value, fields.get(field, 0.0))
    return fields


def dumps(meta: Mapping[str, Any]) -> str:
    """Returns JSON with one line for each entry of an entry, so that a key list reads as a list and diffs well."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_entry(value)}" for key, value in meta.items()) + "\n}\n"


def _entry(value: Any) -> str:
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value)
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"


if __name__ == "__main__":
    sys.exit(main())
