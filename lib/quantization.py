"""What a checkpoint says of how its weights are quantised: `quantization_config` of config.json.

    formax.AutoQuantizationConfig.from_pretrained("path-or-repo")        # GPTQConfig(bits=4, group_size=128, ...)

There is a frozen dataclass for every method that transformers 4.57 knows, with its names and defaults; what a file
holds beyond them is kept and written back. formax does not read quantised weights yet: opening such a checkpoint is one
error that says so, before any of them is read.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, TypeVar, dataclass_transform

from formax import hub
from formax.core.config import Config
from formax.core.frozen import FrozenDict, freeze, thaw

T = TypeVar("T")


class QuantizationError(ValueError):
    """A `quantization_config` that cannot be right, or of which the weights cannot be read; the message names it."""


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """What all methods share.

    Attributes:
        extra: what the file holds beyond the fields.
    """

    quant_method: ClassVar[str]
    # Attributes that say how to load and not what the weights are: a user's win over those stored.
    loading: ClassVar[tuple[str, ...]] = ()
    # {field: its possible values}.
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    extra: FrozenDict = field(default_factory=FrozenDict, repr=False)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = freeze(getattr(self, f.name))
            object.__setattr__(self, f.name, value)
            if not _fits(value, f.default):
                kind = type(f.default).__name__
                raise QuantizationError(f"{type(self).__name__}: {f.name} must be of type {kind}, got {value!r}")
        for name, options in self.choices.items():
            if (value := getattr(self, name)) not in options:
                known = ", ".join(map(repr, options))
                raise QuantizationError(f"{type(self).__name__}: {name}={value!r} is none of {known}")
        self.check()

    def check(self) -> None:
        """What a method demands of its fields together; raises `QuantizationError`."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads the object in a config.json.

        Raises:
            QuantizationError: a value that cannot be right, or one that the method needs and that is missing.
        """
        known = {f.name: f for f in dataclasses.fields(cls) if f.name != "extra"}
        required = [f.name for f in known.values() if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in required if name not in values]:
            raise QuantizationError(f"{cls.__name__} needs {', '.join(missing)}")
        given = {name: value for name, value in values.items() if name in known}
        extra = {name: value for name, value in values.items() if name not in known and name != "quant_method"}
        return cls(**given, extra=FrozenDict(extra))

    def to_dict(self) -> dict[str, Any]:
        """The object that a config.json holds; `from_dict` makes the same of it."""
        own = {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "extra"}
        return {"quant_method": self.quant_method, **own, **thaw(self.extra)}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def loading_attributes(self) -> dict[str, Any]:
        """What it says of how to load."""
        return {name: getattr(self, name) for name in self.loading}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _method(cls: type[T]) -> type[T]:
    return dataclass(frozen=True, kw_only=True)(cls)


def _positive_or_whole(config: Any) -> None:
    if config.group_size != -1 and config.group_size <= 0:
        raise QuantizationError(
            f"{type(config).__name__}: group_size={config.group_size} must be above 0, or -1 for all"
        )


@_method
class AqlmConfig(QuantizationConfig):
    """Additive quantisation of language models (Egiazarian et al. 2024, arXiv:2401.06118)."""

    quant_method: ClassVar[str] = "aqlm"

    in_group_size: int = 8
    out_group_size: int = 1
    num_codebooks: int = 1
    nbits_per_codebook: int = 16
    linear_weights_not_to_quantize: tuple[str, ...] | None = None


@_method
class AutoRoundConfig(QuantizationConfig):
    """Signed gradient descent on rounding (Cheng et al. 2023, arXiv:2309.05516)."""

    quant_method: ClassVar[str] = "auto-round"
    loading: ClassVar[tuple[str, ...]] = ("backend",)
    choices: ClassVar = {"bits": (2, 3, 4, 8)}

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    backend: str = "auto"

    def check(self) -> None:
        _positive_or_whole(self)


@_method
class AwqConfig(QuantizationConfig):
    """Activation-aware weight quantisation (Lin et al. 2023, arXiv:2306.00978)."""

    quant_method: ClassVar[str] = "awq"
    loading: ClassVar[tuple[str, ...]] = ("version", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config")
    choices: ClassVar = {"version": ("gemm", "gemv", "exllama", "ipex"), "backend": ("autoawq", "llm-awq")}

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    version: str = "gemm"
    backend: str = "autoawq"
    do_fuse: bool | None = None
    fuse_max_seq_len: int | None = None
    modules_to_fuse: FrozenDict | None = None
    modules_to_not_convert: tuple[str, ...] | None = None
    exllama_config: FrozenDict | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        version = values.get("version")
        return super().from_dict({**values, "version": version.lower()} if isinstance(version, str) else values)

    def check(self) -> None:
        if self.do_fuse and self.fuse_max_seq_len is None:
            raise QuantizationError("AwqConfig: do_fuse=True needs fuse_max_seq_len")


@_method
class BitNetQuantConfig(QuantizationConfig):
    """Weights of -1, 0 and 1 (Ma et al. 2024, arXiv:2402.17764)."""

    quant_method: ClassVar[str] = "bitnet"
    choices: ClassVar = {"linear_class": ("bitlinear", "autobitlinear"), "quantization_mode": ("online", "offline")}

    modules_to_not_convert: tuple[str, ...] | None = None
    linear_class: str = "bitlinear"
    quantization_mode: str = "offline"
    use_rms_norm: bool = False
    rms_norm_eps: float = 1e-6


@_method
class BitsAndBytesConfig(QuantizationConfig):
    """8 bits with outliers apart (Dettmers et al. 2022, arXiv:2208.07339), or 4 (QLoRA, 2023, arXiv:2305.14314)."""

    quant_method: ClassVar[str] = "bitsandbytes"
    choices: ClassVar = {
        "bnb_4bit_quant_storage": (None, "float16", "float32", "int8", "uint8", "float64", "bfloat16"),
    }

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: tuple[str, ...] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: str | None = None  # None is "float32"
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: str | None = None  # None is "uint8"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        # Files repeat the two switches with an underscore before them.
        return super().from_dict({key: value for key, value in values.items() if not key.startswith("_load_in_")})

    def check(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise QuantizationError(
                "BitsAndBytesConfig: load_in_4bit and load_in_8bit are both true; it is one of them"
            )

    @property
    def quantization_method(self) -> str | None:
        """Of 8 bits "llm_int8", of 4 "fp4" or "nf4"; None where neither switch is on."""
        if self.load_in_8bit:
            return "llm_int8"
        return self.bnb_4bit_quant_type if self.load_in_4bit else None


@_method
class CompressedTensorsConfig(QuantizationConfig):
    """What llm-compressor and its relatives write: many schemes, told by groups of modules."""

    quant_method: ClassVar[str] = "compressed-tensors"
    loading: ClassVar[tuple[str, ...]] = ("run_compressed",)

    config_groups: FrozenDict | None = None
    format: str = "dense"
    quantization_status: str = "initialized"
    kv_cache_scheme: FrozenDict | None = None
    global_compression_ratio: float | None = None
    ignore: tuple[str, ...] | None = None
    sparsity_config: FrozenDict | None = None
    run_compressed: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        inner = values.get("quantization_config")
        if isinstance(inner, Mapping):  # as transformers writes it
            values = {"sparsity_config": values.get("sparsity_config"), **inner}
        return super().from_dict(values)


@_method
class EetqConfig(QuantizationConfig):
    """8-bit weights of NetEase's EETQ."""

    quant_method: ClassVar[str] = "eetq"
    choices: ClassVar = {"weights": ("int8",)}

    weights: str = "int8"
    modules_to_not_convert: tuple[str, ...] | None = None


@_method
class FbgemmFp8Config(QuantizationConfig):
    """8-bit floats of FBGEMM, a scale for each row."""

    quant_method: ClassVar[str] = "fbgemm_fp8"
    loading: ClassVar[tuple[str, ...]] = ("activation_scale_ub",)

    activation_scale_ub: float = 1200.0
    modules_to_not_convert: tuple[str, ...] | None = None


@_method
class FineGrainedFP8Config(QuantizationConfig):
    """8-bit floats, a scale for each block of the matrix, as DeepSeek-V3 has them (2024, arXiv:2412.19437)."""

    quant_method: ClassVar[str] = "fp8"
    choices: ClassVar = {"activation_scheme": ("dynamic",)}

    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, ...] = (128, 128)
    modules_to_not_convert: tuple[str, ...] | None = None

    def check(self) -> None:
        size = self.weight_block_size
        if len(size) != 2 or not all(_fits(one, 1) and one > 0 for one in size):
            raise QuantizationError(f"FineGrainedFP8Config: weight_block_size must be two sizes, got {size!r}")


@_method
class FPQuantConfig(QuantizationConfig):
    """4-bit floats behind rotations (Egiazarian et al. 2025, arXiv:2509.23202)."""

    quant_method: ClassVar[str] = "fp_quant"
    choices: ClassVar = {
        "forward_dtype": ("nvfp4", "mxfp4"),
        "forward_method": ("abs_max", "quest"),
        "backward_dtype": ("bf16",),
        "transform_init": ("hadamard", "identity", "gsr"),
        "hadamard_group_size": (None, 16, 32, 64, 128),
    }

    forward_dtype: str = "nvfp4"
    forward_method: str = "abs_max"
    backward_dtype: str = "bf16"
    store_master_weights: bool = False
    hadamard_group_size: int | None = None  # None is 16 of "nvfp4", 32 of "mxfp4"
    pseudoquantization: bool = False
    transform_init: str = "hadamard"
    modules_to_not_convert: tuple[str, ...] | None = None  # None is ("lm_head",)


@_method
class GPTQConfig(QuantizationConfig):
    """Weights rounded one after the other, the rest made up for (Frantar et al. 2022, arXiv:2210.17323)."""

    quant_method: ClassVar[str] = "gptq"
    loading: ClassVar[tuple[str, ...]] = (
        *("use_exllama", "exllama_config", "use_cuda_fp16", "max_input_length", "backend"),
    )
    choices: ClassVar = {"bits": (2, 3, 4, 8)}

    bits: int
    tokenizer: Any = None
    dataset: Any = None
    group_size: int = 128
    damp_percent: float = 0.1
    desc_act: bool = False
    sym: bool = True
    true_sequential: bool = True
    checkpoint_format: str = "gptq"
    meta: FrozenDict | None = None
    backend: str | None = None
    use_cuda_fp16: bool = False
    model_seqlen: int | None = None
    block_name_to_quantize: str | None = None
    module_name_preceding_first_block: tuple[str, ...] | None = None
    batch_size: int = 1
    pad_token_id: int | None = None
    use_exllama: bool | None = None
    max_input_length: int | None = None
    exllama_config: FrozenDict | None = None
    cache_block_outputs: bool = True
    modules_in_block_to_quantize: tuple[Any, ...] | None = None

    def check(self) -> None:
        _positive_or_whole(self)
        if not 0 < self.damp_percent < 1:
            raise QuantizationError(f"GPTQConfig: damp_percent={self.damp_percent} must be between 0 and 1")


@_method
class HiggsConfig(QuantizationConfig):
    """Grids for rotated weights (Malinovskii et al. 2024, arXiv:2411.17525)."""

    quant_method: ClassVar[str] = "higgs"
    choices: ClassVar = {"bits": (2, 3, 4), "p": (1, 2), "group_size": (64, 128, 256)}

    bits: int = 4
    p: int = 2
    modules_to_not_convert: tuple[str, ...] | None = None
    hadamard_size: int = 512
    group_size: int = 256
    tune_metadata: FrozenDict | None = None

    def check(self) -> None:
        if self.hadamard_size % self.group_size:
            raise QuantizationError(
                f"HiggsConfig: hadamard_size={self.hadamard_size} is no multiple of group_size={self.group_size}"
            )


@_method
class HqqConfig(QuantizationConfig):
    """Half-quadratic quantisation (Badri and Shaji 2023).

    Attributes:
        quant_config: what files hold in the place of the first five fields.
    """

    quant_method: ClassVar[str] = "hqq"
    choices: ClassVar = {"axis": (None, 0, 1)}

    nbits: int = 4
    group_size: int = 64
    view_as_float: bool = False
    axis: int | None = None  # None is 1
    dynamic_config: FrozenDict | None = None
    skip_modules: tuple[str, ...] = ("lm_head",)
    quant_config: FrozenDict | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        stored = values.get("quant_config")
        inner = stored.get("weight_quant_params") if isinstance(stored, Mapping) else None
        told = inner if isinstance(inner, Mapping) else {}
        names = ("nbits", "group_size", "view_as_float", "axis")
        told = {name: told[name] for name in names if name in told}
        return super().from_dict({**told, **values})


@_method
class Mxfp4Config(QuantizationConfig):
    """4-bit floats with a scale for each 32, as gpt-oss has them."""

    quant_method: ClassVar[str] = "mxfp4"
    loading: ClassVar[tuple[str, ...]] = ("dequantize",)

    modules_to_not_convert: tuple[str, ...] | None = None
    dequantize: bool = False


@_method
class QuantoConfig(QuantizationConfig):
    """What optimum-quanto makes."""

    quant_method: ClassVar[str] = "quanto"
    choices: ClassVar = {
        "weights": ("float8", "int8", "int4", "int2"),
        "activations": (None, "int8", "float8"),
    }

    weights: str = "int8"
    activations: str | None = None
    modules_to_not_convert: tuple[str, ...] | None = None


@_method
class QuarkConfig(QuantizationConfig):
    """What AMD's Quark makes; its settings are its own, and kept as they are."""

    quant_method: ClassVar[str] = "quark"


@_method
class SpQRConfig(QuantizationConfig):
    """Outliers apart from 3-bit weights (Dettmers et al. 2023, arXiv:2306.03078)."""

    quant_method: ClassVar[str] = "spqr"
    choices: ClassVar = {"bits": (3,), "beta1": (16,), "beta2": (16,)}

    bits: int = 3
    beta1: int = 16
    beta2: int = 16
    shapes: FrozenDict | None = None
    modules_to_not_convert: tuple[str, ...] | None = None


@_method
class TorchAoConfig(QuantizationConfig):
    """What torchao makes: the name of a kind, or an object that describes it."""

    quant_method: ClassVar[str] = "torchao"

    quant_type: Any
    modules_to_not_convert: tuple[str, ...] | None = None
    include_input_output_embeddings: bool = False
    untie_embedding_weights: bool = False


@_method
class VptqConfig(QuantizationConfig):
    """Vectors in the place of numbers (Liu et al. 2024, arXiv:2409.17066)."""

    quant_method: ClassVar[str] = "vptq"
    choices: ClassVar = {"enable_proxy_error": (False,)}

    enable_proxy_error: bool = False
    config_for_layers: FrozenDict = field(default_factory=FrozenDict)
    shared_layer_config: FrozenDict = field(default_factory=FrozenDict)
    modules_to_not_convert: tuple[str, ...] | None = None


METHODS: dict[str, type[QuantizationConfig]] = {cls.quant_method: cls for cls in QuantizationConfig.__subclasses__()}


class AutoQuantizationConfig:
    """Quantisation settings by their `quant_method`."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationConfig:
        """The settings in an object of config.json.

        Raises:
            QuantizationError: no method, an unknown one (with the nearest), or a value that cannot be right.
        """
        if not isinstance(values, Mapping):
            raise QuantizationError(f"quantization_config must be an object, got {values!r:.60}")
        method = values.get("quant_method")
        if values.get("load_in_8bit") or values.get("load_in_4bit"):
            method = "bitsandbytes"  # whose files did not always say so
        if method is None:
            raise QuantizationError(f"quantization_config has no quant_method; there are {', '.join(METHODS)}")
        if not isinstance(method, str) or method not in METHODS:
            near = difflib.get_close_matches(str(method), METHODS, n=3)
            hint = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(METHODS)}"
            raise QuantizationError(f"quantization_config has the unknown quant_method {method!r}; {hint}")
        return METHODS[method].from_dict(values)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **where: Any) -> QuantizationConfig:
        """The settings of a checkpoint folder or hub repository.

        Args:
            path_or_repo: as in `formax.from_pretrained`; its family need not be one of formax's.
            **where: `revision`, `cache_dir`, `local_files_only` and `token` as there.

        Raises:
            QuantizationError: it has none, or as `from_dict`.
        """
        from formax.loading import read_json

        path = hub.snapshot(path_or_repo, ("config.json",), **where) / "config.json"
        stored = read_json(path).get("quantization_config")
        if stored is None:
            raise QuantizationError(f"{path} has no quantization_config: these weights are not quantised")
        try:
            return cls.from_dict(stored)
        except QuantizationError as error:
            raise QuantizationError(f"{path}: {error}") from None


class AutoHfQuantizer:
    """What reads quantised weights, by their method. There is nothing yet that does: only settings are understood."""

    @classmethod
    def from_config(cls, quantization_config: QuantizationConfig | Mapping[str, Any]) -> NoReturn:
        """The reader of such weights.

        Raises:
            QuantizationError: there is none yet.
        """
        config = quantization_config
        refuse(
            config if isinstance(config, QuantizationConfig) else AutoQuantizationConfig.from_dict(config),
            "the configuration",
        )

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **where: Any) -> NoReturn:
        """The reader of a checkpoint's weights; as `from_config`."""
        refuse(AutoQuantizationConfig.from_pretrained(path_or_repo, **where), f"{path_or_repo}/config.json")

    @staticmethod
    def supports_quant_method(quantization_config: Mapping[str, Any]) -> bool:
        """Whether weights of this method can be read: of none yet.

        Raises:
            QuantizationError: as `AutoQuantizationConfig.from_dict`.
        """
        AutoQuantizationConfig.from_dict(quantization_config)
        return False

    @staticmethod
    def merge_quantization_configs(
        quantization_config: QuantizationConfig | Mapping[str, Any], quantization_config_from_args: Any = None
    ) -> QuantizationConfig:
        """The stored settings, with a user's attributes of loading in the place of their own.

        The others of the user's are passed over, and a warning says so: they cannot change what the weights are.

        Args:
            quantization_config: those of the checkpoint.
            quantization_config_from_args: the user's, settings or an object of them, or None.

        Raises:
            QuantizationError: settings of two methods.
        """
        stored, given = quantization_config, quantization_config_from_args
        stored = stored if isinstance(stored, QuantizationConfig) else AutoQuantizationConfig.from_dict(stored)
        if given is None:
            return stored
        given = given if isinstance(given, QuantizationConfig) else AutoQuantizationConfig.from_dict(given)
        if type(given) is not type(stored):
            raise QuantizationError(
                f"the checkpoint is quantised by {stored.quant_method!r}, the quantization_config that was given is "
                f"for {given.quant_method!r}"
            )
        merged = stored.replace(**given.loading_attributes())
        if merged != given:
            used = f" but for {', '.join(stored.loading)}" if stored.loading else ""
            warnings.warn(
                f"the checkpoint's own quantization_config counts{used}; the one that was given is passed over",
                stacklevel=2,
            )
        return merged


def refuse(config: QuantizationConfig, source: str) -> NoReturn:
    """Raises the error of weights that cannot be read."""
    raise QuantizationError(
        f"{source}: the weights are quantised by {config.quant_method!r} ({type(config).__name__}), which formax does "
        "not read yet; open a checkpoint of the model that is not quantised"
    )


def check_plain(config: Config, source: str, given: Any = None) -> None:
    """Refuses a checkpoint whose weights are quantised, or are asked to be.

    Args:
        config: its configuration; those within are looked at, too.
        source: where it is from, for messages.
        given: the `quantization_config` that a user gave.

    Raises:
        QuantizationError: it is quantised, or its settings cannot be understood.
    """
    parts = [getattr(config, name) for name in config.sub_configs]
    for part in (config, *(part for part in parts if isinstance(part, Config))):
        if (stored := part.extra.get("quantization_config")) is None:
            continue
        try:
            found = AutoHfQuantizer.merge_quantization_configs(stored, given)
        except QuantizationError as error:
            raise QuantizationError(f"{source}: {error}") from None
        refuse(found, source)
    if given is not None:
        raise QuantizationError(
            f"{source} has no quantization_config, and one was given: formax does not quantise weights yet"
        )


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of the type that a field's default shows; a default of None shows nothing."""
    if default is None or default is dataclasses.MISSING:
        return True
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(default)) and not isinstance(value, bool)
