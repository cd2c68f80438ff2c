"""A call of Whisper's `generate`, with everything decided; and what the decoder is given before a transcript."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.core.config import ConfigError
from formax.core.outputs import BaseModelOutput
from formax.generation import processors
from formax.generation.config import GenerationConfig
from formax.generation.state import known
from formax.generation.task import settings_of
from formax.layers.seq2seq import states_of
from formax.model import Model
from formax.text.languages import CODES

STRIDE = 2  # frames for each state of the encoder
TASKS = ("transcribe", "translate")
FIRST, ALL = "first-segment", "all-segments"


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Arguments that Whisper alone has; see `generate`. Those at None are as the model's settings have them."""

    language: Any = None
    task: str | None = None
    is_multilingual: bool | None = None
    return_timestamps: bool | None = None
    return_token_timestamps: bool | None = None
    return_segments: bool = False
    prompt_ids: Any = None
    prompt_condition_type: str | None = None
    condition_on_prev_tokens: bool | None = None
    temperature: Any = None
    compression_ratio_threshold: float | None = None
    logprob_threshold: float | None = None
    no_speech_threshold: float | None = None
    num_frames: Any = None
    monitor_progress: Callable[[np.ndarray], Any] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], config: GenerationConfig) -> Wishes:
        """What a call gives, and what it leaves to the settings, where temperatures are those of all models."""
        names = [f.name for f in fields(cls)]
        own: dict[str, Any] = {name: given[name] for name in names if given.get(name) is not None}
        for name in ("language", "task", "is_multilingual", "return_timestamps", "condition_on_prev_tokens",
                     "compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"):  # fmt: skip
            own.setdefault(name, getattr(config, name, None))
        return cls(**own)

    @property
    def temperatures(self) -> tuple[float | None, ...]:
        """What to draw at, one after the other; None as the settings have it."""
        return tuple(self.temperature) if isinstance(self.temperature, Sequence) else (self.temperature,)


@dataclass(frozen=True)
class Call:
    """A call, with everything decided.

    Attributes:
        model: the model.
        generation_config: settings, as the call gave them.
        config: settings, with the model's.
        features: [B, mels, T], or None where the encoder's states were given.
        frames: int [B], how many each recording has.
        wishes: what Whisper alone is told.
        given: other arguments of each window's `generate`.
        stamped: whether there are times in the transcript.
        heard: int [B], frames that are no padding, if somebody said.
    """

    model: Model
    generation_config: GenerationConfig | None
    config: GenerationConfig
    features: Any
    frames: np.ndarray
    wishes: Wishes
    given: dict[str, Any]
    stamped: bool
    heard: np.ndarray | None

    @classmethod
    def of(
        cls, model: Model, inputs: Any, generation_config: GenerationConfig | None, arguments: Mapping[str, Any]
    ) -> Call:
        """From the arguments of `generate`."""
        given, own = dict(arguments), {f.name for f in fields(Wishes)}
        settings = {f.name for f in fields(GenerationConfig)} - own
        overrides = {name: value for name, value in given.items() if name in settings}
        config = settings_of(model, generation_config, overrides, given.get("use_model_defaults"))[0]
        wishes = Wishes.of({name: given.pop(name) for name in own if name in given}, config)
        features, mask = given.pop("input_features", None), given.pop("attention_mask", None)
        if inputs is not None and features is not None:
            raise ValueError("the first argument is input_features, and input_features= is given as well; give one")
        features, memory = (inputs if features is None else features), given.get("encoder_outputs")
        width = STRIDE * model.config.max_source_positions
        if features is None and memory is None:
            raise ValueError(f"{model.architecture.name} writes about what it hears: give input_features")
        if features is not None and np.ndim(features) != 3:
            raise ValueError(f"input_features must be [batch, mels, frames], got shape {np.shape(features)}")
        if features is not None and known(features):
            features = np.asarray(features)
        rows, frames = (len(features), features.shape[2]) if features is not None else (len(states_of(memory)), width)
        if mask is not None and np.shape(mask) != (rows, frames):
            raise ValueError(f"attention_mask must be [batch, frames] = {(rows, frames)}, got {np.shape(mask)}")
        if frames > width:
            if arguments.get("return_timestamps") is False:
                raise ValueError(
                    f"the recordings have {frames} frames, a window {width}: longer ones need return_timestamps=True, "
                    "for the times say where the next window begins"
                )
            if rows > 1 and mask is None:
                raise ValueError(
                    "several recordings of more than a window need an attention_mask, which says how long each is: the "
                    "feature extractor returns it with return_attention_mask=True"
                )
        heard = np.asarray(mask).sum(-1) if mask is not None and known(mask) else None
        counts = heard if heard is not None and frames > width else np.full(rows, frames)
        if wishes.num_frames is not None:
            heard = np.broadcast_to(np.asarray(wishes.num_frames), rows)
        stamped = bool(frames > width or wishes.return_timestamps)
        call = cls(model, generation_config, config, features, counts, wishes, given, stamped, heard)
        call.check()
        return call

    def check(self) -> None:
        """Raises ConfigError for settings that lack something, or exclude each other."""
        own = self.wishes
        if self.stamped or own.no_speech_threshold is not None:
            self.needs("no_timestamps_token_id", "times and silence")
        if own.return_token_timestamps:
            self.needs("alignment_heads", "the time of each token")
        if own.is_multilingual is False and (own.language is not None or own.task is not None):
            raise ConfigError("language and task are for models of several languages, and is_multilingual is False")
        if own.task not in (None, *TASKS):
            raise ConfigError(f"task={own.task!r} is none of {', '.join(TASKS)}")
        if own.prompt_condition_type not in (None, FIRST, ALL):
            raise ConfigError(f"prompt_condition_type={own.prompt_condition_type!r} is neither {FIRST!r} nor {ALL!r}")
        if own.prompt_condition_type == ALL and not own.condition_on_prev_tokens:
            raise ConfigError(f"prompt_condition_type={ALL!r} needs condition_on_prev_tokens=True")
        if own.no_speech_threshold is not None and own.logprob_threshold is None:
            raise ConfigError("no_speech_threshold is about unlikely transcripts: it needs a logprob_threshold")
        if len(own.temperatures) > 1 and self.given.get("streamer") is not None:
            raise ConfigError("a streamer goes with one temperature: what it was handed cannot be taken back")

    def needs(self, name: str, what: str) -> Any:
        """A setting that not all checkpoints have."""
        found = getattr(self.config, name, None)
        if found is None:
            raise ConfigError(f"{what}: the settings have no {name}, which comes in the generation_config.json")
        return found

    @property
    def rows(self) -> int:
        """Recordings."""
        return len(self.frames)

    @property
    def texts(self) -> int:
        """Transcripts."""
        return self.rows * self.config.num_return_sequences

    @property
    def width(self) -> int:
        """Frames of a window."""
        return STRIDE * int(self.model.config.max_source_positions)

    @property
    def known(self) -> bool:
        """Whether this is not traced."""
        return all(map(known, jax.tree.leaves((self.model.params, self.features, self.given.get("encoder_outputs")))))

    @property
    def hears_again(self) -> bool:
        """Whether the encoder's states are not enough: for another model's encoder, or what is seen within it."""
        c, assistant = self.config, self.given.get("assistant_model")
        seen = c.return_dict_in_generate and (c.output_attentions or c.output_hidden_states)
        another = assistant is not None and assistant.input_names[0] == self.model.input_names[0]
        return self.features is not None and bool(another or seen)

    @property
    def first_stamp(self) -> int:
        """The token of the time 0; beyond all tokens where there are no times."""
        without = getattr(self.config, "no_timestamps_token_id", None)
        return int(self.model.config.vocab_size) + 1 if without is None else without + 1

    # ---------------------------------------------------------------------------------------- before a transcript

    def starts(self, hear: Callable[[], Any]) -> Any:
        """The tokens before each transcript, int32 [B, P]: start, language, task, and whether there are times.

        Args:
            hear: gives the encoder's states of the first windows [B, S, E], to ask for their language.
        """
        config, own = self.config, self.wishes
        if config.decoder_start_token_id is None:
            raise ConfigError("the decoder begins with a token: decoder_start_token_id must be set")
        tokens: list[Any] = [config.decoder_start_token_id]
        if own.task is None and own.language is None:  # older checkpoints say it in this way
            forced = dict(getattr(config, "forced_decoder_ids", None) or ())
            if sorted(forced) != list(range(1, len(forced) + 1)):
                raise ConfigError(f"forced_decoder_ids must be about the places 1, 2, ... in turn, got {forced}")
            tokens += [forced[place] for place in sorted(forced)]
        languages: list[int | None] = [None] * self.rows
        if own.language is not None:
            named = [own.language] * self.rows if isinstance(own.language, str) else list(own.language)
            if len(named) != self.rows:
                raise ConfigError(f"language names {len(named)} languages, for {self.rows} recordings")
            languages = [self.language(name) for name in named]
        elif tokens[1:2] in ([], [None]) and getattr(config, "lang_to_id", None) is not None:
            ids, found = np.asarray([self.start(tokens, -1)], np.int32), self.detected(hear())
            made = jnp.where(ids == -1, found[:, None], ids)
            return np.asarray(made) if known(made) else made
        return np.asarray([self.start(tokens, language) for language in languages], np.int32)

    def start(self, tokens: list[Any], language: int | None) -> list[int]:
        """The tokens before one transcript."""
        if language is not None:
            tokens = [tokens[0], language, *tokens[2:]]
        tasks, task = getattr(self.config, "task_to_id", None) or {}, self.wishes.task
        if task is not None:
            self.needs("task_to_id", f"task={task!r}")
            tokens = [*(one for one in tokens if one not in tasks.values()), tasks[task]]
        elif self.wishes.language is not None and tasks and not set(tokens) & set(tasks.values()):
            tokens = [*tokens, tasks["transcribe"]]
        without = getattr(self.config, "no_timestamps_token_id", None)
        if without is not None:
            tokens = [*(one for one in tokens if one != without), *([] if self.stamped else [without])]
        return [one for one in tokens if one is not None]

    def language(self, name: str) -> int:
        """The token of a language."""
        table: Mapping[str, int] = self.needs("lang_to_id", f"language={name!r}")
        low = name.lower()
        for token in (low, f"<|{low}|>", f"<|{CODES.get(low)}|>"):
            if token in table:
                return table[token]
        own = [token.strip("<|>") for token in table]
        near = difflib.get_close_matches(low, [*own, *(word for word, code in CODES.items() if code in own)], n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"language={name!r} is none that this model knows{hint} It knows {', '.join(own)}")

    def detected(self, memory: jax.Array) -> jax.Array:
        """The token of the language of each recording, from the encoder's states [B, S, E]."""
        table = np.asarray(sorted(self.needs("lang_to_id", "asking for the language").values()))
        start = np.full((len(memory), 1), self.config.decoder_start_token_id, np.int32)
        return jnp.asarray(table, jnp.int32)[next_scores(self.model, memory, start, None, 0)[:, table].argmax(-1)]

    def before(
        self, starts: np.ndarray, rows: Iterable[int], told: Sequence[np.ndarray | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The decoder's prompts of one window of some recordings: tokens [R, P], and which are no padding.

        Args:
            starts: the tokens before each transcript.
            rows: which recordings.
            told: what each says before this window, if that goes before.
        """
        prompt, found = self.prompt, []
        for row, text in zip(rows, told, strict=True):
            own = [starts[row]]
            if text is not None:
                always = prompt is not None and self.wishes.prompt_condition_type == ALL
                room = self.model.config.max_target_positions // 2 - 1
                own = [prompt if always else self.marker, text[-room:], *own]
            elif prompt is not None:
                own = [prompt, *own]
            found.append(np.concatenate(own))
        longest = max(map(len, found))
        mask = np.asarray([np.arange(longest) >= longest - len(one) for one in found])
        pad = self.config.pad_token_id or 0
        return np.asarray([np.pad(x, (longest - len(x), 0), constant_values=pad) for x in found], np.int32), mask

    @property
    def prompt(self) -> np.ndarray | None:
        """`prompt_ids`."""
        return None if self.wishes.prompt_ids is None else np.asarray(self.wishes.prompt_ids, np.int32).reshape(-1)

    @property
    def marker(self) -> np.ndarray:
        """The token that stands before what was said before."""
        found, suppressed = getattr(self.config, "prev_sot_token_id", None), self.config.suppress_tokens or ()
        if found is None and len(suppressed) >= 2:  # where older checkpoints have it
            found = suppressed[-2]
        return np.asarray([] if found is None else [found], np.int32)

    def told(self, segments: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        """What a recording says so far; None for nothing."""
        texts = []
        if self.prompt is not None and self.wishes.prompt_condition_type != ALL:
            texts.append(self.prompt[1:] if self.prompt[:1] == self.marker else self.prompt)
        for segment in segments:  # of two times at the end, the second is the next segment's
            tokens = segment["tokens"]
            texts.append(tokens[:-1] if len(tokens) > 2 and tokens[-2] >= self.first_stamp else tokens)
        return np.concatenate(texts) if texts else None

    # ---------------------------------------------------------------------------------------- one window

    def one_window(self, *, draws: bool = True) -> dict[str, Any]:
        """The arguments of `generate` of all models, where one window is all there is.

        Args:
            draws: whether a temperature alone means to draw.
        """
        own = self.wishes
        looks = [name for name in ("return_token_timestamps", "return_segments", "logprob_threshold",
                                   "compression_ratio_threshold") if getattr(own, name)]  # fmt: skip
        if looks or len(own.temperatures) > 1 or self.frames.max() > self.width:
            raise ValueError(
                f"a stream and a trace (jax.jit, jax.pmap, ...) are about one window of {self.width} frames at one "
                f"temperature{', without ' + looks[0] if looks else ''}"
            )

        features = self.features
        if features is not None:
            features = jnp.pad(features, ((0, 0), (0, 0), (0, self.width - features.shape[2])))

        def hear() -> jax.Array:
            return self.hear(range(self.rows), ()) if features is None else encoded(self.model, features)

        ids = self.starts(hear)
        if self.prompt is not None:
            ids = jnp.concatenate([jnp.broadcast_to(self.prompt, (self.rows, len(self.prompt))), ids], axis=1)
        given = {} if features is None else {"input_features": features}
        (temperature,) = own.temperatures
        if not draws and temperature is not None:
            given, temperature = {**given, "temperature": temperature}, None
        return self.arguments(ids, None, temperature, given)

    def arguments(
        self, ids: Any, mask: np.ndarray | None, temperature: float | None, more: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of `generate` of all models for prompts [R, P] at a temperature, and more of them."""
        rules = list(self.given.get("logits_processor", ()))
        if self.stamped:
            end: Any = (*self.config.eos_token_ids, self.config.bos_token_id)[0]
            make = partial(processors.whisper_timestamps, self.first_stamp - 1, end, ids.shape[1])
            rules.insert(0, make(max_initial_timestamp_index=getattr(self.config, "max_initial_timestamp_index", None)))
        made = {**self.given, "logits_processor": rules, "decoder_input_ids": ids}
        if temperature is not None:
            draws = {"do_sample": True, "temperature": temperature, "num_beams": 1}
            made |= draws if temperature else {"do_sample": False}
        if self.wishes.logprob_threshold is not None:
            made |= {"return_dict_in_generate": True, "output_scores": True}
        if self.given.get("assistant_model") is not None:
            made["begin_suppress_tokens"] = None  # its guesses begin anywhere
        if mask is not None and not mask.all():
            made["decoder_attention_mask"] = mask
        return {**made, **more}

    def windows(self, sources: Any, seek: Any) -> jax.Array:
        """Features of a window of some recordings, each from its frame on: [R, mels, width], zeros after the end."""
        out = np.zeros((len(sources), self.features.shape[1], self.width), np.float32)
        for own, source, at in zip(out, sources, seek, strict=True):
            part = self.features[source, :, at : min(at + self.width, int(self.frames[source]))]
            own[:, : part.shape[1]] = part
        return jnp.asarray(out)

    def hear(self, sources: Any, seek: Any) -> jax.Array:
        """The encoder's states of such windows [R, S, E]."""
        if self.features is None:
            return jnp.asarray(states_of(self.given["encoder_outputs"]))[np.asarray(sources)]
        return encoded(self.model, self.filled(self.windows(sources, seek)))[: len(sources)]

    def filled(self, x: Any) -> Any:
        """Rows of so many texts, with copies of the last one up to a number that is compiled for: all, or 2 ** n."""
        more = min(self.texts, 1 << (len(x) - 1).bit_length()) - len(x)
        return (jnp if isinstance(x, jax.Array) else np).pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1), mode="edge")


@jax.jit
def encoded(model: Model, features: jax.Array) -> jax.Array:
    """The encoder's states [R, S, E] of windows [R, mels, width]."""
    return model.as_method("encode")(input_features=features).last_hidden_state


@jax.jit
def next_scores(model: Model, memory: jax.Array, ids: jax.Array, mask: Any, at: Any) -> jax.Array:
    """The decoder's scores [R, V] after one of its tokens."""
    own = {} if mask is None else {"decoder_attention_mask": mask}
    heard = BaseModelOutput(last_hidden_state=memory)
    return model(encoder_outputs=heard, decoder_input_ids=ids, **own).logits[:, at]
