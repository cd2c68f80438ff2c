"""The Flax classes of transformers 4, on formax: change the import, and go on.

    from formax.compat.flax import FlaxAutoModelForMaskedLM, FlaxBertForMaskedLM

There is a class for every architecture of every family, also for those that transformers never had in Flax, and an Auto
class for every head. They are called as the originals are. `model.params` is a nested dict under Flax's names, which is
what optimisers' masks speak of; gradients with respect to it have the same shape. The package `flax` is not needed.

What differs: a call outside of a trace is compiled, and so is `generate`; configurations are frozen
(`config.replace(...)`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from formax.compat import files, names, outputs
from formax.compat.spelling import Spelling, flat, nested, spelling
from formax.compat.writing import FlaxGenerationMixin
from formax.conversion.load import floating
from formax.core import spec as specs
from formax.core.config import Config
from formax.core.family import Architecture, Family
from formax.generation.config import GenerationConfig
from formax.layers.seq2seq import states_of
from formax.loading import generation_config, load
from formax.model import Model

# Inputs that Flax's classes did not take, which come by name only.
BY_NAME = {
    "bool_masked_pos",
    "cache",
    "decoder_inputs_embeds",
    "encoder_outputs",
    "inputs_embeds",
    "interpolate_pos_encoding",
    "logits_to_keep",
    "output_router_logits",
}
# Places of a call that are kept where the model has no such input.
KEPT_PLACES = {"attention_mask", "head_mask"}
# What follows the inputs, in three orders: of encoder-decoders, of models with batch statistics, of all others.
CACHE, OUTPUTS = "past_key_values", ("output_attentions", "output_hidden_states", "return_dict")
AFTER_SEQ2SEQ = (*OUTPUTS, "train", "params", "dropout_rng")
AFTER_STATISTICS = ("params", "train", "output_hidden_states", "return_dict")
AFTER = ("params", "dropout_rng", "train", *OUTPUTS)
# Everything that is no input of the model; the last two are speech models' alone.
SWITCHES = (*AFTER, CACHE, "gumbel_rng", "freeze_feature_encoder")
FEATURE_ENCODER = "feature_extractor"
# Fields that say how much is hidden from a model in training. Flax's classes hide what they are told to, nothing else.
HIDING = ("mask_time_prob", "mask_feature_prob")


class FlaxPreTrainedModel(FlaxGenerationMixin):
    """A model as transformers' Flax had it: parameters and computation apart, dropout on where `train=True` says so.

    Attributes:
        config: the configuration.
        params: the parameters, nested dicts under the names of Flax's checkpoints.
        dtype: what is computed in; parameters keep their own dtype.
        input_shape: kept for those who ask; shapes of inputs are no part of a model here.
        key: the legacy key of the seed.
        generation_config: what `generate` does if it is not told otherwise; None of a model that does not write.
    """

    config_class: ClassVar[type[Config]]
    base_model_prefix: ClassVar[str]
    main_input_name: ClassVar[str]
    framework: ClassVar[str] = "flax"

    def __init__(
        self,
        config: Config,
        input_shape: Any = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        """A model with initial parameters.

        Args:
            config: a configuration of `config_class`, as `formax.AutoConfig.for_model` makes it.
            input_shape: kept as it is.
            seed: of the initial parameters.
            dtype: what is computed in.
            _do_init: whether the model holds its parameters; else they are given to every call.
            gradient_checkpointing: as `enable_gradient_checkpointing`.

        Raises:
            TypeError: a configuration of another family.
            ValueError: `dtype` is no floating-point type.
        """
        names.check_config(type(self).__name__, self.family, config)
        self._config = config
        self._dtype = floating(dtype)
        self._remat = gradient_checkpointing
        self._is_initialized = _do_init
        self._params: dict[str, Any] | None = None
        self.generation_config: GenerationConfig | None = generation_config(self.architecture, config)
        self.input_shape = input_shape
        self.key = jax.random.PRNGKey(seed)
        if _do_init:
            self._params = self.init_weights(self.key, input_shape)

    # --- parameters

    @property
    def config(self) -> Config:
        """The configuration."""
        return self._config

    @property
    def dtype(self) -> Any:
        """What is computed in."""
        return self._dtype

    @property
    def params(self) -> dict[str, Any]:
        """The parameters.

        Raises:
            ValueError: the model holds none (`_do_init=False`).
        """
        if self._params is None:
            raise ValueError(
                f"this {type(self).__name__} was made with _do_init=False and holds no parameters: give params= to the "
                "call; init_weights makes initial ones"
            )
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        if not self._is_initialized:
            raise ValueError("a model made with _do_init=False holds no parameters; keep them outside and pass params=")
        if missing := self.required_params - flat(params).keys():
            raise ValueError(f"params lacks {', '.join(sorted(map('/'.join, missing))[:5])}")
        self._params = nested(flat(params))

    @property
    def params_shape_tree(self) -> dict[str, Any]:
        """The parameters as shapes and dtypes."""
        return jax.eval_shape(self._spelling.theirs, specs.abstract(self.architecture.spec(self._config)))

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """Places of all parameters, as `flax.traverse_util.flatten_dict` gives them."""
        return set(self._spelling.stored)

    @property
    def _spelling(self) -> Spelling:
        return spelling(self.family, self.architecture, self._config)

    def init_weights(
        self, rng: jax.Array, input_shape: Any = None, params: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Initial parameters; those in `params` are taken from there.

        Args:
            rng: a key, of either kind.
            input_shape: not needed.
            params: parameters that are there already, in whole or in part.
        """
        model = Model.initialise(self._config, self.architecture, self.family, _key(rng), jnp.float32)
        made = self._spelling.theirs(model.params)
        return made if params is None else nested({**flat(made), **flat(params)})

    def to_bf16(self, params: Mapping[str, Any], mask: Any = None) -> dict[str, Any]:
        """A copy of `params` in bfloat16; where there is a mask (a tree of booleans), of what is True there."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Mapping[str, Any], mask: Any = None) -> dict[str, Any]:
        """A copy of `params` in float16; likewise."""
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Mapping[str, Any], mask: Any = None) -> dict[str, Any]:
        """A copy of `params` in float32; likewise."""
        return _cast(params, jnp.float32, mask)

    def num_parameters(self) -> int:
        """Number of scalars that the model has."""
        return specs.count(self.architecture.spec(self._config))

    def enable_gradient_checkpointing(self) -> None:
        """Has the backward pass compute every layer again, in the memory of one."""
        self._remat = True

    # --- calling

    def __call__(self, *args: Any, **given: Any) -> Any:
        """Runs the model.

        Args:
            *args: inputs, and what follows them, in the order of Flax's classes.
            **given: inputs by name, and: `params`, others than the model's own; `train`, whether there is dropout,
                and `dropout_rng`, its key; `past_key_values` of `init_cache`; `output_attentions`,
                `output_hidden_states`, `return_dict`.

        Returns:
            An output whose fields are attributes, items by name and items by place; with `return_dict=False` a tuple.
            With `train=True`, models with batch statistics give (output, {"batch_stats": the new ones}).
        """
        return self._run(None, self._named(self._inputs(), self._after(), args, given))

    def decode(self, *args: Any, **given: Any) -> Any:
        """Runs the decoder: `decoder_input_ids`, `encoder_outputs`, `encoder_attention_mask`, `decoder_attention_mask`.

        The rest is as in a call; the output's fields are called as those of a decoder alone.

        Raises:
            TypeError: the model is no encoder-decoder.
        """
        taken = self._model_of(None).input_names
        if not {"decoder_input_ids", "encoder_outputs"} <= set(taken):
            raise TypeError(f"{type(self).__name__} has no decoder that goes on from an encoder's outputs")
        first = ["decoder_input_ids", "encoder_outputs", "encoder_attention_mask", "decoder_attention_mask"]
        first += ["decoder_position_ids"] if "decoder_position_ids" in taken else []
        named = self._named(first, (CACHE, *AFTER_SEQ2SEQ), args, given)
        if named.get("encoder_outputs") is None or named.get("decoder_input_ids") is None:
            raise TypeError("decode needs decoder_input_ids and encoder_outputs, the output of encode")
        named["encoder_outputs"] = states_of(named["encoder_outputs"])
        if (mask := named.pop("encoder_attention_mask", None)) is not None:
            named["attention_mask"] = mask
        return self._run(None, named, is_decoder=True)

    def __getattr__(self, name: str) -> Any:
        # Only reached for what is no attribute: the architecture's methods (`encode`, `get_text_features`).
        if name.startswith("_") or name not in self.architecture.methods:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return partial(self._call_method, name)

    def _call_method(self, method: str, *args: Any, **given: Any) -> Any:
        inputs = [name for name in self._model_of(method).input_names if name not in BY_NAME]
        after = AFTER_SEQ2SEQ if self._is_seq2seq else ("params", "dropout_rng", "train")
        return self._run(method, self._named(inputs, after, args, given))

    def init_cache(self, batch_size: int, max_length: int, encoder_outputs: Any = None) -> Any:
        """Empty `past_key_values` for decoding step by step, with room for `max_length` positions.

        Raises:
            TypeError: the model does not decode.
        """
        length = 0 if encoder_outputs is None else states_of(encoder_outputs).shape[1]
        params = specs.abstract(self.architecture.spec(self._config))
        model = Model(params, self._config, self.architecture, self.family)
        return model.init_cache(batch_size, max_length, length, self._dtype)

    @property
    def module(self) -> FlaxModule:
        """The computation alone, as `module.apply({"params": params}, ...)`."""
        return FlaxModule(self)

    @property
    def _is_seq2seq(self) -> bool:
        return self.config_class().is_encoder_decoder

    def _writer(self, params: Any = None) -> Model:
        given = self.params if params is None else params
        ours = self._spelling.ours(given, self._dtype)
        return Model(ours, self._config, self.architecture, self.family, generation_config=self.generation_config)

    def _model_of(
        self, method: str | None, params: Any = None, quiet: bool = False, frozen: str | None = None
    ) -> Model:
        """A model whose parameters are Flax's; `quiet` hides nothing of its own, `frozen` parts get no gradients."""
        config = self._config
        if quiet and (hiding := {name: 0.0 for name in HIDING if getattr(config, name, 0)}):
            config = config.replace(**hiding)
        architecture = _spelt(self.family, self.architecture, self._config, self._dtype, frozen)
        model = Model(params, config, architecture, self.family, remat=self._remat)
        return model if method is None else model.as_method(method)

    def _inputs(self) -> list[str]:
        """Inputs in the order of Flax's class."""
        taken = self._model_of(None).input_names
        order = self.family.flax.inputs if self.family.flax is not None else ()
        if not order:
            return [name for name in taken if name not in BY_NAME]
        has_text = "input_ids" in taken or "decoder_input_ids" in taken
        kept = KEPT_PLACES | ({"position_ids"} if has_text else set())
        kept |= {"decoder_position_ids"} if "decoder_input_ids" in taken else set()
        return [name for name in order if name in taken or name in kept]

    def _after(self) -> Sequence[str]:
        """What follows the inputs; `past_key_values` comes before the key, but last with BERT and its relatives."""
        taken = self._model_of(None).input_names
        if self._spelling.statistics:
            return AFTER_STATISTICS
        after = AFTER_SEQ2SEQ if self._is_seq2seq else AFTER
        if "cache" not in taken or "decoder_input_ids" in taken:
            return after
        if "head_mask" in self._inputs():
            return (*after, CACHE)
        place = after.index("dropout_rng")
        return (*after[:place], CACHE, *after[place:])

    def _named(
        self, inputs: Sequence[str], after: Sequence[str], args: Sequence[Any], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Everything that was given, by name.

        Raises:
            TypeError: too many, or one by place and by name.
        """
        order = tuple(dict.fromkeys((*inputs, *after)))
        if len(args) > len(order):
            raise TypeError(f"{type(self).__name__} takes {', '.join(order)}; {len(args)} were given")
        named = dict(zip(order, args, strict=False))
        if twice := named.keys() & given.keys():
            raise TypeError(f"{type(self).__name__} was given {min(twice)!r} twice, by place and by name")
        return {**named, **given}

    def _run(self, method: str | None, named: dict[str, Any], is_decoder: bool = False) -> Any:
        """A call with everything by name."""
        switches = {name: named.pop(name, None) for name in SWITCHES}
        for name in ("train", *OUTPUTS, "freeze_feature_encoder"):
            if not isinstance(switches[name], bool | None):
                raise TypeError(f"{name} must be True or False, got {switches[name]!r:.60}")
        params, train = switches["params"] or self.params, bool(switches["train"])
        if not isinstance(params, Mapping):
            raise TypeError(f"params must be nested dicts as model.params, got a {type(params).__name__}")
        frozen = FEATURE_ENCODER if switches["freeze_feature_encoder"] else None
        if frozen is not None and not any(frozen in path for path in self._spelling.stored):
            raise TypeError(f"freeze_feature_encoder: {type(self).__name__} has no {FEATURE_ENCODER}")
        if switches[CACHE] is not None:
            named["cache"] = switches[CACHE]
        statistics = self._spelling.statistics if train and method is None else {}
        out, seen = self._model_of(method, params, train, frozen).run(
            named,
            key=self._noise(switches["dropout_rng"], switches["gumbel_rng"], bool(statistics)) if train else None,
            optional=tuple(entry.key for entry in statistics.values()),
            output_attentions=switches["output_attentions"],
            output_hidden_states=switches["output_hidden_states"],
        )
        out = outputs.renamed(out, "Flax")
        out = outputs.of_decoder(out, "Flax") if is_decoder else out
        wants_dict = switches["return_dict"]
        wants_dict = self._config.extra.get("return_dict", True) if wants_dict is None else wants_dict
        if not wants_dict and hasattr(out, "to_tuple"):
            out = outputs.as_tuple(out)
        if not statistics:
            return out
        before = flat(params)
        after = {path: seen.get(entry.key, before[path]) for path, entry in statistics.items()}
        return out, nested({path: jnp.asarray(leaf, before[path].dtype) for path, leaf in after.items()})

    def _noise(self, dropout: Any, gumbel: Any, has_statistics: bool) -> jax.Array | None:
        """The key of a call in training.

        Raises:
            ValueError: there is noise, and no key for it.
        """
        if dropout is None:
            if noisy := _noisy(self._config):
                raise ValueError(f"train=True needs dropout_rng=: the configuration has {', '.join(noisy)}")
            # Nothing is drawn: the key says that batch norms see the batch.
            return jax.random.key(0) if has_statistics else None
        key = _key(dropout)
        return key if gumbel is None else jax.random.fold_in(key, jax.random.bits(_key(gumbel)))

    # --- files

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "FlaxAutoModel") -> None:
        """Not done here: no code is put into checkpoints, nor run out of them.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("formax puts no code into checkpoints; formax.register makes a family known")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        dtype: Any = jnp.float32,
        *,
        config: Config | str | Path | None = None,
        from_pt: bool = False,
        _do_init: bool = True,
        input_shape: Any = (1, 1),
        seed: int = 0,
        gradient_checkpointing: bool = False,
        **options: Any,
    ) -> Any:
        """Opens a checkpoint: Flax's weights if there are any, else whatever `formax.from_pretrained` opens.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the hub.
            dtype: what is computed in. Parameters are those of the file; `to_bf16` and the like make others of them.
            config: a configuration, or where one is, in the place of the checkpoint's own.
            from_pt: take PyTorch's weights even where Flax's are.
            _do_init: whether the model holds its parameters.
            input_shape: kept as it is.
            seed: of parameters that the checkpoint does not hold.
            gradient_checkpointing: as `enable_gradient_checkpointing`.
            **options: of `formax.loading.load`: `revision`, `cache_dir`, `local_files_only`, `token`,
                `ignore_mismatched_sizes`; fields of the configuration to replace.

        Returns:
            The model; with `_do_init=False`, (model, parameters).
        """
        opened = load(
            pretrained_model_name_or_path,
            None,
            architecture=cls.architecture.name,
            config=None if config is None else files.config_of(config, {**options, "config": config}),
            key=jax.random.key(seed),
            **files.choice("flax", pretrained_model_name_or_path, from_pt, options),
            **options,
        )
        model = cls._of(opened, input_shape, seed, dtype, gradient_checkpointing)
        if _do_init:
            return model
        params, model._is_initialized, model._params = model._params, False, None
        return model, params

    @classmethod
    def _of(
        cls,
        opened: Model,
        input_shape: Any = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        gradient_checkpointing: bool = False,
    ) -> Any:
        """The class with this model inside."""
        model = cls(opened.config, input_shape, seed, dtype, False, gradient_checkpointing)
        model.generation_config = opened.generation_config
        model._is_initialized, model._params = True, model._spelling.theirs(opened.params)
        return model

    @classmethod
    def _from_config(cls, config: Config, **options: Any) -> Self:
        return cls(config, **options)

    def save_pretrained(
        self,
        save_directory: str | Path,
        params: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = False,
        **of_a_push: Any,
    ) -> list[Path]:
        """Writes config.json and `flax_model.msgpack`, as transformers' Flax classes open them.

        A model that these do not have is written as safetensors under PyTorch's names, and a warning says so.

        Args:
            save_directory: made when missing.
            params: others than the model's own.
            push_to_hub: not done here.
            max_shard_size: bytes, or text such as "5GB"; more than this is split into numbered files with an index.
            safe_serialization: write safetensors, under PyTorch's names, which every framework opens.
            **of_a_push: `commit_message`, `repo_id`, ..., which scripts give whether they push or not.

        Returns:
            The files written.

        Raises:
            TypeError: an argument that transformers did not know either.
        """
        files.check_of_a_push(of_a_push)
        if push_to_hub:
            raise NotImplementedError("push_to_hub: save to a folder, and give it to huggingface_hub.upload_folder")
        ours = self._spelling.ours(self.params if params is None else params)
        own = self.generation_config
        model = Model(ours, self._config, self.architecture, self.family, generation_config=own)
        format = "pytorch" if safe_serialization else "flax"
        return files.save(model, save_directory, max_shard_size, format)


class FlaxModule:
    """The computation of a model, for code that calls `model.module`."""

    def __init__(self, owner: FlaxPreTrainedModel) -> None:
        self.owner = owner

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Mapping[str, jax.Array] | None = None,
        deterministic: bool = True,
        mutable: Any = False,
        **given: Any,
    ) -> Any:
        """As a call of the model, with the parameters in `variables["params"]` and dropout unless `deterministic`.

        Args:
            variables: {"params": ...}, and "batch_stats" where a model has them.
            *args: inputs.
            rngs: {"dropout": key}.
            deterministic: whether there is no dropout.
            mutable: must be False, or say what changes anyway in training, `["batch_stats"]`.
            **given: inputs by name.
        """
        if mutable not in (False, ["batch_stats"]):
            raise ValueError(f"mutable={mutable!r}: caches are given as past_key_values=, and given back in the output")
        params = variables if "batch_stats" in variables else variables["params"]
        keys = rngs or {}
        given = {**given, "dropout_rng": keys.get("dropout"), "train": not deterministic}
        return self.owner(*args, params=params, **given)

    def init(self, rngs: Any, *args: Any, **given: Any) -> dict[str, Any]:
        """Initial variables; inputs are not needed."""
        made = self.owner.init_weights(rngs["params"] if isinstance(rngs, Mapping) else rngs)
        return made if "batch_stats" in made else {"params": made}


@lru_cache(maxsize=512)
def _spelt(family: Family, architecture: Architecture, config: Config, dtype: Any, frozen: str | None) -> Architecture:
    """The architecture on Flax's parameters: one object for each, so that it is compiled once."""
    spelt = spelling(family, architecture, config)

    def on_theirs(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(params: Any, c: Config, **inputs: Any) -> Any:
            return function(spelt.ours(params, dtype, frozen), c, **inputs)

        return run

    methods = {name: on_theirs(method) for name, method in architecture.methods.items()}
    return replace(architecture, apply=on_theirs(architecture.apply), methods=methods)


def _key(rng: Any) -> jax.Array:
    """A key of either kind as one of `jax.random.key`.

    Raises:
        TypeError: neither.
    """
    if isinstance(rng, jax.Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        return rng
    if not hasattr(rng, "dtype") or rng.dtype != jnp.uint32:
        raise TypeError(f"a random key must be made by jax.random.key or jax.random.PRNGKey, got {rng!r:.60}")
    return jax.random.wrap_key_data(jnp.asarray(rng))


def _noisy(config: Config) -> list[str]:
    """Fields of a configuration that ask for dropout."""
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    return [
        f"{name}={value}"
        for part in parts
        if isinstance(part, Config)
        for name in part.__dataclass_fields__
        if "drop" in name and isinstance(value := getattr(part, name), int | float) and value > 0
    ]


def _cast(params: Mapping[str, Any], dtype: Any, mask: Any) -> dict[str, Any]:
    """`params` with the floating-point leaves that the mask has in another dtype."""
    leaves = flat(params)
    wanted = dict.fromkeys(leaves, True) if mask is None else flat(mask)
    if missing := leaves.keys() - wanted.keys():
        raise ValueError(f"the mask has nothing for {'/'.join(min(missing))}")
    return nested(
        {
            path: leaf.astype(dtype) if wanted[path] and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
            for path, leaf in leaves.items()
        }
    )


# --- classes by name


def _fields(family: Family, architecture: Architecture) -> dict[str, Any]:
    return {
        "base_model_prefix": family.base if architecture.base is None else architecture.base,
        "main_input_name": Model({}, family.config(), architecture, family).input_names[0],
    }


SURFACE = names.Surface(__name__, "Flax", FlaxPreTrainedModel, _fields)


def __getattr__(name: str) -> Any:
    return SURFACE.find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *SURFACE.listed()})
