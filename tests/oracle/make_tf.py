"""Records what the reference's TensorFlow classes save (`tests/data/tf/`), and opens with them what formax wrote.

It needs an environment with transformers 4.57.6, TensorFlow and tf-keras, but no PyTorch; `oracle/frameworks.py` has
the cases.

    python tests/oracle/make_tf.py
    python tests/oracle/make_tf.py --check FOLDER     # which `frameworks.py tf FOLDER` has made
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import h5py
import numpy as np
import tensorflow as tf
import transformers
from transformers.modeling_tf_pytorch_utils import apply_transpose, convert_tf_weight_name_to_pt_weight_name

from oracle.frameworks import CASES, DATA, Case, dump, path_of, record, turned


def build(case: Case) -> tuple[Any, dict[str, np.ndarray]]:
    """The reference's model, and the case's weights by its own names."""
    tf.keras.backend.clear_session()
    found = getattr(transformers, f"TF{case.meta['architecture']}")
    model = found(found.config_class.from_dict(case.config))
    model.build_in_name_scope()
    keys = case.meta["keys"]
    rename = getattr(model, "tf_to_pt_weight_rename", lambda name: (name,))  # rules of a class of its own
    values = {}
    for weight in model.weights:
        shape = tuple(weight.shape)
        name, transpose = convert_tf_weight_name_to_pt_weight_name(weight.name, tf_weight_shape=shape)
        for old, new in {"weight_g": "original0", "weight_v": "original1"}.items():
            name = name.replace(f"conv.{old}", f"conv.parametrizations.weight.{new}")
        plain = name.removeprefix(f"{model.base_model_prefix}.")
        name = next((one for one in (name, plain, name.replace("moving_", "running_")) if one in keys), name)
        for old, new in {"moving_mean": "running_mean", "moving_variance": "running_var"}.items():
            name, plain = (one.replace(old, new) for one in (name, plain))
        tied = name.replace("decoder.bias", "bias")
        known = [one for one in (name, plain, *rename(name), *rename(plain), tied) if one in keys]
        if name == "lm_head.weight" and not case.config.get("tie_word_embeddings", True):
            known = [name]  # which XGLM's class calls by the table's name all the same
        if not known:
            continue  # computed, and in no checkpoint of PyTorch's
        name = known[0]
        # By the golden's shape but where the sizes are others: apart from kernels TensorFlow's then is PyTorch's.
        theirs = tuple(keys[name][0]) if name in keys else turned(weight.name, shape)
        if sorted(theirs) != sorted(shape) and np.prod(theirs) != np.prod(shape):
            theirs = turned(weight.name, shape)
        value = apply_transpose(transpose, case.weight(name, theirs), match_shape=shape, pt_to_tf=True)
        assert value.shape == shape, (weight.name, value.shape, shape)
        values[weight.name] = value
    return model, values


def stored(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """All tensors of the files in a folder by the names in them, each once, and how many each group lists."""
    tensors: dict[str, np.ndarray] = {}
    groups: dict[str, int] = {}
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            for layer in [*file.attrs["layer_names"], *{"top_level_model_weights"} & file.keys()]:
                if isinstance(file[layer], h5py.Dataset):
                    tensors[layer] = file[layer][()]
                    continue
                names = file[layer].attrs["weight_names"]
                groups |= {layer: len(names)} if len(names) else {}
                tensors |= {name: file[layer][name][()] for name in names if name not in tensors}
    return tensors, groups


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", metavar="FOLDER")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    (DATA / "tf").mkdir(parents=True, exist_ok=True)
    failed = []
    for case in CASES["tf"]:
        model, values = build(case)
        if arguments.check:
            folder = Path(arguments.check) / case.name / "tf"
            opened, info = type(model).from_pretrained(folder, output_loading_info=True)
            found = {weight.name.partition("/")[2]: weight.numpy() for weight in opened.weights}
            wrong = [name for name, value in values.items() if not np.array_equal(found[name.partition("/")[2]], value)]
            # The class does not read again what it has written of no layer.
            wrong = [name for name in wrong if not name.endswith("_dual_encoder_model/logit_scale:0")]
            # Layers without weights, such as dropout, are listed as well; tables that are computed are in no file.
            wrong += [name for name in info["missing_keys"] if "/" in name and "embed_positions" not in name]
            wrong += info["unexpected_keys"]
            print(case.name, "ok" if not wrong else wrong[:5])
            failed += [case.name] * bool(wrong)
            continue
        computed = {weight.name for weight in model.weights} - values.keys()
        for weight in model.weights:
            if weight.name not in computed:
                weight.assign(values[weight.name])
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved, max_shard_size=case.shard_size)
            tensors, groups = stored(Path(saved))
            for name in [one for one in tensors if one in computed]:
                del tensors[name]
                groups[next(layer for layer in groups if name.split("/")[1] == layer)] -= 1
            head = {"golden": case.golden, "changes": case.changes, "groups": groups}
            path_of("tf", case).write_text(dump({**head, "tensors": record(tensors)}))
            if case.kept:
                kept = path_of("tf", case).with_suffix("")
                shutil.rmtree(kept, ignore_errors=True)
                kept.mkdir()
                for path in Path(saved).iterdir():
                    if path.name != "generation_config.json":
                        shutil.copy(path, kept)
                (kept / "config.json").write_text(json.dumps(case.config, indent=1) + "\n")
        print(case.name, len(tensors))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
