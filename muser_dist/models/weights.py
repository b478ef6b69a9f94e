"""Published weights as those that a tower starts from: files, the names of their keys, and what became of each key.

Files hold tensors and nothing else: safetensors, or what torch.load reads with weights_only. A key finds its place by
its name after one of the renamings below, whatever prefix it has in the file: the renaming and the prefix are taken
under which most keys fit.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

from muser_dist.config import RunConfig
from muser_dist.data.labels import with_stand_ins
from muser_dist.errors import CheckpointError, ConfigError
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import exported_config, exported_weights

REPORT = "weights.json"
"""File in a run's folder that lists the keys of each tower that started from weights."""

_CONVERT = (
    "only tensors are read; where you trust the file, convert it: safetensors.torch.save_file(STATE_DICT, "
    "'weights.safetensors'), with STATE_DICT from torch.jit.load(FILE).state_dict() for a TorchScript archive"
)


@dataclass(frozen=True)
class Match:
    """What became of the keys of a tower and of a file.

    Attributes:
        modality: of the tower; "start" where it is the whole model's.
        source: the setting: a path or a name.
        naming: how the file names its keys.
        matched: by the tower's key, the file's.
        missing: the tower's keys that the file lacks; they stay as they were drawn.
        other_shape: the tower's keys, of its own head, that have another shape in the file; they stay too.
        left_over: the file's keys that have no place.
    """

    modality: str
    source: str
    naming: str
    matched: dict[str, str]
    missing: list[str]
    other_shape: list[str]
    left_over: list[str]

    def __str__(self) -> str:
        renamed = sum(here != there for here, there in self.matched.items())
        every = len(self.matched) + len(self.missing) + len(self.other_shape)
        return (
            f"Weights of model.{self.modality}: {len(self.matched)} of {every} keys from {self.source} ({self.naming}; "
            f"{renamed} renamed), {len(self.missing)} missing, {len(self.other_shape)} of another shape, "
            f"{len(self.left_over)} left over"
        )


def load_weights(model: MultimodalModel, config: RunConfig) -> list[Match]:
    """Puts the weights that towers start from into a model; on the meta device it only looks.

    Raises:
        ConfigError: a file cannot be read, or a key has another shape and is not of the tower's own head.
    """
    matches = [_start(model, config)] if config.model.start else []
    for modality, settings in config.model.towers().items():
        if not settings.weights:
            continue
        tower = model.towers[modality]
        match, tensors = match_weights(modality, tower, settings.weights)
        matches.append(match)
        there = tower.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in tensors.items():
                there[name].copy_(tensor)
    return matches


def _start(model: MultimodalModel, config: RunConfig) -> Match:
    """Puts the weights of model.start in, those whose names and shapes fit.

    Temperatures belong to pairs, and heads of metadata fields to those fields' values, which names of weights do not
    say: the former go by the pairs' names, the latter are left as they were drawn.
    """
    folder, where = config.model.start, "model.start"
    try:
        file, before = load_file(exported_weights(folder)), exported_config(Path(folder))
    except (CheckpointError, SafetensorError) as error:
        raise ConfigError(f"{where}: {error}") from None
    names = {name: name for name in file if not name.startswith(("logits.", "label_heads."))}
    there = [frozenset((pair.first, pair.second)) for pair in before.objective.pairs]
    for p, pair in enumerate(config.objective.pairs):
        if (both := frozenset((pair.first, pair.second))) in there:
            q = there.index(both)
            mine, its = (0 if of.objective.temperature.shared else at for of, at in ((config, p), (before, q)))
            names |= {f"logits.log_scale.{mine}": f"logits.log_scale.{its}", f"logits.bias.{p}": f"logits.bias.{q}"}
    wanted = {name: value for name, value in model.state_dict(keep_vars=True).items() if ".front_end." not in name}
    matched, other_shape = {}, []
    with torch.no_grad():
        for name, old in names.items():
            if name not in wanted or old not in file:
                continue
            if file[old].shape != wanted[name].shape:
                other_shape.append(name)
                continue
            wanted[name].copy_(file[old])
            matched[name] = old
    missing = [name for name in wanted if name not in matched and name not in other_shape]
    used = {*matched.values(), *other_shape}
    return Match(
        "start", folder, "its own names", matched, missing, other_shape, [name for name in file if name not in used]
    )


def report_weights(config: RunConfig) -> list[Match]:
    """What `load_weights` will do, without the memory of a model.

    Raises:
        ConfigError: as there.
    """
    if not (config.model.start or any(settings.weights for settings in config.model.towers().values())):
        return []
    with torch.device("meta"):
        model = MultimodalModel(replace(config, data=with_stand_ins(config.data)))
    return load_weights(model, config)


def as_json(matches: list[Match]) -> str:
    """The content of `REPORT`."""
    return json.dumps({match.modality: asdict(match) for match in matches}, indent=1)


def match_weights(modality: str, tower: nn.Module, source: str) -> tuple[Match, dict[str, Tensor]]:
    """Finds the place of each key.

    Returns:
        the report, and by the tower's key the tensor of the file.

    Raises:
        ConfigError: as `load_weights`, or no key fits.
    """
    where = f"model.{modality}.weights"
    file = read_weights(source, where)
    # What makes spectrograms has no weights, but constants of its settings.
    wanted = {name: value for name, value in tower.state_dict().items() if not name.startswith("front_end.")}
    if any(name.startswith("towers.") for name in file):  # a run's: the towers of other modalities may fit too
        file = {name: tensor for name, tensor in file.items() if name.startswith(f"towers.{modality}.")}

    own_head = getattr(tower, "own_head", "")
    best: dict[str, tuple[str, Tensor]] = {}
    naming, most = "", 0
    for name, renaming in _RENAMINGS.items():
        renamed = renaming(file)
        for own in ("", "encoder.", "base."):
            here = {key.removeprefix(own): key for key in wanted if key.startswith(own)}
            prefix, fitting = _prefix(renamed, {short: wanted[key].shape for short, key in here.items()})
            if fitting > most:
                most, naming = fitting, name + (f", under {prefix!r}" if prefix else "")
                best = {key: renamed[prefix + short] for short, key in here.items() if prefix + short in renamed}
                if own_head:  # which may stand beside the network
                    best |= {key: renamed[key] for key in wanted if key.startswith(own_head) and key in renamed}
    if not best:
        raise ConfigError(
            f"{where}: no key of {source} fits the tower: the file has {_some(file)}, the tower {_some(wanted)}"
        )
    other_shape = [key for key, (_, tensor) in best.items() if tensor.shape != wanted[key].shape]
    for key in other_shape:
        if not (own_head and key.startswith(own_head)):
            raise ConfigError(
                f"{where}: {best[key][0]} of {source} is {tuple(best[key][1].shape)}, where the tower has "
                f"{tuple(wanted[key].shape)} ({key}); give model.{modality}.options (and data.max_tokens and "
                "data.tokenizer for texts) the sizes of the file"
            )
    matched = {key: old for key, (old, _) in best.items() if key not in other_shape}
    used = {old for old, _ in best.values()}
    match = Match(
        modality,
        source,
        naming,
        matched,
        [key for key in wanted if key not in best],
        other_shape,
        [key for key in file if key not in used],
    )
    return match, {key: tensor for key, (_, tensor) in best.items() if key in matched}


def read_weights(source: str, where: str) -> dict[str, Tensor]:
    """The tensors of a file, a folder, or a name on the Hugging Face hub, by key.

    Raises:
        ConfigError: there is no such file, or it holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(source, where):
        try:
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            else:
                tensors |= _tensors(torch.load(path, map_location="cpu", weights_only=True))
        except (UnpicklingError, SafetensorError, RuntimeError, OSError, EOFError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{where}: {path} cannot be read ({reason}); {_CONVERT}") from None
    # A count that nobody reads.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def _files(source: str, where: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        folder = path / "model" if (path / "model").is_dir() else path  # of a run
        for pattern in ("*.safetensors", "pytorch_model*.bin"):
            if found := sorted(folder.glob(pattern)):
                return found
        raise ConfigError(f"{where}: {source} holds neither *.safetensors nor pytorch_model*.bin")
    try:
        for name in ("model.safetensors", "pytorch_model.bin"):
            if found_there := cached_file(source, name, _raise_exceptions_for_missing_entries=False):
                return [Path(found_there)]
        reason = "it has no model.safetensors and no pytorch_model.bin"
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
    raise ConfigError(f"{where}: {source!r} is no file, no folder, and no name on the Hugging Face hub: {reason}")


def _tensors(content: object) -> dict[str, Tensor]:
    """The tensors of a state dict, which some files keep beside other things."""
    if not isinstance(content, dict):
        return {}
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(name), dict):
            return _tensors(content[name])
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _prefix(file: dict[str, tuple[str, Tensor]], shapes: dict[str, torch.Size]) -> tuple[str, int]:
    """The prefix under which most keys of the file have the name and shape of one of the tower's, and how many."""
    fitting: Counter[str] = Counter()
    for name, (_, tensor) in file.items():
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        fitting.update(name[:start] for start in starts if shapes.get(name[start:]) == tensor.shape)
    # MUSER's files hold the image tower that it started from too, as "visual.".
    return max(fitting.items(), key=lambda item: (item[1], item[0] == "spec."), default=("", 0))


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") if listed else "none"


# --- How published files name their keys ---

Renamed = dict[str, tuple[str, Tensor]]
"""By new name, the key of the file and its tensor."""


def _by(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Callable[[dict[str, Tensor]], Renamed]:
    """A renaming by regular expressions, one after the other."""

    def renaming(file: dict[str, Tensor]) -> Renamed:
        out: Renamed = {}
        for old, tensor in file.items():
            new = old
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
            out[new] = old, tensor
        return out

    return renaming


def _clip_text(file: dict[str, Tensor]) -> Renamed:
    """OpenAI's text transformer to transformers': one matrix for three projections there, and a transposed one."""
    out: Renamed = {}
    for new, (old, tensor) in _by(
        (r"^transformer\.resblocks\.", "encoder.layers."),
        (r"^token_embedding\.", "embeddings.token_embedding."),
        (r"^positional_embedding$", "embeddings.position_embedding.weight"),
        (r"^ln_final\.", "final_layer_norm."),
        (r"\.attn\.", ".self_attn."),
        (r"\.ln_(\d)\.", r".layer_norm\1."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    )(file).items():
        if new == "text_projection":
            out["projection.weight"] = old, tensor.T
        else:
            out[new] = old, tensor
    return _apart(out, ("q_proj", "k_proj", "v_proj"))


def _htcl(file: dict[str, Tensor]) -> Renamed:
    """HTCL's released audio encoder, whose layers are torch's, to BERT's."""
    renamed = _by(
        (r"\bfeature_extractor\.layers\.(\d)\.1\.", r"convolutions.\1.convolution."),
        (r"\bfeature_extractor\.layers\.(\d)\.3\.", r"convolutions.\1.norm."),
        (r"\bfeature_projection\.layer_norm\.", "projection.0."),
        (r"\bfeature_projection\.projection\.", "projection.1."),
        (r"\bpos_conv_embed\.conv\.", "position.convolution."),
        (r"\bpos_conv_embed\.layer_norm\.", "position.norm."),
        (r"\blayer_norm\.", "norm."),
        (r"\bcls_token$", "cls"),
        (r"\btransformer_encoder\.layers\.", "transformer.layer."),
        (r"\bself_attn\.out_proj\.", "attention.output.dense."),
        (r"\bself_attn\.in_proj_", "attention.self.in_proj_"),
        (r"\bnorm1\.", "attention.output.LayerNorm."),
        (r"\blinear1\.", "intermediate.dense."),
        (r"\blinear2\.", "output.dense."),
        (r"\bnorm2\.", "output.LayerNorm."),
    )(file)
    flat = {new: (old, x.flatten() if new.endswith("cls") else x) for new, (old, x) in renamed.items()}
    return _apart(flat, ("query", "key", "value"))


def _apart(file: Renamed, names: tuple[str, str, str]) -> Renamed:
    """Three projections for torch's one matrix of attention."""
    out: Renamed = {}
    for new, (old, tensor) in file.items():
        if found := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", new):
            for part, name in zip(tensor.chunk(3), names, strict=True):
                out[f"{found[1]}.{name}.{found[2]}"] = old, part
        else:
            out[new] = old, tensor
    return out


_CLIP_VISUAL_PARTS = {"1": "conv1_1x1", "2": "conv2_kxk", "3": "conv3_1x1"}

_RENAMINGS: dict[str, Callable[[dict[str, Tensor]], Renamed]] = {
    "its own names": _by(
        (r"^text_projection\.", "projection."),  # of transformers' CLIP
        (r"\.weight_g$", ".parametrizations.weight.original0"),  # of weight norms before torch 2
        (r"\.weight_v$", ".parametrizations.weight.original1"),
        (r"\.LayerNorm\.gamma$", ".LayerNorm.weight"),  # of the first BERT
        (r"\.LayerNorm\.beta$", ".LayerNorm.bias"),
    ),
    # A norm and its activation are one module there; features alone come from a network without its nested lists.
    "timm's names": _by((r"\.bn\.(?=\w+$)", ".bn.0."), (r"\b(stem|stages)\.(?=\d)", r"\1_")),
    "CLIP's names": _clip_text,
    "HTCL's names": _htcl,
    "CLIP's names of its image network": _by(
        (r"(^|\.)conv(\d)\.(?=\w+$)", r"\1stem.conv\2.conv."),
        (r"(^|\.)bn(\d)\.(?=\w+$)", r"\1stem.conv\2.bn.0."),
        (
            r"(^|\.)layer(\d)\.(\d+)\.stem\.conv\d\.(conv|bn\.0)\.",
            lambda m: f"{m[1]}stages.{int(m[2]) - 1}.{m[3]}.{_CLIP_VISUAL_PARTS[m[0].split('conv')[1][0]]}.{m[4]}.",
        ),
        (
            r"(^|\.)layer(\d)\.(\d+)\.downsample\.([01])\.",
            lambda m: f"{m[1]}stages.{int(m[2]) - 1}.{m[3]}.shortcut.conv.{('conv', 'bn.0')[int(m[4])]}.",
        ),
        (r"(^|\.)attnpool\.positional_embedding$", r"\1head.pos_embed"),
        (r"(^|\.)attnpool\.c_proj\.", r"\1head.proj."),
        (r"(^|\.)attnpool\.([qkv])_proj\.", r"\1head.\2."),
    ),
    "AudioCLIP's names": _by(
        (r"^(audio\.)?(?!fbsp\.|wavelet\.|att\d)(?=(conv|bn|layer|fc)\d?\b)", r"\1encoder."),
        (r"^(audio\.)?att(\d)\.", lambda m: f"{m[1] or ''}attention.{int(m[2]) - 1}."),
        (r"^(audio\.)?(wavelet|fbsp)\.", r"\1fbsp."),
    ),
}
