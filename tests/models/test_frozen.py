"""Frozen towers: what of them stays, what is run, and texts that are not encoded again."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from muser_dist.config import RunConfig
from muser_dist.errors import ConfigError
from muser_dist.models.frozen import TextCache
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import PlainEngine
from muser_dist.train.optimizer import parameter_groups
from muser_dist.train.step import train_step
from tests.distributed.engine_cells import config_for, global_chunks, on_device
from tests.distributed.loss_cells import TOLERANCE, errors
from tests.distributed.test_gradients import plain

CPU = torch.device("cpu")


def with_towers(config: RunConfig, **changes: dict) -> RunConfig:
    """A config with these fields of its towers replaced, by modality."""
    towers = {name: replace(config.model.towers()[name], **fields) for name, fields in changes.items()}
    return replace(config, model=replace(config.model, **towers))


def frozen_config(cached: bool = True, **text) -> RunConfig:
    """A spectrogram tower with batch norms and a text tower with dropout, both frozen."""
    config = config_for("InfoNCE, same text", 1, 4, cache_gradients=cached)
    norms = {"model": "resnet10t", "mels": 32, "window": 256, "hop": 80}
    dropout = {**config.model.text.options, "dropout": 0.3}
    return with_towers(
        config, spectrogram={"options": norms, "freeze": True}, text={"options": dropout, "freeze": True} | text
    )


def one_step(config: RunConfig) -> tuple[MultimodalModel, dict[str, int]]:
    """The model after a step, and how many rows each tower encoded in it."""
    engine, rows = PlainEngine(MultimodalModel(config), config, CPU), dict.fromkeys(config.model.towers(), 0)

    def count(name: str):
        def hook(_tower: nn.Module, _given: tuple, output: Tensor) -> None:
            rows[name] += len(output)

        return hook

    for name, tower in engine.model.towers.items():
        tower.register_forward_hook(count(name))
    train_step(engine, load_objective(config.objective), config, on_device(global_chunks(config), config), 1.0)
    return engine.model, rows


def test_a_step_changes_heads_and_nothing_of_a_frozen_tower():
    config = frozen_config()
    before = MultimodalModel(config).state_dict()
    after = one_step(config)[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in changed if name.startswith("towers.")} == {"audio"}
    assert {name.split(".")[1] for name in changed if name.startswith("heads.")} == {"audio", "spectrogram", "text"}
    assert any("running_var" in name for name in before)  # and none of those has moved


def test_it_is_in_evaluation_mode_and_in_no_group_of_the_optimizer():
    config = frozen_config()
    model = MultimodalModel(config)
    for mode in (model, model.train(), model.eval().train()):
        assert mode.training and mode.towers["audio"].training
        assert not any(m.training for name in ("spectrogram", "text") for m in mode.towers[name].modules())
    trained = {id(p) for group in parameter_groups(model, config) for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in trained) == (not name.startswith(("towers.spectrogram", "towers.text"))), name


@pytest.mark.parametrize("cache_rows", [0, 3, 100])
def test_gradients_with_outputs_kept_equal_those_with_one_encoding_of_each_chunk(cache_rows):
    (value, got), (exact, want) = plain(frozen_config(cache_rows=cache_rows)), plain(frozen_config(cached=False))
    assert value == pytest.approx(exact, rel=TOLERANCE)
    assert not any(name.startswith("towers.text") for name in got)
    assert max(errors(got, {name: g.double() for name, g in want.items()}).values()) <= TOLERANCE


def test_where_chunks_are_encoded_twice_a_frozen_tower_runs_once():
    rows = one_step(frozen_config())[1]
    assert rows == {"audio": 24, "spectrogram": 12, "text": 12}


# --- Texts that come again ---


class Counting(nn.Module):
    """A text tower that depends on ids and length, and knows how many rows it was given."""

    width = 2

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.rows += len(batch["text_ids"])
        return torch.stack([batch["text_ids"].sum(dim=1), batch["text_length"]], dim=1).float()


def texts(*numbers: int, length: int = 3) -> dict[str, Tensor]:
    """A batch of one text for each number."""
    ids = torch.tensor([[number, 0, 1] for number in numbers], dtype=torch.int32)
    return {"text_ids": ids, "text_length": torch.full((len(numbers),), length, dtype=torch.int32)}


def test_a_text_is_encoded_once_while_it_is_held():
    tower, cache, bare = Counting(), TextCache(4), Counting()

    def encoded(batch: dict[str, Tensor]) -> int:
        before = tower.rows
        assert torch.equal(cache(tower, batch), bare(batch))
        assert len(cache) <= 4
        return tower.rows - before

    assert encoded(texts(1, 2, 1, 1)) == 2  # one of each
    assert encoded(texts(2, 1)) == 0
    assert encoded(texts(1, length=2)) == 1  # the same ids, another length
    assert encoded(texts(3, 1, 4)) == 2  # 2 was used least recently, and went
    assert encoded(texts(1, 3, 4)) == 0
    assert encoded(texts(2)) == 1
    assert encoded(texts(*range(10, 20), 2, 10)) == 10  # more than it holds, beside one that it holds
    assert encoded(texts(19, 18, 17, 16)) == 0
    cache.clear()
    assert encoded(texts(19)) == 1


def test_texts_of_earlier_steps_are_not_encoded_again():
    config = frozen_config(cache_rows=100)
    model, rows = one_step(config)
    different = {tuple(row) for chunk in global_chunks(config) for row in chunk["text_ids"].tolist()}
    assert rows["text"] == len(different) == 12
    batch = on_device(global_chunks(config), config)[0].tensors()
    encoded = []
    model.towers["text"].register_forward_hook(lambda *_: encoded.append(1))
    later = model(batch, (1, 0))["text"]
    assert not encoded
    torch.testing.assert_close(later, model.encode("text", batch))  # which looks at no cache
    assert len(encoded) == 1
    with torch.no_grad():
        model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    torch.testing.assert_close(model(batch, (2, 0))["text"], model.encode("text", batch))


@pytest.mark.parametrize(
    ("modality", "fields", "train", "message"),
    [
        ("text", {"cache_rows": 8}, {}, "model.text.freeze"),
        ("text", {"cache_rows": -1, "freeze": True}, {}, "negative"),
        ("text", {"cache_rows": 8, "freeze": True, "compile": True}, {}, "choose one"),
        ("audio", {"cache_rows": 8, "freeze": True}, {}, r"model\.audio\.cache_rows"),
        (
            "text",
            {"cache_rows": 8, "freeze": True},
            {"zero_stage": 3},
            r"model\.text\.cache_rows.*--train\.zero-stage 2",
        ),
        ("audio", {"compile": True}, {"zero_stage": 3}, r"model\.audio\.compile.*--train\.zero-stage 2"),
        ("text", {"checkpoint_activations": True, "freeze": True}, {}, "keeps no activations"),
    ],
)
def test_options_that_contradict_each_other_are_refused(modality, fields, train, message):
    config = config_for("sigmoid", 1, 2)
    with pytest.raises(ConfigError, match=message):
        with_towers(replace(config, train=replace(config.train, **train)), **{modality: fields})
