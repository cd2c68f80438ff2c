"""Settings of quantisation: names and defaults of the reference, and checkpoints that are refused in one way."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formax
from formax import quantization
from formax.core.frozen import thaw
from formax.quantization import METHODS, AutoHfQuantizer, AutoQuantizationConfig, QuantizationError

# What `oracle/make_quantization.py` found in the reference.
RECORD = json.loads((Path(__file__).resolve().parent / "data" / "quantization.json").read_text())
# As checkpoints of the hub have them.
STORED: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": True, "static_groups": False},
    "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM", "modules_to_not_convert": None},
    "bitsandbytes": {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_threshold": 6.0,
    },
    "fp8": {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "compressed-tensors": {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": True}}},
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "version": "0.6.0",
    },
    "hqq": {
        "quant_config": {"weight_quant_params": {"nbits": 2, "group_size": 16, "axis": 0}, "offload_meta": False},
        "skip_modules": ["lm_head"],
    },
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}, "quant_type_kwargs": {}},
    "mxfp4": {"modules_to_not_convert": ["model.layers.*.self_attn"]},
    "quanto": {"weights": "int4", "activations": None},
    "quark": {"global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}, "export": {"kv_cache_group": []}},
}


def checkpoint(folder: Path, stored: Any, model_type: str = "bert", **inside: Any) -> Path:
    sizes = {
        "vocab_size": 9,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 4,
    }
    model = formax.AutoModel.from_config(formax.AutoConfig.for_model("bert", **sizes), key=jax.random.key(0))
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": model_type, "quantization_config": stored, **inside}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_the_references_methods_names_and_defaults() -> None:
    assert METHODS.keys() == RECORD["signatures"].keys()
    for method, found in RECORD["signatures"].items():
        cls = METHODS[method]
        assert cls.__name__ == found["class"]
        own = {f.name: f for f in dataclasses.fields(cls) if f.name not in ("extra", "quant_config")}
        assert own.keys() == found["fields"].keys(), method
        for name, default in found["fields"].items():
            f = own[name]
            mine = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            assert ("required" if mine is dataclasses.MISSING else thaw(mine)) == default, f"{method}: {name}"


@pytest.mark.parametrize("name", RECORD["written"])
def test_what_the_reference_writes_is_read(name: str) -> None:
    written = RECORD["written"][name]
    found = AutoQuantizationConfig.from_dict(written)
    assert type(found).__name__ == name
    again = found.to_dict()
    assert {key: again[key] for key in written if not key.startswith("_")} == {
        key: value for key, value in written.items() if not key.startswith("_")
    }


@pytest.mark.parametrize("method", STORED)
def test_what_is_read_is_written(method: str) -> None:
    values = {"quant_method": method, **STORED[method]}
    found = AutoQuantizationConfig.from_dict(values)
    assert found.quant_method == method
    assert type(found) is METHODS[method]
    written = json.loads(json.dumps(found.to_dict()))
    assert AutoQuantizationConfig.from_dict(written) == found
    assert hash(AutoQuantizationConfig.from_dict(written)) == hash(found)
    expected = {key: value for key, value in values.items() if not key.startswith("_")}
    assert {key: written[key] for key in expected} == {**expected, **({"version": "gemm"} if method == "awq" else {})}


def test_details_of_methods() -> None:
    assert AutoQuantizationConfig.from_dict({"load_in_8bit": True}).quantization_method == "llm_int8"  # type: ignore[attr-defined]
    nf4 = AutoQuantizationConfig.from_dict({"quant_method": "bitsandbytes", **STORED["bitsandbytes"]})
    assert isinstance(nf4, quantization.BitsAndBytesConfig)
    assert nf4.quantization_method == "nf4"
    assert not nf4.extra
    assert quantization.BitsAndBytesConfig().quantization_method is None
    hqq = AutoQuantizationConfig.from_dict({"quant_method": "hqq", **STORED["hqq"]})
    assert isinstance(hqq, quantization.HqqConfig)
    assert (hqq.nbits, hqq.group_size, hqq.axis) == (2, 16, 0)
    packed = {"quant_method": "compressed-tensors", "quantization_config": {"format": "x"}, "sparsity_config": {"a": 1}}
    found = AutoQuantizationConfig.from_dict(packed)
    assert isinstance(found, quantization.CompressedTensorsConfig)
    assert found.format == "x"
    assert thaw(found.sparsity_config) == {"a": 1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.format = "y"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "no quant_method; there are aqlm"),
        ({"quant_method": "gptqq"}, "unknown quant_method 'gptqq'; the nearest are gptq"),
        ({"quant_method": ["gptq"]}, "unknown quant_method"),
        ([], "must be an object"),
        ({"quant_method": "gptq"}, "GPTQConfig needs bits"),
        ({"quant_method": "gptq", "bits": 5}, "bits=5 is none of 2, 3, 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0 must be above 0, or -1"),
        ({"quant_method": "gptq", "bits": 4, "damp_percent": 1.5}, "damp_percent=1.5 must be between"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": "yes"}, "desc_act must be of type bool, got 'yes'"),
        ({"quant_method": "awq", "version": "gemmm"}, "version='gemmm' is none of 'gemm'"),
        ({"quant_method": "awq", "do_fuse": True}, "do_fuse=True needs fuse_max_seq_len"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both true"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "must be two sizes"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "'static' is none of 'dynamic'"),
        ({"quant_method": "higgs", "hadamard_size": 100}, "no multiple of group_size=256"),
        ({"quant_method": "quanto", "weights": "int3"}, "weights='int3' is none of"),
        ({"quant_method": "hqq", "axis": 3}, "axis=3 is none of None, 0, 1"),
    ],
)
def test_what_cannot_be_right(values: Any, told: str) -> None:
    with pytest.raises(QuantizationError, match=told):
        AutoQuantizationConfig.from_dict(values)


def test_merging() -> None:
    """Stored settings win, but for attributes of loading."""
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 64, "use_exllama": True}
    given = quantization.GPTQConfig(bits=8, group_size=32, use_exllama=False, max_input_length=100)
    with pytest.warns(UserWarning, match="own quantization_config counts but for use_exllama, exllama_config"):
        merged = AutoHfQuantizer.merge_quantization_configs(stored, given)
    assert isinstance(merged, quantization.GPTQConfig)
    assert (merged.bits, merged.group_size) == (4, 64)
    assert (merged.use_exllama, merged.max_input_length) == (False, 100)
    same = AutoHfQuantizer.merge_quantization_configs(merged, merged)
    assert same == merged
    assert AutoHfQuantizer.merge_quantization_configs(stored) == AutoQuantizationConfig.from_dict(stored)
    with pytest.warns(UserWarning, match="counts; the one that was given is passed over"):
        kept = AutoHfQuantizer.merge_quantization_configs(
            {"quant_method": "quanto", "weights": "int4"}, {"quant_method": "quanto"}
        )
    assert kept == quantization.QuantoConfig(weights="int4")
    with pytest.raises(
        QuantizationError, match="quantised by 'gptq', the quantization_config that was given is for 'awq'"
    ):
        AutoHfQuantizer.merge_quantization_configs(stored, quantization.AwqConfig())


@pytest.mark.parametrize("method", STORED)
def test_a_quantised_checkpoint_is_refused_in_one_way(method: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, {"quant_method": method, **STORED[method]})
    name = METHODS[method].__name__
    for options in ({}, {"strict": False}, {"from_pt": True}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(
            QuantizationError, match=rf"config\.json: .* quantised by '{method}' \({name}\), which formax"
        ):
            formax.from_pretrained(tmp_path, **options)
    with pytest.raises(QuantizationError, match=f"quantised by '{method}'"):
        formax.AutoModelForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match=f"quantised by '{method}'"):
        AutoHfQuantizer.from_pretrained(tmp_path)
    assert AutoQuantizationConfig.from_pretrained(tmp_path).quant_method == method
    # The configuration is what it was, word for word.
    config = formax.AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict()["quantization_config"] == {"quant_method": method, **STORED[method]}
    assert AutoHfQuantizer.supports_quant_method(config.quantization_config) is False


def test_what_else_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = checkpoint(tmp_path / "unknown", {"quant_method": "other"})
    with pytest.raises(
        QuantizationError, match=r"config\.json: quantization_config has the unknown quant_method 'other'"
    ):
        formax.from_pretrained(folder)
    plain = checkpoint(tmp_path / "plain", None)
    assert formax.from_pretrained(plain)(np.ones((1, 2), int)).last_hidden_state.dtype == jnp.float32
    assert "quantization_config" not in caplog.text
    with pytest.raises(QuantizationError, match="formax does not quantise weights yet"):
        formax.from_pretrained(plain, quantization_config=quantization.QuantoConfig())
    with pytest.raises(QuantizationError, match=r"plain.config\.json has no quantization_config"):
        AutoQuantizationConfig.from_pretrained(plain)
    with pytest.raises(QuantizationError, match=r"unknown.config\.json: quantization_config has the unknown"):
        AutoQuantizationConfig.from_pretrained(folder)
    with pytest.raises(QuantizationError, match="the configuration: the weights are quantised by 'quanto'"):
        AutoHfQuantizer.from_config(quantization.QuantoConfig())
    # Settings are read of families that formax does not have, too.
    strange = checkpoint(tmp_path / "strange", {"quant_method": "eetq"}, "strange")
    assert AutoQuantizationConfig.from_pretrained(strange) == quantization.EetqConfig()


def test_a_part_that_is_quantised(tmp_path: Path) -> None:
    config = formax.AutoConfig.for_model("clip").to_dict()
    config["text_config"]["quantization_config"] = {"quant_method": "eetq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizationError, match="quantised by 'eetq'"):
        formax.from_pretrained(tmp_path)
