"""The Transformer of towers that read vectors in place of words: frames of sound, patches of notation, features."""

from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, BertModel

from muser_dist.models.heads import inside, masked_mean


def transformer_layers(width: int, depth: int, heads: int, dropout: float) -> nn.Module:
    """BERT's layers alone (Devlin et al. 2019), norms after attention and feed-forward, 4 x width in the latter.

    They take (rows, positions, width) and `attention_mask` (rows, 1, 1, positions) bool, of the positions to attend to,
    and give an object whose `last_hidden_state` is (rows, positions, width).

    Raises:
        ValueError: `heads` does not divide `width`.
    """
    return _bert(width, depth, heads, dropout, 1).encoder


class VectorBert(nn.Module):
    """BERT with learned positions on (rows, positions, width) vectors, averaged over those that a row has.

    The network is `base`, with transformers' names of weights, without word embeddings and pooler: a parameter that
    nothing uses would stall ZeRO.

    Args:
        width: of the vectors and of the output.
        depth: layers.
        heads: attention heads; must divide `width`.
        dropout: probability after embedding, attention and feed-forward.
        positions: most vectors of a row.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    def __init__(self, width: int, depth: int, heads: int, dropout: float, positions: int) -> None:
        super().__init__()
        self.width, self.positions = width, positions
        self.base: Any = _bert(width, depth, heads, dropout, positions)
        self.base.embeddings.word_embeddings = None

    def states(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """The last layer's output, (rows, positions, width); `lengths` (rows,) is at least 1."""
        mask = inside(vectors, lengths).long()
        return self.base(inputs_embeds=vectors, attention_mask=mask).last_hidden_state

    def pooled(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """The mean of `states` over the first `lengths` positions, (rows, width)."""
        return masked_mean(self.states(vectors, lengths), lengths)


def _bert(width: int, depth: int, heads: int, dropout: float, positions: int) -> Any:
    config = BertConfig(
        vocab_size=1,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False)
