"""The waveform tower: strided convolutions and a Transformer over raw samples."""

import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

from muser_dist.config import DataConfig
from muser_dist.models.heads import masked_mean


class WaveformTower(nn.Module):
    """wav2vec 2.0's architecture (Baevski et al. 2020), sized by its options, from random weights.

    Three convolutions (kernels 400, 8, 4; strides 80, 4, 2) make one frame of 640 samples. The
    first is a filter bank with windows of 400 samples; the short kernels of the published stack cost
    a CPU more (benchmarks/LOG.md).

    Args:
        data: gives nothing but the contract of the batch; any sample rate will do.
        width: channels of the Transformer, and of the output.
        depth: Transformer layers.
        heads: attention heads; must divide `width`.
        dropout: probability after attention and feed-forward.
    """

    def __init__(
        self, data: DataConfig, *, width: int = 128, depth: int = 2, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.width = width
        self.encoder = Wav2Vec2Model(
            Wav2Vec2Config(
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                conv_dim=(width, width, width),
                conv_kernel=(400, 8, 4),
                conv_stride=(80, 4, 2),
                conv_bias=True,
                feat_extract_norm="layer",
                do_stable_layer_norm=True,
                num_conv_pos_embeddings=32,
                num_conv_pos_embedding_groups=8,
                hidden_dropout=dropout,
                attention_dropout=dropout,
                activation_dropout=dropout,
                feat_proj_dropout=0.0,
                layerdrop=0.0,  # would make ranks run different layers, which hangs at ZeRO-3
                apply_spec_augment=False,
                mask_time_prob=0.0,  # else it owns a parameter that nothing uses, and ZeRO waits for its gradient
            )
        )
        # Else it asks for the waveform's gradient, which nobody reads: work, and a break in compiled code.
        self.encoder.feature_extractor._requires_grad = False

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeds a batch.

        Args:
            batch: "audio" (rows, samples) int16 and "audio_length" (rows,) int32.

        Returns:
            (rows, width).
        """
        samples = batch["audio"].shape[1]
        waveform = batch["audio"].to(self.encoder.dtype)
        waveform = waveform - waveform.mean(dim=1, keepdim=True)
        waveform = waveform / (waveform.std(dim=1, keepdim=True) + 1.0)  # int16 steps: 1 is the quietest sound
        lengths = batch["audio_length"].clamp(min=1)
        inside = torch.arange(samples, device=waveform.device) < lengths[:, None]
        frames = self.encoder(waveform, attention_mask=inside).last_hidden_state
        frame_lengths = self.encoder._get_feat_extract_output_lengths(lengths).clamp(min=1)  # type: ignore[arg-type]
        return masked_mean(frames, frame_lengths)
