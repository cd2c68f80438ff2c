"""What a configuration says where nobody said anything is what the reference's says."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from formax.core import registry
from formax.core.config import Config
from formax.core.frozen import thaw
from formax.layers.composite import CompositeConfig

RECORD: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "config_defaults.json").read_text(encoding="utf-8")
)
# Where the reference writes out what follows from other fields, ours says that it does: by null, or "auto".
FOLLOWS = {
    "attention_layers",
    "backbone_kwargs",
    "decoder_vocab_size",
    "embedding_size",
    "encoder_no_repeat_ngram_size",  # 0 and null both mean: none
    "head_dim",
    "intermediate_size",
    "num_decoder_layers",
    "num_feat_extract_layers",
    "num_key_value_heads",
    "out_features",
    "out_indices",
    "output_hidden_size",
    "pooler_output_size",
    "stage_names",
    "time_step_rank",
    "word_embed_proj_dim",
}


def families() -> set[str]:
    found = {registry.family(name) for name in registry.MODULES}
    return {family.model_type for family in found if not issubclass(family.config, CompositeConfig)}


def test_every_family_is_recorded() -> None:
    assert RECORD.keys() == families()


@pytest.mark.parametrize("model_type", sorted(RECORD))
def test_defaults_are_the_references(model_type: str) -> None:
    config = registry.family(model_type).config()
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, expected in RECORD[model_type].items():
        field = config.attribute_map.get(name, name)
        if field not in own or isinstance(own[field], Config):  # a configuration inside has a record of its own
            continue
        value = json.loads(json.dumps(thaw(own[field])))
        assert value == expected or (name in FOLLOWS and value in (None, "auto")), (name, value, expected)
