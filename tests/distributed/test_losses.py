"""Every loss, gathered and in a ring, on W ranks with uneven rows against float64 in one process."""

import pytest

from tests.distributed.loss_cells import TOLERANCE, loss_errors
from tests.objectives.cases import LOSSES


@pytest.mark.parametrize("world", [*(pytest.param(w, marks=pytest.mark.slow) for w in (1, 4)), 2, 3])
def test_losses_equal_their_definitions_on_any_number_of_ranks(world):
    seen = 0
    for name, path, of_loss, of_gradients in loss_errors(world):
        worst = max(of_gradients.items(), key=lambda item: item[1])
        assert of_loss <= TOLERANCE, (name, path, of_loss)
        assert worst[1] <= TOLERANCE, (name, path, worst)
        seen += 1
    assert seen == 2 * len(LOSSES)


@pytest.mark.parametrize("mutation", ["a column log-sum-exp dropped", "a mask ignored", "a block not passed on"])
def test_the_check_notices(mutation):
    found = {path: max(of_loss, *of.values()) for _, path, of_loss, of in loss_errors(2, ["three pairs"], mutation)}
    assert found["gathered"] > 100 * TOLERANCE or mutation.startswith("a block")
    assert found["ring"] > 100 * TOLERANCE or mutation.startswith("a column")
