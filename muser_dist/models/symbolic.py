"""M3, CLaMP 2's encoder of notation in patches, and its pretraining on masked patches (Wu et al. 2024)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from muser_dist.data.config import DataConfig
from muser_dist.data.symbolic.characters import BOS, CHARACTERS, EOS, MASK, PAD, PATCH_BYTES
from muser_dist.errors import require
from muser_dist.models.heads import inside
from muser_dist.models.transformer import VectorBert


class PatchEmbedding(nn.Linear):
    """A linear layer on the one-hot characters of a patch: the sum of one of its columns for each character.

    Written so, 64 columns are read of each patch, where the product would multiply 8,192 with mostly zeros.
    """

    def __init__(self, width: int) -> None:
        super().__init__(PATCH_BYTES * CHARACTERS, width)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (rows, patches, 64) uint8, below 128, to (rows, patches, width)."""
        columns = patches.long() + CHARACTERS * torch.arange(PATCH_BYTES, device=patches.device)
        table = self.weight.t().contiguous()
        summed = F.embedding_bag(columns.flatten(0, 1), table, mode="sum")
        return summed.unflatten(0, patches.shape[:2]) + self.bias


class M3(VectorBert):
    """BERT over patches of ABC notation or MIDI as text, averaged over the patches of a piece.

    Args:
        data: gives the most patches of a piece, where `patches` does not.
        patches: most of a piece; published weights have 512.
        width: channels, and the output's.
        depth: layers.
        heads: attention heads; must divide `width`.
        dropout: probability after embedding, attention and feed-forward.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        patches: int | None = None,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(width, depth, heads, dropout, patches or data.symbolic.max_patches)
        self.patch_embedding = PatchEmbedding(width)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeds a batch.

        Args:
            batch: "patches" (rows, patches, 64) uint8, ASCII with PAD, BOS and EOS, and "patches_length" (rows,) int32.

        Returns:
            (rows, width).

        Raises:
            ConfigError: there are more patches than positions.
        """
        patches, lengths = self.read(batch)
        return self.pooled(self.patch_embedding(patches), lengths)

    def read(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A batch's patches up to the longest piece's end, and lengths of at least 1."""
        patches, lengths = batch["patches"], batch["patches_length"].clamp(min=1)
        require(
            patches.shape[1] <= self.positions,
            f"model.symbolic.options.patches: {patches.shape[1]} patches do not fit into {self.positions} positions; "
            "give at least data.symbolic.max_patches",
        )
        return patches[:, : int(lengths.max())], lengths  # most pieces are far shorter than the longest that fits


class PatchDecoder(nn.Module):
    """GPT-2 over the characters of one patch (Radford et al. 2019), whose first input is the encoder's output for it.

    Args:
        width: channels, the encoder's.
        depth: layers.
        heads: attention heads; must divide `width`.
        dropout: probability after embedding, attention and feed-forward.
    """

    def __init__(self, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=CHARACTERS,
            n_positions=PATCH_BYTES,
            n_embd=width,
            n_layer=depth,
            n_head=heads,
            n_inner=4 * width,
            embd_pdrop=dropout,
            resid_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=BOS,
            eos_token_id=EOS,
            # At ZeRO-3 a weight is there in its own module's forward only, and files of weights share no memory.
            tie_word_embeddings=False,
        )
        self.base: Any = GPT2LMHeadModel(config)

    def forward(self, states: Tensor, patches: Tensor) -> Tensor:
        """The summed cross-entropy in nats of each patch's characters, given those before: BOS and PAD are no such.

        Args:
            states: (n, width), of the encoder, one for each patch; it stands in the place of BOS.
            patches: (n, 64) uint8.

        Returns:
            (n,) float32 or finer.
        """
        patches = patches.long()
        known = self.base.transformer.wte(patches[:, 1:-1])
        inputs = torch.cat([states[:, None].to(known.dtype), known], dim=1)
        logits = self.base(inputs_embeds=inputs, use_cache=False).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
        return F.cross_entropy(logits, patches[:, 1:], ignore_index=PAD, reduction="none").sum(dim=1)


class M3Pretraining(nn.Module):
    """M3 and the decoder that it is pretrained with, for the objective "masked_patches".

    In evaluation it is M3. Its weights start an M3: names are the same, under "encoder.".

    Args:
        data: as of `M3`.
        selected: share of a piece's patches that the decoder writes again.
        corrupt: whether one draw decides what becomes of all selected patches of a piece, as in the released code, or
            each has its own, as BERT's words. See `corrupted`.
        decoder_depth: layers of the decoder.
        **encoder: of `M3`; the decoder has its width, heads and dropout.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        selected: float = 0.45,
        corrupt: Literal["piece", "patch"] = "piece",
        decoder_depth: int = 3,
        heads: int = 12,
        dropout: float = 0.1,
        **encoder: int,
    ) -> None:
        super().__init__()
        options = "model.symbolic.options"
        require(0 < selected <= 1, f"{options}.selected is a share; give more than 0 and at most 1")
        require(corrupt in ("piece", "patch"), f"{options}.corrupt: no {corrupt!r}; give piece or patch")
        self.selected, self.each = selected, corrupt == "patch"
        self.encoder = M3(data, heads=heads, dropout=dropout, **encoder)
        self.width = self.encoder.width
        self.decoder = PatchDecoder(self.width, decoder_depth, heads, dropout)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """What the loss is made of in training, and embeddings in evaluation.

        Args:
            batch: as of `M3`.

        Returns:
            (rows, 2) float32 in training: the summed cross-entropy in nats of the characters of a row's selected
            patches, and how many they are. (rows, width) in evaluation.
        """
        if not self.training:
            return self.encoder(batch)
        patches, lengths = self.encoder.read(batch)
        given, selected = corrupted(patches, lengths, self.selected, self.each)
        states = self.encoder.states(self.encoder.patch_embedding(given), lengths)
        losses = self.decoder(states[selected], patches[selected])
        sums = losses.new_zeros(selected.shape).masked_scatter(selected, losses).sum(dim=1)
        counts = ((patches[:, :, 1:] != PAD).sum(dim=2) * selected).sum(dim=1)
        return torch.stack([sums, counts.to(sums.dtype)], dim=1)


def corrupted(patches: Tensor, lengths: Tensor, share: float, each: bool) -> tuple[Tensor, Tensor]:
    """Selects patches at random, and masks most of them: random numbers are torch's global ones.

    Of every 10 draws, 8 fill the selected patches with MASK, one shuffles the characters between a patch's BOS and its
    EOS, one leaves them.

    Args:
        patches: (rows, patches, 64) uint8.
        lengths: (rows,) at least 1.
        share: of a row's patches that is selected, rounded up.
        each: draws for each selected patch, in place of once for a row.

    Returns:
        the patches that the encoder reads; (rows, patches) bool, which are selected.
    """
    rows, length = patches.shape[:2]
    order = torch.rand(rows, length, device=patches.device).masked_fill(~inside(patches, lengths), 2.0)
    selected = order.argsort(dim=1).argsort(dim=1) < torch.ceil(share * lengths.double())[:, None]
    draw = torch.rand(rows, length if each else 1, device=patches.device)
    masked, mixed = selected & (draw < 0.8), selected & (draw >= 0.8) & (draw < 0.9)
    given = torch.where(mixed[:, :, None], _shuffled(patches), patches)
    return given.masked_fill(masked[:, :, None], MASK), selected


def _shuffled(patches: Tensor) -> Tensor:
    """Each patch with the characters between its first and its EOS in random order."""
    place = torch.arange(PATCH_BYTES, device=patches.device)
    text = (patches == EOS).cumsum(dim=2).eq(0) & (place > 0)
    # In order of these the first stays first, what follows the text stays where it is, and that is between.
    order = torch.where(text, torch.rand(patches.shape, device=patches.device), place - 1.0 + (place > 0))
    return patches.gather(2, order.argsort(dim=2))
