"""The waveform tower: strided convolutions and a Transformer over raw samples."""

from muser_dist.config import DataConfig
from muser_dist.models.huggingface import HuggingFaceWaveform


class WaveformTower(HuggingFaceWaveform):
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
        super().__init__(
            data,
            model={
                "model_type": "wav2vec2",
                "hidden_size": width,
                "num_hidden_layers": depth,
                "num_attention_heads": heads,
                "intermediate_size": 4 * width,
                "conv_dim": (width, width, width),
                "conv_kernel": (400, 8, 4),
                "conv_stride": (80, 4, 2),
                "conv_bias": True,
                "feat_extract_norm": "layer",
                "do_stable_layer_norm": True,
                "num_conv_pos_embeddings": 32,
                "num_conv_pos_embedding_groups": 8,
                "hidden_dropout": dropout,
                "attention_dropout": dropout,
                "activation_dropout": dropout,
                "feat_proj_dropout": 0.0,
            },
        )
