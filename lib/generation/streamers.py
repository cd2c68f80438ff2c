"""Streamers: handed the tokens of a text one by one, they give the text as soon as it can no longer change.

    model.generate(**tokenizer("An increasing sequence: one,"), streamer=TextStreamer(tokenizer))

What a token means can depend on the next one (half a character, a space that is taken out before a comma), so a text is
decoded from its last line break on, and given up to its last space. After a line break, or a character of a script that
writes no spaces, all of it is.

Names and behaviour are those of transformers' streamers.
"""

from __future__ import annotations

import asyncio
import queue
from typing import Any, Protocol

import numpy as np

# Blocks of Unicode whose characters stand alone (Chinese ones; Korean and kana are written with other rules).
_ALONE = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


class Decodes(Protocol):
    """What streamers ask of a tokenizer."""

    def decode(self, token_ids: Any, /) -> str: ...


class BaseStreamer:
    """What `generate` asks of its `streamer`; a streamer of your own need not inherit from it."""

    def put(self, value: Any) -> None:
        """Takes the prompt, int [B, T], and after it the tokens of every step, int [B]."""
        raise NotImplementedError(f"{type(self).__name__} has no put()")

    def end(self) -> None:
        """Hears that the text is complete."""
        raise NotImplementedError(f"{type(self).__name__} has no end()")


class TextStreamer(BaseStreamer):
    """Prints a text while it is written, word by word.

    Override `on_finalized_text` to do something else with the words.
    """

    def __init__(self, tokenizer: Decodes, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        """A streamer.

        Args:
            tokenizer: what decodes.
            skip_prompt: leave out what the text began with.
            **decode_kwargs: arguments of its `decode`, such as `skip_special_tokens=True`.
        """
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._line: list[int] = []  # tokens since the last line break
        self._given = 0  # characters of them that were handed out
        self._at_prompt = True

    def put(self, value: Any) -> None:
        """Takes tokens, [T] or [1, T], and hands out the words that they complete.

        Raises:
            ValueError: tokens of several texts.
        """
        ids = np.asarray(value)
        if ids.ndim > 1 and len(ids) > 1:
            raise ValueError(f"{type(self).__name__} takes one text at a time, got the tokens of {len(ids)}")
        if self._at_prompt:
            self._at_prompt = False
            if self.skip_prompt:
                return
        self._line += ids.reshape(-1).tolist()
        text = self._decoded()
        if text.endswith("\n"):
            found = text[self._given :]
            self._line, self._given = [], 0
        else:
            end = len(text) if text and _stands_alone(text[-1]) else text.rfind(" ") + 1
            found = text[self._given : end]
            self._given += len(found)
        self.on_finalized_text(found)

    def end(self) -> None:
        """Hands out what is left; the next text begins with a prompt again."""
        rest = self._decoded()[self._given :] if self._line else ""
        self._line, self._given, self._at_prompt = [], 0, True
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Takes words, or nothing, after every token; here they are printed, with a line break at the end."""
        print(text, flush=True, end="\n" if stream_end else "")

    def _decoded(self) -> str:
        return self.tokenizer.decode(self._line, **self.decode_kwargs)


class TextIteratorStreamer(TextStreamer):
    """Words of a text that another thread writes, as an iterator.

    It ends with the text, and can then be handed to another call. If that thread fails there is no end: a `timeout`
    raises `queue.Empty`.
    """

    def __init__(
        self, tokenizer: Decodes, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        """A streamer.

        Args:
            tokenizer: what decodes.
            skip_prompt: leave out what the text began with.
            timeout: seconds to wait for the next words; None for ever.
            **decode_kwargs: arguments of its `decode`.
        """
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: queue.Queue[str | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Takes words to where the iterator finds them."""
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def __iter__(self) -> TextIteratorStreamer:
        return self

    def __next__(self) -> str:
        text = self.text_queue.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text


class AsyncTextIteratorStreamer(TextStreamer):
    """Words of a text that another thread writes, for `async for`. It is made where an event loop runs.

    If that thread fails there is no end: a `timeout` raises `TimeoutError`.
    """

    def __init__(
        self, tokenizer: Decodes, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        """A streamer; the arguments are those of `TextIteratorStreamer`.

        Raises:
            RuntimeError: no event loop is running.
        """
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.loop = asyncio.get_running_loop()
        self.text_queue: asyncio.Queue[str | None] = asyncio.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Takes words to the event loop."""
        for one in (text, None) if stream_end else (text,):
            self.loop.call_soon_threadsafe(self.text_queue.put_nowait, one)

    def __aiter__(self) -> AsyncTextIteratorStreamer:
        return self

    async def __anext__(self) -> str:
        async with asyncio.timeout(self.timeout):
            text = await self.text_queue.get()
        if text is None:
            raise StopAsyncIteration
        return text


def _stands_alone(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _ALONE)
