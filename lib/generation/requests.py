"""A text that an `Engine` is asked for: its settings, checked, and the handle on it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.core.config import ConfigError
from formax.generation import stopping
from formax.generation.config import GenerationConfig
from formax.generation.slots import ENDS
from formax.generation.state import number
from formax.generation.task import settings_of
from formax.model import Model

if TYPE_CHECKING:
    from formax.generation.engine import Engine

# Settings that each request may have its own of.
SETTINGS = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "eos_token_id",
    "stop_strings",
)
PENALTIES = ("presence_penalty", "frequency_penalty")
# Settings that only sampling reads: who names one wants to sample.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# What files say that has no effect on a single text here.
_SILENT = (
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "return_legacy_cache",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "early_stopping",
    "length_penalty",
    "disable_compile",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "extra",
)


class Ends:
    """Whether a text ends with the token that it is told, by texts of tokens on the host."""

    def __init__(self, strings: Sequence[str], texts: Mapping[int, str], prompt: Sequence[int]) -> None:
        self._strings, self._texts = tuple(strings), texts
        self._longest = max(map(len, self._strings))
        self._tail = "".join(texts.get(int(one), "") for one in prompt[-self._longest :])

    def __call__(self, token: int) -> bool:
        """Whether this token completes a string, wherever in the token it ends."""
        new = self._texts.get(token, "")
        found = any(s in self._tail[len(self._tail) - len(s) + 1 :] + new for s in self._strings if len(s) > 1)
        found = found or any(s in new for s in self._strings)
        self._tail = (self._tail + new)[-self._longest :]
        return found


@dataclass(frozen=True)
class Wanted:
    """What a request asks for.

    Attributes:
        most: new tokens at most.
        least: new tokens before which no end is chosen.
        ends: tokens that end the text.
        samples: draw tokens, or take the likeliest.
        key: uint32 [2].
        numbers: rows of `slots.Rows` for the rest.
    """

    most: int
    least: int
    ends: tuple[int, ...]
    samples: bool
    key: np.ndarray
    numbers: dict[str, float]


def wanted(
    model: Model,
    length: int,
    room: int,
    key: jax.Array | None,
    config: GenerationConfig | None,
    given: dict[str, Any],
) -> tuple[Wanted, tuple[str, ...]]:
    """The settings of a request for a prompt of `length` tokens in `room`: what is wanted, and the stop strings.

    Raises:
        TypeError: a setting that nobody knows, or that `generate` alone does; a key that is none.
        ValueError: an impossible one.
    """
    penalties = {name: given.pop(name, 0.0) for name in PENALTIES}
    for name in given:
        if name in SETTINGS:
            continue
        if any(f.name == name for f in dataclasses.fields(GenerationConfig)):
            raise TypeError(f"the Engine does not do {name}; generate() does")
        near = difflib.get_close_matches(name, (*SETTINGS, *PENALTIES), n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; it takes {', '.join((*SETTINGS, *PENALTIES))}"
        raise TypeError(f"submit() takes no {name!r}{hint}")
    greedy = given.get("temperature") == 0  # as servers say it
    if greedy:
        given = {**given, "temperature": 1.0}
    c, said = settings_of(model, config, given, None)
    default = GenerationConfig()
    for f in dataclasses.fields(GenerationConfig):
        if f.name not in (*SETTINGS, *_SILENT) and not f.name.startswith("_"):
            value = getattr(c, f.name)
            if value is not None and value != getattr(default, f.name):
                raise ConfigError(f"the Engine does not do {f.name}={value!r}, which the settings ask for: replace it")
    samples = c.do_sample
    if "do_sample" not in given:
        samples = samples or key is not None or any(given.get(name) is not None for name in _OF_SAMPLING)
    vocabulary = int(model.config.vocab_size)
    ends = c.eos_token_ids
    for one in ends:
        if not 0 <= one < vocabulary:
            raise ValueError(f"eos_token_id={one} is no token of a vocabulary of {vocabulary}")
    least = c.min_new_tokens or 0
    if least and len(ends) > ENDS:
        raise ValueError(f"min_new_tokens keeps a text from at most {ENDS} ends, there are {len(ends)}")
    numbers = {
        "temperature": number("temperature", _or(c.temperature, 1.0), lambda v: v > 0, "a number above 0"),
        "top_k": number("top_k", c.top_k or 0, lambda v: v >= 0 and v == int(v), "a whole number, 0 or more"),
        "top_p": number("top_p", _or(c.top_p, 1.0), lambda v: 0 <= v <= 1, "a number between 0 and 1"),
        "min_p": number("min_p", _or(c.min_p, 0.0), lambda v: 0 <= v <= 1, "a number between 0 and 1"),
        "repetition": number("repetition_penalty", _or(c.repetition_penalty, 1.0), lambda v: v > 0, "a number above 0"),
    }
    for name in PENALTIES:
        found = number(name, penalties[name], lambda v: -np.inf < v < np.inf, "a finite number")
        numbers[name.removesuffix("_penalty")] = found
    numbers["top_k"] = numbers["top_k"] or vocabulary
    strings = (c.stop_strings,) if isinstance(c.stop_strings, str) else tuple(c.stop_strings or ())
    if not all(strings):
        raise ValueError("stop_strings must be texts of one character or more")
    most = _most(c, said, length, room)
    return Wanted(most, least, ends, bool(samples and not greedy), _key(key), numbers), strings


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _most(c: GenerationConfig, said: set[str], length: int, room: int) -> int:
    """New tokens at most."""
    if length >= room:
        raise ValueError(f"the prompt has {length} tokens, the Engine's max_length={room} leaves none for a new one")
    if c.max_new_tokens is not None:
        most, name = c.max_new_tokens, f"max_new_tokens={c.max_new_tokens}"
    elif "max_length" in said and c.max_length is not None:
        most, name = c.max_length - length, f"max_length={c.max_length}"
    else:
        return min(20, room - length)
    if most < 1:
        raise ValueError(f"{name} leaves no new token after a prompt of {length}")
    if length + most > room:
        raise ValueError(f"a prompt of {length} tokens and {name} are more than the Engine's max_length={room}")
    return most


def _key(key: Any) -> np.ndarray:
    """What is drawn for a text, as uint32 [2]; another every time if no key is given."""
    if key is None:
        return np.frombuffer(secrets.token_bytes(8), np.uint32)
    if isinstance(key, jax.Array) and key.ndim == 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(key)
        return np.asarray(data if data.shape == (2,) else jax.random.bits(key, (2,), np.uint32))
    if getattr(key, "shape", None) == (2,) and getattr(key, "dtype", None) == np.uint32:
        return np.asarray(key)
    raise TypeError(f"key must be a jax.random.key, got {type(key).__name__}; write key=jax.random.key(0)")


@dataclass(eq=False)
class Handle:
    """A text that an `Engine` writes. Iterating over it (also `async for`) gives its tokens as they come.

    Attributes:
        prompt: int32 [T].
        tokens: what was written so far.
        logprobs: of each token, the logarithm of the probability that the model gave it.
        reason: why it ended, "stop" (a token, a string or a function said so), "length", "cancelled" or "error"; None
            before.
        error: what ended it, if something did that should not.
        number: how many were submitted before it.
        priority: lower ones go first.
        submitted, started, finished: in seconds, by `time.monotonic`: when it was asked for, when its first token was
            there, when its last was; None before.
    """

    prompt: np.ndarray
    number: int
    priority: int
    want: Wanted = field(repr=False)
    engine: Engine = field(repr=False)
    on_token: Callable[[Handle, int], Any] | None = field(default=None, repr=False)
    stop: tuple[Callable[[int], bool], ...] = field(default=(), repr=False)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list, repr=False)
    reason: str | None = None
    error: BaseException | None = field(default=None, repr=False)
    submitted: float = field(default_factory=time.monotonic, repr=False)
    started: float | None = field(default=None, repr=False)
    finished: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._news = threading.Condition()
        self._watchers: list[Callable[[], None]] = []
        # Where it is; the Engine's business.
        self.slot = -1
        self.read = 0
        self.pages: list[int] = []
        self.contents: list[bytes] = []

    @property
    def done(self) -> bool:
        """Whether the text has ended."""
        return self.reason is not None

    @property
    def order(self) -> tuple[int, int]:
        """Requests are served in this order."""
        return self.priority, self.number

    def __lt__(self, other: Handle) -> bool:
        return self.order < other.order

    def text(self) -> list[int]:
        """Prompt and what was written so far."""
        return [*self.prompt.tolist(), *self.tokens]

    def cancel(self) -> None:
        """Ends the text as soon as the step that runs is over; nothing happens to one that has ended."""
        self.engine.cancel(self)

    def result(self, timeout: float | None = None) -> np.ndarray:
        """Prompt and all tokens, int32 [T + N], as `generate` returns a row: waits until they are there.

        Raises:
            TimeoutError: they were not after `timeout` seconds.
            Exception: what ended the text, if something did that should not.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            self.engine.advance(self, len(self.tokens), until)
            if until is not None and time.monotonic() > until and not self.done:
                raise TimeoutError(f"the text has {len(self.tokens)} tokens after {timeout} seconds, and is not over")
        if self.error is not None:
            raise self.error
        return np.asarray(self.text(), np.int32)

    def __iter__(self) -> Iterator[int]:
        at = 0
        while True:
            while at < len(self.tokens):
                yield self.tokens[at]
                at += 1
            if self.done:
                break
            self.engine.advance(self, at, None)
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[int]:
        loop, woken, at = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed before the text was over
                loop.call_soon_threadsafe(woken.set)

        self._watchers.append(wake)
        try:
            while True:
                woken.clear()
                over = self.done  # asked before the tokens are: the last ones come first
                while at < len(self.tokens):
                    yield self.tokens[at]
                    at += 1
                if over:
                    break
                if self.engine.is_running:
                    await woken.wait()
                else:
                    await asyncio.to_thread(self.engine.advance, self, at, None)
        finally:
            self._watchers.remove(wake)
        if self.error is not None:
            raise self.error

    def wait(self, seen: int, until: float | None) -> None:
        """Waits until there are more than `seen` tokens, or the text is over, or it is `until`."""
        left = None if until is None else max(until - time.monotonic(), 0)
        with self._news:
            self._news.wait_for(lambda: self.done or len(self.tokens) > seen, left)

    def put(self, token: int, logprob: float) -> None:
        """One token more, told to all who wait; whether the text is over then is in `reason`."""
        with self._news:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.started = self.started or time.monotonic()
        try:
            ended = False
            for stop in self.stop:  # all are asked, since each keeps count of what it was told
                ended = stop(token) or ended
            if self.on_token is not None:
                self.on_token(self, token)
        except Exception as error:  # somebody else's function: it ends this text and no other
            self.end("error", error)
            return
        if token in self.want.ends or ended:
            self.end("stop")
        elif len(self.tokens) >= self.want.most:
            self.end("length")
        else:
            self._tell()

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """The text is over."""
        with self._news:
            self.error, self.reason, self.finished = error, reason, time.monotonic()
        self._tell()

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()
        for wake in tuple(self._watchers):
            wake()


def texts_of(vocabulary: Any) -> Mapping[int, str]:
    """The text of every token, of a tokenizer or as it is given."""
    return vocabulary if isinstance(vocabulary, Mapping) else stopping.texts_of(vocabulary)
