"""What a family file says about itself: its configuration and its table of architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from formax.core.config import Config
from formax.core.spec import Spec, table

# Tasks of architectures whose scores are of a next token.
WRITING = (
    "ForCausalLM",
    "ForSeq2SeqLM",
    "ForSpeechSeq2Seq",
    "ForVision2Seq",
    "ForImageTextToText",
    "ForTextToWaveform",
    "ForTextToSpectrogram",
)


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model class of the reference: what exists, what is computed, and which Auto class finds it.

    Attributes:
        name: as `architectures` in config.json has it, e.g. "BertForMaskedLM".
        task: the Auto class's name after "AutoModel": "" for the bare model, "ForMaskedLM", ...; "Backbone".
        spec: `spec(config)` declares the parameters.
        apply: `apply(params, config, **inputs, key=None)` computes the output.
        also: further tasks whose Auto classes open this architecture.
        base: checkpoint prefix of the bare model inside this architecture, where it is not the family's.
        inputs: the function whose parameters name what the architecture is called with; the family's by default.
        methods: further functions of the same parameters, `method(params, config, **inputs)`, which a model offers as
            methods: {"encode": ...}.
        collected: places of output fields beyond those of `formax.model.COLLECTED`, and in their place: {dotted field:
            (switch of the call, patterns in the order of the field)}.
    """

    name: str
    task: str
    spec: Callable[[Any], Spec]
    apply: Callable[..., Any]
    also: tuple[str, ...] = ()
    base: str | None = None
    inputs: Callable[..., Any] | None = None
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    collected: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)

    @property
    def writes(self) -> bool:
        """Whether its `logits` are of a next token, so that it can generate."""
        return self.task in WRITING


@dataclass(frozen=True)
class Port:
    """What another framework's classes have of a family; `formax.core.frameworks` has the rules of their names.

    Attributes:
        architectures: names of those there are, as PyTorch's classes are called; None for all.
        base: prefix of the bare model in TensorFlow, where it is not the family's.
        numbered: what stands before a layer's number in TensorFlow's names.
        repeats: {layer: prefix of names}: layers of TensorFlow's models that list another's parameters as theirs, too.
        own: names of TensorFlow's parameters that are no layer's, but the model's itself.
        copies: {name: the name that it repeats}: parameters that TensorFlow's models keep twice.
        lacks: says of a configuration which of its fields have a value that the framework does not implement.
        inputs: inputs of Flax's classes, in their order, where that is not the order of ours.
    """

    architectures: tuple[str, ...] | None = None
    base: str | None = None
    numbered: str = "_._"
    repeats: Mapping[str, str] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    lacks: Callable[[Any], Mapping[str, bool]] = lambda c: {}
    inputs: tuple[str, ...] = ()

    def has(self, architecture: Architecture) -> bool:
        """Whether there is this one."""
        return self.architectures is None or architecture.name in self.architectures


@dataclass(frozen=True, eq=False)
class Family:
    """A model type with all its architectures.

    Attributes:
        model_type: as config.json has it.
        config: the configuration class.
        base: checkpoint prefix of the bare model inside the architectures with heads, e.g. "bert".
        inputs: the function whose parameters name what models of this family are called with.
        architectures: the bare model first.
        relative: model type of the family that this one is a small step from.
        old_names: {class name that older config.json files have: its name today}.
        init_cache: `init_cache(config, batch, length, encoder_length, dtype)` for families that decode; it gives None
            for a configuration that does not.
        counts_tokens: whether positions that are not given are counted over tokens that are no padding. The reference's
            `generate` gives them always, from 0 on, and so does ours.
        fills: whether masked positions behind a text change nothing of it, so that `generate` may fill up what an
            encoder reads, to a size that is compiled already. Not where blocks are counted from the end.
        parts: of a model made of models, the architecture and configuration of each.
        flax: what Flax has of it; None for nothing.
        tf: what TensorFlow has of it.
    """

    model_type: str
    config: type[Config]
    base: str
    inputs: Callable[..., Any]
    architectures: tuple[Architecture, ...]
    init_cache: Callable[..., Any] | None = None
    relative: str | None = None
    old_names: Mapping[str, str] = field(default_factory=dict)
    counts_tokens: bool = False
    fills: bool = True
    parts: Callable[[Any], tuple[tuple[Architecture, Any], ...]] = lambda c: ()
    flax: Port | None = None
    tf: Port | None = None

    def __post_init__(self) -> None:
        if self.config.model_type != self.model_type:
            raise ValueError(
                f"the family {self.model_type!r} has {self.config.__name__}, whose model_type is "
                f"{self.config.model_type!r}; they must be the same, or its checkpoints open as the other family"
            )

    def find(self, name: str) -> Architecture | None:
        """The architecture of that name, without the "TF" or "Flax" that other frameworks put before it."""
        plain = name.removeprefix("TF").removeprefix("Flax")
        plain = self.old_names.get(plain, plain)
        return next((arch for arch in self.architectures if arch.name == plain), None)

    def for_task(self, task: str) -> Architecture | None:
        """The first architecture of that task, else the first that serves it too."""
        found = next((arch for arch in self.architectures if arch.task == task), None)
        return found or next((arch for arch in self.architectures if task in arch.also), None)

    def bases(self, architecture: Architecture) -> tuple[str, ...]:
        """Prefixes under which checkpoints hold the bare model, that of `architecture` first."""
        own = self.base if architecture.base is None else architecture.base
        return tuple(dict.fromkeys(base for base in (own, self.base) if base))

    def known_names(self, config: Config) -> set[str]:
        """Every checkpoint name that some architecture of the family reads."""
        return {name for arch in self.architectures for name in table(arch.spec(config)).known_names()}
