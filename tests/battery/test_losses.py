"""Losses are the reference's, on the goldens that record one."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from battery.goldens import LABELS, Golden, goldens
from formax.training import losses


def loss(golden: Golden, out: Any, labels: dict[str, Any]) -> Any:
    """The loss of an architecture's head, by its task."""
    match golden.architecture.task:
        case "ForPreTraining":
            words = losses.cross_entropy(out.prediction_logits, labels["labels"])
            return words + losses.cross_entropy(out.seq_relationship_logits, labels["next_sentence_label"])
        case "ForCausalLM" | "ForDoubleHeads":
            return losses.next_token(out.logits, labels["labels"])
        case "ForQuestionAnswering":
            return losses.span(out.start_logits, out.end_logits, labels["start_positions"], labels["end_positions"])
        case "ForSequenceClassification":
            return losses.sequence_classification(out.logits, labels["labels"], golden.config.problem_type)
        case _:
            return losses.cross_entropy(out.logits, labels["labels"])


@pytest.mark.parametrize("golden", [one for one in goldens() if "out.loss" in one.arrays], ids=str)
def test_losses_are_the_references(golden: Golden, tmp_path: Path) -> None:
    model, _ = golden.open(tmp_path)
    labels = {name: jnp.asarray(golden.arrays[f"in.{name}"]) for name in LABELS if f"in.{name}" in golden.arrays}
    found = loss(golden, model(**golden.inputs), labels)
    np.testing.assert_allclose(found, golden.arrays["out.loss"], rtol=1e-5)


def test_nothing_to_count_is_no_loss() -> None:
    assert losses.cross_entropy(jnp.ones((2, 3)), jnp.array([-100, -100])) == 0


def test_unknown_problem_type() -> None:
    with pytest.raises(ValueError, match="'ranking' is none of regression"):
        losses.sequence_classification(jnp.ones((2, 3)), jnp.array([0, 1]), "ranking")
