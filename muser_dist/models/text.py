"""The text tower: a Transformer encoder over token ids."""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from muser_dist.config import DataConfig
from muser_dist.data.text import load_tokenizer
from muser_dist.models.heads import masked_mean


class TextTower(nn.Module):
    """BERT's architecture (Devlin et al. 2019), sized by its options, from random weights.

    Args:
        data: gives the tokenizer (and so the vocabulary) and the number of tokens.
        width: channels, and the output's.
        depth: layers.
        heads: attention heads; must divide `width`.
        dropout: probability after attention and feed-forward.
    """

    def __init__(
        self, data: DataConfig, *, width: int = 128, depth: int = 2, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.width = width
        self.encoder = BertModel(
            BertConfig(
                vocab_size=load_tokenizer(data.tokenizer, data.vocabulary, data.max_tokens).vocabulary,
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                max_position_embeddings=data.max_tokens,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            ),
            add_pooling_layer=False,
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeds a batch.

        Args:
            batch: "text_ids" (rows, tokens) int32 and "text_length" (rows,) int32.

        Returns:
            (rows, width).
        """
        ids, lengths = batch["text_ids"], batch["text_length"].clamp(min=1)
        inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        hidden = self.encoder(input_ids=ids.long(), attention_mask=inside.long()).last_hidden_state
        return masked_mean(hidden, lengths)
