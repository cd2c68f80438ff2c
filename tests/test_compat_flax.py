"""The Flax classes: names from the table of families, outputs of the goldens, parameters as Flax's files hold them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import migration_tables
import numpy as np
import optax
import pytest
from battery.frames import each_of_a_frame
from battery.goldens import Golden
from oracle.compare import error, visible
from oracle.frameworks import CASES, Case, model_from, path_of

import formax
from formax.compat import flax, names, tf
from formax.compat.spelling import flat, nested, spelling
from formax.core import registry
from formax.core import spec as specs

TRACED = [Golden("bert", "cross_traces"), Golden("t5", "traces"), Golden("whisper", "traces"), Golden("clip", "traces")]
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {
        "vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": 32,
    },
    "gpt2": {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "add_cross_attention": True},
    "t5": {"vocab_size": 40, "d_model": 24, "d_kv": 5, "d_ff": 20, "num_layers": 2, "num_heads": 3},
    "bart": {
        "vocab_size": 40,
        "d_model": 24,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 20,
        "decoder_ffn_dim": 20,
        "max_position_embeddings": 32,
    },
    "resnet": {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
}


def config_of(model_type: str, **changes: Any) -> Any:
    return formax.AutoConfig.for_model(model_type, **CONFIGS[model_type], **changes)


def ids_of(config: Any, rows: int = 2, length: int = 7, seed: int = 0) -> Any:
    return jax.random.randint(jax.random.key(seed), (rows, length), 3, config.vocab_size)


def field(out: Any, name: str) -> np.ndarray:
    for part in name.split("."):
        out = out[int(part)] if part.isdigit() else getattr(out, part)
    return np.asarray(out)


def ported() -> list[Golden]:
    """Goldens of what transformers had in Flax, of relatives one each, and some of others."""
    there = [one for one in each_of_a_frame() if one.family.flax is not None and one.family.flax.has(one.architecture)]
    return [*there, Golden("mixtral", "causal_lm"), Golden("detr", "object_detection"), *TRACED]


@pytest.mark.parametrize("golden", ported(), ids=str)
def test_outputs_are_the_goldens(golden: Golden, tmp_path: Path) -> None:
    kind = getattr(flax, f"Flax{golden.architecture.name}")
    model = kind.from_pretrained(golden.checkpoint(tmp_path))
    out = model(**golden.inputs, **golden.switches)
    for name, expected in golden.outputs.items():
        found = visible(field(out, name.replace("cache", "past_key_values")), golden.inputs)
        assert error(visible(expected, golden.inputs), found) < 1e-4, name


@pytest.mark.parametrize("case", CASES["flax"], ids=lambda case: case.name)
def test_params_are_what_the_references_file_holds(case: Case, tmp_path: Path) -> None:
    opened = model_from(case, tmp_path / "pytorch", formax)
    model = getattr(flax, f"Flax{opened.architecture.name}").from_pretrained(tmp_path / "pytorch")
    record = json.loads(path_of("flax", case).read_text())["tensors"]
    found = {"/".join(path): list(leaf.shape) for path, leaf in flat(model.params).items()}
    assert found == {name: shape for name, (shape, _, _) in record.items()}
    assert model.required_params == flat(model.params).keys()
    assert jax.tree.map(lambda x: x.shape, model.params_shape_tree) == jax.tree.map(lambda x: x.shape, model.params)


def test_a_file_of_the_reference_is_read_and_written(tmp_path: Path) -> None:
    folder = path_of("flax", next(case for case in CASES["flax"] if case.kept)).with_suffix("")
    model = flax.FlaxBertForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_shards'"):
        model.save_pretrained(tmp_path, max_shards=3)
    model.save_pretrained(
        tmp_path, max_shard_size="2KB", push_to_hub=False, commit_message="Step 3"
    )  # as in run_mlm_flax
    again = flax.FlaxAutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(again) is flax.FlaxBertForMaskedLM
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)


def test_every_architecture_has_a_class_and_params_that_lead_back() -> None:
    for family in names.families():
        for architecture in family.architectures:
            kind = getattr(flax, f"Flax{architecture.name}")
            assert kind.architecture is architecture or architecture.name.startswith("Marian")
            spelt = spelling(family, architecture, family.config())
            ours = specs.abstract(architecture.spec(family.config()))
            back = jax.eval_shape(lambda tree, s=spelt: s.ours(s.theirs(tree)), ours)
            assert back == ours, architecture.name


def test_names() -> None:
    assert flax.FlaxBertForCausalLM is flax.FlaxBertLMHeadModel
    config = config_of("bert", is_decoder=True)
    assert isinstance(flax.FlaxAutoModelForCausalLM.from_config(config), flax.FlaxBertForCausalLM)
    listed = dir(flax)
    for name in (
        "FlaxBertModel",
        "FlaxGPT2LMHeadModel",
        "FlaxAutoModel",
        "FlaxAutoModelForCTC",
        "FlaxMambaForCausalLM",
    ):
        assert name in listed
        assert getattr(flax, name).__name__ == name
    of_words = flax.FLAX_MODEL_FOR_CAUSAL_LM_MAPPING
    assert of_words[type(config)] is flax.FlaxBertForCausalLM
    assert "gpt2" in {kind.model_type for kind in of_words}
    assert "vit" not in {kind.model_type for kind in of_words}
    assert flax.FLAX_MODEL_MAPPING[type(config)] is flax.FlaxBertModel
    assert flax.FLAX_MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.keys() >= {formax.AutoConfig.for_model("t5").__class__}
    assert flax.CONFIG_MAPPING["gpt2"]().n_layer == 12
    autos = [name for name in formax.__all__ if name.startswith("AutoModel")]
    assert {f"Flax{name}" for name in autos} <= set(listed)
    with pytest.raises(AttributeError, match=r"no class 'FlaxBertForMaskedLN'.*nearest are FlaxBertForMaskedLM"):
        flax.FlaxBertForMaskedLN  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'BertModel'"):
        flax.BertModel  # noqa: B018


@pytest.mark.parametrize(("framework", "module"), [("flax", flax), ("tf", tf)])
def test_names_are_the_references(framework: str, module: Any) -> None:
    """Every class that transformers had of a family is here, and families claim no other."""
    known = {model_type.replace("-", "_") for model_type in registry.model_types()}
    recorded, prefix = migration_tables.RECORD[framework], {"flax": "Flax", "tf": "TF"}[framework]
    for model_type, found in recorded.items():
        for name in found if model_type in known | {"auto"} else ():
            kind = getattr(module, name)
            if model_type != "auto":
                assert name in migration_tables.class_names(kind.family, kind.architecture, prefix)
    had = {name for found in recorded.values() for name in found}
    for family in names.families():
        port = getattr(family, framework)
        for architecture in family.architectures:
            there = had & {*migration_tables.class_names(family, architecture, prefix)}
            assert bool(there) == (port is not None and port.has(architecture)), architecture.name


@pytest.mark.parametrize("page", migration_tables.PAGES)
def test_the_pages_list_what_there_is(page: str) -> None:
    found = (migration_tables.DOCS / page).read_text(encoding="utf-8")
    assert found == migration_tables.written(page), "run python tests/migration_tables.py"


def test_a_registered_family_has_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    bert = registry.family("bert")
    mine = replace(bert, architectures=tuple(replace(one, name=f"My{one.name}") for one in bert.architectures))
    monkeypatch.setitem(registry._registered, "bert", mine)
    assert flax.FlaxMyBertModel.family is mine


def test_neither_flax_nor_transformers_is_imported() -> None:
    program = (
        "import sys, formax.compat.flax as flax; flax.FlaxBertModel; "
        "print([name for name in ('flax', 'optax', 'torch', 'transformers', 'msgpack') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


# --- calls


def test_places_of_a_call_are_the_references() -> None:
    """As `inspect.signature` says of transformers 4.57.6."""
    order = {
        "FlaxBertModel": "input_ids attention_mask token_type_ids position_ids head_mask encoder_hidden_states "
        "encoder_attention_mask params dropout_rng train output_attentions output_hidden_states return_dict "
        "past_key_values",
        "FlaxGPT2LMHeadModel": "input_ids attention_mask position_ids encoder_hidden_states encoder_attention_mask "
        "params past_key_values dropout_rng train output_attentions output_hidden_states return_dict",
        "FlaxLlamaForCausalLM": "input_ids attention_mask position_ids params past_key_values dropout_rng train "
        "output_attentions output_hidden_states return_dict",
        "FlaxT5Model": "input_ids attention_mask decoder_input_ids decoder_attention_mask output_attentions "
        "output_hidden_states return_dict train params dropout_rng",
        "FlaxT5EncoderModel": "input_ids attention_mask output_attentions output_hidden_states return_dict train "
        "params dropout_rng",
        "FlaxBartModel": "input_ids attention_mask decoder_input_ids decoder_attention_mask position_ids "
        "decoder_position_ids output_attentions output_hidden_states return_dict train params dropout_rng",
        "FlaxBartForCausalLM": "input_ids attention_mask position_ids encoder_hidden_states encoder_attention_mask "
        "output_attentions output_hidden_states return_dict train params past_key_values dropout_rng",
        "FlaxWhisperModel": "input_features decoder_input_ids attention_mask decoder_attention_mask position_ids "
        "decoder_position_ids output_attentions output_hidden_states return_dict train params dropout_rng",
        "FlaxWhisperForAudioClassification": "input_features attention_mask output_attentions output_hidden_states "
        "return_dict train params dropout_rng",
        "FlaxCLIPModel": "input_ids pixel_values attention_mask position_ids params dropout_rng train "
        "output_attentions output_hidden_states return_dict",
        "FlaxCLIPVisionModel": "pixel_values params dropout_rng train output_attentions output_hidden_states "
        "return_dict",
        "FlaxViTModel": "pixel_values params dropout_rng train output_attentions output_hidden_states return_dict",
        "FlaxResNetModel": "pixel_values params train output_hidden_states return_dict",
    }
    for name, expected in order.items():
        kind = getattr(flax, name)
        model = kind(kind.config_class(), _do_init=False)
        assert [*model._inputs(), *model._after()] == expected.split(), name


def test_outputs_by_name_by_place_and_as_a_tuple() -> None:
    config = config_of("bert")
    model = flax.FlaxBertModel(config, seed=3)
    ids = np.asarray(ids_of(config))
    out = model(ids, np.ones_like(ids), output_hidden_states=True)
    assert out.keys() == ["last_hidden_state", "pooler_output", "hidden_states"]
    assert out[0] is out.last_hidden_state is out["last_hidden_state"]
    assert out.past_key_values is None
    assert len(out.hidden_states) == 3
    compiled = jax.jit(lambda params: model(ids, params=params))(model.params)
    assert compiled.keys() == ["last_hidden_state", "pooler_output"]
    plain = model(ids, return_dict=False)
    assert type(plain) is tuple
    np.testing.assert_allclose(plain[1], out[1], atol=1e-6)
    assert type(flax.FlaxBertModel(config.replace(extra={"return_dict": False}))(ids)) is tuple
    clip = flax.FlaxCLIPModel(formax.AutoConfig.for_model("clip", text_config=TEXT, vision_config=VISION))
    nested_out = clip(ids, jnp.zeros((2, 3, 8, 8)), return_dict=False)
    assert type(nested_out[-1]) is tuple


TEXT = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
VISION = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_given_parameters_take_the_place_of_the_models() -> None:
    config = config_of("bert")
    model, ids = flax.FlaxBertForMaskedLM(config), ids_of(config)
    other = jax.tree.map(lambda x: x * 1.5, model.params)
    out = model(ids, params=other).logits
    np.testing.assert_allclose(jax.jit(lambda p, x: model(x, params=p)[0])(other, ids), out, rtol=2e-5, atol=2e-5)
    assert not np.allclose(model(ids).logits, out)
    model.params = other
    np.testing.assert_allclose(model(ids).logits, out, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match=r"params lacks cls/predictions/bias"):
        model.params = {"bert": model.params["bert"]}
    with pytest.raises(ValueError, match=r"params lacks bert/embeddings/word_embeddings/embedding"):
        model(ids, params={"cls": model.params["cls"]})
    wrong = {**model.params, "cls": jax.tree.map(lambda x: x[..., :1], model.params["cls"])}
    with pytest.raises(ValueError, match=r"cls/predictions/.* has shape .*, the model \("):
        model(ids, params=wrong)
    with pytest.raises(TypeError, match="params must be nested dicts"):
        model(ids, params=[1])


def test_parameters_outside() -> None:
    config = config_of("bert")
    model = flax.FlaxBertForMaskedLM(config, seed=1, _do_init=False)
    with pytest.raises(ValueError, match="holds no parameters"):
        model.params  # noqa: B018
    with pytest.raises(ValueError, match="holds no parameters"):
        model.params = {}
    params = model.init_weights(jax.random.PRNGKey(1), (1, 1))
    inside = flax.FlaxBertForMaskedLM(config, (1, 1), 1)
    jax.tree.map(np.testing.assert_array_equal, params, inside.params)
    ids = ids_of(config)
    np.testing.assert_array_equal(model(ids, params=params)[0], inside(ids)[0])
    filled = model.init_weights(jax.random.key(5), (1, 1), {"bert": params["bert"]})
    np.testing.assert_array_equal(jax.tree.leaves(filled["bert"])[0], jax.tree.leaves(params["bert"])[0])
    assert filled.keys() == params.keys()


def test_opening_with_parameters_outside_and_a_new_head(tmp_path: Path) -> None:
    config = config_of("bert")
    model = flax.FlaxBertForMaskedLM(config)
    model.save_pretrained(tmp_path)
    found, params = flax.FlaxAutoModelForSequenceClassification.from_pretrained(
        tmp_path, jnp.bfloat16, _do_init=False, num_labels=5, seed=2
    )
    assert type(found) is flax.FlaxBertForSequenceClassification
    assert found.config.num_labels == 5
    assert params["classifier"]["kernel"].shape == (24, 5)
    np.testing.assert_array_equal(
        params["bert"]["embeddings"]["word_embeddings"]["embedding"],
        model.params["bert"]["embeddings"]["word_embeddings"]["embedding"],
    )
    assert found(ids_of(config), params=params).logits.dtype == jnp.bfloat16
    config = formax.AutoConfig.from_pretrained(tmp_path, num_labels=3, finetuning_task="mnli")  # as the examples do
    assert (config.num_labels, config.finetuning_task) == (3, "mnli")
    given = flax.FlaxBertForMaskedLM.from_pretrained(tmp_path, config=str(tmp_path))
    np.testing.assert_array_equal(given(ids_of(config))[0], model(ids_of(config))[0])
    with pytest.raises(TypeError, match=r"FlaxBertModel needs a BertConfig.*not a GPT2Config"):
        flax.FlaxBertModel(config_of("gpt2"))


def test_which_weights_are_opened(tmp_path: Path) -> None:
    config = config_of("bert")
    first, second = flax.FlaxBertModel(config, seed=1), flax.FlaxBertModel(config, seed=2)
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "flax_model.msgpack", "model.safetensors"}
    for options, expected in (({}, first), ({"from_pt": True}, second)):
        found = flax.FlaxBertModel.from_pretrained(tmp_path, **options)
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_what_flax_lacks_is_saved_for_pytorch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 6, "num_local_experts": 3}
    model = flax.FlaxMixtralForCausalLM(formax.AutoConfig.for_model("mixtral", **sizes))
    model.save_pretrained(tmp_path)
    assert "mixtral does not exist in Flax" in caplog.text
    again = flax.FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    with pytest.raises(NotImplementedError, match="upload_folder"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_dtypes() -> None:
    config = config_of("bert")
    model = flax.FlaxBertModel(config, dtype=jnp.bfloat16)
    assert jax.tree.leaves(model.params)[0].dtype == jnp.float32
    assert model(ids_of(config))[0].dtype == jnp.bfloat16
    halved = model.to_bf16(model.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(halved)} == {jnp.dtype("bfloat16")}
    assert flax.FlaxBertModel(config)(ids_of(config), params=halved)[0].dtype == jnp.float32
    mask = nested({path: path[-2:] != ("LayerNorm", "scale") for path in flat(model.params)})
    mixed = flat(model.to_fp16(model.params, mask))
    assert {leaf.dtype.name for path, leaf in mixed.items() if path[-2:] == ("LayerNorm", "scale")} == {"float32"}
    assert {leaf.dtype.name for path, leaf in mixed.items() if path[-1] == "kernel"} == {"float16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.to_fp32(nested(mixed)))} == {"float32"}
    with pytest.raises(ValueError, match="mask has nothing for"):
        model.to_fp16(model.params, {})
    with pytest.raises(ValueError, match="not floating-point"):
        flax.FlaxBertModel(config, dtype=jnp.int32)


def test_errors_of_a_call() -> None:
    config = config_of("bert")
    model, ids = flax.FlaxBertModel(config), ids_of(config)
    with pytest.raises(TypeError, match="no input 'input_id'; did you mean input_ids"):
        model(input_id=ids)
    with pytest.raises(TypeError, match="'input_ids' twice"):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError, match="train must be True or False"):
        model(ids, train=ids)
    with pytest.raises(TypeError, match="were given"):
        model(*([None] * 20))
    with pytest.raises(TypeError, match="freeze_feature_encoder: FlaxBertModel has no"):
        model(ids, freeze_feature_encoder=True)
    with pytest.raises(TypeError, match="no decoder"):
        model.decode(ids, ids)
    with pytest.raises(AttributeError, match="no attribute 'encode'"):
        model.encode(ids)


# --- training


def test_dropout_is_that_of_the_key() -> None:
    config = config_of("bert")
    model, ids = flax.FlaxBertModel(config), ids_of(config)
    with pytest.raises(ValueError, match=r"needs dropout_rng=: the configuration has hidden_dropout_prob=0.1"):
        model(ids, train=True)
    legacy, typed = jax.random.PRNGKey(4), jax.random.key(4)
    one, same = (model(ids, dropout_rng=key, train=True)[0] for key in (legacy, typed))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, model(ids)[0])
    assert not np.allclose(one, model(ids, dropout_rng=jax.random.PRNGKey(5), train=True)[0])
    np.testing.assert_array_equal(model(ids, dropout_rng=legacy)[0], model(ids)[0])
    with pytest.raises(TypeError, match=r"made by jax\.random"):
        model(ids, dropout_rng=4, train=True)
    quiet = flax.FlaxBertModel(config.replace(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    np.testing.assert_allclose(quiet(ids, train=True)[0], quiet(ids)[0], atol=1e-6)


def test_a_masked_lm_trains_as_in_run_mlm_flax() -> None:
    """The steps of Hugging Face's example: a mask of weight decay by names, `value_and_grad` over `model.params`."""
    config = config_of("bert")
    model = flax.FlaxAutoModelForMaskedLM.from_config(config, seed=0, dtype=jnp.float32)

    def decays(params: Any) -> Any:
        kept = {path: path[-1] != "bias" and path[-2:] != ("LayerNorm", "scale") for path in flat(params)}
        assert 0 < sum(kept.values()) < len(kept)
        return nested(kept)

    optimizer = optax.adamw(5e-3, weight_decay=0.01, mask=decays)
    labels = ids_of(config, 4, 9)
    hidden = jax.random.bernoulli(jax.random.key(8), 0.4, labels.shape)
    batch = {"input_ids": jnp.where(hidden, 1, labels), "attention_mask": jnp.ones_like(labels)}

    @jax.jit
    def step(params: Any, state: Any, key: Any) -> Any:
        dropout_rng, key = jax.random.split(key)

        def loss_of(params: Any) -> Any:
            logits = model(**batch, params=params, dropout_rng=dropout_rng, train=True)[0]
            return (optax.softmax_cross_entropy_with_integer_labels(logits, labels) * hidden).sum() / hidden.sum()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, key, loss

    params, state, key = model.params, optimizer.init(model.params), jax.random.PRNGKey(0)
    losses = []
    for _ in range(30):
        params, state, key, loss = step(params, state, key)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    model.params = params
    predicted = model(**batch).logits.argmax(-1)
    assert (predicted == labels)[hidden].mean() > 0.5


def test_gradients_are_those_of_the_model() -> None:
    """GPT-2 has its projections in one tensor: gradients come back in Flax's layout."""
    config = config_of("gpt2")
    model, ids = flax.FlaxGPT2LMHeadModel(config), ids_of(config)
    plain = formax.AutoModelForCausalLM.from_config(config, key=jax.random.key(0))
    spelt = spelling(plain.family, plain.architecture, config)
    found = jax.grad(lambda params: model(ids, params=params).logits.std())(spelt.theirs(plain.params))
    expected = jax.grad(lambda m: m(ids).logits.std())(plain)
    for path, leaf in flat(spelt.theirs(expected.params)).items():
        np.testing.assert_allclose(flat(found)[path], leaf, rtol=1e-4, atol=1e-6, err_msg="/".join(path))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    config = config_of("bert")
    ids = ids_of(config)
    model = flax.FlaxBertModel(config)

    def grads() -> Any:
        return jax.grad(lambda params: model(ids, params=params)[0].std())(model.params)

    before = grads()
    assert "remat" not in str(jax.make_jaxpr(lambda p: model(ids, params=p)[0])(model.params))
    model.enable_gradient_checkpointing()
    assert "remat" in str(jax.make_jaxpr(lambda p: model(ids, params=p)[0])(model.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), before, grads())


def test_batch_statistics_come_back() -> None:
    model = flax.FlaxResNetForImageClassification(config_of("resnet"))
    images = jax.random.normal(jax.random.key(0), (4, 3, 32, 32)) + 1
    assert model.params.keys() == {"params", "batch_stats"}
    out, new = model(images, train=True)
    assert new.keys() == {"batch_stats"}
    assert flat(new["batch_stats"]).keys() == flat(model.params["batch_stats"]).keys()
    moved = [
        bool((a != b).any())
        for a, b in zip(*map(jax.tree.leaves, (new["batch_stats"], model.params["batch_stats"])), strict=True)
    ]
    assert all(moved)
    assert not np.allclose(out.logits, model(images).logits)
    for _ in range(60):
        _, new = model(images, {**model.params, **new}, True)
    # Batch norms whose running statistics are those of the batch compute the same with either, but for n / (n - 1).
    settled = model(images, params={**model.params, **new}).logits
    np.testing.assert_allclose(settled, model(images, train=True)[0].logits, rtol=0.05, atol=0.02)


def test_speech_models_hide_what_they_are_told_and_freeze_on_demand() -> None:
    sizes = {"conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2}
    sizes |= {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 3, "mask_time_length": 2}
    rates = ["hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"]
    rates += ["final_dropout", "feat_quantizer_dropout"]
    config = formax.AutoConfig.for_model("wav2vec2", **sizes, **dict.fromkeys(rates, 0.0), mask_time_prob=0.6)
    model = flax.FlaxWav2Vec2Model(config)
    sound = jax.random.normal(jax.random.key(0), (2, 80))
    np.testing.assert_allclose(model(sound, dropout_rng=jax.random.key(1), train=True)[0], model(sound)[0], atol=1e-5)
    frames = model(sound)[0].shape[1]
    hidden = jnp.arange(2 * frames).reshape(2, frames) % 3 == 0
    assert not np.allclose(model(sound, mask_time_indices=hidden)[0], model(sound)[0])

    def sizes_of(**given: Any) -> dict[str, float]:
        grads = jax.grad(lambda p: model(sound, params=p, **given)[0].std())(model.params)
        return {"/".join(path): float(abs(leaf).sum()) for path, leaf in flat(grads).items()}

    frozen, free = sizes_of(freeze_feature_encoder=True), sizes_of()
    inside = [name for name in free if name.startswith("feature_extractor")]
    assert inside
    assert all(frozen[name] == 0 < free[name] for name in inside)
    assert all(frozen[name] > 0 for name in free if name.startswith("feature_projection"))
    pretraining = flax.FlaxWav2Vec2ForPreTraining(config)
    keys = {"dropout_rng": jax.random.PRNGKey(0), "train": True}
    one, two = (pretraining(sound, hidden, gumbel_rng=jax.random.PRNGKey(i), **keys) for i in (1, 2))
    assert not np.allclose(one.projected_quantized_states, two.projected_quantized_states)


# --- decoding


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encode_and_decode_are_the_whole(kind: str) -> None:
    config = config_of(kind)
    model = flax.FlaxAutoModelForSeq2SeqLM.from_config(config)
    ids, reply = ids_of(config), ids_of(config, length=6, seed=1)
    mask = jnp.ones_like(ids).at[0, 5:].set(0)
    whole = model(ids, mask, reply)
    encoded = model.encode(ids, mask, output_hidden_states=True)
    assert len(encoded.hidden_states) == 3
    out = model.decode(reply, encoded, mask, output_attentions=True)
    np.testing.assert_allclose(out.logits, whole.logits, atol=1e-5)
    assert len(out.attentions) == len(out.cross_attentions) == 2
    np.testing.assert_allclose(model.decode(reply, (encoded[0],), mask).logits, whole.logits, atol=1e-5)

    cache = model.init_cache(2, 6, encoded)
    steps = []
    for i in range(6):
        step = model.decode(reply[:, i : i + 1], encoded, mask, jnp.ones((2, 6), int), past_key_values=cache)
        cache = step.past_key_values
        steps.append(step.logits)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole.logits, atol=1e-5)
    with pytest.raises(TypeError, match="decode needs decoder_input_ids"):
        model.decode(decoder_input_ids=reply)


def test_a_decoder_with_past_key_values() -> None:
    config = config_of("gpt2")
    model, ids = flax.FlaxGPT2LMHeadModel(config), ids_of(config)
    whole, cache, steps = model(ids).logits, model.init_cache(2, 9), []
    for i in range(7):
        # A mask of the whole length, as Flax's loops have it.
        out = model(ids[:, i : i + 1], jnp.ones((2, 9), int), jnp.full((2, 1), i), past_key_values=cache)
        assert out.keys() == ["logits", "past_key_values"]
        cache = out.past_key_values
        steps.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, atol=1e-5)
    with pytest.raises(TypeError, match="does not decode"):
        flax.FlaxBertModel(config_of("bert")).init_cache(1, 2)


def test_methods_and_the_module() -> None:
    clip = flax.FlaxCLIPModel(formax.AutoConfig.for_model("clip", text_config=TEXT, vision_config=VISION))
    ids, images = jnp.arange(3, 9).reshape(2, 3), jax.random.normal(jax.random.key(0), (2, 3, 8, 8))
    out = clip(ids, images)
    features = clip.get_text_features(ids, params=clip.params)
    np.testing.assert_allclose(features / jnp.linalg.norm(features, axis=-1, keepdims=True), out.text_embeds, atol=1e-5)
    assert clip.get_image_features(images).shape == out.image_embeds.shape
    config = config_of("bert")
    model = flax.FlaxBertModel(config)
    variables = model.module.init(jax.random.PRNGKey(0), ids)
    np.testing.assert_array_equal(model.module.apply(variables, ids)[0], model(ids)[0])
    noisy = model.module.apply(variables, ids, rngs={"dropout": jax.random.key(1)}, deterministic=False)[0]
    np.testing.assert_array_equal(noisy, model(ids, dropout_rng=jax.random.key(1), train=True)[0])
    with pytest.raises(ValueError, match="past_key_values="):
        model.module.apply(variables, ids, mutable=["cache"])
