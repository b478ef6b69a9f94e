"""The symbolic tower in the model: two notations in one pass, what is frozen, evaluation, and the model in use."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from muser_dist import Muser
from muser_dist.config import ModelConfig, ObjectiveConfig, PairConfig, RunConfig, TemperatureConfig, from_dict, to_dict
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.symbolic.config import SymbolicConfig
from muser_dist.data.symbolic.encode import encode_member, encode_windows
from muser_dist.data.symbolic.patches import to_text
from muser_dist.errors import ConfigError, DataError
from muser_dist.evaluate.embedding import embed
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.evaluate.validation import flat_scores, score_names
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from muser_dist.objectives.batch import Batch, Logits
from muser_dist.objectives.reference import reference_loss
from muser_dist.objectives.registry import check_objective, load_objective
from muser_dist.recipes.finetune import finetune
from muser_dist.train.engine import PlainEngine
from muser_dist.train.find_chunk import _chunk
from muser_dist.train.health import batch_health
from muser_dist.train.preflight import check_settings
from muser_dist.train.step import to_device, train_step
from tests.data.symbolic.notation import note, score
from tests.scores import M3, NOTATION, TEXT, abc, midi, symbolic_config, write_scores
from tests.small import LOCAL, index_of, reader_of, small_config

CPU = torch.device("cpu")


def stepped(config: RunConfig, pattern: str, steps: int = 2) -> tuple[dict[str, torch.Tensor], MultimodalModel, list]:
    """The weights before some steps of the plain engine, the model after them, and what the steps were."""
    model = MultimodalModel(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine, reader, made = PlainEngine(model, config, CPU), reader_of(config, pattern), []
    for step in range(steps):
        chunks = reader.read(range(step * reader.slots_per_step, (step + 1) * reader.slots_per_step))
        mine = [to_device(chunk, config.features, CPU) for chunk in chunks]
        made.append(train_step(engine, load_objective(config.objective), config, mine, 1.0))
    return before, model, made


def test_both_notations_are_embedded_as_each_is_alone(tmp_path):
    config = symbolic_config(TEXT, NOTATION)
    (chunk,) = reader_of(config, write_scores(tmp_path, 8)).read([0])
    on_device = to_device(chunk, config.features, CPU)
    model, tensors = MultimodalModel(config), on_device.tensors()
    out = model(tensors, on_device.moment)
    assert {"symbolic", "notation", "text"} <= out.keys()
    own = {"patches": tensors["patches"], "patches_length": tensors["patches_length"]}
    other = {"patches": tensors["notation_patches"], "patches_length": tensors["notation_length"]}
    torch.testing.assert_close(out["symbolic"], model.encode("symbolic", own), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["notation"], model.encode("symbolic", other), rtol=1e-4, atol=1e-5)
    assert (out["notation"] - out["symbolic"]).abs().max() > 1e-3


def test_two_notations_are_plain_clip_and_only_the_row_is_a_match():
    """Whatever its text: against the reference, and by hand."""
    config = ObjectiveConfig(pairs=(PairConfig(*NOTATION),), targets="same_text")
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 8, generator=g, dtype=torch.float64) for _ in range(2))
    batch = Batch(
        dict.fromkeys(NOTATION, torch.ones(5, dtype=torch.bool)),
        torch.arange(5),
        torch.zeros(5).long(),
        torch.full((5,), -1),
    )
    logits, features = Logits(torch.tensor([3.0], dtype=torch.float64)), {"symbolic": x, "notation": y}
    share = load_objective(config)(features, logits, batch, config).share
    cosines = 3.0 * torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T
    both = [torch.nn.functional.cross_entropy(s, torch.arange(5)) for s in (cosines, cosines.T)]
    torch.testing.assert_close(share, (both[0] + both[1]) / 2)
    torch.testing.assert_close(share, reference_loss(features, logits, batch, config))


def test_unnormalised_products_with_the_constant_scale_of_one():
    config = ObjectiveConfig(
        pairs=(PairConfig(*TEXT),),
        targets="instance",
        normalise=False,
        temperature=TemperatureConfig(init=1.0, learnable=False),
    )
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 8, generator=g) for _ in range(2))
    batch = Batch(dict.fromkeys(TEXT, torch.ones(5, dtype=torch.bool)), *3 * [torch.arange(5)])
    run = symbolic_config()
    model = MultimodalModel(replace(run, objective=config))
    assert not any(name.startswith("logits") and p.requires_grad for name, p in model.named_parameters())
    share = load_objective(config)({"symbolic": x, "text": y}, Logits(model.logits()["scale"]), batch, config).share
    both = [torch.nn.functional.cross_entropy(s, torch.arange(5)) for s in (x @ y.T, y @ x.T)]
    torch.testing.assert_close(share, (both[0] + both[1]) / 2)


def with_towers(config: RunConfig, **changes: dict) -> RunConfig:
    towers = {name: replace(config.model.towers()[name], **fields) for name, fields in changes.items()}
    return replace(config, model=replace(config.model, **towers))


KEPT = {"freeze": True, "freeze_head": True}


@pytest.mark.parametrize("cached", [False, True])
def test_a_frozen_modality_stays_bitwise_as_it_is(tmp_path, cached):
    config = symbolic_config(TEXT, NOTATION, train={"cache_gradients": cached, "weight_decay": 0.5, "ema_samples": 8})
    config = with_towers(config, text=KEPT)
    config = replace(config, model=replace(config.model, audio=replace(small_config().model.audio, **KEPT)))
    before, model, made = stepped(config, write_scores(tmp_path, 16))
    after = model.state_dict()
    kept = ("towers.text.", "heads.text.", "towers.audio.", "heads.audio.")
    for name, value in before.items():
        if name.startswith(kept):
            assert torch.equal(after[name], value), name
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("towers.symbolic.") for name in changed)
    assert any(name.startswith("heads.symbolic.") for name in changed)
    assert all(step.applied for step in made)
    # The audio tower is not even run; it is there for whoever uses the model.
    assert made[0].features.keys() == {"symbolic", "notation", "text"}
    save_model(tmp_path / "model", after, config)
    assert Muser.from_pretrained(tmp_path).modalities == ("audio", "symbolic", "notation", "text")
    assert from_dict(to_dict(config), "here") == config


def test_without_freeze_head_the_head_is_trained(tmp_path):
    config = with_towers(symbolic_config(), text={"freeze": True})
    before, model, _ = stepped(config, write_scores(tmp_path, 16))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert any(name.startswith("heads.text.") for name in changed)
    assert not any(name.startswith("towers.text.") for name in changed)


def test_what_cannot_be_trained_is_refused():
    config = symbolic_config()
    with pytest.raises(ConfigError, match="give freeze too"):
        with_towers(config, text={"freeze_head": True})
    audio = small_config().model.audio
    for fields in ({}, {"freeze": True}):
        with pytest.raises(ConfigError, match=r"model\.audio: no pair .* --model\.audio\.freeze-head"):
            replace(config, model=replace(config.model, audio=replace(audio, **fields)))
    with pytest.raises(ConfigError, match=r"nothing would be trained"):
        with_towers(config, text=KEPT, symbolic=KEPT)
    with pytest.raises(ConfigError, match=r"of two notations, and data\.symbolic\.notations is only midi"):
        symbolic_config(NOTATION, notations=("midi",))
    with pytest.raises(ConfigError, match=r"contrasts symbolic with notation, but model\.symbolic is None"):
        replace(
            config, model=ModelConfig(text=config.model.text), objective=ObjectiveConfig(pairs=(PairConfig(*NOTATION),))
        )
    with pytest.raises(ConfigError, match="give audio or spectrogram first"):
        PairConfig("symbolic", "partner") and ObjectiveConfig(pairs=(PairConfig("symbolic", "partner"),))
    trial = replace(config, data=replace(config.data, train=("train.tar",)))
    assert check_settings(trial)[0] > 0
    check_objective(symbolic_config(TEXT, NOTATION))
    with pytest.raises(ConfigError, match=r"24 patches do not fit into 12 positions"):
        check_settings(with_towers(trial, symbolic={"options": M3.options | {"patches": 12}}))


def test_a_step_of_the_largest_chunk_can_be_tried():
    config = symbolic_config(TEXT, NOTATION)
    chunk = to_device(_chunk(config, 4, 0), config.features, CPU)
    out = MultimodalModel(config)(chunk.tensors(), chunk.moment)
    assert out["notation"].shape == (4, 8) and "audio" not in chunk.tensors()


def test_masked_patches_are_trained_and_are_no_embeddings(tmp_path):
    tower = replace(M3, build="m3_pretraining", options=M3.options | {"decoder_depth": 1})
    config = symbolic_config()
    config = replace(config, model=ModelConfig(symbolic=tower), objective=ObjectiveConfig("masked_patches", pairs=()))
    pattern = write_scores(tmp_path, 16)
    _, model, made = stepped(config, pattern)
    assert made[0].features["symbolic"].shape[1] == 2 and not config.objective.embeds
    health = batch_health({}, made[0].batch, ())
    assert not any(name.startswith(("variance", "dimensions")) for name in health)
    scores = evaluate(Muser(model, config), config, index_of(pattern), LOCAL)
    assert set(scores["retrieval"]) == {"symbolic->notation", "notation->symbolic"}


# --- Evaluation ---


def test_each_direction_is_scored_and_named_beforehand(tmp_path):
    config, index = symbolic_config(TEXT), index_of(write_scores(tmp_path, 16))
    config = replace(config, evaluate=replace(config.evaluate, fields=("instrument",)))
    muser = Muser(MultimodalModel(config), config)
    scores = evaluate(muser, config, index, LOCAL)
    assert set(scores["retrieval"]) == {
        f"{a}->{b}" for a in ("symbolic", "notation", "text") for b in ("symbolic", "notation", "text") if a != b
    }
    assert set(scores["zero_shot"]["instrument"]) == {"symbolic", "notation"}
    assert flat_scores(scores).keys() <= set(score_names(config))
    rows = embed(muser, config, index, LOCAL)
    (chunk, *_) = evaluation_chunks(config, index, LOCAL)
    alone = muser.encode_symbolic([abc(0), midi(0)])
    np.testing.assert_allclose([rows.joint["symbolic"][0], rows.joint["notation"][0]], alone, atol=1e-5)
    assert "notation_patches" in chunk
    kept = embed(muser, config, index, LOCAL, keep=tmp_path / "kept")
    again = embed(muser, config, index, LOCAL, keep=tmp_path / "kept")
    np.testing.assert_array_equal(kept.joint["notation"], again.joint["notation"])


# --- In use ---


@pytest.fixture(scope="module")
def muser() -> Muser:
    config = symbolic_config()
    return Muser(MultimodalModel(config), config)


def test_pieces_by_path_or_bytes_of_every_kind(muser, tmp_path):
    sheet = score([[note("C5", 32)]]).encode()
    files = {"tune.abc": abc(3), "tune.mid": midi(3), "sheet.musicxml": sheet, "misnamed.txt": midi(3)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    by_path = muser.encode_symbolic([tmp_path / name for name in files])
    assert by_path.shape == (4, muser.dim) and by_path.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(by_path, axis=1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(by_path, muser.encode_symbolic(list(files.values())))
    np.testing.assert_allclose(by_path[1], by_path[3], atol=1e-6)
    assert muser.encode_symbolic([]).shape == (0, muser.dim)
    bom = b"\xef\xbb\xbf" + sheet
    np.testing.assert_allclose(muser.encode_symbolic([bom])[0], by_path[2], atol=1e-6)


def test_a_short_piece_is_the_row_that_evaluation_sees(muser):
    patches, length = encode_member("abc", abc(1), muser.config.data.symbolic)
    batch = {"patches": torch.from_numpy(patches)[None], "patches_length": torch.tensor([length])}
    with torch.inference_mode():
        want = torch.nn.functional.normalize(muser.model.encode("symbolic", batch), dim=1).numpy()
    np.testing.assert_allclose(muser.encode_symbolic([abc(1)]), want, atol=1e-6)


def test_a_long_piece_is_the_weighted_mean_of_its_windows(muser):
    bars = "|".join(f"{'CDEFGAB'[i % 7]}{i % 5 + 1}" for i in range(60))
    tune = f"X:1\nM:4/4\nK:C\n{bars}|\n".encode()
    config = muser.config.data.symbolic
    windows = list(encode_windows("abc", tune, config))
    whole, total = encode_member("abc", tune, SymbolicConfig())
    assert len(windows) == 3 and [length for _, length, _ in windows] == [24] * 3
    news = [new for *_, new in windows]
    assert news == [24, 24, total - 48] and 0 < news[2] < 24
    joined = "".join(to_text(window[24 - new :]) for window, _, new in windows)
    assert joined == to_text(whole[:total])
    np.testing.assert_array_equal(windows[-1][0], whole[total - 24 : total])  # the last ends with the piece
    batch = {
        "patches": torch.from_numpy(np.stack([window for window, *_ in windows])),
        "patches_length": torch.tensor([24] * 3),
    }
    with torch.inference_mode():
        each = torch.nn.functional.normalize(muser.model.encode("symbolic", batch), dim=1).numpy()
    mean = (np.array(news)[:, None] * each).sum(axis=0)
    np.testing.assert_allclose(muser.encode_symbolic([tune])[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_what_is_wrong_with_a_piece_is_named(muser, tmp_path):
    (tmp_path / "broken.mid").write_bytes(b"MThd nothing more")
    with pytest.raises(DataError, match=r"broken\.mid: "):
        muser.encode_symbolic([tmp_path / "broken.mid"])
    with pytest.raises(DataError, match=r"gone\.abc: there is no such file"):
        muser.encode_symbolic([tmp_path / "gone.abc"])
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read: Is a directory"):
        muser.encode_symbolic([tmp_path])
    with pytest.raises(DataError, match="a piece given as bytes: "):
        muser.encode_symbolic([b"no notes"])
    with pytest.raises(TypeError, match=r"wrap the one you have in \[ \]"):
        muser.encode_symbolic(abc(1))
    config = small_config()
    with pytest.raises(ConfigError, match="no symbolic tower; it has audio, spectrogram, text"):
        Muser(MultimodalModel(config), config).encode_symbolic([abc(1)])


def test_a_tower_of_notation_can_be_fine_tuned_and_classifies_pieces(tmp_path):
    config = with_towers(symbolic_config(), symbolic=KEPT)  # which fine-tuning does not
    save_model(tmp_path / "run" / "model", MultimodalModel(config).state_dict(), config)
    tuned = finetune(str(tmp_path / "run"), "symbolic")
    data = replace(tuned.data, classes=("instrument",), label_values={"instrument": ("flute", "horn")})
    tuned = replace(tuned, data=data)
    assert not tuned.model.symbolic.freeze
    muser = Muser(MultimodalModel(tuned), tuned)
    assert muser.classify([abc(1), midi(2)])["instrument"].shape == (2, 2)
