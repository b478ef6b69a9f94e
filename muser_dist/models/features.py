"""CLaMP 3's audio tower: a Transformer over a frozen network's features of a song's windows (Wu et al. 2025)."""

from torch import Tensor, nn

from muser_dist.data.config import DataConfig
from muser_dist.errors import require
from muser_dist.models.heads import inside
from muser_dist.models.transformer import VectorBert


class FeatureTower(VectorBert):
    """BERT over one vector for each window of a song, between two zero vectors, averaged over all of them.

    As published: MERT's features of windows of 5 s, 128 positions.

    Args:
        data: gives the size of a feature (where it is not `width`, a linear layer comes first), and the most windows of
            a song.
        positions: most vectors of a song, the zero vectors among them, where weights have more than `data` needs; 128
            as published.
        width: channels, and the output's.
        depth: layers.
        heads: attention heads; must divide `width`.
        dropout: probability after embedding, attention and feed-forward.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        positions: int | None = None,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(width, depth, heads, dropout, positions or data.features.max_windows + 2)
        size = data.features.size
        self.inputs = nn.Identity() if size == width else nn.Linear(size, width)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeds a batch.

        Args:
            batch: "features" (rows, windows, size) float16 or float32 and "features_length" (rows,) int32, of the
                windows that a row has; what stands behind them does not matter.

        Returns:
            (rows, width).

        Raises:
            ConfigError: there are more windows than positions for them.
        """
        features, lengths = batch["features"], batch["features_length"].clamp(min=1)
        require(
            features.shape[1] + 2 <= self.positions,
            f"model.features.options.positions: {features.shape[1]} windows and two zero vectors do not fit into "
            f"{self.positions} positions; give at least data.features.max_windows + 2",
        )
        features = features[:, : int(lengths.max())]  # most songs may be far shorter than the longest that fits
        features = features.masked_fill(~inside(features, lengths)[:, :, None], 0.0).to(self.base.dtype)
        return self.pooled(self.inputs(nn.functional.pad(features, (0, 0, 1, 1))), lengths + 2)
