"""One step of training, as a pure function on any optax optimiser.

    optimizer = optax.adamw(1e-4)
    state = init_state(model, optimizer, jax.random.key(0))
    step = compile_step(make_train_step(optimizer), state)
    for batch in batches:
        state, metrics = step(state, batch)
    state.model.save_pretrained("trained")

What is trained are the weights of a model; its buffers (running statistics of batch norms) get neither gradients nor
state of the optimiser, and are written back from what the forward pass saw. The optimiser works in float32 whatever
the weights are kept in, see `make_train_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from formax.core import spec as specs
from formax.core.mesh import of_arrays, placed
from formax.core.spec import Tree
from formax.model import Model
from formax.sharding import DEFAULT_RULES, Rules, shardings
from formax.training.objective import Batch, inputs_of, loss_of

Metrics = dict[str, jax.Array]
Objective = Callable[[Model, Any, Batch], jax.Array]


@dataclass(frozen=True, eq=False)
class TrainState:
    """Everything that a step changes, a pytree.

    Attributes:
        model: the model, with its weights and buffers.
        opt_state: the optimiser's state of the weights.
        step: how many steps were made, int32.
        key: the random key that dropout's are folded from; None trains without noise, and with the running statistics
            of batch norms as they are.
    """

    model: Model
    opt_state: Any
    step: jax.Array
    key: jax.Array | None


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

jax.tree_util.register_dataclass(TrainState, data_fields=["model", "opt_state", "step", "key"], meta_fields=[])


def init_state(model: Model, optimizer: optax.GradientTransformation, key: jax.Array | None = None) -> TrainState:
    """The state before the first step; where the model is sharded, the optimiser's state lies as its weights do.

    The state holds the model's own arrays, not copies: a step from `compile_step` takes them over.

    Args:
        model: what is trained.
        optimizer: any optax transformation; it sees the parameter tree with None where a buffer is.
        key: a `jax.random.key` for dropout and other noise, None for none.
    """
    weights, _ = split(model)

    def fresh(weights: Tree) -> tuple[Any, jax.Array]:
        return optimizer.init(_in_float32(weights)), jnp.zeros((), jnp.int32)

    places = {path: leaf.sharding for path, leaf in _paths(model.params) if not isinstance(leaf, jax.core.Tracer)}
    meshes = [place.mesh for place in places.values() if isinstance(place, NamedSharding)]
    if not meshes:
        opt_state, step = jax.jit(fresh)(weights)
        # A copy, so that the caller's key outlives the state.
        return TrainState(model, opt_state, step, None if key is None else jnp.copy(key))
    whole = NamedSharding(meshes[0], PartitionSpec())
    opt_state, step = jax.eval_shape(fresh, weights)
    opt_state, step = jax.jit(fresh, out_shardings=(_follow(opt_state, model.params, places, whole), whole))(weights)
    return TrainState(model, opt_state, step, None if key is None else jax.device_put(jnp.copy(key), whole))


def make_train_step(
    optimizer: optax.GradientTransformation,
    *,
    objective: Objective = loss_of,
    accumulate: int = 1,
    compute_dtype: Any = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
) -> TrainStep:
    """A pure function `train_step(state, batch) -> (state, metrics)`, to be compiled (`compile_step`, or `jax.jit`).

    The noise of a step is that of `state.key` folded with `state.step`, so a run that is resumed goes on as it would
    have. The optimiser gets float32 gradients and weights, keeps its state in float32, and what it gives is added in
    float32; weights of another dtype are rounded after that. Updates that are small beside a bfloat16 weight get lost
    so: train float32 weights with `compute_dtype="bfloat16"`.

    Args:
        optimizer: that of `init_state`. Clipping, schedules and weight decay are its business.
        objective: `objective(model, output, batch)`, a scalar to be made small; that of the architecture by default.
        accumulate: in how many parts a batch is worked off, one after the other. Loss and gradients are the mean over
            the parts: those of the whole batch where a loss is the mean over rows that count equally. Batch norms see
            one part at a time.
        compute_dtype: dtype of the weights in the forward and backward pass; None for that of the weights.
        learning_rate: a number or schedule, to be told among the metrics.

    Returns:
        The step. Its metrics are float32 scalars: "loss", "grad_norm" (before the optimiser changes anything),
        "learning_rate" if it was given.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be 1 or more, got {accumulate}")

    def forward(weights: Tree, buffers: Tree, model: Model, batch: Batch, key: Any) -> tuple[jax.Array, Tree]:
        """The loss, and the buffers after this pass."""
        if compute_dtype is not None:
            weights = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), weights)
        held = {path: leaf for path, leaf in specs.flatten(buffers).items() if leaf is not None}
        model = model.replace(params=join(weights, buffers))
        inputs = inputs_of(model.architecture, model.config, batch)
        out, seen = model.run(inputs, optional=tuple(map(specs.dotted, held)), key=key)
        after = {path: jnp.asarray(seen.get(specs.dotted(path), leaf), leaf.dtype) for path, leaf in held.items()}
        return objective(model, out, batch).astype(jnp.float32), specs.unflatten({**specs.flatten(buffers), **after})

    gradient = jax.value_and_grad(forward, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = None if state.key is None else jax.random.fold_in(state.key, state.step)
        weights, buffers = split(state.model)
        if accumulate == 1:
            (loss, buffers), grads = gradient(weights, buffers, state.model, batch, key)
            grads = _in_float32(grads)
        else:

            def part(carry: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, None]:
                (loss, grads), buffers = carry
                i, rows = item
                own = None if key is None else jax.random.fold_in(key, i)
                (more, buffers), slope = gradient(weights, buffers, state.model, rows, own)
                mean = jax.tree.map(lambda a, b: a + b / accumulate, (loss, grads), (more, _in_float32(slope)))
                return (mean, buffers), None

            nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, _in_float32(weights))
            parts = jnp.arange(accumulate), parts_of(batch, accumulate)
            ((loss, grads), buffers), _ = jax.lax.scan(part, (nothing, buffers), parts)
        before = _in_float32(weights)
        updates, opt_state = optimizer.update(grads, state.opt_state, before)
        after = jax.tree.map(lambda w, new: new.astype(w.dtype), weights, optax.apply_updates(before, updates))
        metrics = {"loss": loss, "grad_norm": jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))}
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(state.step) if callable(learning_rate) else learning_rate
        model = state.model.replace(params=join(after, buffers))
        new = replace(state, model=model, opt_state=opt_state, step=state.step + 1)
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return train_step


def compile_step(train_step: TrainStep, state: TrainState) -> TrainStep:
    """The step as a compiled program, which reuses the memory of the state that it is given.

    The state that goes in, and the model and arrays it was made of, cannot be used again. What comes out lies on the
    devices as `state` does.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    if not any(isinstance(place, NamedSharding) for place in jax.tree.leaves(places)):
        return jax.jit(train_step, donate_argnums=0)
    placing = of_arrays(jax.tree.leaves(state.model.params))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with placed(placing):  # in a trace the weights do not say where they lie
            return train_step(state, batch)

    return jax.jit(step, donate_argnums=0, out_shardings=(places, None))


def state_shardings(state: TrainState, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> TrainState:
    """The state with a sharding at every leaf: parameters by the rules, what the optimiser keeps of them likewise.

    Args:
        state: a state, or its shapes alone (`jax.eval_shape` of `init_state`).
        mesh: the devices.
        rules: as of `formax.sharding.shardings`.
    """
    whole: Any = NamedSharding(mesh, PartitionSpec())
    params = shardings(state.model.spec, mesh, rules)
    opt_state = _follow(state.opt_state, state.model.params, dict(_paths(params)), whole)
    return TrainState(state.model.replace(params=params), opt_state, whole, None if state.key is None else whole)


def split(model: Model) -> tuple[Tree, Tree]:
    """Weights and buffers of a model: twice its parameter tree, with None in the place of the others."""
    trained = specs.flatten(specs.trainable(model.spec))
    leaves = specs.flatten(model.params)
    weights = {path: leaf if trained[path] else None for path, leaf in leaves.items()}
    buffers = {path: None if trained[path] else leaf for path, leaf in leaves.items()}
    return specs.unflatten(weights), specs.unflatten(buffers)


def join(weights: Tree, buffers: Tree) -> Tree:
    """Inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, weights, buffers, is_leaf=lambda leaf: leaf is None)


def parts_of(batch: Batch, count: int) -> dict[str, jax.Array]:
    """A batch cut into parts: every [B, ...] -> [count, B / count, ...].

    Part i has the rows i, i + count, ...: of a batch that is split over devices every device then works on each part.

    Raises:
        ValueError: arrays of different numbers of rows, or of one that does not divide.
    """
    rows = {name: x.shape[0] if jnp.ndim(x) else 0 for name, x in batch.items()}
    if len({*rows.values()}) != 1 or next(iter(rows.values())) % count:
        told = ", ".join(f"{name} [{rows[name]}]" for name in rows)
        raise ValueError(f"{count} parts need arrays of equally many rows, a multiple of {count}; the batch has {told}")
    return {name: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0) for name, x in batch.items()}


def _in_float32(tree: Tree) -> Tree:
    """The tree with arrays of at least float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def _paths(tree: Tree) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _follow(opt_state: Any, params: Tree, places: Mapping[Any, Any], otherwise: Any) -> Any:
    """The optimiser's state with the place of its parameter at every array that is of a parameter's path and shape.

    Optimisers keep trees in the shape of the parameters' (moments, averages), whose paths end in a parameter's path.
    What has no parameter (counts) or another shape (factored moments) lies `otherwise`.
    """
    shapes = {path: leaf.shape for path, leaf in _paths(params)}

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        ends = (path[start:] for start in range(len(path)))
        owner = next((end for end in ends if end in shapes), None)
        return places[owner] if owner is not None and shapes[owner] == leaf.shape else otherwise

    return jax.tree_util.tree_map_with_path(place, opt_state)
