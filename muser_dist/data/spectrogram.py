"""Waveforms to spectrograms, on the worker's device or in the decoding tasks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchaudio.transforms import MelSpectrogram, Spectrogram

from muser_dist.config import TowerConfig
from muser_dist.data.config import DataConfig
from muser_dist.errors import ConfigError


class LogMel(nn.Module):
    """Logarithm of the mel power spectrogram over the full band.

    Made in float32, also under autocast: the power of a loud clip overflows float16, and bfloat16
    has too few digits for quiet bands. The logarithm fits float16.

    Args:
        sample_rate: Hz.
        mels: bands between 0 Hz and half the sample rate.
        window: samples of the Fourier transform.
        hop: samples between frames.
        low, high: Hz, where the bands begin and end; 0 as `high` means half the sample rate.
        mean, deviation: of natural logarithms of power; they come out as 0 and 1. Published networks want their own.
    """

    channels = 1
    fits_float16 = True

    def __init__(
        self,
        sample_rate: int,
        mels: int = 64,
        window: int = 1024,
        hop: int = 320,
        low: float = 0.0,
        high: float = 0.0,
        mean: float = -4.0,
        deviation: float = 4.0,
    ) -> None:
        super().__init__()
        self.mels, self.hop, self.mean, self.deviation = mels, hop, mean, deviation
        with torch.device("cpu"):  # it looks at the values of its filters, which the meta device lacks
            self.mel = MelSpectrogram(
                sample_rate, n_fft=window, hop_length=hop, n_mels=mels, f_min=low, f_max=high or None
            )

    def forward(self, audio: Tensor) -> Tensor:
        """(rows, samples) int16 to (rows, 1, mels, frames) float32, about zero mean and unit variance."""
        with torch.autocast(audio.device.type, enabled=False):
            power = self.mel(audio.to(self.mel.mel_scale.fb.dtype) / 32768.0)
            return ((torch.log(power + 1e-6) - self.mean) / self.deviation)[:, None]


class CroppedLinear(nn.Module):
    """The picture that MUSER's released code shows to its CLIP image tower (Chen et al. 2023).

    A linear-frequency power spectrogram, neither mel nor logarithm, its shorter side resized to 300
    (bicubic), the 224 x 224 in the middle, in three equal channels with CLIP's normalisation. At 16 kHz
    the crop keeps 1.0 to 7.0 kHz only. Its power overflows float16, so it is made on the device.

    Args:
        sample_rate: unused: the picture is laid out in bins.
        window: samples of the Fourier transform.
        hop: samples between frames.
    """

    channels = 3
    fits_float16 = False
    mean: Tensor
    deviation: Tensor

    def __init__(self, sample_rate: int, window: int = 1024, hop: int = 512) -> None:
        super().__init__()
        with torch.device("cpu"):
            self.power = Spectrogram(n_fft=window, hop_length=hop, power=2.0)
        mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None], persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """(rows, samples) int16 to (rows, 3, 224, 224) float32."""
        with torch.autocast(audio.device.type, enabled=False):
            power = self.power(audio.float() / 32768.0)
            height, width = power.shape[1:]
            scale = 300 / min(height, width)
            size = (round(height * scale), round(width * scale))
            image = interpolate(power[:, None], size, mode="bicubic", antialias=True)
            top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
            crop = image[:, :, top : top + 224, left : left + 224]
            return (crop - self.mean) / self.deviation


KINDS: dict[str, type[LogMel] | type[CroppedLinear]] = {"log_mel": LogMel, "cropped_linear": CroppedLinear}

OPTIONS = ("kind", "mels", "window", "hop", "low", "high", "mean", "deviation")


def front_end(data: DataConfig, kind: str = "log_mel", **options: Any) -> LogMel | CroppedLinear:
    """The module that makes a tower's spectrograms.

    Args:
        data: gives the sample rate.
        kind: "log_mel" or "cropped_linear".
        options: of the kind; see there.

    Raises:
        ConfigError: there is no such kind or option.
    """
    try:
        return KINDS[kind](data.sample_rate, **options)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"model.spectrogram.options: {error}; kinds are {', '.join(KINDS)}, options {', '.join(OPTIONS[1:])}"
        ) from None


def in_tasks(data: DataConfig, tower: TowerConfig) -> LogMel | CroppedLinear:
    """The front end of a tower for decoding tasks (data.spectrogram_on "cpu").

    Raises:
        ConfigError: its spectrograms do not fit the float16 that goes through the object store.
    """
    module = front_end(data, **{name: tower.options[name] for name in OPTIONS if name in tower.options})
    if not module.fits_float16:
        raise ConfigError(
            "data.spectrogram_on: the power of a cropped_linear spectrogram overflows float16; give device"
        )
    return module
