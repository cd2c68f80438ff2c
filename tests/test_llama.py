"""Llama beyond its goldens: configurations of both generations, sharded files, devices that read their own part."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from battery.goldens import Golden
from oracle.compare import error

import formax
from formax.core.config import ConfigError
from formax.sharding import make_mesh

ROPES = ("rope_default", "rope_linear", "rope_dynamic_long", "rope_llama3", "rope_yarn", "rope_yarn_mscale")


def new_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as version 5 of the reference writes it."""
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    return {**config, "rope_parameters": {**scaling, "rope_theta": config.pop("rope_theta")}}


@pytest.mark.parametrize("name", ROPES)
def test_rope_parameters_are_rope_scaling_and_rope_theta(name: str, tmp_path: Path) -> None:
    golden = Golden("llama", name)
    folder = golden.checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps(new_spelling(dict(golden.meta["config"]))))
    model = formax.from_pretrained(folder)
    assert model.config == golden.config
    for output, expected in golden.outputs.items():
        assert error(expected, np.asarray(getattr(model(**golden.inputs), output))) < 1e-4


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rope_type": "spiral"}, "rope_type='spiral' is none of default, linear, dynamic, llama3, yarn"),
        ({"rope_type": "linear"}, "rope_type 'linear' need a positive factor, got None"),
        ({"rope_type": "yarn", "factor": 0.0}, "rope_type 'yarn' need a positive factor, got 0.0"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "need a positive high_freq_factor, got None"),
    ],
)
def test_impossible_scalings(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        formax.AutoConfig.for_model("llama", rope_scaling=settings)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_shards_on_disk_and_on_devices(family: str, tmp_path: Path) -> None:
    golden = Golden(family, "causal_lm")
    (tmp_path / "whole").mkdir()
    model, _ = golden.open(tmp_path / "whole")
    files = model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert sum(path.suffix == ".safetensors" for path in files) > 2
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    expected = model(**golden.inputs).logits
    np.testing.assert_array_equal(formax.from_pretrained(tmp_path / "parts")(**golden.inputs).logits, expected)

    mesh = make_mesh(fsdp=2, tensor=2, expert=2)
    spread = formax.from_pretrained(tmp_path / "parts", mesh=mesh)
    split = [leaf for leaf in jax.tree.leaves(spread.params) if not leaf.sharding.is_fully_replicated]
    assert split
    for leaf in split:
        assert leaf.addressable_shards[0].data.size < leaf.size
    np.testing.assert_allclose(spread(**golden.inputs).logits, expected, rtol=1e-4, atol=1e-4)
