"""Makes `tests/data/transcriptions.json`: what the reference's Whisper writes down, of a tiny model of known weights.

    python tests/oracle/make_transcriptions.py          # writes
    python tests/oracle/make_transcriptions.py --check  # compares with the file; status 1 if it differs

Run it in the environment of requirements.txt. As in make_generate.py no text here hangs on the last bits: every case is
repeated with weights that are a little off.

What a reimplementer must know, and may not expect
--------------------------------------------------

- Of the tokens before a transcript none is returned, nor is the end; before 4.4x both were.
- Silence is judged by a pass of its own over the prompt, before its first token; the token for it is the one before
  the token of "no times".
- Of a batch, a row that is not to be conditioned on what was said before gets the marker of that all the same, and one
  that is left of others in a prompt of unequal lengths has its padding counted as positions. Whether anything is
  conditioned at all hangs on the first recording. formax has none of the three: rows are as they are alone.
- A single recording is heard to the end of its array, whatever its mask says. Here the mask counts.
- `token_timestamps` of more than one window do not count from the beginning of the recording, but of the window;
  those in the segments do.
- A transcript of two equal times and nothing else would be written for ever.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oracle import cases
from oracle.make_generate import SEEDS, WHISPER, Settings, opened, settle, written

PATH = Path(__file__).resolve().parent.parent / "data" / "transcriptions.json"
WIDTH = 24  # frames of a window
LANGUAGES = {"<|en|>": 42, "<|de|>": 43, "<|zh|>": 44}
TASKS = {"translate": 45, "transcribe": 46}
SETTINGS: Settings = {
    "pad_token_id": 40,
    "bos_token_id": 40,
    "eos_token_id": 40,
    "decoder_start_token_id": 41,
    "lang_to_id": LANGUAGES,
    "task_to_id": TASKS,
    "prev_sot_token_id": 47,
    "no_timestamps_token_id": 49,
    "is_multilingual": True,
    "max_initial_timestamp_index": 4,
    "alignment_heads": [[0, 1], [1, 2], [1, 3]],
    "suppress_tokens": [41, 42, 43, 44, 45, 46, 47, 48],
    "begin_suppress_tokens": [7, 40],
    "max_length": 48,
}
MODEL = replace(
    WHISPER,
    config=WHISPER.config
    | {
        "vocab_size": 63,  # 40 words, the end, special tokens, and times from 0 to 0.24 s
        "max_target_positions": 48,
        "median_filter_width": 3,
        "pad_token_id": 40,
        "bos_token_id": 40,
        "eos_token_id": 40,
        "decoder_start_token_id": 41,
    },
    scale=(
        (r"embed_tokens", 1.0),
        (r"decoder.*self_attn\.out_proj\.weight", 0.5),
        (r"encoder_attn\.out_proj\.weight", 0.8),
        (r"encoder_attn\.(q|k)_proj\.weight", 2.5),
        (r"encoder_attn\.v_proj\.weight", 2.0),
    ),
    settings=SETTINGS,
)
# Recordings: how many frames each has. Those of one case have one array, with zeros at the end of the shorter.
RECORDINGS = {"short": (24, 24, 24), "one short": (24,), "long": (100,), "two long": (70, 101), "three": (30, 90, 49)}
STAMPED = {"return_timestamps": True}
SEGMENTS = STAMPED | {"return_segments": True}
CASES: dict[str, tuple[str, Settings]] = {
    "asks for the language": ("short", {}),
    "a language": ("short", {"language": "english"}),
    "languages": ("short", {"language": ["de", "<|zh|>", "English"], "task": "translate"}),
    "a task": ("short", {"task": "translate"}),
    "times": ("short", SEGMENTS),
    "times, beams": ("short", SEGMENTS | {"num_beams": 3, "language": "de"}),
    "older settings": ("short", {"_settings": {"forced_decoder_ids": [[1, 43], [2, 46], [3, 49]]}}),
    "older settings that ask": ("short", {"_settings": {"forced_decoder_ids": [[1, None], [2, 45]]}} | STAMPED),
    "a prompt": ("short", {"prompt_ids": [47, 3, 9, 11], "language": "en"}),
    "few tokens": ("short", {"max_new_tokens": 5, "language": "zh"}),
    "times of tokens": ("one short", {"return_token_timestamps": True, "_mask": True, "language": "en"}),
    "times of tokens, part": ("one short", {"return_token_timestamps": True, "num_frames": 17} | SEGMENTS),
    "times of tokens, beams": ("one short", {"return_token_timestamps": True, "num_beams": 2, "_mask": True}),
    "long": ("long", SEGMENTS),
    "long, beams": ("long", SEGMENTS | {"num_beams": 2}),
    "long, times of tokens": ("long", SEGMENTS | {"return_token_timestamps": True, "_mask": True}),
    "two long": ("two long", SEGMENTS | {"_mask": True, "language": "en"}),
    "three": ("three", {"_mask": True}),
    "goes on": ("long", SEGMENTS | {"condition_on_prev_tokens": True}),
    "goes on from a prompt": ("long", {"condition_on_prev_tokens": True, "prompt_ids": [47, 3, 9, 11]}),
    "goes on, always a prompt": (
        "long",
        {"condition_on_prev_tokens": True, "prompt_ids": [47, 3, 9, 11], "prompt_condition_type": "all-segments"},
    ),
    "a prompt for each": ("long", {"prompt_ids": [47, 3, 9, 11]}),
    "silence": (
        "long",
        SEGMENTS | {"logprob_threshold": -1.5, "no_speech_threshold": 0.004, "temperature": [0.0], "language": "en"},
    ),
    "too hot to go on": ("long", SEGMENTS | {"condition_on_prev_tokens": True, "temperature": [0.0, 0.0],
                                             "compression_ratio_threshold": 0.5}),
}  # fmt: skip


def features(name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Recordings and which of their frames there are."""
    lengths = RECORDINGS[name]
    mask = cases.mask(*lengths, width=max(lengths))
    return cases.floats(f"transcriptions.{name}", len(lengths), 8, max(lengths)) * mask[:, None], mask


def answered(stored: Settings, name: str, seed: int | None) -> Any:
    """What the reference writes, as JSON has it."""
    recordings, settings = CASES[name]
    given = {key: value for key, value in settings.items() if not key.startswith("_")}
    model = opened(stored, settings.get("_settings"), seed)
    sound, mask = features(recordings)
    if settings.get("_mask"):
        given["attention_mask"] = torch.from_numpy(mask)
    if "prompt_ids" in given:
        given["prompt_ids"] = torch.tensor(given["prompt_ids"])
    with torch.inference_mode():
        out = model.generate(torch.from_numpy(sound.astype(np.float32)), **given)
    if isinstance(out, torch.Tensor):
        return {"sequences": out.tolist()}
    found: Settings = {"sequences": out["sequences"].tolist()}
    if "token_timestamps" in out:
        found["token_timestamps"] = np.round(out["token_timestamps"].numpy(), 4).tolist()
    if "segments" in out:
        found["segments"] = [
            [
                {"start": round(float(one["start"]), 4), "end": round(float(one["end"]), 4),
                 "tokens": one["tokens"].tolist(), "idxs": list(one["idxs"])}
                for one in each
            ]
            for each in out["segments"]
        ]  # fmt: skip
    return found


def main() -> int:
    stored = written(MODEL)
    found: dict[str, Any] = {"transformers": transformers.__version__, "model": stored, "cases": {}}
    wrong = []
    for name, (recordings, settings) in CASES.items():
        out = answered(stored, name, None)
        if any(answered(stored, name, seed) != out for seed in SEEDS):
            wrong.append(f"{name}: weights that are a little off change the text")
        said = {"recordings": list(RECORDINGS[recordings]), "name": recordings, "settings": settings}
        found["cases"][name] = said | out
    if wrong:
        sys.exit("\n".join(wrong))
    return settle(PATH, json.loads(json.dumps(found)))


if __name__ == "__main__":
    sys.exit(main())
