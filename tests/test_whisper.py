"""Whisper's own `generate` against the reference's, of recordings of any length; and what is before a transcript.

`tests/oracle/make_transcriptions.py` makes the goldens and says where formax goes another way than the reference.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import cases
from test_generate_goldens import written

import formax
from formax.core.config import ConfigError
from formax.generation.whisper import alignment, detect_language, windows

GOLDEN = json.loads((Path(__file__).parent / "data" / "transcriptions.json").read_text())
CASES: dict[str, Any] = GOLDEN["cases"]
FIRST = 50  # the token of the time 0
Opener = Callable[..., Any]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opener:
    models: dict[str, Any] = {}

    def open_(**settings: Any) -> Any:
        key = json.dumps(settings)
        if key not in models:
            said = GOLDEN["model"]["generation_config"] | settings
            models[key] = formax.from_pretrained(written(tmp_path_factory.mktemp("whisper"), GOLDEN["model"], said))
        return models[key]

    return open_


def recordings(name: str) -> tuple[np.ndarray, np.ndarray]:
    case = CASES[name]
    lengths = case["recordings"]
    mask = cases.mask(*lengths, width=max(lengths))
    sound = cases.floats(f"transcriptions.{case['name']}", len(lengths), 8, max(lengths)) * mask[:, None]
    return sound.astype(np.float32), mask


def call(name: str) -> dict[str, Any]:
    sound, mask = recordings(name)
    given = {key: value for key, value in CASES[name]["settings"].items() if not key.startswith("_")}
    return {"input_features": sound, **given} | ({"attention_mask": mask} if "_mask" in CASES[name]["settings"] else {})


@pytest.mark.parametrize("name", CASES)
def test_it_writes_what_the_reference_writes(name: str, opened: Opener) -> None:
    case = CASES[name]
    out = opened(**case["settings"].get("_settings", {})).generate(**call(name))
    sequences = out if isinstance(out, jax.Array) else out.sequences
    np.testing.assert_array_equal(np.asarray(sequences), case["sequences"])
    if "segments" in case:
        assert [len(each) for each in out.segments] == [len(each) for each in case["segments"]]
        for mine, right in zip(sum(out.segments, []), sum(case["segments"], []), strict=True):
            np.testing.assert_array_equal(mine["tokens"], right["tokens"])
            assert (mine["start"], mine["end"]) == pytest.approx((right["start"], right["end"]), abs=1e-4)
            assert list(mine["idxs"]) == right["idxs"]
            np.testing.assert_array_equal(mine["result"][slice(*mine["idxs"])], mine["tokens"])
    if "token_timestamps" in case:
        times = np.asarray(out.token_timestamps)
        if "segments" in case:  # the reference's count from the window; those of its segments do not
            (parts,) = case["segments"]
            window = [one["start"] - (one["tokens"][0] - FIRST) * windows.SECONDS for one in parts]
            times = times - np.concatenate(
                [np.full(len(one["tokens"]), at) for one, at in zip(parts, window, strict=True)]
            )
        np.testing.assert_allclose(times, case["token_timestamps"], atol=1e-4)
