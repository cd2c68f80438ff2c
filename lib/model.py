"""`Model`: parameters, configuration and architecture in one object that is a pytree.

Outside a trace a call goes through one compiled program for each set of shapes; inside a trace (`jax.jit`, `jax.grad`,
`jax.vmap`) it is the plain function. Gradients with respect to a model are a model:

    grads = jax.grad(lambda m: loss(m(input_ids=ids).logits))(model)
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from formax.conversion.load import floating
from formax.core import mesh
from formax.core import spec as specs
from formax.core.config import Config
from formax.core.family import Architecture, Family
from formax.core.rng import fold_path
from formax.core.spec import Tree
from formax.core.tap import Intervention, watch

if TYPE_CHECKING:
    from formax.generation.config import GenerationConfig

# Output fields that are collected at taps: field -> (switch of the call, patterns in the order of the field). A family
# whose last hidden state is the one after its final norm taps that as `last`; it takes the place of the last layer's.
# The fields without a prefix are those of outputs of one stack, which may be an encoder or a decoder alone.
STACKS = ("", "encoder.", "decoder.")
STATES = {stack: (f"{stack}embed.out", f"{stack}layers.*.out", f"{stack}last") for stack in STACKS}
WEIGHTS = {stack: (f"{stack}layers.*.attn.weights",) for stack in STACKS}
COLLECTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "hidden_states": ("output_hidden_states", sum(STATES.values(), ())),
    "attentions": ("output_attentions", sum(WEIGHTS.values(), ())),
    "cross_attentions": ("output_attentions", ("layers.*.cross.weights", "decoder.layers.*.cross.weights")),
    "encoder_hidden_states": ("output_hidden_states", STATES["encoder."]),
    "encoder_attentions": ("output_attentions", WEIGHTS["encoder."]),
    "decoder_hidden_states": ("output_hidden_states", STATES["decoder."]),
    "decoder_attentions": ("output_attentions", WEIGHTS["decoder."]),
}
# Inputs that are rows of a table: input -> fields of the configuration, the first of which has the table's size.
TABLES = {
    "input_ids": ("vocab_size",),
    "decoder_input_ids": ("written_vocab_size", "vocab_size"),
    "token_type_ids": ("type_vocab_size",),
    "position_ids": ("max_position_embeddings",),
    "decoder_position_ids": ("max_target_positions",),
}
# Inputs of every family with attention: factors on the weights, [heads] or [layers, heads] -> where.
HEAD_MASKS = {
    "head_mask": ("layers.*.attn.weights", "layers.*.cross.weights", "encoder.layers.*.attn.weights"),
    "decoder_head_mask": ("decoder.layers.*.attn.weights",),
    "cross_attn_head_mask": ("decoder.layers.*.cross.weights",),
}


@dataclass(frozen=True, eq=False)
class Model:
    """A family's architecture with its parameters.

    Attributes:
        params: nested dicts and tuples of arrays.
        config: the family's configuration.
        architecture: what is computed.
        family: where it belongs.
        interventions: changes of inner values in force (`formax.intervene`).
        remat: layers are computed again in the backward pass, which needs the memory of one instead of all of them.
        generation_config: what `generate` does if it is not told otherwise; None for what `config` says about it.
    """

    params: Tree
    config: Config
    architecture: Architecture
    family: Family
    interventions: tuple[Intervention, ...] = ()
    remat: bool = False
    generation_config: GenerationConfig | None = None

    # --- calling

    def __call__(
        self,
        *args: Any,
        key: jax.Array | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """Runs the model.

        Args:
            *args: the first inputs, in the order of the family: `input_ids` [B, T] and `attention_mask` (1 where there
                is a token, 0 where there is padding) of a text model, `pixel_values` of a vision model.
            key: a `jax.random.key`; given, dropout is on.
            output_hidden_states: also return the states after the embeddings and after every layer.
            output_attentions: also return the attention weights [B, H, T, S] of every layer.
            **inputs: inputs by name. Models with attention also take `head_mask` ([heads] or [layers, heads], factors
                on the attention weights), encoder-decoders `decoder_head_mask` and `cross_attn_head_mask`.

        Returns:
            The architecture's output, a frozen dataclass.
        """
        out, _ = self.run(
            {**self.name_inputs(args, inputs), **inputs},
            key=key,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        return out

    def __getattr__(self, name: str) -> Any:
        # Only reached for what is no attribute: the architecture's own methods (`encode`, `get_text_features`).
        if name.startswith("__") or name not in self.architecture.methods:
            methods = ", ".join(self.architecture.methods)
            more = f"; beside a Model's own it has {methods}" if methods else ""
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{more}")
        return self.as_method(name).__call__

    def as_method(self, name: str) -> Self:
        """The model whose call is one of its architecture's methods: `model.as_method("encode")(ids)`.

        `model.encode(ids)` is its call, and it can be captured: `formax.capture(model.as_method("encode"), "**.out")`.
        """
        return replace(self, architecture=_as_architecture(self.architecture, name))

    def name_inputs(self, args: Sequence[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Positional inputs under their names.

        Raises:
            TypeError: more than the architecture takes, or one that is given by name as well.
        """
        names = self.input_names
        if len(args) > len(names):
            raise TypeError(f"{self.architecture.name} takes {', '.join(names)}; {len(args)} inputs were given")
        named = dict(zip(names, args, strict=False))
        if twice := named.keys() & inputs.keys():
            raise TypeError(f"{self.architecture.name} was given {min(twice)!r} twice, by place and by name")
        return named

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return _input_names(self.architecture.inputs or self.family.inputs, self.architecture.apply)

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        patterns: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
        key: jax.Array | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """The call behind `__call__` and `formax.capture`: (output, {place: value} of the places asked for).

        Each of `patterns` must match a place, those of `optional` may; the rest as in `__call__`.
        """
        factors = {name: jnp.asarray(inputs[name], jnp.float32) for name in HEAD_MASKS if inputs.get(name) is not None}
        arrays, static = self.sort_inputs({name: x for name, x in inputs.items() if name not in HEAD_MASKS})
        if key is not None and not isinstance(key, jax.Array):
            raise TypeError(f"key must be a jax.random.key, got {type(key).__name__}; write key=jax.random.key(0)")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        on = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        wanted = tuple(name for name, switch in on.items() if switch)
        called = self if self.generation_config is None else replace(self, generation_config=None)
        leaves = jax.tree.leaves((called, arrays, key, factors))
        placing = mesh.of_arrays(leaves)  # tracers do not tell: inside a trace it is the caller's to say
        arguments = (called, arrays, key, factors, tuple(static.items()), wanted, patterns, optional, placing)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        out, seen = _forward(*arguments) if traced else _compiled_forward(*arguments)
        return out, dict(seen)

    def sort_inputs(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits inputs into arrays and static switches.

        Raises:
            TypeError: an input that the family does not take, with the nearest names.
            ValueError: ragged rows, or ids off their table.
        """
        known = self.input_names
        arrays: dict[str, Any] = {}
        static: dict[str, Any] = {}
        for name, value in inputs.items():
            if value is None:
                continue
            if name not in known:
                near = difflib.get_close_matches(name, known, n=2)
                hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(known)}"
                raise TypeError(f"{self.architecture.name} takes no input {name!r}; {hint}")
            if (isinstance(value, bool | str) and name not in TABLES) or (
                name == "logits_to_keep" and type(value) is int
            ):
                static[name] = value
            elif _is_on_host(value):
                arrays[name] = jnp.asarray(_checked(self, name, value))
            else:
                arrays[name] = value
        return arrays, static

    def init_cache(self, batch: int, length: int, encoder_length: int = 0, dtype: Any = jnp.float32) -> Any:
        """Empty caches for decoding: room for `length` positions, and for an encoder's states where there is one.

        Raises:
            TypeError: the family does not decode, or the layers are stacked.
        """
        self.check_unstacked()
        make = self.family.init_cache
        cache = None if make is None else make(self.config, batch, length, encoder_length, dtype)
        if cache is None:
            raise TypeError(f"{self.architecture.name} does not decode step by step, so it has no cache")
        return cache

    def check_unstacked(self) -> None:
        """Raises TypeError for layers in a stack, which no cache is for."""
        if self._is_stacked:
            raise TypeError("decoding step by step wants the layers one by one: unstack_layers() first")

    # --- writing

    def generate(self, inputs: Any = None, generation_config: GenerationConfig | None = None, **arguments: Any) -> Any:
        """Writes a text, or several; `formax.generation.generate` has the arguments.

        ids = model.generate(input_ids=ids, max_new_tokens=64)
        """
        from formax.generation import generate

        return generate(self, inputs, generation_config, **arguments)

    def stream(
        self, inputs: Any = None, generation_config: GenerationConfig | None = None, **arguments: Any
    ) -> Iterator[np.ndarray]:
        """Writes a text and hands out every token as soon as it is there; `formax.generation.stream` has more."""
        from formax.generation import stream

        return stream(self, inputs, generation_config, **arguments)

    def astream(
        self, inputs: Any = None, generation_config: GenerationConfig | None = None, **arguments: Any
    ) -> AsyncIterator[np.ndarray]:
        """As `stream`, for `async for`; `formax.generation.astream` has more."""
        from formax.generation import astream

        return astream(self, inputs, generation_config, **arguments)

    def compute_transition_scores(
        self, sequences: Any, scores: Sequence[Any], beam_indices: Any = None, normalize_logits: bool = False
    ) -> jax.Array:
        """Of every new token the score that it was chosen by; see `formax.generation.transition_scores`."""
        from formax.generation import transition_scores

        return transition_scores(sequences, scores, beam_indices, normalize=normalize_logits)

    # --- changing

    def replace(self, **changes: Any) -> Self:
        """A copy with another `params`, `config`, ..."""
        return replace(self, **changes)

    def astype(self, dtype: Any) -> Self:
        """A copy with floating-point parameters in `dtype` (a JAX dtype or its name, "bfloat16").

        Raises:
            ValueError: `dtype` is no floating-point type.
        """
        to = floating(dtype)
        leaves = specs.flatten(self.params)
        kept = {entry.path for entry in specs.table(self.spec).entries if entry.param.stored_as is not None}
        cast = {
            path: leaf.astype(to) if jnp.issubdtype(leaf.dtype, jnp.floating) and path not in kept else leaf
            for path, leaf in leaves.items()
        }
        return replace(self, params=specs.unflatten(cast), config=self.config.replace(dtype=to.name))

    def stack_layers(self) -> Self:
        """A copy whose layers are stacked, each parameter with a first axis "layers": they run as one compiled loop.

        That compiles in the time of one layer, however many there are. It is for training: decoding with a cache wants
        them one by one (`unstack_layers`). `save_pretrained` writes the same files for both.

        Raises:
            ValueError: the layers are not equal, or there are none.
        """
        if self._is_stacked:
            return self
        stacked = replace(self, params=specs.stack_layers(self.params))
        if not stacked._is_stacked:
            raise ValueError(f"{self.architecture.name} has no layers to stack")
        for entry in specs.table(stacked.spec).entries:
            if entry.param.buffer and "layers" in entry.param.axes:
                # Its new value is a place for each layer, which no path of a stack is.
                raise ValueError(f"{entry.key} is state that training updates; leave these layers one by one")
        return stacked

    def unstack_layers(self) -> Self:
        """Inverse of `stack_layers`."""
        return replace(self, params=specs.unstack_layers(self.params)) if self._is_stacked else self

    @property
    def _is_stacked(self) -> bool:
        return any("layers" in entry.param.axes for entry in specs.table(self.spec).entries)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of scalars in the tree (tied weights once); without buffers if `only_trainable`."""
        total = sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(self.params))
        if not only_trainable:
            return total
        buffers = (entry.param.shape for entry in specs.table(self.spec).entries if entry.param.buffer)
        return total - sum(math.prod(shape) for shape in buffers)

    @property
    def spec(self) -> specs.Spec:
        """The declaration of this model's parameters, stacked where these are."""
        return specs.as_held(self.architecture.spec(self.config), self.params)

    def describe(self) -> str:
        """The parameter table: path, shape, dtype, logical axes, checkpoint name."""
        return specs.describe(self.spec, self.params)

    def resize_token_embeddings(self, size: int, *, key: jax.Array | None = None) -> Self:
        """A copy with a vocabulary of `size`: old rows kept, new ones drawn around the mean of the old.

        New rows start at the average of the old rows plus a hundredth of their spread (Hewitt 2021, "Initializing New
        Word Embeddings"), new entries of output biases at their mean; every parameter with a vocabulary axis follows.

        Args:
            size: the new number of tokens.
            key: random key for the new rows; `jax.random.key(0)` by default.
        """
        old = getattr(self.config, "vocab_size", None)
        if old is None:
            raise TypeError(f"{self.architecture.name} has no vocabulary of its own; resize that of a part of it")
        if size < 1:
            raise ValueError(f"a vocabulary needs at least one token, got {size}")
        key = jax.random.key(0) if key is None else key
        config = self.config.replace(vocab_size=size)
        leaves = specs.flatten(self.params)
        for entry in specs.table(self.spec).entries:
            if "vocab" in entry.param.axes:
                axis = entry.param.axes.index("vocab")
                leaf = leaves[entry.path]
                if leaf.shape[axis] != old:
                    raise ValueError(
                        f"{entry.key} has {leaf.shape[axis]} tokens along axis {axis}, the configuration {old}"
                    )
                leaves[entry.path] = _resized(leaf, axis, size, fold_path(key, entry.key))
        return replace(self, params=specs.unflatten(leaves), config=config)

    def prune_heads(self, heads: Mapping[int, Sequence[int]]) -> Self:
        """A copy without the given attention heads ({layer: heads}), smaller in parameters and computation.

        Head numbers are those of the unpruned model, also for a model that is pruned already.
        """
        from formax.surgery import prune_heads

        return replace(self, **prune_heads(self.params, self.config, heads))

    # --- saving

    def save_pretrained(
        self, directory: str | Path, *, max_shard_size: int | str = "5GB", format: str = "pytorch"
    ) -> list[Path]:
        """Writes config.json and weights that transformers opens, bit for bit.

        The directory is replaced file by file once everything is written: a save that dies leaves the old checkpoint.

        Args:
            directory: made when missing.
            max_shard_size: bytes, or text such as "5GB"; more than this is split into numbered files with an index.
            format: "pytorch" for safetensors; "flax" (MessagePack) and "tf" (HDF5, with h5py) for the classes of these
                frameworks that transformers 4 had.

        Returns:
            The files written.
        """
        from formax.saving import save

        return save(self, Path(directory), max_shard_size, format)

    def __repr__(self) -> str:
        return f"{self.architecture.name}({self.num_parameters():,} parameters)"

    # --- made by Auto classes

    @classmethod
    def initialise(
        cls,
        config: Config,
        architecture: Architecture,
        family: Family,
        key: jax.Array,
        dtype: Any = None,
        shardings: Tree | None = None,
    ) -> Self:
        """A model with initial parameters.

        Raises:
            ValueError: `dtype` (else the configuration's) is no floating-point type.
        """
        dtype = config.dtype if dtype is None else dtype
        made = specs.init(architecture.spec(config), key, floating(dtype or jnp.float32), shardings)
        return cls(made, config, architecture, family)


jax.tree_util.register_dataclass(
    Model,
    data_fields=["params"],
    meta_fields=["config", "architecture", "family", "interventions", "remat", "generation_config"],
)


def _forward(
    model: Model,
    arrays: dict[str, Any],
    key: jax.Array | None,
    factors: dict[str, jax.Array],
    static: tuple[tuple[str, Any], ...],
    wanted: tuple[str, ...],
    patterns: tuple[str, ...],
    optional: tuple[str, ...],
    placing: mesh.Placing | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The forward pass with its taps watched."""
    fields = {
        name: found
        for name, (switch, found) in (COLLECTED | dict(model.architecture.collected)).items()
        if switch in wanted
    }
    interventions = model.interventions
    masked = dict(HEAD_MASKS)
    if "decoder_input_ids" not in model.input_names:  # a decoder alone
        masked["head_mask"] += masked["decoder_head_mask"]
    for name, factor in factors.items():
        interventions += tuple(
            Intervention(pattern, _head_factors(name, factor), indexed=True, required=False) for pattern in masked[name]
        )
    states = tuple(pattern for found in fields.values() for pattern in found)
    seen_by = watch(patterns, interventions, optional=(*optional, *states))
    with specs.rematerialised(model.remat), mesh.placed(placing), seen_by as seen:
        arguments = {**arrays, **dict(static)}
        if key is not None:
            arguments["key"] = key
        out = model.architecture.apply(model.params, model.config, **arguments)
    for name, factor in factors.items():
        depth = max(len(seen.among((pattern,))) for pattern in masked[name])
        if depth == 0:
            raise ValueError(f"{name} is given, but this call has no such attention weights")
        if factor.ndim == 2 and len(factor) != depth:
            raise ValueError(f"{name} must be [heads] or [{depth} layers, heads], got shape {factor.shape}")
    for name, found in fields.items():
        out = _filled(out, name.split("."), _states(seen.find(found)))
    # A plain dict comes out of `jit` in alphabetical order: layers.10 before layers.2.
    return out, OrderedDict(seen.find((*patterns, *optional)))


_compiled_forward = jax.jit(_forward, static_argnums=(4, 5, 6, 7, 8))


def _head_factors(name: str, factors: jax.Array) -> Callable[[jax.Array, Any], jax.Array]:
    """The intervention that multiplies attention weights [B, H, ...] by `factors`, [heads] or [layers, heads]."""
    if factors.ndim not in (1, 2):
        raise ValueError(f"{name} must be [heads] or [layers, heads], got shape {factors.shape}")

    def masked(weights: jax.Array, layer: Any) -> jax.Array:
        row = factors if factors.ndim == 1 else factors[layer]
        if len(row) != weights.shape[1]:
            raise ValueError(f"{name} {factors.shape} is for {len(row)} heads, there are {weights.shape[1]}")
        return weights * row.reshape(-1, *[1] * (weights.ndim - 2)).astype(weights.dtype)

    return masked


def _states(found: dict[str, Any]) -> tuple[Any, ...]:
    """The values in order, where that of a final norm takes the place of the last layer's."""
    values = list(found.values())
    if len(values) > 1 and next(reversed(found)).rpartition(".")[2] == "last":
        del values[-2]
    return tuple(values)


def _filled(out: Any, field: Sequence[str], values: tuple[Any, ...]) -> Any:
    """`out` with `values` in its (dotted) field, if it has that field and there are values."""
    inner = getattr(out, field[0], None) if field[1:] else None
    if not values or not hasattr(out, field[0]) or (field[1:] and inner is None):
        return out
    return replace(out, **{field[0]: _filled(inner, field[1:], values) if field[1:] else values})


@lru_cache(maxsize=512)
def _as_architecture(architecture: Architecture, method: str) -> Architecture:
    """A method of an architecture as an architecture of its own: one object, so that it is compiled once."""
    function = architecture.methods[method]
    return replace(architecture, name=f"{architecture.name}.{method}", apply=function, inputs=function)


@lru_cache(maxsize=512)
def _input_names(function: Callable[..., Any], apply: Callable[..., Any]) -> tuple[str, ...]:
    """What a forward function takes beside its parameters, its configuration and its key, and what its head takes."""
    names = [name for name in list(inspect.signature(function).parameters)[2:] if name != "key"]
    return (*names, *(("logits_to_keep",) if "logits_to_keep" in inspect.signature(apply).parameters else ()))


def _is_on_host(value: Any) -> bool:
    """Whether a value is numbers, or an array of another library, or rows of these, rather than a tree (a cache)."""
    if isinstance(value, list | tuple):
        return all(map(_is_on_host, value))
    return isinstance(value, int | float | str) or (hasattr(value, "__array__") and not isinstance(value, jax.Array))


def table_size(config: Config, name: str) -> int | None:
    """Rows of the table that an input is looked up in; None for other inputs, and where it has no table."""
    sizes = (getattr(config, field, None) for field in TABLES.get(name, ()))
    return next((size for size in sizes if size is not None), None)


def _checked(model: Model, name: str, given: Any) -> np.ndarray:
    """Numbers from the host, ids inside the vocabulary: a compiled look-up would clip them in silence."""
    try:
        value = np.asarray(given)
    except ValueError:
        raise ValueError(f"{name} is not a rectangular array of numbers; pad the rows to one length") from None
    if value.dtype.kind in "USO":
        raise ValueError(f"{name} must hold numbers, it holds {given!r:.40}; a tokenizer makes ids of text")
    limit = table_size(model.config, name)
    if name == "position_ids" and hasattr(model.config, "rope_parameters"):
        limit = None  # rotary positions are computed, there is no table of them
    if limit is not None and value.size:
        if value.dtype.kind not in "iu":
            raise ValueError(f"{name} must hold whole numbers, it holds {value.dtype}")
        if value.min() < 0 or value.max() >= limit:
            raise ValueError(f"{name} holds {value.min()} to {value.max()}, outside the table of {limit} rows")
    return value.astype(np.int32) if value.dtype == np.int64 else value


def _resized(leaf: jax.Array, axis: int, size: int, key: jax.Array) -> jax.Array:
    old = leaf.shape[axis]
    kept = jax.lax.slice_in_dim(leaf, 0, min(old, size), axis=axis)
    if size <= old:
        return kept
    shape = list(leaf.shape)
    shape[axis] = size - old
    mean, spread = leaf.mean(axis, keepdims=True), leaf.std(axis, keepdims=True) if leaf.ndim > 1 else 0.0
    new = mean + 0.01 * spread * jax.random.normal(key, shape, jnp.float32)
    return jnp.concatenate([kept, new.astype(leaf.dtype)], axis=axis)
