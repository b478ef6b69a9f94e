"""The towers' attention is torch's fused one, also where rows are padded and in training with dropout."""

import pytest
import torch
import torch.nn.functional as F

from muser_dist.models.model import MultimodalModel
from tests.models.test_model import batch_of
from tests.models.test_recompute import config_with


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_attention_is_fused(modality, monkeypatch):
    config = config_with("convnext_atto")
    model, batch = MultimodalModel(config), batch_of(config)
    batch["text_length"][1], batch["audio_length"][1] = 3, config.data.crop_samples // 2
    calls, fused = [], F.scaled_dot_product_attention

    def counting(query, key, value, attn_mask=None, **options):
        calls.append((attn_mask is not None, options["dropout_p"]))
        return fused(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    model.train().encode(modality, batch)
    assert calls == [(True, 0.3)] * 2  # one for each layer, with the mask of padded rows
    with torch.inference_mode():
        model.eval().encode(modality, batch)
    assert calls[2:] == [(True, 0.0)] * 2
