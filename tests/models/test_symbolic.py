"""M3 and its pretraining: patches as one-hot characters, padding unseen, what is selected, and the loss by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertModel

from muser_dist.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TowerConfig
from muser_dist.data.symbolic.characters import BOS, EOS, MASK, PAD, PATCH_BYTES
from muser_dist.errors import ConfigError
from muser_dist.models.model import MultimodalModel, build_tower
from muser_dist.models.recompute import repeated_layers
from muser_dist.models.symbolic import M3, M3Pretraining, PatchEmbedding, corrupted
from muser_dist.models.weights import match_weights
from tests.distributed.engine_cells import config_for
from tests.distributed.loss_cells import TOLERANCE, errors
from tests.distributed.test_gradients import plain
from tests.models.test_recompute import recomputed

DATA = DataConfig()
SIZES = {"width": 16, "depth": 2, "heads": 2, "patches": 12}


def notation(lengths: list[int], patches: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Pieces of random text; each patch has 1 to 64 characters with its BOS, and its EOS where there is room."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(len(lengths), patches, PATCH_BYTES, dtype=torch.uint8)
    for row, length in enumerate(lengths):
        for patch in out[row, :length]:
            written = int(torch.randint(1, PATCH_BYTES + 1, (), generator=generator))
            patch[:written] = torch.randint(4, 128, (written,), generator=generator)
            patch[0] = BOS
            if written < PATCH_BYTES:
                patch[written] = EOS
    return {"patches": out, "patches_length": torch.tensor(lengths, dtype=torch.int32)}


def seeded(build: type, **options):
    torch.manual_seed(0)
    return build(DATA, **(SIZES | options))


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        ("m3", 91_742_976),  # BERT's 85.5 M of layers and positions, and 6.3 M of the projection
        ("m3_pretraining", 113_253_888),
    ],
)
def test_the_published_sizes(build, parameters):
    with torch.device("meta"):
        tower = build_tower("symbolic", TowerConfig(build), DATA)
    assert sum(p.numel() for p in tower.parameters()) == parameters
    assert tower.width == 768


def test_a_patch_is_embedded_as_its_one_hot_characters():
    torch.manual_seed(0)
    embedding = PatchEmbedding(24).double()
    patches = torch.randint(0, 128, (3, 5, PATCH_BYTES)).to(torch.uint8)
    one_hot = F.one_hot(patches.long(), 128).double().flatten(2)
    want, weights = F.linear(one_hot, embedding.weight, embedding.bias), torch.randn(3, 5, 24, dtype=torch.float64)
    got = embedding(patches)
    torch.testing.assert_close(got, want)
    exact = torch.autograd.grad((want * weights).sum(), [embedding.weight, embedding.bias])
    for ours, theirs in zip(torch.autograd.grad((got * weights).sum(), embedding.parameters()), exact, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_padding_is_not_seen_and_rows_are_apart():
    encoder, batch = seeded(M3).eval(), notation([12, 5, 1, 0])
    whole = encoder(batch)
    assert torch.isfinite(whole).all()
    beyond = torch.arange(12) >= batch["patches_length"].clamp(min=1)[:, None]
    noisy = batch | {"patches": batch["patches"].masked_fill(beyond[:, :, None], 77)}
    torch.testing.assert_close(encoder(noisy), whole)
    for row, length in enumerate([12, 5, 1, 1]):
        alone = {"patches": batch["patches"][row : row + 1, :length], "patches_length": torch.tensor([length])}
        torch.testing.assert_close(encoder(alone)[0], whole[row], rtol=1e-4, atol=1e-5)
    swapped = batch | {"patches": batch["patches"].roll(1, dims=1)}
    assert (encoder(swapped)[0] - whole[0]).abs().max() > 1e-3  # order matters


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    share=st.sampled_from([0.01, 0.45, 0.5, 1.0]),
    each=st.booleans(),
    seed=st.integers(0, 999),
)
def test_what_is_selected_and_what_becomes_of_it(lengths, share, each, seed):
    batch = notation(lengths, seed=seed)
    patches, before = batch["patches"], batch["patches"].clone()
    torch.manual_seed(seed)
    given_patches, selected = corrupted(patches, batch["patches_length"], share, each)
    assert torch.equal(patches, before)
    assert selected.sum(dim=1).tolist() == [math.ceil(share * length) for length in lengths]
    assert not (selected & (torch.arange(12) >= batch["patches_length"][:, None])).any()
    assert torch.equal(given_patches[~selected], patches[~selected])
    for row in range(len(lengths)):
        kinds = set()
        for there, read in zip(patches[row, selected[row]], given_patches[row, selected[row]], strict=True):
            if (read == MASK).all():
                kinds.add("masked")
                continue
            end = (there == EOS).nonzero()[0, 0] if (there == EOS).any() else PATCH_BYTES
            assert read[0] == there[0] and torch.equal(read[end:], there[end:])
            assert read.sort().values.tolist() == there.sort().values.tolist()
            if not torch.equal(read, there):
                kinds.add("shuffled")
        assert each or len(kinds) <= 1


@pytest.mark.parametrize("each", [False, True])
def test_eight_of_ten_are_masked_and_one_is_shuffled(each):
    batch = notation([12] * 400, seed=3)
    torch.manual_seed(1)
    given_patches, selected = corrupted(batch["patches"], batch["patches_length"], 0.5, each)
    masked = (given_patches == MASK).all(dim=2)[selected].view(400, 6)
    kept = (given_patches == batch["patches"]).all(dim=2)[selected].view(400, 6)
    long = (batch["patches"] != PAD).sum(dim=2)[selected].view(400, 6) > 20  # a shuffle leaves hardly one as it was
    count = 6 if each else 1  # draws of a row
    assert masked[:, :count].double().mean().item() == pytest.approx(0.8, abs=0.06)
    assert kept[long].double().mean().item() == pytest.approx(0.1, abs=0.05)
    assert (masked.all(dim=1) | ~masked.any(dim=1)).all() != each
    assert selected.double().mean(dim=0).min() > 0.4  # every place is selected alike


@torch.no_grad()
def by_hand(model: M3Pretraining, given_patches: Tensor, selected: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The sums and counts, one character after the other, each from what stands before it."""
    states = model.encoder.states(model.encoder.patch_embedding(given_patches), batch["patches_length"])
    gpt = model.decoder.base
    out = torch.zeros(len(states), 2, dtype=states.dtype)
    for row, patch in selected.nonzero().tolist():
        characters = batch["patches"][row, patch].long()
        for place in range(1, PATCH_BYTES):
            if characters[place] == PAD:
                break
            before = torch.cat([states[row, patch][None], gpt.transformer.wte.weight[characters[1:place]]])
            logits = gpt(inputs_embeds=before[None]).logits[0, -1]
            out[row] += torch.stack([-logits.log_softmax(dim=0)[characters[place]], torch.ones(())])
    return out


def test_the_loss_by_hand():
    model, batch = seeded(M3Pretraining, dropout=0.0, decoder_depth=1).double().train(), notation([4, 1, 2], 4)
    batch["patches"][1] = 0  # a row that is masked
    torch.manual_seed(5)
    got = model(batch)
    torch.manual_seed(5)
    want = by_hand(model, *corrupted(batch["patches"], batch["patches_length"], 0.45, False), batch)
    torch.testing.assert_close(got, want)
    assert got[1].tolist() == [0.0, 0.0] and got[0, 1] > 0
    assert model.eval()(batch).shape == (3, 16)
    torch.testing.assert_close(model(batch), model.encoder(batch))


def test_every_parameter_has_a_gradient_and_layers_are_recomputed_one_by_one():
    model = seeded(M3Pretraining).train()
    model(notation([5, 3, 0]))[:, 0].sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert len(repeated_layers(model)) == 2 + 3


class Heard(M3Pretraining):
    """Takes the bytes of a clip for notation: it stands in for the modality in the config of a run."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        samples = batch["audio"][:, : 12 * PATCH_BYTES].view(-1, 12, PATCH_BYTES)
        patches = (4 + samples.remainder(124)).to(torch.uint8)
        patches[:, :, 0], patches[:, :, 40], patches[:, :, 41:] = BOS, EOS, PAD
        lengths = (batch["audio_length"] > 0) * torch.arange(3, 3 + len(samples), device=samples.device)
        inside = torch.arange(12) < lengths[:, None]
        return super().forward({"patches": patches * inside[:, :, None], "patches_length": lengths})


def pretraining(workers: int, chunks: int, stage: int = 0, **train) -> RunConfig:
    config = config_for("InfoNCE, same text", workers, chunks, stage, **train)
    options = SIZES | {"dropout": 0.2, "decoder_depth": 2, "corrupt": "patch"}
    tower = TowerConfig(f"{__name__}:Heard", options)
    objective = ObjectiveConfig("masked_patches", pairs=())
    return RunConfig(ModelConfig(audio=tower), data=config.data, objective=objective, train=config.train)


def test_gradients_cached_and_recomputed_are_those_of_one_encoding():
    (value, got), (exact, want) = plain(recomputed(pretraining(1, 4))), plain(pretraining(1, 4, cache_gradients=False))
    assert value == pytest.approx(exact, rel=1e-6) and 3 < value < 7
    assert max(errors(got, {name: g.double() for name, g in want.items()}).values()) <= TOLERANCE


def test_in_bf16_the_loss_is_about_the_same_and_float32():
    exact, rough = (plain(pretraining(1, 2, precision=precision))[0] for precision in ("fp32", "bf16"))
    assert rough != exact and rough == pytest.approx(exact, rel=0.02)


def test_the_weights_of_pretraining_start_an_encoder(tmp_path):
    model = MultimodalModel(pretraining(1, 1))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = M3(DATA, **SIZES)
    match, tensors = match_weights("audio", encoder, str(tmp_path))
    assert not match.missing and not match.other_shape
    assert all("decoder" in name for name in match.left_over)
    encoder.load_state_dict(tensors)
    batch = notation([4, 9])
    torch.testing.assert_close(encoder.eval()(batch), model.eval().towers["audio"].encoder(batch))


def test_clamps_weights_give_clamps_embeddings(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    theirs = BertModel(BertConfig(vocab_size=1, max_position_embeddings=12, **sizes)).eval()
    projection = torch.nn.Linear(8192, 16)
    file = {f"symbolic_model.base.{name}": x for name, x in theirs.state_dict().items()}
    file |= {f"symbolic_model.patch_embedding.{name}": x for name, x in projection.state_dict().items()}
    file |= {"text_model.embeddings.LayerNorm.weight": torch.ones(9)}
    save_file(file, tmp_path / "clamp2.safetensors")
    encoder = seeded(M3).eval()
    match, tensors = match_weights("symbolic", encoder, str(tmp_path / "clamp2.safetensors"))
    assert not match.missing and not match.other_shape
    encoder.load_state_dict(tensors)
    batch = notation([12, 5])
    mask = (torch.arange(12) < batch["patches_length"][:, None]).long()
    hidden = theirs(
        inputs_embeds=projection(F.one_hot(batch["patches"].long(), 128).float().flatten(2)), attention_mask=mask
    ).last_hidden_state
    want = (hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    torch.testing.assert_close(encoder(batch), want, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_says_why():
    with pytest.raises(ConfigError, match=r"model\.symbolic\.options\.patches: 13 patches do not fit into 12"):
        seeded(M3)(notation([3], 13))
    with pytest.raises(ConfigError, match="selected is a share"):
        seeded(M3Pretraining, selected=0.0)
    with pytest.raises(ConfigError, match="corrupt: no 'word'"):
        seeded(M3Pretraining, corrupt="word")
    with pytest.raises(ConfigError, match=r"m3 cannot be built: .*attention heads"):
        build_tower("symbolic", TowerConfig("m3", {"width": 10, "heads": 3}), DATA)
    with pytest.raises(ConfigError, match="trains the tower m3_pretraining, not m3"):
        RunConfig(ModelConfig(audio=TowerConfig("m3")), objective=ObjectiveConfig("masked_patches", pairs=()))
    with pytest.raises(ConfigError, match="with 'supervised' take m3"):
        RunConfig(ModelConfig(audio=TowerConfig("m3_pretraining")), objective=ObjectiveConfig("supervised", pairs=()))
    with pytest.raises(ConfigError, match='"masked_patches" contrasts nothing'):
        ObjectiveConfig("masked_patches")
