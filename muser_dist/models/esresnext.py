"""ESResNeXt-fbsp (Guzhov et al. 2021): wavelets that are learned, and a ResNeXt with attention on their powers.

The audio tower of AudioCLIP and of MUSER's released code.
"""

import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muser_dist.config import DataConfig
from muser_dist.errors import ConfigError
from muser_dist.models.batch_norm import replace_batch_norm, set_valid_rows
from muser_dist.models.heads import masked_mean


class WaveletKernels(nn.Module):
    """Complex frequency B-spline wavelets, one for each frequency bin.

    psi(t) = sqrt(fb) · sinc(fb·t / m)^m · exp(-i·fc·t), over n samples with -π <= t <= π, divided by sqrt(n).
    The names of the three parameters are the published ones. m begins at 0, where the envelope is 1 and the wavelets
    are those of the discrete Fourier transform, each of norm 1.

    Two changes keep gradients finite where the published formula divides by m = 0 and by sin = 0: m is no smaller
    than one step of t inside the sinc, and sin² no smaller than 1e-4 (docs/decisions.md).

    Args:
        samples: n.
    """

    times: Tensor

    def __init__(self, samples: int) -> None:
        super().__init__()
        bins = samples // 2 + 1
        self.m = nn.Parameter(torch.zeros(bins))
        self.fb = nn.Parameter(torch.ones(bins))
        self.fc = nn.Parameter(torch.arange(bins, dtype=torch.get_default_dtype()))
        self.register_buffer("times", math.pi * torch.linspace(-1.0, 1.0, samples), persistent=False)

    def forward(self) -> Tensor:
        """(bins, 2, samples): real and imaginary parts."""
        t, (m, fb, fc) = self.times, (parameter[:, None] for parameter in (self.m, self.fb, self.fc))
        x = fb * t / torch.sqrt(m.square() + (2 * math.pi / len(t)) ** 2)
        log_sinc = 0.5 * torch.log((x.sin().square() + 1e-4) / (x.square() + 1e-4))
        # A negative number to the power of m is turned by m half circles.
        turned = torch.where(torch.sin(x) * x < 0, math.pi * m, 0.0)
        envelope = fb.abs().sqrt() * torch.exp(m * log_sinc) / math.sqrt(len(t))
        return torch.stack([envelope * torch.cos(turned - fc * t), envelope * torch.sin(turned - fc * t)], dim=1)


class Attention(nn.Module):
    """Factors between 0 and 1 for the output of a stage, out of the stage's input."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv_depth = nn.Conv2d(channels, channels, kernel, padding=padding, groups=channels)
        self.conv_point = nn.Conv2d(channels, out, 1)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, channels, height, width) to (rows, out, height, width)."""
        return torch.sigmoid(self.bn(self.conv_point(self.conv_depth(x))))


_ATTENTION_KERNELS = ((3, 1), (1, 5), (3, 1), (1, 5), (3, 5))
"""(frequency, time) of the four stages and of the pooling."""


class ESResNeXt(nn.Module):
    """Raw samples to the embedding, with a loss that keeps the wavelets at norm 1.

    The powers of the bins in dB, their lower, middle and upper third as three channels, go through a ResNeXt-50
    (32x4d) whose stages are each multiplied by an attention map; then pooling over frequency and time, and a linear
    layer. Columns after a clip's end are not pooled. The published sizes are the defaults.

    Args:
        data: gives nothing but the contract of the batch; published at 16 kHz (MUSER) and 44.1 kHz (AudioCLIP).
        outputs: of the last linear layer, and the tower's width.
        model: timm's name of the residual network.
        n_fft: samples of a wavelet.
        hop: samples between frames.
        window: samples of the Blackman-Harris window that frames are multiplied by.
    """

    own_head = "encoder.fc."
    taper: Tensor

    def __init__(
        self,
        data: DataConfig,
        *,
        outputs: int = 1024,
        model: str = "resnext50_32x4d",
        n_fft: int = 2048,
        hop: int = 561,
        window: int = 1654,
    ) -> None:
        super().__init__()
        if not window <= n_fft:
            raise ValueError(f"window ({window}) must not exceed n_fft ({n_fft})")
        self.width, self.hop, self.window = outputs, hop, window
        self.fbsp = WaveletKernels(n_fft)
        # Blackman-Harris, with torch's own: a_k = 0.35875, 0.48829, 0.14128, 0.01168.
        angles = 2 * math.pi * torch.arange(window, dtype=torch.float64) / window
        weights = (0.35875, -0.48829, 0.14128, -0.01168)
        taper = torch.stack([a * torch.cos(k * angles) for k, a in enumerate(weights)]).sum(dim=0)
        self.register_buffer("taper", taper.to(torch.get_default_dtype()), persistent=False)
        try:
            self.encoder = timm.create_model(model, num_classes=outputs, in_chans=3)
        except RuntimeError as error:
            raise ConfigError(f"model.audio.options: timm cannot build {model!r}: {error}") from None
        network: Any = self.encoder
        channels = [stage["num_chs"] for stage in network.feature_info]
        outs = [*channels[1:], channels[-1]]
        self.attention = nn.ModuleList(
            Attention(*sizes) for sizes in zip(channels, outs, _ATTENTION_KERNELS, strict=True)
        )
        replace_batch_norm(self, "chunk")

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """ "kernel_norm": mean over the wavelets of (norm - 1)²; published as loss_ttf."""
        return {"kernel_norm": (self.fbsp().square().sum(dim=(1, 2)).sqrt() - 1.0).square().mean()}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeds a batch.

        Args:
            batch: "audio" (rows, samples) int16 and "audio_length" (rows,) int32.

        Returns:
            (rows, outputs).
        """
        set_valid_rows(self, batch["audio_length"] > 0)
        x = self._image(batch["audio"])
        network: Any = self.encoder
        x = network.maxpool(network.act1(network.bn1(network.conv1(x))))
        stages = (network.layer1, network.layer2, network.layer3, network.layer4)
        for stage, attention in zip(stages, self.attention, strict=False):
            after = stage(x)
            x = after * attention(F.adaptive_max_pool2d(x, after.shape[-2:]))
        samples_per_column = batch["audio"].shape[1] / x.shape[3]
        lengths = torch.ceil(batch["audio_length"] / samples_per_column).clamp(min=1)
        return network.fc(self._pooled(x, lengths))

    def _pooled(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(rows, channels, frequency, time) to (rows, channels), over the first `lengths` columns."""
        after_end = torch.arange(x.shape[3], device=x.device) >= lengths[:, None, None, None]
        largest = x.masked_fill(after_end, 0.0).amax(dim=(2, 3), keepdim=True)  # nothing is negative here
        return masked_mean(x.mean(dim=2).transpose(1, 2), lengths) * self.attention[-1](largest)[:, :, 0, 0]

    def _image(self, audio: Tensor) -> Tensor:
        """(rows, samples) int16 to (rows, 3, bins // 3, frames), in dB."""
        with torch.autocast(audio.device.type, enabled=False):
            kernels = self.fbsp()
            missing = max(self.window - audio.shape[1], -(audio.shape[1] - self.window) % self.hop)
            padded = F.pad(audio.to(kernels.dtype) / 32768.0, (missing // 2, missing - missing // 2))
            frames = padded.unfold(1, self.window, self.hop)  # (rows, frames, window)
            outside = (kernels.shape[2] - self.window) // 2
            kernels = kernels[:, :, outside : outside + self.window] * self.taper
            real, imaginary = (frames @ kernels[:, part].T for part in (0, 1))
            power = (real.square() + imaginary.square()).transpose(1, 2)  # (rows, bins, frames)
            third = power.shape[1] // 3
            # Below it is the silence of the published code.
            return 10.0 * torch.log10(power[:, : 3 * third].clamp(min=1e-18)).unflatten(1, (3, third))
