"""Saving a run and going on with it, by orbax: the state of training as it is, on any number of devices.

    save("run", state)
    state = restore("run", init_state(model, optimizer, key))

A folder holds one numbered folder a step, and each of these `config/config.json` (which model it is), `params` and
`train` (the optimiser's state, the step, the key). A step is there as a whole or not at all. What others shall open is
written by `state.model.save_pretrained`; this is for the run itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from formax import loading
from formax.conversion.checkpoint import CheckpointError
from formax.core import registry
from formax.core import spec as specs
from formax.model import Model
from formax.sharding import DEFAULT_RULES, Rules, shardings
from formax.training.step import TrainState

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

TOLD = 5  # differences that an error names


def manager(directory: str | Path, *, keep: int | None = None, background: bool = True) -> CheckpointManager:
    """What writes many checkpoints of a run; a context manager, which waits for the last one when it is left.

    Args:
        directory: made when missing; may be a bucket ("gs://...").
        keep: how many of the latest steps are kept, None for all.
        background: write while training goes on. The values are those of the call, also where the state is donated.
    """
    return _manager(directory, create=True, max_to_keep=keep, enable_async_checkpointing=background)


def save(directory: str | Path | CheckpointManager, state: TrainState) -> None:
    """Writes the state under the number of its step, into a folder or through a `manager`.

    Raises:
        CheckpointError: that step is there already.
        ValueError: the model carries interventions, which no checkpoint can hold.
    """
    import orbax.checkpoint as ocp

    if isinstance(directory, str | Path):
        with manager(directory, background=False) as own:
            return save(own, state)
    model, step = state.model, int(state.step)
    if model.interventions:
        raise ValueError("this model carries interventions, which no checkpoint can hold; train one without")
    if step in directory.all_steps():
        raise CheckpointError(f"{directory.directory} holds step {step} already; remove it, or save to another folder")
    config = model.config.replace(architectures=(model.architecture.name,)).to_dict()
    params, train = _named(state)
    items = {"params": ocp.args.StandardSave(params), "train": ocp.args.StandardSave(train)}
    # Forced: a run that went back to an earlier step saves steps that come before the latest.
    directory.save(step, args=ocp.args.Composite(config=ocp.args.JsonSave(config), **items), force=True)
    return None


def latest_step(directory: str | Path) -> int | None:
    """The last step that is saved there; None if there is none, or no such folder."""
    if _missing(directory):
        return None
    with _manager(directory) as own:
        return own.latest_step()


def restore(directory: str | Path, like: TrainState, *, step: int | None = None) -> TrainState:
    """The state that was saved, every array placed as that of `like` is.

    Args:
        directory: where `save` wrote.
        like: a state of the same model and optimiser, whose values do not matter: a new one, or its shapes alone
            (`jax.ShapeDtypeStruct`s, whose `sharding` says where an array is to lie).
        step: which step, None for the latest.

    Raises:
        CheckpointError: there is no such checkpoint, or it is of another architecture, shape, dtype or optimiser.
    """
    import orbax.checkpoint as ocp

    with _manager(_present(directory)) as own:
        step = _pick(own, step)
        where = f"{own.directory}, step {step},"
        saved, here = _config_of(own, step)["architectures"][0], like.model.architecture.name
        if saved != here:
            raise CheckpointError(f"{where} holds a {saved}; the state to be restored has a {here}")
        params, train = _named(like)
        held = own.item_metadata(step)
        _compare(f"{where} holds other parameters", held["params"].tree, params)
        _compare(f"{where} holds the state of another optimiser, or another kind of key", held["train"].tree, train)
        items = {"params": _abstract(params), "train": _abstract(train)}
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        found = own.restore(step, args=ocp.args.Composite(**args))
    leaves = {path: found["params"][specs.dotted(path)] for path in specs.flatten(like.model.params)}
    treedef = jax.tree.structure(like.opt_state)
    opt_state = jax.tree.unflatten(treedef, [found["train"][name] for name in _opt_names(like.opt_state)])
    key = None
    if like.key is not None:
        kinds: list[Any] = []  # only an array tells its kind, traced or not: a shape does not
        jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), like.key)
        key = jax.random.wrap_key_data(found["train"]["key"], impl=kinds[0])
    model = like.model.replace(params=specs.unflatten(leaves))
    return TrainState(model, opt_state, found["train"]["step"], key)


def restore_model(
    directory: str | Path, *, step: int | None = None, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES
) -> Model:
    """The model that was saved, without what training needs, made of its config.json.

    Args:
        directory: where `save` wrote.
        step: which step, None for the latest.
        mesh: devices to split the parameters over, by `rules`; None for the default device.
        rules: as of `formax.sharding.shardings`.

    Raises:
        CheckpointError: there is no such checkpoint, or its parameters are not those of its configuration.
        ConfigError, UnknownModelTypeError: its configuration is none of a family there is.
    """
    import orbax.checkpoint as ocp

    with _manager(_present(directory)) as own:
        step = _pick(own, step)
        where = f"{own.directory}, step {step},"
        config = loading.as_config(_config_of(own, step), where, {})
        architecture, family, config = loading.choose(registry.family(config.model_type), config, None)
        held = own.item_metadata(step)["params"].tree
        leaves = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in held.items()}
        shapes = specs.unflatten({_path(name): leaf for name, leaf in leaves.items()})
        model = Model(shapes, config, architecture, family)
        declared = {entry.key: entry.param for entry in specs.table(model.spec).entries}
        kinds = {name: leaf.dtype for name, leaf in leaves.items()}
        wanted = {
            name: jax.ShapeDtypeStruct(param.shape, kinds.get(name, "float32")) for name, param in declared.items()
        }
        _compare(f"{where} is not of its own configuration", held, wanted)
        if mesh is not None:
            places = specs.flatten(shardings(model.spec, mesh, rules))
            wanted = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[_path(name)])
                for name, leaf in wanted.items()
            }
        args = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(wanted)))
        found = own.restore(step, args=args)["params"]
    return model.replace(params=specs.unflatten({_path(name): leaf for name, leaf in found.items()}))


def _manager(directory: str | Path, **options: Any) -> CheckpointManager:
    import orbax.checkpoint as ocp

    handlers = {
        "config": ocp.JsonCheckpointHandler(filename="config.json"),
        "params": ocp.StandardCheckpointHandler(),
        "train": ocp.StandardCheckpointHandler(),
    }
    how = ocp.CheckpointManagerOptions(**{"create": False, "enable_async_checkpointing": False} | options)
    return ocp.CheckpointManager(_absolute(directory), options=how, item_names=tuple(handlers), item_handlers=handlers)


def _absolute(directory: str | Path) -> str | Path:
    return str(directory) if "://" in str(directory) else Path(directory).expanduser().resolve()


def _missing(directory: str | Path) -> bool:
    where = _absolute(directory)
    return isinstance(where, Path) and not where.is_dir()


def _present(directory: str | Path) -> str | Path:
    if _missing(directory):
        raise CheckpointError(f"there is no folder {directory}")
    return directory


def _pick(own: CheckpointManager, step: int | None) -> int:
    """The step asked for, else the latest."""
    steps = sorted(own.all_steps())
    if not steps:
        raise CheckpointError(f"{own.directory} holds no checkpoint of a run")
    if step is not None and step not in steps:
        raise CheckpointError(f"{own.directory} holds no step {step}; it has {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def _config_of(own: CheckpointManager, step: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    return own.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]


def _named(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a state (or their shapes) by their names: the parameters, and the rest."""
    params = {specs.dotted(path): leaf for path, leaf in specs.flatten(state.model.params).items()}
    train = dict(zip(_opt_names(state.opt_state), jax.tree.leaves(state.opt_state), strict=True))
    train["step"] = state.step
    if state.key is not None:
        train["key"] = _key_data(state.key)
    return params, train


def _opt_names(opt_state: Any) -> list[str]:
    """A name for every array of the optimiser's state: "opt[0].mu['norm']['scale']"."""
    return [f"opt{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_flatten_with_path(opt_state)[0]]


def _key_data(key: Any) -> Any:
    """The numbers of a random key, or their shape."""
    if isinstance(key, jax.Array):
        return jax.random.key_data(key)
    data = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _path(name: str) -> specs.Path:
    """Inverse of `formax.core.spec.dotted`."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def _abstract(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and places of arrays; the default device for what has no place."""
    one = SingleDeviceSharding(jnp.zeros(()).device)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or one)
        for name, x in arrays.items()
    }


def _compare(fault: str, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `fault` where names, shapes or dtypes of arrays are not those that are wanted."""

    def told(x: Any) -> str:
        return "nothing" if x is None else f"{jnp.dtype(x.dtype).name}{list(x.shape)}"

    pairs = {name: (told(held.get(name)), told(wanted.get(name))) for name in held.keys() | wanted.keys()}
    wrong = sorted(name for name, (a, b) in pairs.items() if a != b)
    if wrong:
        lines = [f"  {name}: {pairs[name][0]} there, {pairs[name][1]} here" for name in wrong[:TOLD]]
        more = [f"  ... and {len(wrong) - TOLD} more"] if len(wrong) > TOLD else []
        raise CheckpointError("\n".join([f"{fault}:", *lines, *more]))
