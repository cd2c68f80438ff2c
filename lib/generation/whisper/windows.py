"""Window after window of recordings: what is written of each, whether it is taken, and where the next one begins."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from formax.core.outputs import BaseModelOutput, Output, output
from formax.generation.decoding import bucket
from formax.generation.outputs import transition_scores
from formax.generation.whisper.alignment import token_frames
from formax.generation.whisper.call import STRIDE, Call, next_scores
from formax.model import Model

WARM = 0.5  # a temperature from which on nothing is conditioned on a transcript
SECONDS = 0.02  # that a state of the encoder stands for, and a step of the times in a transcript


@output
class Transcription(Output):
    """Of recordings: `sequences` int32 [B, N], `token_timestamps` [B, N] in seconds, `segments` a list for each.

    A segment is a dictionary: "start" and "end" in seconds, "tokens", their times as "token_timestamps" if they were
    asked for, "result" (int32 [P + N], all that was written of the window after what was before it; a dictionary of
    "sequences" and "scores" where these were asked for), and "idxs", where in that the segment's tokens begin and end.
    """

    sequences: Any
    token_timestamps: Any = None
    segments: Any = None


@dataclass(frozen=True)
class Window:
    """What was written of one window of a recording.

    Attributes:
        tokens: int32 [P + N], with the end if it came.
        begin: P.
        result: what a segment says of it.
        likely: the mean of the tokens' log-probabilities, if somebody asked.
        calm: it was not drawn at a temperature at which what follows does better without it.
        silent: nothing is said, so that it does not count.
    """

    tokens: np.ndarray
    begin: int
    result: Any
    likely: float | None = None
    calm: bool = True
    silent: bool = False


class Asked(NamedTuple):
    """What is heard in a window of some recordings, and what is before their transcripts.

    Attributes:
        memory: the encoder's states [R, S, E].
        features: the windows, where the encoder's states are not enough; else None.
        ids: the decoder's prompts [R, P].
        mask: which of their tokens are no padding.
    """

    memory: jax.Array
    features: jax.Array | None
    ids: np.ndarray
    mask: np.ndarray


def run(call: Call, plain: Callable[..., Any]) -> Any:
    """Window after window of all recordings.

    Args:
        call: what is asked for.
        plain: `generate` of all models, which writes one window.
    """
    own = call.wishes
    nothing = np.zeros(call.texts, int)
    first = call.hear(range(call.rows), nothing[: call.rows])
    sources = np.repeat(np.arange(call.rows), call.config.num_return_sequences)  # of each transcript, its recording
    starts = call.starts(lambda: first)[sources]
    frames, seek, key = call.frames[sources], nothing, call.given.get("key")
    parts: list[list[dict[str, Any]]] = [[] for _ in sources]
    goes_on = np.full(call.texts, bool(own.condition_on_prev_tokens))
    found: Any = None
    while (seek < frames).any():
        if own.monitor_progress is not None:
            own.monitor_progress(np.stack([seek, frames], axis=1))
        rows = np.flatnonzero(seek < frames)
        memory = call.hear(sources[rows], seek[rows]) if seek.any() else first[sources[rows]]
        told = [call.told(parts[row]) if goes_on[row] else None for row in rows]
        features = call.windows(sources[rows], seek[rows]) if call.hears_again else None
        asked = Asked(memory, features, *call.before(starts, rows, told))
        key, used = (None, None) if key is None else jax.random.split(key)
        found, windows = taken(call, plain, asked, starts.shape[1], used)
        for n, (row, window) in enumerate(zip(rows, windows, strict=True)):
            at, times = int(seek[row]), None
            step = min(int(frames[row]) - at, call.width)
            if not window.silent:
                if own.return_token_timestamps:
                    times = token_times(call, memory[n], window, sources[row], at)
                new, step = segments(call, window, times, at * SECONDS / STRIDE, step)
                parts[row] += new
            goes_on[row] = bool(own.condition_on_prev_tokens) and window.calm
            seek[row] += step
    plainly = not (call.stamped or own.return_token_timestamps or own.return_segments or len(own.temperatures) > 1)
    return found if call.config.return_dict_in_generate and plainly else answer(call, parts)


def taken(call: Call, plain: Callable[..., Any], asked: Asked, begin: int, key: Any) -> tuple[Any, list[Window]]:
    """What is written of a window of some recordings, at the first temperature at which nothing looks wrong.

    Args:
        call: what is asked for.
        plain: `generate` of all models.
        asked: what is heard, and what is before the transcripts.
        begin: how much of that is from the token of the start on.
        key: random key.

    Returns:
        What `plain` returned last, and the windows.
    """
    own, most, rows = call.wishes, math.inf, len(asked.ids)
    silence: Any = np.zeros(rows)
    if own.no_speech_threshold is not None:  # the token of silence is before that of no times
        memory, _, ids, mask = jax.tree.map(call.filled, asked)
        silence = jax.nn.softmax(next_scores(call.model, memory, ids, mask, ids.shape[1] - begin))
        silence, most = np.asarray(silence[:, call.first_stamp - 2]), own.no_speech_threshold
    todo, windows, found = np.arange(rows), dict[int, Window](), None
    for temperature in own.temperatures:
        key, used = (None, None) if key is None else jax.random.split(key)
        found, made = write(call, plain, jax.tree.map(lambda x, todo=todo: x[todo], asked), temperature, used)
        for n, window in zip(todo.tolist(), made, strict=True):
            silent = is_unlikely(call, window) and silence[n] > most
            windows[n] = replace(window, silent=silent)
        todo = np.asarray([n for n in todo.tolist() if not windows[n].silent and is_wrong(call, windows[n])], int)
        if not len(todo):
            break
    return found, [windows[n] for n in range(rows)]


def write(
    call: Call, plain: Callable[..., Any], asked: Asked, temperature: float | None, key: Any
) -> tuple[Any, list[Window]]:
    """Transcripts at one temperature; the arguments and what is returned as of `taken`."""
    memory, features, ids, full = jax.tree.map(call.filled, asked)
    heard = {"encoder_outputs": BaseModelOutput(last_hidden_state=memory)}
    if features is not None:
        heard = {"input_features": features}
    more = {**heard, "key": key, "num_return_sequences": 1}
    found = plain(call.model, None, call.generation_config, **call.arguments(ids, full, temperature, more))
    texts = np.asarray(getattr(found, "sequences", found))
    likely = None
    if call.wishes.logprob_threshold is not None:
        parents = getattr(found, "beam_indices", None)
        likely = np.asarray(_log_probabilities(found.sequences, found.scores, parents, temperature or 1.0))
    windows = []
    for n, (text, here) in enumerate(zip(texts[: len(asked.ids)], asked.mask, strict=True)):
        begin = int(here.sum())
        tokens = text[ids.shape[1] - begin :]
        ends = np.flatnonzero(np.isin(tokens[begin:], call.config.eos_token_ids))
        tokens = tokens[: begin + int(ends[0]) + 1] if len(ends) else tokens
        result: Any = tokens
        if isinstance(found, Output) and call.config.return_dict_in_generate:
            result = {"sequences": tokens, **_of_row(found, n, len(tokens) - begin)}
        mean = None if likely is None else float(likely[n, : len(tokens) - begin].mean())
        windows.append(Window(tokens, begin, result, mean, temperature is None or temperature < WARM))
    return found, windows


def is_wrong(call: Call, window: Window) -> bool:
    """Whether a transcript repeats itself, or is unlikely."""
    most, text = call.wishes.compression_ratio_threshold, window.tokens[window.begin :]
    if most is not None:
        size = int(math.log2(call.model.config.vocab_size) / 8) + 1
        data = b"".join(int(token).to_bytes(size, "little") for token in text)
        if len(data) / len(zlib.compress(data)) > most:
            return True
    return is_unlikely(call, window)


def is_unlikely(call: Call, window: Window) -> bool:
    """Whether a transcript's tokens are less likely than they shall be."""
    least = call.wishes.logprob_threshold
    return least is not None and window.likely is not None and window.likely < least


def segments(
    call: Call, window: Window, times: np.ndarray | None, offset: float, left: int
) -> tuple[list[dict[str, Any]], int]:
    """A window's transcript in parts, and how many frames are done with it.

    Two times in a row are the end of one part and the beginning of the next. What comes after the last such pair is
    left to the next window, unless a single time at the end says that nothing is said after it.

    Args:
        call: what is asked for.
        window: what was written.
        times: of each token, in seconds from the beginning of the recording.
        offset: when the window begins, likewise.
        left: frames of it.
    """
    end = len(window.tokens) - int(window.tokens[-1] in call.config.eos_token_ids and len(window.tokens) > window.begin)
    text = window.tokens[window.begin : end]
    stamps = text >= call.first_stamp
    closed = stamps[-2:].tolist() == [False, True]
    cuts = (np.flatnonzero(stamps[:-1] & stamps[1:]) + 1).tolist()
    step, first = left, call.first_stamp

    def part(begin: int, end: int, start: float, stop: float) -> dict[str, Any]:
        at = window.begin + begin, window.begin + end
        found = {"start": offset + start * SECONDS, "end": offset + stop * SECONDS, "tokens": text[begin:end],
                 "idxs": at, "result": window.result}  # fmt: skip
        return found if times is None else {**found, "token_timestamps": times[slice(*at)]}

    if not cuts:
        said = text[stamps]
        stop = said[-1] - first if len(said) and said[-1] != first else left // STRIDE
        return [part(0, len(text), 0, int(stop))], step
    if closed:
        cuts.append(len(text))
    else:
        step = int(text[cuts[-1] - 1] - first) * STRIDE or left  # no step would be forever
        cuts[-1] += 1  # with the time that the next part begins at
    found, begin = [], 0
    for cut in cuts:
        last = -2 if cut == cuts[-1] and not closed else -1
        found.append(part(begin, cut, int(text[begin] - first), int(text[begin:cut][last] - first)))
        begin = cut
    return found, step


def token_times(call: Call, memory: jax.Array, window: Window, source: int, seek: int) -> np.ndarray:
    """When each token [P + N] was said, in seconds; 0 before the transcript; of the last as of the one before it."""
    tokens, new = window.tokens, len(window.tokens) - window.begin
    out = np.zeros(len(tokens), np.float32)
    if new < 2:
        return out
    heads = tuple(tuple(pair) for pair in call.needs("alignment_heads", "the time of each token"))
    ids = np.pad(tokens[:-1], (0, min(bucket(len(tokens)), call.model.config.max_target_positions) - len(tokens) + 1))
    looks = np.asarray(_looks(call.model, memory[None], ids[None], heads=heads))[:, window.begin : len(tokens) - 1]
    if call.heard is not None:
        looks = looks[..., : max(1, (int(call.heard[source]) - seek) // STRIDE)]
    found = token_frames(looks, call.model.config.median_filter_width) * SECONDS + seek * SECONDS / STRIDE
    out[window.begin : -1], out[-1] = found, found[-1]
    return out


def answer(call: Call, segments: list[list[dict[str, Any]]]) -> Any:
    """What is returned of segments."""
    own = call.wishes
    pad = call.config.pad_token_id
    pad = (*call.config.eos_token_ids, 0)[0] if pad is None else pad
    sequences = jnp.asarray(_filled([[one["tokens"] for one in each] for each in segments], pad, np.int32))
    whole = own.return_segments or call.config.return_dict_in_generate
    if not whole and not own.return_token_timestamps:
        return sequences
    times = None
    if own.return_token_timestamps:
        times = jnp.asarray(_filled([[x["token_timestamps"] for x in each] for each in segments], None, np.float32))
    return Transcription(sequences=sequences, token_timestamps=times, segments=segments if whole else None)


@partial(jax.jit, static_argnames="heads")
def _looks(model: Model, memory: jax.Array, ids: jax.Array, *, heads: tuple[tuple[int, int], ...]) -> jax.Array:
    """Weights of some (layer, head) over the encoder's states, of one text: [heads, T, S]."""
    heard = BaseModelOutput(last_hidden_state=memory)
    seen = model(encoder_outputs=heard, decoder_input_ids=ids, output_attentions=True).cross_attentions
    return jnp.stack([seen[layer][0, head] for layer, head in heads])


@jax.jit
def _log_probabilities(sequences: jax.Array, scores: Any, parents: Any, temperature: Any) -> jax.Array:
    """Of every new token [R, N], at the temperature 1."""
    return transition_scores(sequences, [x * temperature for x in scores], parents, normalize=True)


def _of_row(found: Any, row: int, steps: int) -> dict[str, Any]:
    """The scores and logits [V] of a text's tokens."""
    parents = getattr(found, "beam_indices", None)
    places = [row] * steps if parents is None else np.asarray(parents)[row]
    return {
        name: tuple(x[place] for x, place in zip(found[name][:steps], places, strict=False))
        for name in ("scores", "logits")
        if getattr(found, name) is not None
    }


def _filled(texts: list[list[np.ndarray]], value: Any, dtype: Any) -> np.ndarray:
    """Texts of parts [B, N], filled up with a value; with None, with their last one."""
    whole = [np.concatenate(parts) if parts else np.zeros(0, dtype) for parts in texts]
    out = np.zeros((len(whole), max(map(len, whole), default=0)), dtype)
    for own, text in zip(out, whole, strict=True):
        own[: len(text)] = text
        own[len(text) :] = value if value is not None else text[-1] if len(text) else 0
    return out
