"""Every loss, gathered and in a ring, on W ranks with uneven rows against float64 in one process."""

import pytest

from tests.distributed.cells import TOLERANCE, loss_errors


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_losses_equal_their_definitions_on_any_number_of_ranks(world):
    seen = 0
    for name, path, of_loss, of_gradients in loss_errors(world):
        worst = max(of_gradients.items(), key=lambda item: item[1])
        assert of_loss <= TOLERANCE, (name, path, of_loss)
        assert worst[1] <= TOLERANCE, (name, path, worst)
        seen += 1
    assert seen >= 30


@pytest.mark.parametrize("mutation", ["a column log-sum-exp dropped", "a mask ignored"])
def test_the_check_notices(mutation):
    ((_, _, of_loss, of_gradients), _) = loss_errors(2, ["InfoNCE, same text"], mutation)
    assert max(of_loss, *of_gradients.values()) > 100 * TOLERANCE
