"""Streamers print what the reference's print; threads, event loops, and tokens for `async for`."""

import asyncio
import contextlib
import json
import queue
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import formax
from formax import generation
from formax.generation import AsyncTextIteratorStreamer, BaseStreamer, TextIteratorStreamer, TextStreamer

DATA = Path(__file__).parent / "data" / "text"
GOLDEN = json.loads((DATA / "streamers.json").read_text(encoding="utf-8"))
CASES = [(name, text, call) for name, texts in GOLDEN["texts"].items() for text in texts for call in GOLDEN["calls"]]
PROMPT = np.array([[5, 6, 7]])


def tokenizer(name: str = "bytelevel") -> Any:
    return formax.AutoTokenizer.from_pretrained(DATA / name)


@pytest.fixture(scope="module")
def model() -> Any:
    """A model that writes anything but the end."""
    sizes = {"vocab_size": len(tokenizer()), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = formax.AutoConfig.for_model("gpt2", **sizes, bos_token_id=0, eos_token_id=None)
    return formax.AutoModelForCausalLM.from_config(config, key=jax.random.key(3))


class Recorder(TextStreamer):
    """A streamer that writes down instead of printing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.found: list[list[Any]] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.found.append([text, stream_end])


@pytest.mark.parametrize(("name", "text", "call"), CASES)
def test_words_come_when_the_references_do(name: str, text: str, call: str) -> None:
    golden = GOLDEN["texts"][name][text]
    ids, prompt = np.asarray(golden["ids"]), GOLDEN["prompt"]
    streamer = Recorder(tokenizer(name), **GOLDEN["calls"][call])
    for _ in range(2):  # the second time as the first: nothing is left of it
        streamer.found = []
        streamer.put(ids[None, :prompt])
        for one in ids[prompt:]:
            streamer.put(one[None])
        streamer.end()
        assert streamer.found == golden[call]


def test_text_is_printed_while_it_is_written(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    own = tokenizer()
    ids = model.generate(input_ids=PROMPT, max_new_tokens=6, streamer=TextStreamer(own))
    assert capsys.readouterr().out == own.decode(ids[0]) + "\n"
    model.generate(input_ids=PROMPT, max_new_tokens=6, streamer=TextStreamer(own, skip_prompt=True))
    assert capsys.readouterr().out == own.decode(ids[0, 3:]) + "\n"


def test_words_from_another_thread(model: Any) -> None:
    own, streamer = tokenizer(), TextIteratorStreamer(tokenizer(), timeout=60, skip_prompt=True)
    arguments = {"input_ids": PROMPT, "max_new_tokens": 6}
    for _ in range(2):
        thread = threading.Thread(target=model.generate, kwargs={**arguments, "streamer": streamer})
        thread.start()
        words = list(streamer)
        thread.join()
        assert len(words) == 7
        assert "".join(words) == own.decode(model.generate(**arguments)[0, 3:])


def test_words_in_an_event_loop(model: Any) -> None:
    async def words() -> list[str]:
        streamer = AsyncTextIteratorStreamer(tokenizer(), timeout=60)
        writing = asyncio.to_thread(model.generate, input_ids=PROMPT, max_new_tokens=6, streamer=streamer)
        task = asyncio.create_task(writing)
        found = [text async for text in streamer]
        await task
        return found

    assert "".join(asyncio.run(words())) == tokenizer().decode(model.generate(input_ids=PROMPT, max_new_tokens=6)[0])


def test_nobody_waits_for_ever() -> None:
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(tokenizer(), timeout=0.01))

    async def wait() -> None:
        await anext(AsyncTextIteratorStreamer(tokenizer(), timeout=0.01))

    with pytest.raises(TimeoutError):
        asyncio.run(wait())
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncTextIteratorStreamer(tokenizer())


def test_what_streamers_refuse(model: Any) -> None:
    with pytest.raises(ValueError, match="takes one text at a time, got the tokens of 2"):
        TextStreamer(tokenizer()).put(np.ones((2, 3), int))
    with pytest.raises(ValueError, match="Recorder takes one text"):
        model.generate(input_ids=PROMPT.repeat(2, 0), max_new_tokens=2, streamer=Recorder(tokenizer()))
    with pytest.raises(NotImplementedError, match=r"BaseStreamer has no put"):
        BaseStreamer().put(PROMPT)
    with pytest.raises(NotImplementedError, match=r"BaseStreamer has no end"):
        BaseStreamer().end()


def test_names_at_the_top() -> None:
    assert formax.TextStreamer is TextStreamer
    assert formax.TextIteratorStreamer is TextIteratorStreamer
    assert formax.AsyncTextIteratorStreamer is AsyncTextIteratorStreamer


# ------------------------------------------------------------------------------------------------- tokens for async for


def test_tokens_in_an_event_loop(model: Any) -> None:
    """They are those of `stream`, of two texts at once, each with its settings, and the loop goes on meanwhile."""
    arguments = [{"input_ids": PROMPT, "max_new_tokens": 6}, {"input_ids": PROMPT + 1, "max_new_tokens": 4}]

    async def tokens(given: dict[str, Any]) -> list[Any]:
        return [one.tolist() async for one in model.astream(**given)]

    async def both() -> tuple[list[list[Any]], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        clock = asyncio.create_task(tick())
        found = await asyncio.gather(*map(tokens, arguments))
        clock.cancel()
        return found, ticks

    found, ticks = asyncio.run(both())
    assert found == [[one.tolist() for one in model.stream(**given)] for given in arguments]
    assert ticks > 2


class Slow:
    """Tokens that take their time, and know whether they were closed."""

    def __init__(self) -> None:
        self.steps, self.closed = 0, threading.Event()

    def __next__(self) -> np.ndarray:
        time.sleep(0.05)
        self.steps += 1
        return np.array([self.steps])

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_a_stream_that_is_left_is_closed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    monkeypatch.setattr(generation.api, "stream", lambda *_, **__: slow)
    tokens: Any = generation.astream

    async def read() -> None:
        async with contextlib.aclosing(tokens(None)) as stream:
            async for token in stream:
                if how == "break" and token[0] == 2:
                    break

    async def leave() -> None:
        task = asyncio.create_task(read())
        if how == "cancel":
            await asyncio.sleep(0.12)  # amid a step
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled() == (how == "cancel")

    asyncio.run(leave())
    assert slow.closed.wait(10)
    steps = slow.steps
    time.sleep(0.12)
    assert slow.steps == steps <= 3
    assert not [one for one in threading.enumerate() if one.name.startswith("formax-stream")]


def test_errors_come_with_the_first_token(model: Any) -> None:
    async def first(**given: Any) -> Any:
        return await anext(model.astream(input_ids=PROMPT, **given))

    with pytest.raises(TypeError, match="takes no 'max_new_token'"):
        asyncio.run(first(max_new_token=3))
    with pytest.raises(ValueError, match=r"stream\(\) is for greedy search"):
        asyncio.run(first(num_beams=2))
