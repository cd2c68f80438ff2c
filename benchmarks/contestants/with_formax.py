"""formax: the model as a user has it, called without an own `jit` (training: inside the user's)."""

from __future__ import annotations

from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import formax
from benchmarks.contestants.training import adamw, adamw_state, cross_entropy
from benchmarks.task import (
    CHECKED_STEPS,
    Options,
    Task,
    UnavailableError,
    arrays,
    heads,
    labels,
    sample,
    square,
    tall,
    token_ids,
)
from formax.core import registry
from formax.generation import stopping
from formax.layers import attention as layers
from formax.layers.attention import Mask


def versions() -> dict[str, str]:
    return {"formax": formax.__version__, "jax": jax.__version__, "numpy": np.__version__}


@cache
def open_model(checkpoint: str) -> Any:
    return formax.AutoModel.from_pretrained(checkpoint)


def forward(options: Options) -> Task:
    model = open_model(options["checkpoint"])
    ids = jnp.asarray(token_ids(options))
    mask = jnp.ones_like(ids)

    def run() -> Any:
        return jax.block_until_ready(model(input_ids=ids, attention_mask=mask))

    return Task(run, sample(run().last_hidden_state))


def call(options: Options) -> Task:
    model = open_head(options["checkpoint"])
    inputs = {name: jnp.asarray(x) for name, x in arrays(options).items()}

    def run() -> Any:
        return jax.block_until_ready(model(**inputs))

    return Task(run, sample(getattr(run(), options["output"])))


def generate(options: Options) -> Task:
    model = open_head(options["checkpoint"])
    ids = arrays(options)["input_ids"]

    def run() -> Any:
        return jax.block_until_ready(model.generate(ids, **options["settings"]))

    return Task(run, [float(token) for token in np.asarray(run()).reshape(-1)])


def generate_in_room(options: Options) -> Task:
    """As many new tokens in a buffer with room for more."""
    model = open_head(options["checkpoint"])
    ids, new = arrays(options)["input_ids"], options["new"]

    def run() -> Any:
        tokens = model.generate(
            ids, max_new_tokens=options["room"] - ids.shape[1], eos_token_id=None, stopping_criteria=[enough(new)]
        )
        return jax.block_until_ready(tokens)

    return Task(run, [float(run().shape[1])])


@cache
def enough(new: int) -> Any:
    return stopping.max_new_tokens(new)


@cache
def open_head(checkpoint: str) -> Any:
    return formax.from_pretrained(checkpoint)


def train_step(options: Options) -> Task:
    rate = options["dropout"]
    model = formax.AutoModelForMaskedLM.from_pretrained(
        options["checkpoint"], hidden_dropout_prob=rate, attention_probs_dropout_prob=rate
    )
    state = adamw_state(model)
    ids, targets = jnp.asarray(token_ids(options)), jnp.asarray(labels(options))
    mask = jnp.ones_like(ids)

    def loss(model: Any, key: jax.Array) -> jax.Array:
        # Dropout is on exactly when there is a key.
        out = model(input_ids=ids, attention_mask=mask, key=key if rate else None)
        return cross_entropy(out.logits, targets)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(model: Any, state: Any, number: int) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(model, jax.random.fold_in(jax.random.key(0), number))
        model, state = adamw(model, grads, state)
        return model, state, value

    numbers = count()

    def run() -> float:
        nonlocal model, state
        model, state, value = jax.block_until_ready(step(model, state, next(numbers)))
        return float(value)

    return Task(run, [run() for _ in range(CHECKED_STEPS)])


def load(options: Options) -> Task:
    """The parameters on the device."""
    jax.devices()
    open_it = formax.AutoModel.from_pretrained  # imports what it needs before the clock starts
    return Task(lambda: jax.block_until_ready(open_it(options["checkpoint"])))


def attention_inputs(options: Options) -> list[jax.Array]:
    return [jnp.asarray(x, options["dtype"]) for x in heads(options)]


def attention_task(attend: Any, inputs: list[jax.Array], options: Options) -> Task:
    """A function of queries, keys and values, or with `slopes` its gradients for the sum of squares."""
    function = attend
    if options["slopes"]:
        function = jax.grad(lambda *x: (attend(*x).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))
    run = jax.jit(function)
    return Task(lambda: jax.block_until_ready(run(*inputs)), sample(jax.tree.leaves(run(*inputs))[0]))


def attention(options: Options) -> Task:
    (b, length, h, _), window = options["q"], options.get("window")
    ids = jnp.arange(length)[None] * options["segments"] // length if options.get("segments") else None
    mask = Mask(
        causal=bool(options.get("causal")),
        window=None if window is None else (window - 1, 0),
        segments=None if ids is None else (jnp.repeat(ids, b, 0),) * 2,
    )
    sinks = jnp.zeros(h) if options.get("sinks") else None

    def attend(q: Any, k: Any, v: Any) -> Any:
        return layers.attention(q, k, v, mask=mask, softcap=options.get("softcap"), sinks=sinks,
                                backend=options.get("backend"))  # fmt: skip

    try:
        return attention_task(attend, attention_inputs(options), options)
    except NotImplementedError as reason:
        raise UnavailableError(str(reason)) from None


def matmul(options: Options) -> Task:
    a = jnp.asarray(square(options))
    product = jax.jit(jnp.matmul)
    return Task(lambda: product(a, a).block_until_ready(), sample(product(a, a)))


def stream(options: Options) -> Task:
    a, x = map(jnp.asarray, tall(options))
    product = jax.jit(jnp.matmul)
    return Task(lambda: product(a, x).block_until_ready(), sample(product(a, x)))


def checkpoint(options: Options) -> Task:
    """Writes the checkpoint that every contestant opens: random weights, of a BERT for pre-training by default."""
    config = formax.AutoConfig.for_model(options.get("model_type", "bert"), **options["config"])
    family = registry.family(config.model_type)
    architecture = family.find(options.get("architecture", "BertForPreTraining"))
    assert architecture is not None
    declared = jax.eval_shape(lambda key: formax.Model.initialise(config, architecture, family, key), jax.random.key(0))
    generator = np.random.default_rng(0)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = path[-1].key
        if kind == "count":
            return np.zeros(leaf.shape, np.float32)
        centre = 1.0 if kind in ("scale", "var") else 0.0
        values = generator.standard_normal(leaf.shape, np.float32)
        return np.float32(centre) + np.float32(0.02) * values

    def write() -> None:
        params = jax.tree_util.tree_map_with_path(fill, declared.params)
        declared.replace(params=params).save_pretrained(Path(options["checkpoint"]))

    return Task(write)


TASKS = {
    "attention": attention,
    "call": call,
    "checkpoint": checkpoint,
    "forward": forward,
    "generate": generate,
    "generate_in_room": generate_in_room,
    "load": load,
    "matmul": matmul,
    "stream": stream,
    "train_step": train_step,
}
