"""What a checkpoint holds, read from its headers alone: `formax inspect PATH`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax

from formax import hub
from formax.conversion.checkpoint import open_checkpoint
from formax.conversion.load import make_plan
from formax.core import frameworks, registry
from formax.core import spec as specs
from formax.loading import choose, read_config


def inspect_table(path_or_repo: str | Path, **where: Any) -> str:
    """The parameter table of a checkpoint: our names, shapes, dtypes on disk, logical axes, names in the file.

    Args:
        path_or_repo: a checkpoint folder or hub repository.
        **where: `revision`, `cache_dir`, `local_files_only`, `token`, as in `formax.from_pretrained`.

    Raises:
        ConfigError, UnknownModelTypeError, CheckpointError, HubError: as `formax.from_pretrained` does.
    """
    folder = hub.checkpoint(path_or_repo, **where)
    config = read_config(folder)
    family = registry.family(config.model_type)
    architecture, _, _ = choose(family, config, None)
    with open_checkpoint(folder) as checkpoint:
        theirs = checkpoint.framework
        spec = frameworks.respell(architecture.spec(config), family, theirs).spec
        table, bases = specs.table(spec), family.bases(architecture)
        siblings = partial(frameworks.known_names, family, config, theirs)
        plan = make_plan(checkpoint, table, bases, siblings, False, True)
        dtypes = {entry: checkpoint[entry.param.layout.names(name)[0]].dtype for entry, name in plan.found.items()}
        size = sum(info.file.stat().st_size for info in {info.file: info for info in checkpoint.values()}.values())
        kind = checkpoint.format
    leaves = {e.path: jax.ShapeDtypeStruct(e.param.shape, dtypes.get(e, "float32")) for e in table.entries}
    lines = [f"{architecture.name} in {folder} ({kind}, {size / 1e6:,.1f} MB)"]
    lines.append(specs.describe(spec, specs.unflatten(leaves)))
    for title, names in (
        ("not in the file, would be initialised", plan.report.initialised),
        ("of another shape in the file, would need ignore_mismatched_sizes=True", plan.report.mismatched),
        ("in the file, but not part of this architecture", plan.report.left_out),
    ):
        if names:
            lines.append(f"{title}: {', '.join(names)}")
    return "\n".join(lines)
