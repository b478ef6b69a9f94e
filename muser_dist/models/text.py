"""The text tower: a Transformer encoder over token ids."""

from muser_dist.config import DataConfig
from muser_dist.models.huggingface import HuggingFaceText


class TextTower(HuggingFaceText):
    """BERT's architecture (Devlin et al. 2019), sized by its options, from random weights, averaged over the tokens.

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
        super().__init__(
            data,
            model={
                "model_type": "bert",
                "hidden_size": width,
                "num_hidden_layers": depth,
                "num_attention_heads": heads,
                "intermediate_size": 4 * width,
                "max_position_embeddings": data.max_tokens,
                "hidden_dropout_prob": dropout,
                "attention_probs_dropout_prob": dropout,
            },
        )
