"""Makes the goldens of the streamers: what the reference's print after every token of a text.

    python tests/oracle/make_streamers.py [--check] [--any-version]

Writes `tests/data/text/streamers.json`: for both small tokenizers of `tests/data/text/` some texts as ids, cut into a
prompt and tokens, and what is handed out after each `put` and at the `end`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, TextStreamer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oracle.make_goldens import refuse_other_versions

DATA = Path(__file__).resolve().parent.parent / "data" / "text"
TEXTS = {
    "words": "A parameter is declared once: its spec says what exists, and it doesn't say more.",
    "lines": "The dog\njumps over\n\nthe fox, twice\n",
    "chinese": "The words 東京 are two 漢字, the rest 한국어 かな are not",
    "bytes": "naïve — café 🙂 end",
    "blanks": "  two  spaces, and a tab\tand  ",
    "one": "A",
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without_prompt": {"skip_prompt": True},
    "without_special": {"skip_special_tokens": True, "clean_up_tokenization_spaces": True},
}
PROMPT = 3


class Recorder(TextStreamer):  # type: ignore[misc]
    """A streamer of the reference that writes down instead of printing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.found: list[list[Any]] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Writes down what is handed out."""
        self.found.append([text, stream_end])


def record(name: str) -> dict[str, Any]:
    """What a tokenizer's texts become."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / name)
    out: dict[str, Any] = {}
    for title, text in TEXTS.items():
        ids = tokenizer(text)["input_ids"]
        out[title] = {"ids": ids}
        for call, arguments in CALLS.items():
            streamer = Recorder(tokenizer, **arguments)
            streamer.put(torch.tensor([ids[:PROMPT]]))
            for one in ids[PROMPT:]:
                streamer.put(torch.tensor([one]))
            streamer.end()
            out[title][call] = streamer.found
    return out


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored goldens, write nothing")
    parser.add_argument("--any-version", action="store_true", help="do not insist on the versions of requirements.txt")
    args = parser.parse_args()
    if not args.any_version:
        refuse_other_versions()
    golden = {"version": transformers.__version__, "prompt": PROMPT, "calls": CALLS}
    golden |= {"texts": {name: record(name) for name in ("wordpiece", "bytelevel")}}
    lines = json.dumps(golden, ensure_ascii=False, separators=(",", ":")).replace('"ids"', '\n"ids"') + "\n"
    path = DATA / "streamers.json"
    if not args.check:
        path.write_text(lines, encoding="utf-8")
        return 0
    return int(path.read_text(encoding="utf-8") != lines)


if __name__ == "__main__":
    sys.exit(main())
