"""MUSER's recipes: their losses by hand, what their pictures show, the sizes of the published towers."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from muser_dist.cli import parse_runs
from muser_dist.config import RunConfig
from muser_dist.models.heads import LogitScale
from muser_dist.models.model import MultimodalModel, build_tower
from muser_dist.objectives.batch import Batch, Logits
from muser_dist.objectives.registry import load_objective
from muser_dist.recipes import RECIPES, load_recipe

ROOT = Path(__file__).parents[2]
ROWS, SAME_TEXT = 5, torch.tensor([1, 1, 2, 3, 2])


def offline(recipe: str) -> RunConfig:
    """Without the tokenizer that is fetched by name."""
    config = load_recipe(recipe)
    return replace(config, data=replace(config.data, tokenizer="words"))


def features() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(ROWS, 16, generator=g, dtype=torch.float64) for name in ("audio", "spectrogram", "text")}


def loss_of(config: RunConfig, of: dict[str, torch.Tensor]) -> float:
    """Through the recipe's own objective and temperatures."""
    valid = {name: torch.ones(ROWS, dtype=torch.bool) for name in of}
    batch = Batch(valid, torch.arange(ROWS), SAME_TEXT, torch.full((ROWS,), -1))
    logits = LogitScale(config.objective)()
    return load_objective(config.objective)(of, Logits(logits["scale"].double()), batch, config.objective).share.item()


def cross_entropy(x: torch.Tensor, y: torch.Tensor, scale: float) -> float:
    """Mean over rows of -log softmax(scale · cos)_ii, in NumPy."""
    a, b = (z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True) for z in (x, y))
    s = scale * a @ b.T
    return float(np.mean(np.log(np.exp(s).sum(axis=1)) - np.diag(s)))


def test_the_papers_loss_is_the_mean_of_four_cross_entropies_with_one_temperature():
    config, of = offline("muser_paper"), features()
    a, s, t = of["audio"], of["spectrogram"], of["text"]
    four = [cross_entropy(x, y, 1 / 0.07) for x, y in ((a, t), (t, a), (s, t), (t, s))]
    assert loss_of(config, of) == pytest.approx(sum(four) / 4, rel=1e-6)
    assert len(list(LogitScale(config.objective).parameters())) == 1


def test_the_codes_loss_is_six_cross_entropies_over_1_2_3_with_scales_of_100():
    config, of = offline("muser_code"), features()
    pairs = [(x, y) for x in of for y in of if x != y]
    six = [cross_entropy(of[x], of[y], 100.0) for x, y in pairs]
    assert loss_of(config, of) == pytest.approx(sum(six) / 6, rel=1e-6)
    scales = LogitScale(config.objective)
    assert len(list(scales.parameters())) == 3
    for moved, scale in ((5.0, 100.0), (-20.0, 1.0)):  # clamped to [1, 100]
        with torch.no_grad():
            for parameter in scales.parameters():
                parameter.fill_(moved)
        torch.testing.assert_close(scales()["scale"], torch.full((3,), scale))


def test_only_our_reading_counts_equal_texts_as_matches():
    of = features()
    of["text"] = of["text"][[0, 0, 2, 3, 2]]
    of["audio"] = of["spectrogram"] = of["text"].clone()
    assert loss_of(offline("muser"), of) > loss_of(offline("muser_paper"), of) > 0.0  # log 2 where a text comes twice
    perfect = 4 / 5 * math.log(2)
    of["text"] = of["audio"] = of["spectrogram"] = torch.eye(16, dtype=torch.float64)[[0, 0, 2, 3, 2]]
    assert loss_of(offline("muser"), of) == pytest.approx(perfect, abs=1e-4)


def test_a_tone_of_200_hertz_changes_the_picture_of_muser_and_not_that_of_its_released_code():
    def change(recipe: str) -> float:
        config = offline(recipe)
        front_end = build_tower("spectrogram", config.model.spectrogram, config.data).front_end
        samples = config.data.crop_samples
        time = torch.arange(samples, dtype=torch.float64) / config.data.sample_rate
        # Music is not a single tone: noise over the whole band, and the tone on top.
        noise = 3000 * torch.randn(samples, generator=torch.Generator().manual_seed(0))
        tone = 3000 * torch.sin(2 * math.pi * 200 * time)
        # Not rounded to int16, which would change every band by about 1e-4 itself.
        without, with_tone = (front_end(x.float()[None]) for x in (noise, noise + tone))
        return float((with_tone - without).norm() / without.norm())

    assert change("muser") > 0.05
    assert change("muser_code") < 1e-4


def test_the_published_towers_have_the_published_sizes():
    config = offline("muser_code")
    assert (config.data.sample_rate, config.data.crop_samples, config.data.max_tokens) == (16_000, 480_000, 77)
    with torch.device("meta"):
        model = MultimodalModel(config)
    clip = sum(p.numel() for name in ("spectrogram", "text") for p in model.towers[name].parameters())
    assert clip == 102_007_136  # 102.0 M; CLIP's own temperature is one more
    assert sum(p.numel() for p in model.heads.parameters()) == 0
    assert {tower.width for tower in model.towers.values()} == {1024}
    audio = model.towers["audio"]
    assert [len(getattr(audio.encoder, f"layer{i}")) for i in (1, 2, 3, 4)] == [3, 4, 6, 3]
    assert audio.encoder.layer1[0].conv2.groups == 32 and audio.encoder.layer1[0].conv2.out_channels == 128
    assert (len(audio.fbsp.times), audio.hop, audio.window, len(audio.fbsp.m)) == (2048, 561, 1654, 1025)
    assert len(model.towers["text"].encoder.encoder.layers) == 12
    assert load_recipe("muser_paper").model == config.model


@pytest.mark.parametrize("recipe", ["muser", "muser_audio_text"])
def test_sizes_grow(recipe):
    counts = []
    for name in (f"{recipe}_tiny", recipe, f"{recipe}_base", f"{recipe}_large"):
        with torch.device("meta"):
            counts.append(sum(p.numel() for p in MultimodalModel(offline(name)).parameters()))
    assert all(2 < larger / smaller < 12 for smaller, larger in pairwise(counts))


@pytest.mark.parametrize("recipe", ["muser_tiny", "muser_code"])
def test_help_names_the_sizes_of_the_towers(recipe, capsys):
    with pytest.raises(SystemExit) as done:
        parse_runs([recipe, "--help"], "jobs/pretrain.py")
    assert done.value.code == 0
    shown = capsys.readouterr().out
    option = {"muser_tiny": "--model.audio.options.width", "muser_code": "--model.audio.options.outputs"}[recipe]
    assert option in shown and "--model.audio.weights" in shown and recipe in RECIPES


FULL_SIZE = """
import resource
import torch
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import PlainEngine
from muser_dist.train.step import train_step
from dataclasses import replace
from tests.distributed.engine_cells import ROWS, global_chunks, on_device
from tests.recipes.test_muser import offline

config = offline("muser_code")
config = replace(config, train=replace(config.train, global_batch=ROWS, chunk=ROWS))
engine = PlainEngine(MultimodalModel(config), config, torch.device("cpu"))
chunks = on_device(global_chunks(config, messy=False), config)
made = train_step(engine, load_objective(config.objective), config, chunks, 1.0)
assert made.applied and made.features["audio"].shape == (ROWS, 1024)
assert "loss/audio/kernel_norm" in made.loss.metrics
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_step_of_the_full_size_recipe_needs_less_than_24_gb():
    run = subprocess.run([sys.executable, "-c", FULL_SIZE], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 24e9
