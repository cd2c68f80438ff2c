"""The TensorFlow classes: names from the table of families, outputs of the goldens, files of the reference."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.goldens import Golden
from oracle.compare import error, visible
from oracle.frameworks import CASES, path_of

import formax
from formax.compat import names, tf

SIZES = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
PARITY = ["bert/traces", "gpt2/lm_head", "t5/conditional_generation", "vit/image_classification", "whisper/model"]


def bert(**changes: Any) -> Any:
    return formax.AutoConfig.for_model("bert", **SIZES, **changes)


def field(out: Any, name: str) -> np.ndarray:
    for part in name.split("."):
        out = out[int(part)] if part.isdigit() else getattr(out, part)
    return np.asarray(out)


@pytest.mark.parametrize("name", PARITY)
def test_outputs_are_the_goldens(name: str, tmp_path: Path) -> None:
    golden = Golden(*name.split("/"))
    (tmp_path / "pytorch").mkdir()
    kind = getattr(tf, f"TF{golden.architecture.name}")
    kind.from_pretrained(golden.checkpoint(tmp_path / "pytorch")).save_pretrained(tmp_path / "tf")
    assert {path.name for path in (tmp_path / "tf").iterdir()} == {"config.json", "tf_model.h5"}
    out = kind.from_pretrained(tmp_path / "tf")(golden.inputs, **golden.switches, training=False)
    for one, expected in golden.outputs.items():
        found = field(out, one.replace("cache", "past_key_values"))
        assert error(visible(expected, golden.inputs), visible(found, golden.inputs)) < 1e-4, one


def test_a_file_of_the_reference_is_read_and_written(tmp_path: Path) -> None:
    case = next(case for case in CASES["tf"] if case.kept)
    folder = path_of("tf", case).with_suffix("")
    model = tf.TFAutoModelForMaskedLM.from_pretrained(folder)
    assert type(model) is tf.TFBertForMaskedLM
    model.save_pretrained(tmp_path)
    again = tf.TFBertForMaskedLM.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]


def test_names() -> None:
    listed = dir(tf)
    autos = [name for name in formax.__all__ if name.startswith("AutoModel")]
    assert {f"TF{name}" for name in autos} <= set(listed)
    for family in names.families():
        for architecture in family.architectures:
            assert f"TF{architecture.name}" in listed
            assert getattr(tf, f"TF{architecture.name}").__name__ == f"TF{architecture.name}"
    with pytest.raises(AttributeError, match=r"no class 'TFBertForMaskedLN'.*nearest are TFBertForMaskedLM"):
        tf.TFBertForMaskedLN  # noqa: B018
    with pytest.raises(TypeError, match=r"TFBertModel needs a BertConfig"):
        tf.TFBertModel(formax.AutoConfig.for_model("gpt2"))


def test_inputs_by_name_as_a_dict_as_a_list() -> None:
    model = tf.TFAutoModelForSequenceClassification.from_config(bert(num_labels=3), seed=4)
    ids, mask = np.arange(3, 15).reshape(2, 6), np.ones((2, 6), int)
    out = model(ids, attention_mask=mask, training=False)
    assert isinstance(out.logits, jax.Array)
    assert out.logits.shape == (2, 3)
    same = [model({"input_ids": ids, "attention_mask": mask}), model([ids, mask]), model(ids, mask)]
    same += [model(input_ids=ids, attention_mask=mask), model({"input_ids": ids}, attention_mask=mask)]
    for one in same:
        np.testing.assert_array_equal(one.logits, out.logits)
    as_tuple = model(ids, return_dict=False, output_hidden_states=True)
    assert [type(part) for part in as_tuple] == [type(out.logits), tuple]
    with pytest.raises(TypeError, match="'input_ids' twice"):
        model({"input_ids": ids}, input_ids=ids)
    with pytest.raises(TypeError, match=r"takes no labels: the loss is a function of formax\.training"):
        model(ids, labels=np.zeros(2, int))
    with pytest.raises(TypeError, match="did you mean"):
        model({"input_id": ids})


def test_training_needs_a_key() -> None:
    model = tf.TFBertModel(bert())
    ids = jnp.arange(3, 9)[None]
    with pytest.raises(ValueError, match="training=True needs key="):
        model(ids, training=True)
    one, same, other = (model(ids, training=True, key=jax.random.key(i))[0] for i in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)


def test_decoding_with_past_key_values() -> None:
    config = formax.AutoConfig.for_model("gpt2", vocab_size=40, n_embd=24, n_layer=2, n_head=3)
    model, ids = tf.TFGPT2LMHeadModel(config), jnp.arange(3, 9)[None]
    whole, cache = model(ids).logits, model.init_cache(1, 6)
    for i in range(6):
        out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        np.testing.assert_allclose(out.logits[:, 0], whole[:, i], atol=1e-5)
    with pytest.raises(TypeError, match="use_cache=True needs past_key_values="):
        model(ids, use_cache=True)


def test_which_weights_are_opened(tmp_path: Path) -> None:
    """Safetensors before TensorFlow's own, as transformers 4.57 has it; those before pickles."""
    first, second = tf.TFBertModel(bert(), seed=1), tf.TFBertModel(bert(), seed=2)
    first.save_pretrained(tmp_path)
    assert tf.TFBertModel.from_pretrained(tmp_path).num_parameters() == first.num_parameters()
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    tf.TFBertModel.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    second.save_pretrained(tmp_path, safe_serialization=True)
    for options, expected in (({}, second), ({"from_pt": True}, second), ({"use_safetensors": False}, first)):
        found = tf.TFBertModel.from_pretrained(tmp_path, **options)
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    given = tf.TFAutoModel.from_pretrained(tmp_path, config=tmp_path, num_hidden_layers=2)
    jax.tree.map(np.testing.assert_array_equal, given.params, second.params)


def test_what_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tf.TFMambaModel(formax.AutoConfig.for_model("mamba", vocab_size=9, hidden_size=8, num_hidden_layers=1))
    model.save_pretrained(tmp_path)
    assert "mamba does not exist in TensorFlow" in caplog.text
    assert (tmp_path / "model.safetensors").exists()
    for name, told in {"fit": "formax.training", "predict": "call the model"}.items():
        with pytest.raises(NotImplementedError, match=told):
            getattr(model, name)
    with pytest.raises(TypeError, match=r"MambaModel has no scores of a next token"):
        model.generate(jnp.ones((1, 2), int))
    with pytest.raises(NotImplementedError, match="SavedModel"):
        model.save_pretrained(tmp_path, True)
    with pytest.raises(NotImplementedError, match="upload_folder"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(AttributeError, match="no attribute 'encode'"):
        model.encode(jnp.ones((1, 2)))


def test_neither_tensorflow_nor_h5py_is_imported() -> None:
    program = (
        "import sys, formax.compat.tf as tf; tf.TFBertModel; "
        "print([name for name in ('h5py', 'tensorflow', 'keras', 'torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
