"""From a checkpoint folder or repository to a `Model`: which family, which head, which parameters."""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from formax import hub
from formax.conversion.checkpoint import open_checkpoint
from formax.conversion.load import LoadReport, load_params
from formax.core import frameworks, registry
from formax.core import spec as specs
from formax.core.config import INERT, Config, ConfigError
from formax.core.family import Architecture, Family
from formax.core.spec import Spec
from formax.model import Model
from formax.quantization import check_plain
from formax.sharding import DEFAULT_RULES, Rules, shardings

if TYPE_CHECKING:
    from formax.generation.config import GenerationConfig

log = logging.getLogger("formax")

# A parameter of more elements than this is a mistake in the configuration: it takes terabytes.
MAX_ELEMENTS = 2**40


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: no such file, unreadable, not UTF-8, not JSON, or not an object; the message names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} holds no {path.name}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and brackets without end
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, it holds a {type(values).__name__}")
    return values


def read_config(folder: Path, **overrides: Any) -> Config:
    """The configuration in `folder`; see `AutoConfig.from_pretrained`."""
    return as_config(read_json(folder / "config.json"), str(folder / "config.json"), overrides)


def as_config(values: Mapping[str, Any], source: str, overrides: Mapping[str, Any]) -> Config:
    """The configuration made of a JSON object, in which any key may stand, and of overrides.

    These must be fields, or keys of the reference that change nothing here, such as `finetuning_task`.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f'{source} has no model_type; it must say which family this is, e.g. "bert"')
    try:
        cls = registry.family(model_type).config
    except registry.UnknownModelTypeError as error:
        code = values.get("auto_map")
        hint = "; its auto_map names code, which formax never runs" if code else ""
        raise registry.UnknownModelTypeError(f"{source}: {error}{hint}") from None
    fields = (*cls.__dataclass_fields__, *cls.attribute_map, "num_labels", "torch_dtype", "rope_theta", "rope_scaling")
    for name in overrides:
        if name not in values and name not in fields and name not in INERT:
            near = difflib.get_close_matches(name, fields, n=3)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise ConfigError(f"{cls.__name__} has no field {name!r}{hint}")
    return cls.from_dict(values, source=source, **overrides)


def load(
    path_or_repo: str | Path,
    task: str | None,
    *,
    architecture: str | None = None,
    config: Config | Mapping[str, Any] | None = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    mesh: Any = None,
    rules: Rules = DEFAULT_RULES,
    key: jax.Array | None = None,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    from_pt: bool = False,
    from_flax: bool = False,
    from_tf: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    trust_remote_code: bool | None = None,
    quantization_config: Any = None,
    **overrides: Any,
) -> Any:
    """`from_pretrained` of all Auto classes.

    Args:
        path_or_repo: a checkpoint folder, or a hub repository id.
        task: the Auto class's suffix; None takes the head from config.json.
        architecture: a class name such as "CLIPTextModelWithProjection", in the place of a task.
        config: a configuration to use instead of the checkpoint's own.
        dtype: floating-point dtype of the parameters; None or "auto" keeps what is on disk.
        torch_dtype: what transformers called `dtype` before.
        mesh: a device mesh; every device then reads its own slices alone.
        rules: logical axis -> mesh axis, see `formax.sharding`.
        key: random key for parameters that the checkpoint does not hold (a new head).
        strict: raise on tensors that nothing explains.
        ignore_mismatched_sizes: initialise parameters of another shape instead of raising.
        output_loading_info: also return the `LoadReport`.
        from_pt: read PyTorch's weights (safetensors or pickles), whatever else the folder holds.
        from_flax: read Flax's weights (MessagePack).
        from_tf: read TensorFlow's weights (HDF5, with h5py). By default the first of the three that there is.
        revision: branch, tag or commit on the hub.
        cache_dir: the hub's cache folder.
        local_files_only: never ask the hub.
        token: hub access token.
        trust_remote_code: must not be true: no code out of a checkpoint is run.
        quantization_config: how the weights are to be quantised, which is refused; see `formax.quantization`.
        **overrides: configuration fields to replace, such as `num_labels=5`.

    Returns:
        A `Model`, or (Model, LoadReport).

    Raises:
        ConfigError, UnknownModelTypeError, CheckpointError, HubError: each names the file and key.
        QuantizationError: the weights are quantised.
        RemoteCodeError: `trust_remote_code=True`.
    """
    hub.refuse_code(trust_remote_code)
    if dtype is None:
        dtype = torch_dtype
    picked = [name for name, on in {"pytorch": from_pt, "flax": from_flax, "tf": from_tf}.items() if on]
    if len(picked) > 1:
        raise ValueError("from_pt, from_flax and from_tf name one kind of weights each: give at most one of them")
    framework = picked[0] if picked else None
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    folder = hub.checkpoint(path_or_repo, framework, local_files_only=local_files_only, **where)
    if config is None:
        config = read_config(folder, **overrides)
    elif isinstance(config, Config):
        config = config.replace(**overrides) if overrides else config
    else:
        config = as_config(config, "config", overrides)
    check_plain(config, str(folder / "config.json"), quantization_config)
    whole = registry.family(config.model_type)
    found, family, inner = choose(whole, config, task, architecture)
    spec = spec_of(found, inner)

    with open_checkpoint(folder, framework) as checkpoint:
        theirs = checkpoint.framework

        def siblings() -> set[str]:
            names = frameworks.known_names(family, inner, theirs)
            return names | (set() if whole is family else frameworks.known_names(whole, config, theirs))

        params, report = load_params(
            checkpoint,
            frameworks.respell(spec, family, theirs).spec,
            bases=family.bases(found),
            siblings=siblings,
            dtype=None if dtype == "auto" else dtype,
            shardings=None if mesh is None else shardings(spec, mesh, rules),
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            key=key,
        )
    _say(found, folder, report)
    model = Model(params, inner, found, family, generation_config=generation_config(found, inner, folder))
    return (model, report) if output_loading_info else model


def generation_config(
    architecture: Architecture, config: Config, folder: Path | None = None
) -> GenerationConfig | None:
    """How a model writes that can: as its checkpoint's generation_config.json says, else its configuration.

    Settings that are impossible are told of, and not used: they harm nobody who does not write.
    """
    if not architecture.writes:
        return None
    from formax.generation.config import FILE, GenerationConfig

    path = None if folder is None else folder / FILE
    try:
        if path is not None and path.is_file():
            return GenerationConfig.from_dict(read_json(path), source=str(path))
        return GenerationConfig.from_model_config(config)
    except ConfigError as error:
        log.warning("%s; generate() starts from the defaults", error)
        return GenerationConfig()


def spec_of(architecture: Architecture, config: Config) -> Spec:
    """The parameters of an architecture.

    Raises:
        ConfigError: sizes each of which is possible make a parameter that is not.
    """
    spec = architecture.spec(config)
    for entry in specs.table(spec).entries:
        if math.prod(entry.param.shape) > MAX_ELEMENTS:
            raise ConfigError(
                f"{architecture.name} of this configuration is larger than any memory: {entry.key} would have the "
                f"shape {entry.param.shape}"
            )
    return spec


def choose(
    family: Family, config: Config, task: str | None, name: str | None = None
) -> tuple[Architecture, Family, Config]:
    """The architecture for a task or of a name, with its family and configuration.

    For neither, it is the one that the configuration names, else the bare model. What the family itself does not have
    is looked for in the models that its configuration is made of: the text tower of a two-tower model, say.

    Raises:
        ConfigError: there is no such head.
    """
    names = (name,) if name is not None else config.architectures or ()
    parts = [(family, config)]
    parts += [(registry.family(part.model_type), part) for part in _parts(config)]
    for owner, own in parts:
        if task is not None and name is None:
            if (found := owner.for_task(task)) is not None:
                return found, owner, own
        elif (found := next(filter(None, map(owner.find, names)), None)) is not None:
            return found, owner, own
    if task is not None and name is None:
        heads = ", ".join(f"AutoModel{arch.task}" for arch in family.architectures)
        raise ConfigError(f"{family.model_type} has no head for AutoModel{task}; it has {heads}")
    if names:
        heads = ", ".join(arch.name for arch in family.architectures)
        source = "architectures in config.json names" if name is None else "architecture ="
        raise ConfigError(
            f"{source} {names[0]!r}, which is none of {family.model_type}'s: {heads}; an Auto class such as AutoModel "
            "opens the checkpoint as one of them"
        )
    return family.architectures[0], family, config


def _parts(config: Config) -> list[Config]:
    """The configurations inside a configuration that are models of their own."""
    inner = (getattr(config, name) for name in config.sub_configs)
    return [part for part in inner if isinstance(part, Config) and part.model_type in registry.model_types()]


def _say(architecture: Architecture, folder: Path, report: LoadReport) -> None:
    """Tells what was not simply read, as log records of the logger "formax"."""
    if report.initialised:
        log.warning(
            "%s: %s is not in %s and was initialised; train it before use",
            architecture.name,
            _some(report.initialised),
            folder,
        )
    if report.mismatched:
        log.warning(
            "%s: %s has another shape in %s and was initialised", architecture.name, _some(report.mismatched), folder
        )
    if report.left_out:
        log.info(
            "%s: %s in %s is not part of this architecture and was left out",
            architecture.name,
            _some(report.left_out),
            folder,
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
