"""The spectrogram tower: log-mel on the worker's device, then an image network of timm."""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from muser_dist.config import DataConfig
from muser_dist.errors import ConfigError
from muser_dist.models.heads import masked_mean


class LogMel(nn.Module):
    """Logarithm of the mel power spectrogram over the full band.

    Made in float32 on the worker's device, also under autocast: the power of a loud clip
    overflows float16, and bfloat16 has too few digits for quiet bands.

    Args:
        sample_rate: Hz.
        mels: bands between 0 Hz and half the sample rate.
        window: samples of the Fourier transform.
        hop: samples between frames.
    """

    def __init__(self, sample_rate: int, mels: int, window: int, hop: int) -> None:
        super().__init__()
        self.hop = hop
        with torch.device("cpu"):  # it looks at the values of its filters, which the meta device lacks
            self.mel = MelSpectrogram(sample_rate, n_fft=window, hop_length=hop, n_mels=mels)

    def forward(self, audio: Tensor) -> Tensor:
        """(rows, samples) int16 to (rows, mels, frames) float32, about zero mean and unit variance."""
        with torch.autocast(audio.device.type, enabled=False):
            power = self.mel(audio.to(self.mel.mel_scale.fb.dtype) / 32768.0)
            return (torch.log(power + 1e-6) + 4.0) / 4.0


class SpectrogramTower(nn.Module):
    """An image network of timm on the log-mel spectrogram, averaged over frequency and time.

    Args:
        data: gives the sample rate.
        model: timm's name of the network; it must be convolutional with (rows, channels,
            frequency, time) features, and its norms must not look at other rows.
        mels: mel bands.
        window: samples of the Fourier transform.
        hop: samples between frames.
        timm_options: passed to timm.create_model; for ConvNeXt `depths` and `dims`.

    Raises:
        ConfigError: timm does not know the model or its options.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        model: str = "convnext_atto",
        mels: int = 64,
        window: int = 1024,
        hop: int = 320,
        **timm_options: Any,
    ) -> None:
        super().__init__()
        self.log_mel = LogMel(data.sample_rate, mels, window, hop)
        try:
            # The network without its head: a parameter that nothing uses would stall ZeRO.
            self.encoder = timm.create_model(model, in_chans=1, features_only=True, out_indices=(-1,), **timm_options)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"model.spectrogram.options: timm cannot build {model!r}: {error}") from None
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.encoder.modules()):
            raise ConfigError(
                f"model.spectrogram.options.model: {model!r} has BatchNorm, which mixes masked rows into the others; "
                "take a network with LayerNorm or GroupNorm, such as convnext_atto"
            )
        self.width: int = self.encoder.feature_info.channels()[-1]  # type: ignore[operator, union-attr]
        self.norm = nn.LayerNorm(self.width)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeds a batch.

        Args:
            batch: "audio" (rows, samples) int16 and "audio_length" (rows,) int32.

        Returns:
            (rows, width).
        """
        image = self.log_mel(batch["audio"])
        (features,) = self.encoder(image[:, None])  # (rows, width, frequency, time)
        columns = features.mean(dim=2).transpose(1, 2)
        samples_per_column = batch["audio"].shape[1] / columns.shape[1]
        lengths = torch.ceil(batch["audio_length"] / samples_per_column).clamp(min=1)
        return self.norm(masked_mean(columns, lengths))
