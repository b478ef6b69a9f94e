"""The GPU's kernels, run by Triton's interpreter on the CPU, against the tiles that every device can do.

test_tiles_cuda.py starts this in a process of its own: Triton asks for TRITON_INTERPRET when it is imported. Float32
alone: Triton 3.6's interpreter multiplies the bits of bfloat16 numbers as if they were integers.
"""

from dataclasses import replace

import pytest
import torch

from muser_dist.objectives import tiles, tiles_cuda
from muser_dist.objectives.blocks import Block, Similarities
from muser_dist.objectives.statistics import LogSumExp, Rows, SoftplusSum
from muser_dist.objectives.targets import Matches
from muser_dist.objectives.tiles import TorchTiles

STATISTICS = {"softmax": LogSumExp(), "decoupled": LogSumExp(decoupled=True), "sigmoid": SoftplusSum()}
N, M, D = 70, 45, 40  # neither fills its pieces


tiles_cuda.PIECE = 32


def similarities(name: str, repeats: bool, scale: float) -> tuple[Similarities, Block, Block]:
    g = torch.Generator().manual_seed(7)
    total = N + M
    valid = torch.rand(total, generator=g) < 0.9 if repeats else torch.ones(total, dtype=torch.bool)
    label = torch.randint(0, 9, (total,), generator=g).int() if repeats else torch.arange(total).int()
    barred = tuple(torch.randint(0, 20, (total,), generator=g).int() for _ in range(2 if repeats else 0))
    x, y = (torch.nn.functional.normalize(torch.randn(n, D, generator=g), dim=1) for n in (N, M))
    x, y = x.masked_fill(~valid[:N, None], 0.0), y.masked_fill(~valid[N - 5 : N - 5 + M, None], 0.0)
    of = Similarities(
        scale,
        -3.0 if name == "sigmoid" else None,
        Matches(valid, label, repeats, barred, not repeats),
        STATISTICS[name],
    )
    return of, Block(x, 0), Block(y, N - 5)  # five rows are in both: with unique labels, those are the positives


@pytest.mark.parametrize("scale", [9.0, 100.0])
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("name", STATISTICS)
def test_kernels_make_the_same_of_a_tile(name, repeats, scale):
    of, x, y = similarities(name, repeats, scale)
    assert tiles_cuda.supports(of.statistic, torch.float32)
    fused, plain = tiles_cuda.FusedTiles(of, x, y), TorchTiles(of, x, y)
    i, j = slice(0, N), slice(0, M)
    finished = []
    of_blocks = zip(fused.states(i, j), plain.states(i, j), (x.places(i), y.places(j)), strict=True)
    for got, want, places in of_blocks:
        valid = of.matches.valid[places]  # what stands in other rows means nothing
        got, want = of.statistic.finish(got), of.statistic.finish(want)
        torch.testing.assert_close(got[:, valid], want[:, valid], rtol=2e-5, atol=2e-5)
        finished.append(want)
    g = torch.Generator().manual_seed(1)
    rows, columns = (Rows(value, torch.randn(value.shape, generator=g)) for value in finished)
    for known in (rows, columns):  # losses ask nothing of rows that have no candidate
        known.grad[known.value.isinf()] = 0.0
    got, want = fused.gradient(i, j, rows, columns), plain.gradient(i, j, rows, columns)
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_statistics_with_several_exponents_take_the_general_way():
    assert not tiles_cuda.supports(LogSumExp((1.5, 0.5, 0.0)), torch.float32)
    assert not tiles_cuda.supports(LogSumExp(), torch.float64)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_block_of_several_tiles(name, monkeypatch):
    of, x, y = similarities(name, True, 9.0)
    want = tiles.statistics(of, x, y)
    g = torch.Generator().manual_seed(1)
    rows, columns = (Rows(v := of.statistic.finish(state), torch.randn(v.shape, generator=g)) for state in want)
    for known in (rows, columns):
        known.grad[known.value.isinf()] = 0.0

    def everything() -> list[torch.Tensor]:
        into_x, into_y = torch.zeros_like(x.features), torch.zeros_like(y.features)
        of_bias = tiles.gradient(of, x, y, rows, columns, into_x, into_y)
        return [into_x, into_y, of_bias]

    expected = everything()
    monkeypatch.setattr(tiles, "_tiles", tiles_cuda.FusedTiles)
    monkeypatch.setattr(tiles_cuda.FusedTiles, "rows", 32)
    monkeypatch.setattr(tiles_cuda.FusedTiles, "columns", 32)
    for state, known, block in zip(tiles.statistics(of, x, y), (rows, columns), (x, y), strict=True):
        valid = of.matches.valid[block.places(slice(0, len(block.features)))]
        torch.testing.assert_close(of.statistic.finish(state)[:, valid], known.value[:, valid], rtol=2e-5, atol=2e-5)
    for got, exact in zip(everything(), expected, strict=True):
        assert (got - exact).norm() <= 1e-5 * exact.norm()


def test_small_terms_of_the_sigmoid_loss_are_not_lost():
    of, x, y = similarities("sigmoid", False, 1.0)
    of = replace(of, bias=-16.0)  # as in a large batch: log(1 + 1e-7), which float32 rounds to zero or to 1.2e-7
    away = Block(y.features, 1000)  # no row of both
    matches = Matches(torch.ones(1200, dtype=torch.bool), torch.arange(1200).int(), False, (), True)
    of = replace(of, matches=matches)
    i, j = slice(0, N), slice(0, M)
    got, want = tiles_cuda.FusedTiles(of, x, away).states(i, j), TorchTiles(of, x, away).states(i, j)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
