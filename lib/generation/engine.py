"""`Engine`: many texts at once, asked for at any time, each with settings of its own (continuous batching).

Every text has a slot while it is written (Yu et al. 2022, "Orca"), and its keys and values are in pages of pools that
all share (Kwon et al. 2023, arXiv:2309.06180). A step reads what is unread of prompts, up to a limit, and writes a
token of every text that is read. When pages run out, the youngest text gives its own back and is read again later.

What is decided on the host (which text is in which slot, whose pages) is plain Python; what runs on the device are the
two programs of `generation.slots`.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from formax.generation import slots as programs
from formax.generation.config import GenerationConfig
from formax.generation.decoding import Feed, cache_dtype
from formax.generation.pages import PagePool, content_of
from formax.generation.requests import Ends, Handle, texts_of, wanted
from formax.generation.task import positions_of
from formax.model import Model

# Pieces of prompts are filled up to these sizes, or cut to them: the least, and by default the largest.
LEAST, LARGEST = 16, 512
# Tokens of a text at most, where nobody says. Models of today have positions for more than there is memory.
LENGTH = 2048


class Engine:
    """Writes texts with one model.

        engine = Engine(model, slots=8)
        handle = engine.submit(ids, max_new_tokens=64, temperature=0.7)
        for handle, token in engine.run():
            ...

    Nothing runs by itself: `step`, `run`, a handle's iterator and its `result` do. After `start` (or inside `with`) a
    thread of its own does, and `submit`, `cancel` and handles may be used from any thread.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 8,
        pages: int | None = None,
        page_size: int = 16,
        max_length: int | None = None,
        chunk: int = LARGEST,
        share_prefixes: bool = True,
        tokenizer: Any = None,
    ) -> None:
        """An engine without requests.

        Args:
            model: a decoder with a head for the next token.
            slots: texts that are written at once.
            pages: pages that all texts share; enough for all slots at their longest by default.
            page_size: positions of a page; kernels read pages of 16, 32, 64, ...
            max_length: tokens of a text at most, prompt included; by default the model's positions, but 2048 at most.
            chunk: positions of prompts that a step reads at most, a power of two: a long prompt does not keep the
                others waiting for longer.
            share_prefixes: texts that begin with the same tokens share the pages of these.
            tokenizer: for `stop_strings`; or the text of each token, {id: text}.

        Raises:
            TypeError: a model that writes no text, or about something else than text.
            ValueError: impossible sizes.
        """
        if not model.architecture.writes:
            raise TypeError(f"{model.architecture.name} has no scores of a next token: open it as a CausalLM")
        if "decoder_input_ids" in model.input_names or model.input_names[0] != "input_ids":
            raise TypeError(
                f"{model.architecture.name} writes about what its {model.input_names[0]} say: the Engine serves "
                "decoders alone, for others there is generate()"
            )
        limit = positions_of(model)
        if max_length is None:
            max_length = min(getattr(model.config, "max_position_embeddings", None) or LENGTH, LENGTH)
        for name, value in (("slots", slots), ("page_size", page_size), ("chunk", chunk), ("max_length", max_length)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number, 1 or more")
        if limit is not None and max_length > limit:
            raise ValueError(f"max_length={max_length} is more than the {limit} positions of the model")
        if chunk & (chunk - 1):
            raise ValueError(f"chunk={chunk} must be a power of two")
        each = -(-max_length // page_size)
        pages = slots * each if pages is None else pages
        if pages < 1:
            raise ValueError(f"pages={pages} must be 1 or more")

        self.model = replace(model, generation_config=None)
        self._settings = model
        self.max_length, self.page_size, self.chunk = max_length, page_size, chunk
        self._largest = max(chunk, LEAST) if limit is None else min(max(chunk, LEAST), limit)
        self._feed = Feed.of(self.model)
        self._store = programs.store_of(self.model, slots, pages, page_size, max_length, cache_dtype(model))
        self._paged, self._exact = programs.is_paged(self._store), programs.is_recurrent(self._store)
        self._share = share_prefixes and not self._exact  # a state is not in pages
        self._pool = PagePool(pages if self._paged else 0)
        self._texts = None if tokenizer is None else texts_of(tokenizer)

        self._rows = programs.Rows.empty(slots)
        self._table = np.zeros((slots, each), np.int32)
        self._on_device: programs.Rows | None = None
        self._table_on_device: Any = None
        self._in: list[Handle | None] = [None] * slots

        self._stepping = threading.RLock()  # held by who runs a step
        self._asking = threading.Condition()  # held for a moment by who asks for something
        self._asked: list[Handle] = []
        self._cancelled: set[Handle] = set()
        self._waiting: list[Handle] = []
        self._count = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._error: BaseException | None = None  # what broke it
        self.steps = 0
        self.evictions = 0
        self.pages_reused = 0

    # --- asking

    def submit(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None = None,
        *,
        key: Any = None,
        priority: int = 0,
        on_token: Callable[[Handle, int], Any] | None = None,
        stop: Callable[[int], bool] | None = None,
        **settings: Any,
    ) -> Handle:
        """Asks for a text; from any thread, at any time.

        Args:
            input_ids: the prompt, int [T] or [1, T].
            generation_config: settings; what they leave at the defaults is as the model's own have it.
            key: a `jax.random.key` that decides what is drawn, whatever other texts there are; another every time
                without one.
            priority: requests with a lower one go first; those with the same one in the order they came.
            on_token: called with the handle and every token, by the thread that runs the step.
            stop: called with every token; the text ends with the one that it returns True for.
            **settings: `requests.SETTINGS` under the names of `generate`, `presence_penalty` and `frequency_penalty`.
                A `key`, or a temperature, `top_k`, `top_p` or `min_p`, means sampling where `do_sample` is not said;
                `temperature=0` is greedy search.

        Raises:
            TypeError: a setting that nobody knows, or that `generate` alone does.
            ValueError: an empty prompt, ids off the vocabulary, a text longer than there is room for, an impossible
                setting.
            RuntimeError: the engine is closed.
        """
        ids = self._prompt(input_ids)
        want, strings = wanted(self._settings, len(ids), self.max_length, key, generation_config, settings)
        need = -(-(len(ids) + want.most - 1) // self.page_size)
        if self._paged and need > self._pool.size:
            raise ValueError(
                f"a text of {len(ids)} tokens and {want.most} new ones needs {need} pages, there are {self._pool.size}"
            )
        stops: tuple[Callable[[int], bool], ...] = () if stop is None else (stop,)
        if strings:
            if self._texts is None:
                raise ValueError("stop_strings need the tokenizer of the model: Engine(model, tokenizer=...)")
            stops += (Ends(strings, self._texts, ids.tolist()),)
        with self._asking:
            if self._closed:
                raise RuntimeError("this Engine is closed") from self._error
            handle = Handle(ids, self._count, priority, want, self, on_token, stops)
            self._count += 1
            self._asked.append(handle)
            self._asking.notify_all()
        return handle

    def _prompt(self, input_ids: Any) -> np.ndarray:
        ids = np.asarray(input_ids)
        ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
        if ids.ndim != 1:
            raise ValueError(f"input_ids must be the ids of one text, [length], got shape {ids.shape}")
        if not ids.size:
            raise ValueError("input_ids is empty: give at least one token")
        if ids.dtype.kind not in "iu":
            raise ValueError(f"input_ids must hold token ids (whole numbers), it holds {ids.dtype}")
        size = int(self.model.config.vocab_size)
        if ids.min() < 0 or ids.max() >= size:
            raise ValueError(f"input_ids holds {ids.min()} to {ids.max()}, the vocabulary has {size}")
        return ids.astype(np.int32)

    def cancel(self, handle: Handle) -> None:
        """Ends a text as soon as the step that runs is over."""
        with self._asking:
            self._cancelled.add(handle)
            self._asking.notify_all()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        with self._asking:
            asked = bool(self._asked or self._cancelled)
        return asked or bool(self._waiting) or any(self._in)

    @property
    def is_running(self) -> bool:
        """Whether a thread of its own runs the steps."""
        return self._thread is not None

    def stats(self) -> dict[str, int]:
        """How many texts are written and waiting, and how many pages are free and saved; and what was done so far."""
        running = sum(one is not None for one in self._in)
        with self._asking:
            waiting = len(self._waiting) + len(self._asked)
        return {
            "running": running,
            "waiting": waiting,
            "pages": self._pool.size,
            "pages_free": self._pool.available,
            "pages_shared": self._pool.shared,
            "pages_reused": self.pages_reused,
            "steps": self.steps,
            "evictions": self.evictions,
        }

    # --- running

    def run(self) -> Iterator[tuple[Handle, int]]:
        """Steps until there is nothing to do: every token with the handle of its text, as they come."""
        while self.busy:
            yield from self.step()

    def step(self) -> list[tuple[Handle, int]]:
        """Reads what is unread, up to `chunk` positions, and writes a token of every text that is read."""
        with self._stepping:
            self._take_in()
            self._read_prompts()
            self._make_room()
            ready = [one for one in self._in if one is not None and self._is_read(one)]
            if not ready:
                return []
            chosen, sure = self._write(ready)
            self.steps += 1
            out = []
            for one in ready:
                token, slot = int(chosen[one.slot]), one.slot
                one.read += 1
                self._rows.put(slot, last=token, length=one.read, count=len(one.tokens) + 1)
                self._know_pages(one)
                one.put(token, float(sure[slot]))
                out.append((one, token))
                if one.done:
                    self._leave(one)
            return out

    def advance(self, handle: Handle, seen: int, until: float | None) -> None:
        """Sees to it that a text has more than `seen` tokens or is over: waits for it, or does a step itself."""
        if self.is_running:
            handle.wait(seen, until)
            return
        with self._stepping:
            if len(handle.tokens) <= seen and not handle.done:
                if not self.busy:
                    raise RuntimeError("this text is no longer asked for: the Engine was closed")
                self.step()

    def start(self) -> Self:
        """Steps run in a thread of its own from now on, whenever there is something to do."""
        with self._asking:
            if self._closed:
                raise RuntimeError("this Engine is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="formax.Engine", daemon=True)
                self._thread.start()
        return self

    def close(self) -> None:
        """Ends all texts, and the thread."""
        with self._asking:
            self._closed = True
            thread, self._thread = self._thread, None
            self._asking.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._end_all("cancelled", None)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            with self._asking:
                self._asking.wait_for(lambda: self._closed or self._asked or self._cancelled or self._waits_or_writes())
                if self._closed:
                    return
            try:
                self.step()
            except Exception as error:  # told to all who wait, since nobody sees what a thread raises
                with self._stepping:
                    with self._asking:
                        self._closed, self._thread, self._error = True, None, error
                    self._end_all("error", error)
                return

    def _waits_or_writes(self) -> bool:
        return bool(self._waiting) or any(self._in)

    def _end_all(self, reason: str, error: BaseException | None) -> None:
        with self._stepping, self._asking:
            for one in (*self._asked, *self._waiting, *filter(None, self._in)):
                if not one.done:
                    one.end(reason, error)
            self._asked.clear()
            self._waiting.clear()
            for one in filter(None, tuple(self._in)):
                self._leave(one)

    # --- which text is where

    def _take_in(self) -> None:
        """Requests that have come, and those that are no longer wanted."""
        with self._asking:
            asked, self._asked = self._asked, []
            cancelled, self._cancelled = self._cancelled, set()
        for one in asked:
            heapq.heappush(self._waiting, one)
        for one in cancelled:
            if one.done:
                continue
            if one.slot >= 0:
                self._leave(one)
            else:
                self._waiting.remove(one)
                heapq.heapify(self._waiting)
            one.end("cancelled")

    def _read_prompts(self) -> None:
        """Reads unread positions, those of the oldest text first; then lets waiting ones in while there is room."""
        left = self.chunk
        for one in sorted(filter(None, self._in)):
            left = self._read(one, left)
        while left > 0 and self._waiting and None in self._in:
            if not self._admit(self._waiting[0]):
                return  # those behind it wait, too: the first does not wait for ever
            left = self._read(heapq.heappop(self._waiting), left)

    def _admit(self, one: Handle) -> bool:
        """Gives a text a slot and the pages of all that it has so far; False if there are not enough."""
        text = one.text()
        if self._paged:
            pages, contents = self._shared(text)
            need = -(-len(text) // self.page_size) - len(pages)
            if need > self._pool.available:
                self._pool.release(pages)
                return False
            one.contents, one.read = contents, len(pages) * self.page_size
            self.pages_reused += len(pages)
            one.pages = [*pages, *(self._take() for _ in range(need))]
        one.slot = self._in.index(None)
        self._in[one.slot] = one
        self._table[one.slot] = 0
        self._table[one.slot, : len(one.pages)] = one.pages
        self._table_on_device = None
        ids = np.zeros(self.max_length, np.int32)
        ids[: len(text)] = text
        self._store = programs.place(self._store, jnp.int32(one.slot), jnp.asarray(ids))
        ends = np.full(programs.ENDS, -1, np.int32)
        ends[: len(one.want.ends)] = one.want.ends[: programs.ENDS]
        self._rows.put(
            one.slot,
            last=text[-1],
            length=len(text) - 1,
            live=False,
            count=len(one.tokens),
            least=one.want.least,
            ends=ends,
            key=one.want.key,
            samples=one.want.samples,
            **one.want.numbers,
        )
        self._on_device = None
        return True

    def _shared(self, text: list[int]) -> tuple[list[int], list[bytes]]:
        """Pages that hold the beginning of a text already; the last token is in none, since it is read for scores."""
        pages, contents, before = list[int](), list[bytes](), b""
        if not self._share:
            return pages, contents
        for start in range(0, (len(text) - 1) // self.page_size * self.page_size, self.page_size):
            before = content_of(before, text[start : start + self.page_size])
            page = self._pool.share(before)
            if page is None:
                break
            pages.append(page)
            contents.append(before)
        return pages, contents

    def _take(self) -> int:
        page = self._pool.take()
        assert page is not None
        return page

    def _leave(self, one: Handle) -> None:
        """Takes a text out of its slot; its pages are free, though what they hold is still known."""
        self._pool.release(one.pages)
        self._rows.put(one.slot, live=False)
        self._on_device = None
        self._in[one.slot] = None
        one.slot, one.read, one.pages, one.contents = -1, 0, [], []

    def _make_room(self) -> None:
        """Sees to it that every text that is read has a page for its next position."""
        if not self._paged:
            return
        for one in sorted(filter(None, self._in)):
            while one.slot >= 0 and self._is_read(one) and one.read // self.page_size >= len(one.pages):
                page = self._pool.take()
                if page is not None:
                    self._table[one.slot, len(one.pages)] = page
                    one.pages.append(page)
                    self._table_on_device = None
                else:
                    self._evict(max(filter(None, self._in)))

    def _evict(self, one: Handle) -> None:
        """Takes the pages of a text, which is read again when there are enough."""
        self._leave(one)
        self.evictions += 1
        heapq.heappush(self._waiting, one)

    # --- the device

    def _is_read(self, one: Handle) -> bool:
        return one.read == len(one.prompt) + len(one.tokens) - 1

    def _read(self, one: Handle, left: int) -> int:
        """Reads what is unread of a text, but not its last token, up to `left` positions; returns what is left."""
        unread = len(one.prompt) + len(one.tokens) - 1 - one.read
        text = one.text() if unread else []
        while unread > 0 and left > 0:
            count, size = self._piece(min(unread, left))
            piece = np.zeros((1, size), np.int32)
            piece[0, :count] = text[one.read : one.read + count]
            table = jnp.array(self._table[one.slot : one.slot + 1])  # a copy: this one changes before it is read
            where = (jnp.int32(one.slot), table, jnp.int32(one.read), jnp.int32(one.read + count))
            self._store = programs.read_piece(self.model, self._store, jnp.asarray(piece), *where, feed=self._feed)
            one.read += count
            unread, left = unread - count, left - count
            self._know_pages(one)
        if unread == 0 and not self._rows.live[one.slot]:
            self._rows.put(one.slot, live=True)
            self._on_device = None
        return left

    def _piece(self, unread: int) -> tuple[int, int]:
        """How many positions are read next, and how many the program reads: (count, size), powers of two.

        A state cannot leave out filling, so that there the piece is cut and not filled up.
        """
        if self._exact:
            size = 1 << (min(unread, self.chunk).bit_length() - 1)
            return size, size
        return unread, min(max(LEAST, 1 << (unread - 1).bit_length()), self._largest)

    def _write(self, ready: list[Handle]) -> tuple[np.ndarray, np.ndarray]:
        """One step of the device: tokens [B], and the logarithms of their probabilities."""
        if self._on_device is None:
            self._on_device = self._rows.on_device()
        if self._table_on_device is None:
            self._table_on_device = jnp.array(self._table)
        self._store, self._on_device, chosen, sure = programs.write(
            self.model, self._store, self._on_device, self._table_on_device, feed=self._feed
        )
        return np.asarray(chosen), np.asarray(sure)

    def _know_pages(self, one: Handle) -> None:
        """Says what is in the pages of a text that have become full."""
        full = one.read // self.page_size
        if not self._share or len(one.contents) >= full:
            return
        text = one.text()
        while len(one.contents) < full:
            start = len(one.contents) * self.page_size
            before = one.contents[-1] if one.contents else b""
            content = content_of(before, text[start : start + self.page_size])
            self._pool.know(one.pages[len(one.contents)], content)
            one.contents.append(content)
