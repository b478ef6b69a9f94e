"""Loss and every parameter's gradient on W workers at each ZeRO stage against one process in float64."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from muser_dist.config import ObjectiveConfig, RunConfig, TemperatureConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.contrastive import contrastive, global_metrics
from muser_dist.objectives.reference import reference_loss
from muser_dist.train.engine import DeepSpeedEngine, PlainEngine
from muser_dist.train.step import DeviceChunk, join, to_device, train_step
from tests.distributed.workers import run_workers
from tests.small import small_config

CHUNKS, ROWS = 4, 3  # K = 4 is not a multiple of W = 3: one rank gets an all-masked chunk
SCENARIOS = ("clean", "messy")

# Norm-wise relative error of a tensor's gradient in float32 against float64.
TOLERANCE = 1e-5
# A gradient that is zero in exact arithmetic (such as an attention key's bias, which the softmax
# cancels) has no relative error; it is compared with the largest gradient of the model instead.
ZERO = 1e-7


def config_for(scenario: str, workers: int, stage: int = 0, precision: str = "fp32") -> RunConfig:
    targets = "instance" if scenario == "clean" else "same_text"
    temperature = TemperatureConfig(init=0.1)
    return replace(
        small_config(
            train={
                "workers": workers,
                "zero_stage": stage,
                "precision": precision,
                "global_batch": CHUNKS * ROWS,
                "chunk": ROWS,
                "clip_norm": 0.0,  # clipping would hide every error of scale
            }
        ),
        objective=ObjectiveConfig(targets=targets, temperature=temperature),
    )


def global_chunks(scenario: str, config: RunConfig) -> list[dict]:
    """All chunks of a step, padded to a multiple of the workers, in the pipeline's form."""
    chunks = []
    for number in range(config.train.chunks_per_worker * config.train.workers):
        rng = np.random.default_rng(number)
        samples, tokens = config.data.crop_samples, config.data.max_tokens
        real = number < CHUNKS
        heard, stated = np.full(ROWS, real), np.full(ROWS, real)
        row = np.arange(number * ROWS, (number + 1) * ROWS) if real else np.full(ROWS, -1)
        text_id = 1000 + row
        if scenario == "messy" and real:
            heard[number % ROWS] = False  # masked rows
            if number == 1:
                stated[:] = False  # a chunk without any text
            text_id = np.array([7, number % 2, 50 + number])  # duplicate texts
            row[2] = 2 if number == 3 else row[2]  # the same clip twice, its text read differently
        text_id = np.where(stated, text_id, -1)
        chunks.append(
            {
                "step": np.int64(0),
                "chunk": np.int64(number),
                "row": row.astype(np.int64),
                "text_id": text_id.astype(np.int64),
                "valid_audio": heard,
                "valid_spectrogram": heard,
                "valid_text": stated,
                "audio": rng.integers(-9000, 9000, (ROWS, samples)).astype(np.int16) * heard[:, None].astype(np.int16),
                "audio_length": np.full(ROWS, samples, np.int32) * heard,
                "text_ids": rng.integers(2, config.data.vocabulary, (ROWS, tokens)).astype(np.int32),
                "text_length": np.full(ROWS, tokens, np.int32) * stated,
            }
        )
    return chunks


def on_device(chunks: list[dict], config: RunConfig) -> list[DeviceChunk]:
    return [to_device(chunk, tuple(config.model.towers()), torch.device("cpu")) for chunk in chunks]


def expected(scenario: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by the reference, in float64, in one process."""
    config = config_for(scenario, workers=1)
    model = MultimodalModel(config).double().train()
    chunks = on_device(global_chunks(scenario, config), config)
    encoded = [model(chunk.tensors, chunk.moment) for chunk in chunks]
    features = {name: torch.cat([part[name] for part in encoded]) for name in config.model.towers()}
    loss = reference_loss(features, encoded[0]["scale"], join([c.batch for c in chunks]), config.objective)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


class Recording:
    """An engine that keeps the gradients of the step it is asked for, and changes no weight."""

    def __init__(self, engine) -> None:
        self.engine, self.device = engine, engine.device
        self.encode, self.backward = engine.encode, engine.backward
        self.gradients: dict[str, torch.Tensor] = {}

    def step(self, lr_factor: float) -> None:
        if isinstance(self.engine, PlainEngine):
            self.gradients = {n: p.grad.clone() for n, p in self.engine.model.named_parameters()}
        else:
            from deepspeed.utils import safe_get_full_grad

            for name, parameter in self.engine.deepspeed.module.named_parameters():
                self.gradients[name] = safe_get_full_grad(parameter).detach().clone()
        self.engine.step(0.0)


def worker(rank: int, world: int, folder: str, precision: str) -> None:
    for stage in range(4):
        config = config_for(SCENARIOS[0], world, stage, precision)
        recording = Recording(DeepSpeedEngine(MultimodalModel(config), config, torch.device("cpu")))
        for scenario in SCENARIOS:
            config = config_for(scenario, world, stage, precision)
            mine = on_device(global_chunks(scenario, config)[rank::world], config)
            loss, _ = train_step(recording, contrastive, config.objective, mine, 1.0)
            value = global_metrics(loss)["loss"]
            if rank == 0:
                torch.save((value, recording.gradients), Path(folder) / f"{stage}-{scenario}.pt")


def errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error by parameter, norm-wise; of those that should be zero, relative to the largest norm."""
    assert got.keys() == want.keys()
    largest = max(float(g.norm()) for g in want.values())
    result = {}
    for name, exact in want.items():
        error, size = float((got[name].double() - exact).norm()), float(exact.norm())
        result[name] = error / largest if size < ZERO * largest else error / size
    return result


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gradients_equal_the_reference_at_every_zero_stage(world, tmp_path):
    run_workers(worker, world, world, str(tmp_path), "fp32")
    for scenario in SCENARIOS:
        loss, gradients = expected(scenario)
        for stage in range(4):
            value, got = torch.load(tmp_path / f"{stage}-{scenario}.pt")
            assert value == pytest.approx(loss, rel=1e-5), (stage, scenario)
            worst = max(errors(got, gradients).items(), key=lambda item: item[1])
            assert worst[1] <= TOLERANCE, (stage, scenario, worst)


def test_the_plain_engine_equals_the_reference():
    for scenario in SCENARIOS:
        loss, gradients = expected(scenario)
        config = config_for(scenario, workers=1)
        engine = Recording(PlainEngine(MultimodalModel(config), config, torch.device("cpu")))
        share, _ = train_step(
            engine, contrastive, config.objective, on_device(global_chunks(scenario, config), config), 1.0
        )
        assert share.share.item() == pytest.approx(loss, rel=1e-5)
        assert max(errors(engine.gradients, gradients).values()) <= TOLERANCE


def test_bf16_gradients_point_the_right_way(tmp_path):
    run_workers(worker, 2, 2, str(tmp_path), "bf16")
    loss, gradients = expected("clean")
    for stage in range(4):
        value, got = torch.load(tmp_path / f"{stage}-clean.pt")
        assert value == pytest.approx(loss, rel=0.02)  # bfloat16 has 8 bits: 0.4 % in each product
        together = torch.cat([got[name].flatten().double() for name in gradients])
        exact = torch.cat([g.flatten() for g in gradients.values()])
        assert torch.cosine_similarity(together, exact, dim=0) > 0.99
        assert together.norm() / exact.norm() == pytest.approx(1.0, abs=0.1)


def test_the_check_notices_a_wrong_scale_and_a_lost_gradient():
    _, gradients = expected("messy")
    assert max(errors({n: 0.5 * g for n, g in gradients.items()}, gradients).values()) > 0.4
    name = "temperature.log_scale.0"
    assert errors({**gradients, name: 0 * gradients[name]}, gradients)[name] == pytest.approx(1.0)
