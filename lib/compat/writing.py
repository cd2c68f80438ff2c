"""`generate` as transformers' Flax and TensorFlow classes had it.

Texts are those of `formax.generation`, so those of PyTorch's classes. What the two had otherwise is here: their
arguments, how long a text becomes where nobody says it, what follows its end, and what is given back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from formax.compat import outputs
from formax.compat.generation import as_rules
from formax.core.family import Architecture, Family
from formax.generation import transition_scores
from formax.generation.api import own_way, run
from formax.generation.config import GenerationConfig, GenerationMode
from formax.generation.task import Task, settings_of, split_arguments, task_of
from formax.model import Model

# What Flax's classes pass over, since they give texts alone.
FLAX_IGNORES = {
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
}
# The way of generating -> how TensorFlow's outputs are called.
TF_KINDS = {
    GenerationMode.SAMPLE: "Sample",
    GenerationMode.CONTRASTIVE: "ContrastiveSearch",
    GenerationMode.BEAM: "BeamSearch",
    GenerationMode.BEAM_SAMPLE: "BeamSample",
    GenerationMode.GROUP_BEAM: "BeamSearch",
    GenerationMode.CONSTRAINED_BEAM: "BeamSearch",
}
BEAMS = {mode for mode, kind in TF_KINDS.items() if kind.startswith("Beam")}


def _strategy(**settings: Any) -> Callable[..., Any]:
    """A way of generating as a method, with these settings."""

    def method(
        self: GenerationMixin,
        input_ids: Any,
        logits_processor: Sequence[Any] = (),
        stopping_criteria: Sequence[Any] = (),
        logits_warper: Sequence[Any] = (),
        **given: Any,
    ) -> Any:
        """Writes with the processors and criteria that are given, and none of the model's own.

        Args:
            self: the model.
            input_ids: [B, T] the prompt, one row for each input; [B, beams, T] as TensorFlow's beams want it goes, too.
            logits_processor: what is done to scores.
            stopping_criteria: when a text ends.
            logits_warper: what is done to scores after that.
            **given: as `generate`: settings by name (`max_length`, `num_beams`, ...), inputs of the model, `params`.
        """
        if np.ndim(input_ids) == 3:
            given.setdefault("num_beams", np.shape(input_ids)[1])
            input_ids = input_ids[:, 0]
        if self.generation_config is not None and "max_new_tokens" not in given:
            given.setdefault("max_length", self.generation_config.max_length)
        return self.generate(
            input_ids,
            GenerationConfig(**settings),
            use_model_defaults=False,
            logits_processor=[*logits_processor, *logits_warper],
            stopping_criteria=stopping_criteria,
            **given,
        )

    return method


class GenerationMixin:
    """What the classes of both frameworks have in common where they write."""

    family: ClassVar[Family]
    architecture: ClassVar[Architecture]
    generation_config: Any
    generate: Callable[..., Any]

    greedy_search = _strategy(num_beams=1)
    sample = _strategy(num_beams=1, do_sample=True, top_k=0)
    beam_search = _strategy()
    beam_sample = _strategy(do_sample=True, top_k=0)
    contrastive_search = _strategy()
    group_beam_search = _strategy()
    constrained_beam_search = _strategy()
    assisted_decoding = _strategy()

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it has scores of a next token."""
        return cls.architecture.writes

    def compute_transition_scores(
        self, sequences: Any, scores: Sequence[Any], beam_indices: Any = None, normalize_logits: bool = False
    ) -> jax.Array:
        """Of every new token the score that it was chosen by; see `formax.generation.transition_scores`."""
        return transition_scores(sequences, scores, beam_indices, normalize=normalize_logits)

    def _writer(self, params: Any = None) -> Model:
        """The model that writes, with its own parameters or others."""
        raise NotImplementedError

    def _write(
        self,
        model: Model,
        inputs: Any,
        config: GenerationConfig | None,
        key: jax.Array | None,
        given: dict[str, Any],
        *,
        logits_processor: Sequence[Any] | None,
        streamer: Any = None,
        assistant_model: Any = None,
        **options: Any,
    ) -> tuple[Task, Any, bool]:
        """What is generated, what is known of it (of `formax.generation.outputs`), and whether it was asked for."""
        if (way := own_way(model)) is not None:  # both frameworks write one window, and return what is before it
            own = {**given, "logits_processor": as_rules(logits_processor)}
            given, inputs = way.prompted(model, inputs, config, own, draws=False), None
            logits_processor = given.pop("logits_processor")
        overrides, _ = split_arguments(model, given)
        asked, _ = settings_of(model, config, overrides, options.get("use_model_defaults"))
        # Both frameworks count the prompt where nobody says how long a text may be.
        if asked.max_new_tokens is None and asked.max_length is not None:
            given = {"max_length": asked.max_length, **given}
        given |= {"return_dict_in_generate": True, "output_scores": True}
        task = task_of(
            model,
            inputs,
            config,
            logits_processor=as_rules(logits_processor),
            assisted=assistant_model is not None,
            given=given,
            **options,
        )
        # A score of every text is had for nothing, all scores of all steps are not.
        if not asked.return_dict_in_generate:
            task = dataclasses.replace(task, keeps=())
        elif not asked.output_scores:
            task = dataclasses.replace(task, keeps=tuple(name for name in task.keeps if name != "scores"))
        draft = assistant_model._writer() if isinstance(assistant_model, GenerationMixin) else assistant_model
        out = run(task, key, streamer, assistant_model=draft, what={"inputs": inputs, "given": given})
        return task, out, bool(asked.return_dict_in_generate)


class FlaxGenerationMixin(GenerationMixin):
    """`generate` of transformers' Flax classes."""

    def generate(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        prng_key: jax.Array | None = None,
        trace: bool = True,
        params: Mapping[str, Any] | None = None,
        logits_processor: Sequence[Any] | None = None,
        *,
        stopping_criteria: Sequence[Any] = (),
        streamer: Any = None,
        use_model_defaults: bool | None = None,
        **given: Any,
    ) -> Any:
        """Writes a text for every row of the inputs.

        Args:
            input_ids: the first input: [B, T] of a text model, `input_features` of one that hears.
            generation_config: settings; what they leave at the defaults is as `model.generation_config` has it.
            prng_key: for what is drawn; `jax.random.PRNGKey(0)` by default, so that two calls give the same.
            trace: not looked at: it is compiled in any case.
            params: others than the model's own.
            logits_processor: further processors: those of `formax.compat`, or functions (input_ids, scores, cur_len).
            stopping_criteria: further criteria.
            streamer: is handed every token.
            use_model_defaults: False takes nothing but the special tokens from the model's own settings.
            **given: settings by name (`max_length`, `num_beams`, ...), and further inputs (`attention_mask`, ...).

        Returns:
            `FlaxGreedySearchOutput`, `FlaxSampleOutput` or `FlaxBeamSearchOutput`: `sequences`, int32
            [B * num_return_sequences, max_length], filled up with the padding token; of beams `scores`, too.

        Raises:
            TypeError: a model that does not write, an argument that nobody knows.
            ValueError: inputs that do not fit the model or the settings.
        """
        model = self._writer(params)
        given = {name: value for name, value in given.items() if name not in FLAX_IGNORES}
        ids = given.get("input_ids") if input_ids is None else input_ids
        if model.input_names[0] == "input_ids" and ids is not None and given.get("attention_mask") is None:
            given["attention_mask"] = np.ones(np.shape(ids), np.int32)  # padding is told, and not guessed
        task, out, _ = self._write(
            model,
            input_ids,
            generation_config,
            jax.random.PRNGKey(0) if prng_key is None else prng_key,
            given,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            use_model_defaults=use_model_defaults,
        )
        sequences = _padded(task, out)
        missing = max((task.config.max_length or 0) - sequences.shape[1], 0)
        sequences = jnp.pad(sequences, ((0, 0), (0, missing)), constant_values=task.pad)
        if task.mode in BEAMS:
            return outputs.written("FlaxBeamSearchOutput")(sequences=sequences, scores=out.sequences_scores)
        kind = "Sample" if task.config.do_sample else "GreedySearch"
        return outputs.written(f"Flax{kind}Output")(sequences=sequences)


class TFGenerationMixin(GenerationMixin):
    """`generate` of transformers' TensorFlow classes, as it is without `tf.function`."""

    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Any] | None = None,
        seed: Any = None,
        *,
        stopping_criteria: Sequence[Any] = (),
        streamer: Any = None,
        assistant_model: Any = None,
        use_model_defaults: bool | None = None,
        key: jax.Array | None = None,
        **given: Any,
    ) -> Any:
        """Writes a text for every row of the inputs.

        Args:
            inputs: the first input: `input_ids` [B, T] of a text model, `input_features` of one that hears.
            generation_config: settings; what they leave at the defaults is as `model.generation_config` has it.
            logits_processor: further processors: those of `formax.compat`, or functions (input_ids, scores, cur_len).
            seed: one or two whole numbers, for what is drawn.
            stopping_criteria: further criteria.
            streamer: is handed every token.
            assistant_model: a smaller model that proposes tokens.
            use_model_defaults: False takes nothing but the special tokens from the model's own settings.
            key: a `jax.random.key` in the place of a seed; without both it is another every time.
            **given: settings by name (`max_length`, `num_beams`, ...), and further inputs (`attention_mask`, ...).

        Returns:
            int32 [B * num_return_sequences, T + new tokens], an array of JAX, rows that ended early filled with the
            padding token; with `return_dict_in_generate=True` one of the outputs from `TFGreedySearchDecoderOnlyOutput`
            to `TFContrastiveSearchEncoderDecoderOutput`.

        Raises:
            TypeError: a model that does not write, an argument that nobody knows.
            ValueError: inputs that do not fit the model or the settings.
        """
        if seed is not None and key is None:
            first, *more = (int(one) for one in np.ravel(seed))
            key = jax.random.key(first)
            for one in more:
                key = jax.random.fold_in(key, one)
        task, out, asked = self._write(
            self._writer(),
            inputs,
            generation_config,
            key,
            given,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            assistant_model=assistant_model,
            use_model_defaults=use_model_defaults,
        )
        sequences = _padded(task, out)
        if not asked:
            return sequences
        part = "EncoderDecoder" if task.is_encoder_decoder else "DecoderOnly"
        kind = TF_KINDS.get(task.mode, "Sample" if task.config.do_sample else "GreedySearch")
        made = outputs.written(f"TF{kind}{part}Output")
        fields = {field.name: getattr(out, field.name) for field in dataclasses.fields(made)}
        return made(**{**fields, "sequences": sequences})


def _padded(task: Task, out: Any) -> jax.Array:
    """The texts with padding after their end, where PyTorch's beams may have something else."""
    sequences = jnp.asarray(out.sequences)
    if (parents := getattr(out, "beam_indices", None)) is None:
        return sequences
    new = parents.shape[1]
    ends = jnp.where(parents < 0, task.pad, sequences[:, sequences.shape[1] - new :])
    return jnp.concatenate([sequences[:, : sequences.shape[1] - new], ends], axis=1)
