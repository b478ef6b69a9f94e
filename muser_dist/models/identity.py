"""Which model a model is: what tells its embeddings from those of any other."""

import hashlib
import json

from safetensors.torch import save
from torch import Tensor

from muser_dist.config import RunConfig, to_dict

# Of data, what decides how an input is read. Not the tokenizer: its name is a path, which differs from place to place.
_READ = ("sample_rate", "crop_seconds", "pad", "symbolic", "features", "vocabulary", "max_tokens", "label_values")


def identity_of(weights: dict[str, Tensor], config: RunConfig) -> str:
    """SHA-256 of the weights, as safetensors, and of the config that decides what they make of an input.

    Weights alone are not enough: layers that are averaged, or embeddings that are compared as they are, have none.

    Args:
        weights: of the whole model, by name.
        config: the exported one, in which no paths of the training are.
    """
    values = to_dict(config)
    computing = [values["model"], values["objective"], {name: values["data"][name] for name in _READ}]
    whole = {name: value.cpu().contiguous() for name, value in weights.items()}
    return hashlib.sha256(save(whole) + json.dumps(computing, sort_keys=True).encode()).hexdigest()
