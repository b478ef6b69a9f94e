"""The largest chunk that fits: in a child process whose memory is limited for real."""

import multiprocessing
from dataclasses import replace

import pytest
import torch
from torch import nn

from muser_dist.config import ObjectiveConfig, PairConfig, RunConfig, TowerConfig
from muser_dist.errors import ConfigError, MuserError
from muser_dist.models.model import MultimodalModel
from muser_dist.train import find_chunk as module
from muser_dist.train.find_chunk import chunk_sizes, find_chunk, is_out_of_memory, out_of_memory_message
from tests.small import small_config

CPU = torch.device("cpu")
ROW = 3 * 2**27
"""Bytes that each row of the heavy tower needs in its backward pass: an output, its gradient, and its input's."""


class Heavy(nn.Module):
    """A tower whose activations are all that matters."""

    width = 4

    def __init__(self, data, *, fails: bool = False) -> None:
        super().__init__()
        self.linear, self.fails = nn.Linear(1, self.width), fails

    def forward(self, batch):
        if self.fails:
            raise RuntimeError("shapes do not match")
        few = self.linear(batch["audio_length"][:, None].float())
        return few * few[:, :1].expand(-1, 2**27 // 4).sigmoid().mean(dim=1, keepdim=True)


def heavy(**options) -> RunConfig:
    config = small_config(train={"workers": 2, "global_batch": 32, "samples": 64})
    audio = TowerConfig(f"{__name__}:Heavy", options)
    return replace(
        config,
        model=replace(config.model, audio=audio, spectrogram=None),
        objective=replace(config.objective, pairs=config.objective.pairs[:1]),
    )


def test_the_largest_chunk_that_fits_is_found():
    memory = 2**31
    found = find_chunk(heavy(), CPU, memory)
    assert found in (2, 4, 8)
    assert found * ROW < memory < 2 * found * ROW + 2**30  # 1 GiB is more than the interpreter and its libraries take


@pytest.mark.slow
def test_all_rows_of_a_worker_fit_where_memory_is_ample():
    assert find_chunk(small_config(train={"workers": 2, "global_batch": 24}), CPU) == 12


def test_all_that_the_optimizer_keeps_has_room(monkeypatch):
    limits, trained = [], 0
    monkeypatch.setattr(module, "_limit_memory", lambda device, size: limits.append(size))
    monkeypatch.setattr(module, "chunk_sizes", lambda config: [])
    for settings in ({}, {"ema_samples": 8}, {"zero_stage": 2, "workers": 2}, {"optimizer": "sgd"}):
        config = small_config(train={"zero_stage": 0, "workers": 1} | settings)
        trained = sum(p.numel() for p in MultimodalModel(config).parameters() if p.requires_grad)
        results, theirs = multiprocessing.Pipe(duplex=False)
        module._try_chunks(theirs, config, "cpu", 2**31)
        assert results.recv() == 0
    states = [(2**31 - limit) / (4 * trained) for limit in limits]
    # AdamW's two moments; a moving average; with a copy of the weights, shared by two; one moment.
    assert states == pytest.approx([2, 3, 1.5, 1], rel=1e-3)


def test_where_nothing_fits_the_mends_are_named():
    with pytest.raises(ConfigError, match=r"chunks of 1 rows; give --model\.audio\.checkpoint-activations, or"):
        find_chunk(heavy(), CPU, 2**20)


@pytest.mark.slow
def test_a_step_that_fails_for_another_reason_says_so():
    with pytest.raises(MuserError, match="not for want of memory: RuntimeError: shapes do not match"):
        find_chunk(heavy(fails=True), CPU, 2**33)


@pytest.mark.parametrize(
    ("batch", "workers", "sizes"),
    [
        (32, 2, [1, 2, 4, 8, 16]),
        (12, 2, [1, 2, 3, 6]),  # not 4: the second worker would have half a chunk of padding
        (10, 3, [1, 2]),
        (2, 3, [1]),
    ],
)
def test_sizes_divide_the_global_batch_and_leave_no_worker_out(batch, workers, sizes):
    config = small_config(train={"workers": workers, "global_batch": batch, "chunk": 1, "samples": batch})
    assert chunk_sizes(config) == sizes
    for size in sizes:
        assert replace(config.train, chunk=size).chunks_per_step * size == batch


def test_the_message_names_what_would_help():
    config = small_config(train={"workers": 2, "global_batch": 32, "chunk": 8, "samples": 64})
    message = out_of_memory_message(config)
    assert "chunks of 8 rows" in message
    assert "--train.chunk, such as 4 " in message
    assert "--train.find-chunk" in message
    assert "train.global_batch stays 32" in message
    for modality in ("audio", "spectrogram", "text"):
        assert f"--model.{modality}.checkpoint-activations" in message
    uncached = out_of_memory_message(replace(config, train=replace(config.train, cache_gradients=False)))
    assert "--train.cache-gradients (it holds those of 2 chunks now" in uncached
    assert "--train.chunk" not in uncached  # it would change nothing


def test_errors_for_want_of_memory_are_told_from_others():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_songs_of_a_pair_share_a_chunk():
    objective = ObjectiveConfig(pairs=(PairConfig("audio", "text"), PairConfig("audio", "partner")))
    model = replace(small_config().model, spectrogram=None)
    config = small_config(train={"workers": 2, "global_batch": 24, "chunk": 4}, objective=objective, model=model)
    assert chunk_sizes(config) == [2, 4, 6, 12]
    assert "such as 2 " in out_of_memory_message(replace(config, train=replace(config.train, cache_gradients=True)))
