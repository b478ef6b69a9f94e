"""Towers out of transformers: waveform, spectrogram and text encoders of any family that fits.

Which network it is, its config says: the option `model` is that of Hugging Face, as a dictionary with "model_type",
or a local path or a name there that holds one. Weights are random; published ones come with `weights` of the tower's
config (muser_dist/models/weights.py). Code that comes with a checkpoint is never run.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, ClapAudioConfig, ClapAudioModel, PretrainedConfig

from muser_dist.config import DataConfig, RunConfig, TowerConfig
from muser_dist.data.spectrogram import LogMel, front_end
from muser_dist.data.text import load_tokenizer
from muser_dist.errors import ConfigError, require
from muser_dist.models.batch_norm import replace_batch_norm, set_valid_rows
from muser_dist.models.heads import inside, masked_mean
from muser_dist.models.spectrogram import image_of

_ALWAYS = {
    # Would make ranks run different layers, which hangs at ZeRO-3.
    "layerdrop": 0.0,
    # Random masks come from NumPy; and the network would own a parameter that is not always used.
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
}


def architecture(model: str | dict[str, Any], modality: str, defaults: dict[str, Any]) -> PretrainedConfig:
    """The config of a network.

    Args:
        model: a dictionary with "model_type", or a local path or name on the Hugging Face hub.
        modality: of the tower; of a config with several networks (CLIP's, CLAP's) that one is taken.
        defaults: what a dictionary has where it does not say.

    Raises:
        ConfigError: it cannot be found, or transformers does not know it.
    """
    where = f"model.{modality}.options.model"
    try:
        if isinstance(model, str):
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
            part = "text_config" if modality == "text" else "audio_config"
            config = getattr(config, part, config)
        else:
            options = defaults | model
            config = AutoConfig.for_model(options.pop("model_type"), **options)
    except KeyError:
        raise ConfigError(f'{where}: the dictionary needs a "model_type", such as "bert"') from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {model!r}: {str(error).strip().splitlines()[0]}") from None
    for name, value in _ALWAYS.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def self_contained(config: RunConfig) -> RunConfig:
    """The config of an exported model: with dictionaries in place of paths and names of networks, which may not be
    where the model is used, and without the weights that training began with."""

    def rewritten(modality: str, tower: TowerConfig) -> TowerConfig:
        options = dict(tower.options)
        if tower.build.startswith("hf_") and isinstance(options.get("model"), str):
            found = architecture(options["model"], modality, {})
            options["model"] = {"model_type": found.model_type} | found.to_diff_dict()
        return replace(tower, options=options, weights="")

    towers: dict[str, Any] = {name: rewritten(name, tower) for name, tower in config.model.towers().items()}
    return replace(config, model=replace(config.model, **towers, start=""))


def _network(config: PretrainedConfig, modality: str) -> Any:
    try:
        if isinstance(config, ClapAudioConfig):  # not among those that AutoModel knows
            network: Any = ClapAudioModel(config)
        else:
            network = AutoModel.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"model.{modality}.options.model: {str(error).strip().splitlines()[0]}") from None
    if getattr(network, "pooler", None) is not None:
        network.pooler = None  # pooled here; a parameter that nothing uses would stall ZeRO
    return network.float()


class HuggingFaceWaveform(nn.Module):
    """wav2vec 2.0, HuBERT, WavLM and their like on raw samples, averaged over the frames of the clip.

    MERT's architecture is HuBERT's: give its sizes as a "hubert" and its weights. Published ones want the sample rate
    that they were trained at (16 kHz; MERT 24 kHz) as data.sample_rate. Padding is not heard; but where the first norm
    is over time ("feat_extract_norm" of "group": wav2vec 2.0's and HuBERT's base, MERT), it is part of that norm.

    Args:
        data: gives nothing but the contract of the batch.
        model: see `architecture`; "model_type" is "wav2vec2", "hubert", "wavlm", ...
        layers: whose output it gives: the last one's, or the "mean" of all, the first one's input among them (what
            CLaMP 3 takes of MERT).
    """

    def __init__(
        self, data: DataConfig, *, model: str | dict[str, Any], layers: Literal["last", "mean"] = "last"
    ) -> None:
        super().__init__()
        require(layers in ("last", "mean"), f'model.audio.options.layers is {layers!r}; give "last" or "mean"')
        self.layers = layers
        config = architecture(model, "audio", {})
        self.encoder: Any = _network(config, "audio")
        require(
            hasattr(self.encoder, "_get_feat_extract_output_lengths"),
            f"model.audio.options.model: a {config.model_type!r} does not hear waveforms; give a wav2vec2 or its like",
        )
        self.width: int = config.hidden_size
        # Else it asks for the waveform's gradient, which nobody reads: work, and a break in compiled code.
        self.encoder.feature_extractor._requires_grad = False

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeds a batch.

        Args:
            batch: "audio" (rows, samples) int16 and "audio_length" (rows,) int32.

        Returns:
            (rows, width).
        """
        waveform = batch["audio"].to(torch.promote_types(self.encoder.dtype, torch.float32))
        lengths = batch["audio_length"].clamp(min=1)
        heard = inside(waveform, lengths)
        # As their own feature extractor does it: over what is heard alone, and the padding is 0 afterwards.
        mean = (waveform * heard).sum(dim=1, keepdim=True) / lengths[:, None]
        waveform = (waveform - mean) * heard
        deviation = (waveform.square().sum(dim=1, keepdim=True) / lengths[:, None]).sqrt()
        waveform = (waveform / (deviation + 1.0)).to(self.encoder.dtype)  # int16 steps: 1 is the quietest sound
        every = self.layers == "mean"
        output = self.encoder(waveform, attention_mask=heard, output_hidden_states=every)
        frames = torch.stack(output.hidden_states).mean(dim=0) if every else output.last_hidden_state
        frame_lengths = self.encoder._get_feat_extract_output_lengths(lengths).clamp(min=1)
        return masked_mean(frames, frame_lengths)


class HuggingFaceSpectrogram(nn.Module):
    """AST (Gong et al. 2021) or HTS-AT (Chen et al. 2022, as in CLAP) on the log-mel spectrogram, by their own pooling.

    They take no mask: what comes after a clip is heard as silence.

    Args:
        data: gives the sample rate and the length of crops.
        model: see `architecture`; "model_type" is "audio-spectrogram-transformer" or "clap_audio_model".
        **spectrogram: of the log-mel spectrogram (muser_dist/data/spectrogram.py). Published weights want their own.
    """

    def __init__(self, data: DataConfig, *, model: str | dict[str, Any], **spectrogram: Any) -> None:
        super().__init__()
        self.front_end = front_end(data, **spectrogram)
        mel = self.front_end
        if not isinstance(mel, LogMel):
            raise ConfigError("model.spectrogram.options.kind: these networks take log_mel")
        frames = data.crop_samples // mel.hop + 1
        config = architecture(model, "spectrogram", {"num_mel_bins": mel.mels})
        if config.model_type == "audio-spectrogram-transformer" and isinstance(model, dict):
            config.max_length = model.get("max_length", frames)
        require(
            config.model_type in ("audio-spectrogram-transformer", "clap_audio_model"),
            f"model.spectrogram.options.model: no {config.model_type!r} here; give audio-spectrogram-transformer or "
            "clap_audio_model",
        )
        require(
            config.num_mel_bins == mel.mels,
            f"model.spectrogram.options.mels: the network has {config.num_mel_bins} bands, not {mel.mels}",
        )
        self.frames = getattr(config, "max_length", None)
        self.encoder: Any = _network(config, "spectrogram")
        replace_batch_norm(self.encoder, "chunk")
        self.width: int = config.hidden_size

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
        frames = image.transpose(2, 3)  # (rows, 1, frames, mels)
        if self.frames is None:
            return self.encoder(frames).pooler_output
        missing = self.frames - frames.shape[2]
        frames = nn.functional.pad(frames[:, 0, : self.frames], (0, 0, 0, max(0, missing)))
        return self.encoder(frames).pooler_output


class HuggingFaceText(nn.Module):
    """Any text encoder: BERT, RoBERTa, XLM-R, MPNet, CLIP's, sentence encoders.

    Args:
        data: gives the number of tokens and the tokenizer, which must be the network's own where weights are published.
        model: see `architecture`; a dictionary gets the tokenizer's vocabulary, unless it says "vocab_size".
        pooling: "mean" over the tokens, the first one ("cls"), or the last one ("eos", CLIP's).
        projection: outputs of a linear layer without bias after the pooling, as CLIP's; none when 0.
    """

    own_head = "projection."

    def __init__(
        self,
        data: DataConfig,
        *,
        model: str | dict[str, Any],
        pooling: Literal["mean", "cls", "eos"] = "mean",
        projection: int = 0,
    ) -> None:
        super().__init__()
        require(pooling in ("mean", "cls", "eos"), f"model.text.options.pooling: no {pooling!r}; give mean, cls or eos")
        vocabulary = load_tokenizer(data.tokenizer, data.vocabulary, data.max_tokens).vocabulary
        config = architecture(model, "text", {"vocab_size": vocabulary})
        require(
            vocabulary <= config.vocab_size,
            f"data.tokenizer: {data.tokenizer!r} has {vocabulary:,} tokens, the network in model.text.options "
            f"{config.vocab_size:,}; give the network's own tokenizer",
        )
        self.encoder: Any = _network(config, "text")
        self.pooling = pooling
        self.width: int = projection or config.hidden_size
        self.projection: nn.Module = nn.Identity()
        if projection:
            self.projection = nn.Linear(config.hidden_size, projection, bias=False)
            nn.init.normal_(self.projection.weight, std=config.hidden_size**-0.5)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeds a batch.

        Args:
            batch: "text_ids" (rows, tokens) int32 and "text_length" (rows,) int32.

        Returns:
            (rows, width).
        """
        ids, lengths = batch["text_ids"], batch["text_length"].clamp(min=1)
        hidden = self.encoder(input_ids=ids.long(), attention_mask=inside(ids, lengths).long()).last_hidden_state
        if self.pooling == "mean":
            pooled = masked_mean(hidden, lengths)
        else:
            at = torch.zeros_like(lengths) if self.pooling == "cls" else lengths - 1
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), at.long()]
        return self.projection(pooled)
