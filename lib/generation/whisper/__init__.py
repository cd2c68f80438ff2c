"""Whisper writes down what is said: `generate` of its family (Radford et al. 2022, arXiv:2212.04356, 2.3 and 3.8).

A recording is heard a window (half a minute) at a time. The tokens before a transcript say the language, the task and
whether there are times; the times in a transcript say where the next window begins. A window whose transcript looks
wrong, because it repeats itself or is unlikely, is written again at a higher temperature.

B recordings, R of them that are being written, T frames, P tokens before a transcript, N tokens of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from formax.core.outputs import Output
from formax.generation.config import GenerationConfig
from formax.generation.whisper import windows
from formax.generation.whisper.call import Call
from formax.generation.whisper.windows import Transcription
from formax.model import Model

__all__ = ["Transcription", "detect_language", "generate", "prompted"]


def generate(
    plain: Callable[..., Any],
    model: Model,
    inputs: Any = None,
    generation_config: GenerationConfig | None = None,
    **arguments: Any,
) -> Any:
    """Writes down recordings of any length.

    Args:
        plain: the `generate` of all models, whose arguments these are, too.
        model: a Whisper with its head.
        inputs: `input_features` [B, mels, T]. More than a window is written with times.
        generation_config: settings, among them which tokens stand for languages, tasks and times.
        **arguments: what `plain` takes (with `decoder_input_ids` it is called and nothing else); `attention_mask` [B,
            T], which frames there are, for several recordings of more than a window; and

            - `language`: "en", "english" or "<|en|>", one or one a recording; the model is asked by default.
            - `task`: "transcribe" or "translate", the latter into English.
            - `is_multilingual`: False for a model that takes neither of the two.
            - `return_timestamps`: tokens for times in the transcript.
            - `return_token_timestamps`: the time of each token, from where certain heads look; `num_frames`, one or
              [B], says how long the recordings are, if no `attention_mask` does.
            - `return_segments`: what there is of each segment.
            - `condition_on_prev_tokens`: the transcript so far goes before that of each window.
            - `prompt_ids`: [N] tokens of a text that goes before transcripts, such as names that come up; with
              `condition_on_prev_tokens` once (`prompt_condition_type="first-segment"`) or always ("all-segments").
            - `temperature`: one, or several to try in turn while a transcript, compressed, has a higher ratio than
              `compression_ratio_threshold`, or tokens less likely than `logprob_threshold` (mean of logarithms).
            - `no_speech_threshold`: a window with an unlikely transcript is left out where silence is likelier than
              this.
            - `monitor_progress`: called with int [B, 2] before each window: frames that are done, and all.

    Returns:
        int32 [B, N], transcripts without the tokens before them and without the end, filled with padding. A
        `Transcription` where segments or times of tokens are asked for. With `return_dict_in_generate=True` and without
        times, what `plain` returns.

    Raises:
        ConfigError: settings that lack what is asked for, or exclude each other.
        ValueError: inputs that do not fit; in a trace, what needs a look at what was written.
    """
    if arguments.get("decoder_input_ids") is not None:
        return plain(model, inputs, generation_config, **arguments)
    call = Call.of(model, inputs, generation_config, arguments)
    if call.known:
        return windows.run(call, plain)
    given = call.one_window()
    found = plain(model, None, generation_config, **given)
    return found if isinstance(found, Output) else found[:, given["decoder_input_ids"].shape[1] :]


def prompted(
    model: Model,
    inputs: Any,
    generation_config: GenerationConfig | None,
    arguments: Mapping[str, Any],
    *,
    draws: bool = True,
) -> dict[str, Any]:
    """The arguments of `generate` of all models, for one window: with the tokens before a transcript, and its rules.

    Args:
        model: a Whisper with its head.
        inputs: `input_features`, if not among the arguments.
        generation_config: settings.
        arguments: those of Whisper's `generate`.
        draws: whether a temperature alone means to draw, as it does there and nowhere else.

    Raises:
        ValueError: as `generate`; and for more than a window, or what needs a look at what was written.
    """
    if arguments.get("decoder_input_ids") is not None:
        return {**arguments, **({} if inputs is None else {"input_features": inputs})}
    return Call.of(model, inputs, generation_config, arguments).one_window(draws=draws)


def detect_language(model: Model, input_features: Any, generation_config: GenerationConfig | None = None) -> np.ndarray:
    """The token of the language that the model hears in each recording's first window: int [B].

    Args:
        model: a Whisper of several languages, with its head.
        input_features: [B, mels, T].
        generation_config: settings, if not the model's own.

    Raises:
        ConfigError: the settings have no `lang_to_id`.
    """
    call = Call.of(model, input_features, generation_config, {"return_timestamps": True, "language": None})
    return np.asarray(call.detected(call.hear(range(call.rows), np.zeros(call.rows, int))))
