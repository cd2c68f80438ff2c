"""The Flax classes that transformers had until version 5, under the `jax.jit` that their users wrote around them."""

from __future__ import annotations

import importlib
from functools import cache, partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from benchmarks.contestants.training import adamw, adamw_state, cross_entropy
from benchmarks.task import (
    CHECKED_STEPS,
    Options,
    Task,
    UnavailableError,
    arrays,
    labels,
    sample,
    token_ids,
)


def versions() -> dict[str, str]:
    flax = importlib.import_module("flax")
    return {"flax": flax.__version__, "jax": jax.__version__, "transformers": transformers.__version__}


def class_of(name: str) -> Any:
    """A class of transformers, which from version 5 on has none for Flax."""
    if not hasattr(transformers, name):
        raise UnavailableError(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


@cache
def open_model(checkpoint: str) -> Any:
    return class_of("FlaxBertModel").from_pretrained(checkpoint)


def forward(options: Options) -> Task:
    model = open_model(options["checkpoint"])
    ids = jnp.asarray(token_ids(options))
    mask = jnp.ones_like(ids)
    call = jax.jit(lambda params, ids, mask: model(ids, mask, params=params))

    def run() -> Any:
        return jax.block_until_ready(call(model.params, ids, mask))

    return Task(run, sample(run().last_hidden_state))


def generate(options: Options) -> Task:
    """As its users called it: the loop is compiled inside, anew for every call of another shape."""
    model = class_of(f"Flax{options['architecture']}").from_pretrained(options["checkpoint"])
    ids = jnp.asarray(arrays(options)["input_ids"])

    def run() -> Any:
        return jax.block_until_ready(model.generate(ids, **options["settings"]).sequences)

    return Task(run, [float(token) for token in run().reshape(-1)])


def train_step(options: Options) -> Task:
    rate = options["dropout"]
    model = class_of("FlaxBertForMaskedLM").from_pretrained(
        options["checkpoint"], hidden_dropout_prob=rate, attention_probs_dropout_prob=rate
    )
    params = model.params
    state = adamw_state(params)
    ids, targets = jnp.asarray(token_ids(options)), jnp.asarray(labels(options))
    mask = jnp.ones_like(ids)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        logits = model(ids, mask, params=params, dropout_rng=key, train=True).logits
        return cross_entropy(logits, targets)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, number: int) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(jax.random.key(0), number))
        params, state = adamw(params, grads, state)
        return params, state, value

    numbers = count()

    def run() -> float:
        nonlocal params, state
        params, state, value = jax.block_until_ready(step(params, state, next(numbers)))
        return float(value)

    return Task(run, [run() for _ in range(CHECKED_STEPS)])


def load(options: Options) -> Task:
    """The parameters on the device."""
    jax.devices()
    model_class = class_of("FlaxBertModel")
    return Task(
        lambda: jax.block_until_ready(jax.device_put(model_class.from_pretrained(options["checkpoint"]).params))
    )


TASKS = {"forward": forward, "generate": generate, "load": load, "train_step": train_step}
