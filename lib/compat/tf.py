"""The TensorFlow classes of transformers 4, on formax: change the import, and go on with JAX arrays.

    from formax.compat.tf import TFAutoModelForSequenceClassification, TFBertModel

There is a class for every architecture of every family and an Auto class for every head. They are called as the
originals are, with inputs by name, as a dict or as a list, and open and write `tf_model.h5`. What they take may be
arrays of TensorFlow, NumPy or JAX; what they give are arrays of JAX. TensorFlow is not needed (h5py is, for its files).

Keras is not here: a model is trained by `formax.training`, and a random key says what is dropped (`training=True`,
`key=`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from formax.compat import files, names, outputs
from formax.compat.generation import top_k_top_p_filtering
from formax.compat.writing import TFGenerationMixin
from formax.core.config import Config
from formax.generation.config import GenerationConfig
from formax.loading import generation_config, load
from formax.model import Model

tf_top_k_top_p_filtering = top_k_top_p_filtering
# What Keras' models have and these do not -> what there is for it.
KERAS = {
    **dict.fromkeys(
        ("compile", "fit", "evaluate", "prepare_tf_dataset"), "formax.training has the steps and the losses"
    ),
    "predict": "call the model",
}


class TFPreTrainedModel(TFGenerationMixin):
    """A model as transformers' TensorFlow had it.

    Attributes:
        model: the `formax.Model` that it is.
    """

    config_class: ClassVar[type[Config]]
    framework: ClassVar[str] = "tf"

    def __init__(self, config: Config, *, seed: int = 0) -> None:
        """A model with initial parameters.

        Args:
            config: a configuration of `config_class`, as `formax.AutoConfig.for_model` makes it.
            seed: of the initial parameters.

        Raises:
            TypeError: a configuration of another family.
        """
        names.check_config(type(self).__name__, self.family, config)
        made = Model.initialise(config, self.architecture, self.family, jax.random.key(seed), jnp.float32)
        self.model = made.replace(generation_config=generation_config(self.architecture, config))

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.model.config

    @property
    def generation_config(self) -> GenerationConfig | None:
        """What `generate` does if it is not told otherwise; None of a model that does not write."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.model = self.model.replace(generation_config=config)

    def _writer(self, params: Any = None) -> Model:
        return self.model

    @property
    def params(self) -> Any:
        """The parameters, as those of a `formax.Model`."""
        return self.model.params

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of scalars that the model has."""
        return self.model.num_parameters(only_trainable)

    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        training: bool = False,
        key: jax.Array | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **given: Any,
    ) -> Any:
        """Runs the model.

        Args:
            inputs: the first input, or all of them as a dict, or the first ones as a list.
            *args: further inputs, in the order of the family.
            training: whether there is dropout.
            key: a `jax.random.key` for it.
            past_key_values: caches that decoding goes on from, of `init_cache`.
            use_cache: whether caches are given back, which is the case where they are given.
            output_attentions: also give the attention weights of every layer.
            output_hidden_states: also give the states after the embeddings and after every layer.
            return_dict: whether the output has names; else it is a tuple.
            **given: inputs by name.

        Returns:
            An output whose fields are attributes, items by name and items by place; with `return_dict=False` a tuple.

        Raises:
            TypeError: an input that the model does not take, or one that is given twice; labels.
            ValueError: training without a key.
        """
        if isinstance(inputs, Mapping):
            if twice := inputs.keys() & given.keys():
                raise TypeError(f"{type(self).__name__} was given {min(twice)!r} twice, in the dict and by name")
            given = {**inputs, **given}
        elif inputs is not None:
            args = (*inputs, *args) if isinstance(inputs, tuple | list) else (inputs, *args)
        if labels := [name for name in given if "label" in name and given[name] is not None]:
            raise TypeError(f"{type(self).__name__} takes no {labels[0]}: the loss is a function of formax.training")
        if training and key is None:
            raise ValueError("training=True needs key=, a jax.random.key: there is no random state besides")
        if use_cache and past_key_values is None:
            raise TypeError("use_cache=True needs past_key_values=, the caches that init_cache makes")
        named = {**self.model.name_inputs(args, given), **given}
        if past_key_values is not None:
            named["cache"] = past_key_values
        out, _ = self.model.run(
            named,
            key=key if training else None,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        out = outputs.renamed(out, "TF")
        wants_dict = self.config.extra.get("return_dict", True) if return_dict is None else return_dict
        return out if wants_dict else outputs.as_tuple(out)

    def init_cache(self, batch_size: int, max_length: int, encoder_length: int = 0) -> Any:
        """Empty `past_key_values`, with room for `max_length` positions and an encoder's `encoder_length` states.

        Raises:
            TypeError: the model does not decode.
        """
        return self.model.init_cache(batch_size, max_length, encoder_length)

    def __getattr__(self, name: str) -> Any:
        # Only reached for what is no attribute: the architecture's methods (`get_text_features`), and Keras'.
        if name in KERAS:
            raise NotImplementedError(f"{type(self).__name__} is no Keras model and has no {name}: {KERAS[name]}")
        if name.startswith("_") or name not in self.architecture.methods:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.model, name)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "TFAutoModel") -> None:
        """Not done here: no code is put into checkpoints, nor run out of them.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("formax puts no code into checkpoints; formax.register makes a family known")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: Config | str | Path | None = None,
        from_pt: bool = False,
        use_safetensors: bool | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Any:
        """Opens a checkpoint: safetensors if there are any, else `tf_model.h5`, else what else there is.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the hub.
            config: a configuration, or where one is, in the place of the checkpoint's own.
            from_pt: take PyTorch's weights.
            use_safetensors: False takes `tf_model.h5` even where safetensors are.
            seed: of parameters that the checkpoint does not hold.
            **options: of `formax.loading.load`: `revision`, `cache_dir`, `local_files_only`, `token`,
                `ignore_mismatched_sizes`; fields of the configuration to replace.
        """
        first = use_safetensors is not False
        opened = load(
            pretrained_model_name_or_path,
            None,
            architecture=cls.architecture.name,
            config=None if config is None else files.config_of(config, {**options, "config": config}),
            key=jax.random.key(seed),
            **files.choice("tf", pretrained_model_name_or_path, from_pt, options, safetensors_first=first),
            **options,
        )
        return cls._of(opened)

    @classmethod
    def _of(cls, model: Model) -> Any:
        """The class with this model inside."""
        found = cls.__new__(cls)
        found.model = model
        return found

    def save_pretrained(
        self,
        save_directory: str | Path,
        saved_model: bool = False,
        *,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = False,
        **of_a_push: Any,
    ) -> list[Path]:
        """Writes config.json and `tf_model.h5`, as transformers' TensorFlow classes open them.

        A model that these do not have is written as safetensors under PyTorch's names, and a warning says so.

        Args:
            save_directory: made when missing.
            saved_model: not done here.
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
        if saved_model:
            raise NotImplementedError("saved_model=True: formax writes no SavedModel yet")
        return files.save(self.model, save_directory, max_shard_size, "pytorch" if safe_serialization else "tf")


SURFACE = names.Surface(__name__, "TF", TFPreTrainedModel, lambda family, architecture: {})


def __getattr__(name: str) -> Any:
    return SURFACE.find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *SURFACE.listed()})
