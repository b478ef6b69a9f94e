"""The wavelets of ESResNeXt-fbsp against their formula, the loss of their norms, and the pooling."""

import math

import numpy as np
import torch

from muser_dist.config import DataConfig
from muser_dist.models.batch_norm import set_valid_rows
from muser_dist.models.esresnext import ESResNeXt, WaveletKernels

SMALL = {"outputs": 8, "model": "resnet10t", "n_fft": 128, "hop": 50, "window": 100}


def complex_kernels(kernels: WaveletKernels) -> np.ndarray:
    parts = kernels().detach().numpy()
    return (parts[:, 0] + 1j * parts[:, 1]) * math.sqrt(parts.shape[2])


def test_wavelets_begin_as_the_fourier_transform_of_norm_1():
    t = math.pi * np.linspace(-1, 1, 128)
    expected = np.exp(-1j * np.arange(65)[:, None] * t)
    kernels = WaveletKernels(128)
    np.testing.assert_allclose(complex_kernels(kernels), expected, atol=1e-4)
    torch.testing.assert_close(kernels().square().sum(dim=(1, 2)), torch.ones(65))


def test_wavelets_are_the_published_formula():
    kernels = WaveletKernels(256).double()
    with torch.no_grad():
        kernels.m.copy_(torch.linspace(1.0, 3.0, 129))
        kernels.fb.copy_(torch.linspace(0.5, 6.0, 129))
    m, fb, fc = (p.detach().numpy()[:, None] for p in (kernels.m, kernels.fb, kernels.fc))
    t = math.pi * np.linspace(-1, 1, 256)
    sinc = np.sin(fb * t / m) / (fb * t / m)
    expected = np.sqrt(fb) * sinc.astype(complex) ** m * np.exp(-1j * fc * t)
    np.testing.assert_allclose(complex_kernels(kernels), expected, atol=0.02)
    clear = np.abs(sinc) > 0.1
    np.testing.assert_allclose(complex_kernels(kernels)[clear], expected[clear], rtol=0.01)


def test_gradients_of_the_wavelets_are_those_of_finite_differences_and_finite_from_the_start():
    kernels = WaveletKernels(16).double()
    given = [torch.linspace(low, high, 9, dtype=torch.float64) for low, high in ((0.3, 2.5), (0.5, 3.0), (0.2, 8.1))]

    def of(*parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(kernels, dict(zip(("m", "fb", "fc"), parameters, strict=True)), ())

    assert torch.autograd.gradcheck(of, [p.requires_grad_() for p in given])
    fresh = WaveletKernels(2048)
    fresh().square().sum(dim=(1, 2)).sqrt().sum().backward()
    for parameter in fresh.parameters():
        assert parameter.grad.abs().max() < 100


def test_the_loss_of_norms_by_hand():
    tower = ESResNeXt(DataConfig(), **SMALL)
    assert tower.auxiliary_losses()["kernel_norm"].item() < 1e-10
    with torch.no_grad():
        tower.fbsp.fb[:] = 4.0  # a factor of sqrt(4) at m = 0: norms are 2
        tower.fbsp.fb[0] = 16.0
    assert tower.auxiliary_losses()["kernel_norm"].item() == torch.tensor((64 * 1.0 + 9.0) / 65).item()


def test_columns_after_the_end_are_not_pooled():
    tower = ESResNeXt(DataConfig(), **SMALL).eval()
    x = torch.rand(2, 512, 3, 7)
    lengths = torch.tensor([4.0, 7.0])
    before = tower._pooled(x, lengths)
    x[0, :, :, 4:] = 1e4
    torch.testing.assert_close(tower._pooled(x, lengths), before)


def test_the_image_is_the_power_in_decibels_of_windowed_frames():
    tower = ESResNeXt(DataConfig(), **SMALL)
    audio = torch.randint(-9000, 9000, (1, 400), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    image = tower._image(audio)
    assert image.shape == (1, 3, 21, 7)
    taper = np.zeros(128)
    taper[14:114] = tower.taper.numpy()
    assert taper.max() == taper[14 + 50]  # periodic, as in the published code
    padded = np.pad(audio[0].numpy() / 32768, 200)
    frame = padded[200 + 50 - 14 :][:128] * taper  # 400 samples are 7 frames, nothing is missing
    t = math.pi * np.linspace(-1, 1, 128)
    bins = np.exp(-1j * np.arange(63)[:, None] * t) @ frame / math.sqrt(128)
    power = 10 * np.log10(np.abs(bins) ** 2).reshape(3, 21)
    np.testing.assert_allclose(image[0, :, :, 1].detach().numpy(), power, atol=0.05)


def test_silence_is_finite():
    tower = ESResNeXt(DataConfig(), **SMALL)
    batch = {"audio": torch.zeros(2, 300, dtype=torch.int16), "audio_length": torch.tensor([0, 300])}
    set_valid_rows(tower, batch["audio_length"] > 0)
    out = tower(batch)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters())
