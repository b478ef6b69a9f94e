"""Chunks as the data path makes them, without data."""

import numpy as np

from muser_dist.config import RunConfig
from muser_dist.data.chunks import Chunk
from muser_dist.data.text import load_tokenizer


def synthetic_chunk(config: RunConfig, number: int) -> Chunk:
    """What training needs of a chunk (muser_dist/data/chunks.py): noise, random tokens, every row valid."""
    data, c = config.data, config.train.chunk
    rng = np.random.default_rng(number)
    row = number * c + np.arange(c)
    words = load_tokenizer(data.tokenizer, data.vocabulary, data.max_tokens).vocabulary
    chunk: Chunk = {
        "step": np.int64(0),
        "chunk": np.int64(number),
        "row": row,
        "audio": rng.integers(-20_000, 20_000, (c, data.crop_samples), dtype=np.int16),
        "audio_length": np.full(c, data.crop_samples, np.int32),
        "text_ids": rng.integers(1, words, (c, data.max_tokens), dtype=np.int32),
        "text_length": np.full(c, data.max_tokens, np.int32),
        "text_id": row,
        "label_id": np.full(c, -1, np.int64),
    }
    return chunk | {f"valid_{modality}": np.ones(c, bool) for modality in config.model.towers()}
