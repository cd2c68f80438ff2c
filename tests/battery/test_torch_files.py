"""Models that the reference saved as `pytorch_model.bin`: one file, shards, and the format before PyTorch 1.6."""

from pathlib import Path

import jax
import numpy as np
import pytest

import formax
from battery.goldens import Golden

DATA = Path(__file__).resolve().parent.parent / "data" / "torch_bin"
GOLDEN = Golden("bert", "act_relu")


@pytest.mark.parametrize("folder", ["bert", "bert_legacy", "bert_shards"])
def test_a_pickled_model_is_the_safetensors_one(folder: str, tmp_path: Path) -> None:
    expected, _ = GOLDEN.open(tmp_path)
    found, report = formax.from_pretrained(DATA / folder, output_loading_info=True)
    assert (report.initialised, report.mismatched, report.left_out) == ((), (), ())
    assert found.architecture is expected.architecture
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
