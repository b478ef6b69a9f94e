"""HTCL's audio encoder, on log-mel spectrograms of up to two minutes (Pan et al. 2025)."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from muser_dist.data.config import DataConfig
from muser_dist.data.spectrogram import LogMel, front_end
from muser_dist.errors import ConfigError, require
from muser_dist.models.heads import inside, masked_mean
from muser_dist.models.spectrogram import image_of
from muser_dist.models.transformer import transformer_layers

KERNELS = 5, 3, 3
STRIDE = 2

_Count = TypeVar("_Count", int, Tensor)


class HTCLAudio(nn.Module):
    """Three strided convolutions and a Transformer with convolutional positions, averaged over a clip's tokens.

    As published, but for padding: no frame behind the end of a clip is heard or averaged, where the released code pads
    every song to two minutes of silence and takes the mean over all of it. A frame counts where its window lies inside
    the clip, and each clip is standardised over its own frames; so an embedding does not depend on how far its clip is
    padded. A clip of fewer than 17 frames, which are one token, is heard together with what pads it.

    The published input at 16 kHz is {"mels": 128, "window": 2048, "hop": 1536}: 128 ms every 96 ms.

    Args:
        data: gives the sample rate and the length of crops.
        width: channels of the Transformer, and of the output; a multiple of 16 (groups of the positional convolution).
        depth: Transformer layers.
        heads: attention heads; must divide `width`.
        channels: of the strided convolutions.
        dropout: probability before the Transformer and after attention and feed-forward.
        **spectrogram: of the log-mel spectrogram (muser_dist/data/spectrogram.py).

    Raises:
        ConfigError: the spectrogram is another kind, or a crop is too short for one token.
        ValueError: sizes do not divide each other.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        channels: int = 512,
        dropout: float = 0.1,
        **spectrogram: Any,
    ) -> None:
        super().__init__()
        self.front_end = front_end(data, **spectrogram)
        mel = self.front_end
        if not isinstance(mel, LogMel):
            raise ConfigError("model.spectrogram.options.kind: HTCL's encoder takes log_mel")
        self.half_window, self.hop = mel.mel.n_fft // 2, mel.hop
        frames = data.crop_samples // mel.hop + 1
        require(
            _tokens(frames) >= 1,
            f"data.crop_seconds: a crop of {frames} frames is too short for HTCL's convolutions, which make a token of "
            "17; give longer crops, or a smaller hop in model.spectrogram.options",
        )
        inputs = (mel.mels, channels, channels)
        self.convolutions = nn.ModuleList(_Strided(i, channels, k) for i, k in zip(inputs, KERNELS, strict=True))
        self.projection = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.position = _Position(width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.cls = nn.Parameter(torch.randn(width))
        self.transformer = transformer_layers(width, depth, heads, dropout)
        self.width = width

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeds a batch.

        Args:
            batch: "audio_length" (rows,) int32 with "audio" (rows, samples) int16, or with the
                "spectrogram" (rows, 1, mels, frames) float16 that decoding tasks have made.

        Returns:
            (rows, width).
        """
        frames = image_of(batch, self.front_end)[:, 0].transpose(1, 2)  # (rows, frames, mels)
        # Windows of later frames go beyond the clip's end.
        lengths = ((batch["audio_length"] - self.half_window) // self.hop + 1).clamp(min=1)
        x = _standardised(frames, lengths)
        for convolution in self.convolutions:
            x = convolution(x)
        lengths = _tokens(lengths).clamp(min=1)
        x = self.projection(x) * inside(x, lengths)[:, :, None]
        x = self.dropout(self.norm(x + self.position(x)))
        x, lengths = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1), lengths + 1
        x = self.transformer(x, attention_mask=inside(x, lengths)[:, None, None]).last_hidden_state
        return masked_mean(x, lengths)


class _Strided(nn.Module):
    """(rows, positions, inputs) to (rows, about half the positions, channels), without padding."""

    def __init__(self, inputs: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(inputs, channels, kernel, stride=STRIDE, bias=False)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.norm(self.convolution(x.transpose(1, 2)).transpose(1, 2)))


class _Position(nn.Module):
    """What is added for the position: a grouped convolution over the neighbours (wav2vec 2.0, Baevski et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = weight_norm(nn.Conv1d(width, width, kernel_size=31, padding=15, groups=16), dim=2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.norm(self.convolution(x.transpose(1, 2)).transpose(1, 2)))


def _standardised(frames: Tensor, lengths: Tensor) -> Tensor:
    """Zero mean and unit variance over all values of a clip's own frames; the others are 0: (rows, frames, mels)."""
    own = inside(frames, lengths)[:, :, None]
    count = lengths[:, None, None] * frames.shape[2]
    centred = (frames - (frames * own).sum(dim=(1, 2), keepdim=True) / count) * own
    variance = centred.square().sum(dim=(1, 2), keepdim=True) / count
    return centred * torch.rsqrt(variance + 1e-5)  # all zeros for silence


def _tokens(frames: _Count) -> _Count:
    """How many of the convolutions' outputs lie wholly inside so many frames; below 1 where there is none."""
    for kernel in KERNELS:
        frames = (frames - kernel) // STRIDE + 1
    return frames
