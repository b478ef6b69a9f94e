"""The spectrogram tower: an image network of timm on the spectrogram."""

from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from muser_dist.data.config import DataConfig
from muser_dist.data.spectrogram import OPTIONS, front_end
from muser_dist.errors import ConfigError, require
from muser_dist.models.batch_norm import replace_batch_norm, set_valid_rows
from muser_dist.models.heads import masked_mean


class SpectrogramTower(nn.Module):
    """An image network of timm on the spectrogram, averaged over frequency and time, or pooled by its own head.

    Args:
        data: gives the sample rate and the length of crops.
        model: timm's name of the network; it must be convolutional with (rows, channels,
            frequency, time) features, unless `outputs` is given.
        outputs: of the network's own head, which is then the tower's output: CLIP's networks ("resnet50_clip", 1,024)
            end in an attention pooling and a projection, which take no mask. 0 averages the features instead.
        batch_norm: what becomes of batch normalisation, where the network has it: "chunk" normalises over the valid
            rows of a chunk and updates the running statistics once a step; "frozen" keeps to the running ones.
        options: "kind" and options of the spectrogram (muser_dist/data/spectrogram.py); the others go to
            timm.create_model: for ConvNeXt `depths` and `dims`.

    Raises:
        ConfigError: timm does not know the model or its options.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        model: str = "convnext_atto",
        outputs: int = 0,
        batch_norm: Literal["chunk", "frozen"] = "chunk",
        **options: Any,
    ) -> None:
        super().__init__()
        self.front_end = front_end(data, **{name: options.pop(name) for name in OPTIONS if name in options})
        self.samples = data.crop_samples
        try:
            # Either with its head or without: a parameter that nothing uses would stall ZeRO.
            head = {"num_classes": outputs} if outputs else {"features_only": True, "out_indices": (-1,)}
            self.encoder = timm.create_model(model, in_chans=self.front_end.channels, **head, **options)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"model.spectrogram.options: timm cannot build {model!r}: {error}") from None
        require(batch_norm in ("chunk", "frozen"), f"model.spectrogram.options.batch_norm: no {batch_norm!r}")
        replace_batch_norm(self.encoder, batch_norm)
        self.own_head = f"encoder.{self.encoder.default_cfg['classifier']}." if outputs else ""  # type: ignore[index]
        self.width: int = outputs or self.encoder.feature_info.channels()[-1]  # type: ignore[operator, union-attr]
        self.norm = None if outputs else nn.LayerNorm(self.width)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeds a batch.

        Args:
            batch: "audio_length" (rows,) int32 with "audio" (rows, samples) int16, or with the
                "spectrogram" (rows, 1, mels, frames) float16 that decoding tasks have made.

        Returns:
            (rows, width).
        """
        image = image_of(batch, self.front_end)
        set_valid_rows(self.encoder, batch["audio_length"] > 0)
        if self.norm is None:
            return self.encoder(image)
        (features,) = self.encoder(image)  # (rows, width, frequency, time)
        columns = features.mean(dim=2).transpose(1, 2)
        samples_per_column = self.samples / columns.shape[1]
        lengths = torch.ceil(batch["audio_length"] / samples_per_column).clamp(min=1)
        return self.norm(masked_mean(columns, lengths))


def image_of(batch: dict[str, Tensor], front_end: nn.Module) -> Tensor:
    """A batch's spectrograms: those that decoding tasks have made, or made here; float32."""
    return batch["spectrogram"].float() if "spectrogram" in batch else _made(front_end, batch["audio"])


@torch.compiler.disable  # it generates no code for Fourier transforms, and breaks the graph all around them
def _made(front_end: nn.Module, audio: Tensor) -> Tensor:
    return front_end(audio)
