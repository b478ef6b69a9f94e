from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from muser_dist.config import TemperatureConfig, TowerConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import PlainEngine
from muser_dist.train.optimizer import SGD, lr_factor, parameter_groups
from muser_dist.train.step import train_step
from tests.distributed.engine_cells import config_for, global_chunks, on_device
from tests.small import small_config


def test_the_schedule_over_the_whole_run():
    train = replace(small_config().train, samples=1000, warmup_samples=100, global_batch=10, chunk=10)
    factors = [lr_factor(samples, train) for samples in range(0, 1001, 10)]
    assert factors[:11] == pytest.approx([i / 10 for i in range(11)])
    assert factors[55] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert lr_factor(1, replace(train, warmup_samples=0)) == pytest.approx(1.0, abs=1e-5)


def test_groups_cover_each_parameter_once_with_its_rate_and_decay():
    config = small_config()
    text = replace(config.model.text, lr=1e-5)
    config = replace(config, model=replace(config.model, text=text))
    model = MultimodalModel(config)
    by_id = {
        id(p): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, config)
        for p in group["params"]
    }
    names = dict(model.named_parameters())
    assert len(by_id) == len(names)
    for name, parameter in names.items():
        lr, decay = by_id[id(parameter)]
        assert lr == (1e-5 if ".text." in name else config.train.lr), name
        assert decay == (0.0 if parameter.ndim < 2 else config.train.weight_decay), name
    assert by_id[id(names["logits.log_scale.0"])][1] == 0.0


def test_a_constant_temperature_is_in_no_group():
    config = small_config()
    config = replace(config, objective=replace(config.objective, temperature=TemperatureConfig(learnable=False)))
    model = MultimodalModel(config)
    trained = {id(p) for group in parameter_groups(model, config) for p in group["params"]}
    assert not any(id(p) in trained for p in model.logits.parameters())


def test_a_tower_without_vectors_makes_no_empty_group():
    config = small_config()
    audio = TowerConfig("tests.models.test_model:CountingTower", {"size": 2})
    config = replace(config, model=replace(config.model, audio=audio))
    assert all(group["params"] for group in parameter_groups(MultimodalModel(config), config))


def test_the_average_is_that_of_the_weights_after_each_step():
    config = config_for("InfoNCE, same text", 1, 2, ema_samples=18)  # 6 rows a step: three steps are a half-life
    engine = PlainEngine(MultimodalModel(config), config, torch.device("cpu"))
    averages = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    for _ in range(3):
        chunks = on_device(global_chunks(config), config)
        train_step(engine, load_objective(config.objective), config, chunks, 1.0)
        for name, parameter in engine.model.named_parameters():
            averages[name] = 0.5 ** (1 / 3) * averages[name] + (1 - 0.5 ** (1 / 3)) * parameter.detach()
    exported = engine.state_dict()
    for name, parameter in engine.model.named_parameters():
        torch.testing.assert_close(exported[name], averages[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(exported[name], parameter)
    norms = engine.grad_norms()
    assert set(norms) == {"audio", "spectrogram", "text", "logits"}
    assert sum(norm**2 for norm in norms.values()) == pytest.approx(engine.grad_norm() ** 2)


def test_norms_are_of_gradients_without_sgd_s_momentum():
    weight = torch.nn.Parameter(torch.zeros(4))
    # "foreach" as on GPUs, where torch takes it by default.
    optimizer = SGD([{"params": [weight], "part": "audio"}], lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    optimizer.start(None)
    for step in range(3):
        weight.grad = torch.full((4,), float(step))
        optimizer.forget_squares()
        optimizer.step()
        assert optimizer.squares["audio"].item() == pytest.approx(4 * step**2)
