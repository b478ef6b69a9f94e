"""CLAP checkpoints of transformers (Wu et al. 2023) as a model of others: see external.py."""

from collections.abc import Sequence

import numpy as np

from muser_dist.errors import CheckpointError, ConfigError


class Clap:
    """transformers' ClapModel from a local folder, with its feature extractor and its tokenizer.

    Args:
        folder: what `save_pretrained` of the three wrote.
        device: where it computes.

    Raises:
        CheckpointError: the folder lacks something; nothing is fetched from a hub.
    """

    def __init__(self, folder: str = "", device: str = "cpu") -> None:
        import torch
        from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

        if not folder:
            raise ConfigError("model: clap needs the folder of a checkpoint; give --weights FOLDER")
        try:
            self._model = ClapModel.from_pretrained(folder, local_files_only=True).eval()
            self._model.to(torch.device(device))
            self._extractor = ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: no CLAP checkpoint: {str(error).strip().splitlines()[0]}") from None
        self.sample_rate: int = self._extractor.sampling_rate
        self.seconds: float = self._extractor.max_length_s

    def encode_audio(self, clips: Sequence[np.ndarray], sample_rate: int) -> np.ndarray:
        """(n, D) float32 of (samples,) float32 clips; of longer ones the middle `seconds` are heard."""
        import torch

        with torch.inference_mode():
            features = torch.from_numpy(self.audio_features(clips, sample_rate)).to(self._model.device)
            return self._model.audio_projection(features).float().cpu().numpy()

    def audio_features(self, clips: Sequence[np.ndarray], sample_rate: int) -> np.ndarray:
        """(n, width) float32: the audio tower's pooled output before its projection."""
        import torch

        if sample_rate != self.sample_rate:
            raise ConfigError(f"CLAP hears {self.sample_rate} Hz, not {sample_rate}; resample the clips")
        wanted = round(self.seconds * sample_rate)
        middle = [clip[(start := max(0, len(clip) - wanted) // 2) : start + wanted] for clip in clips]
        inputs = self._extractor(middle, sampling_rate=sample_rate, return_tensors="pt")
        # The extractor calls one clip of a batch longer at random when none is, which would make batches matter.
        longer = torch.zeros(len(clips), 1, dtype=torch.bool)
        with torch.inference_mode():
            spectrograms = inputs["input_features"].to(self._model.device)
            out = self._model.audio_model(input_features=spectrograms, is_longer=longer.to(self._model.device))
            return out.pooler_output.float().cpu().numpy()

    def encode_text(self, sentences: Sequence[str]) -> np.ndarray:
        """(n, D) float32."""
        import torch

        inputs = self._tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            inputs = {name: inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
            out = self._model.text_model(**inputs)
            return self._model.text_projection(out.pooler_output).float().cpu().numpy()
