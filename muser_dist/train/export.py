"""A run as a folder to give away: weights, config, tokenizer, and a model card that says what it is.

Where the run's data lay, and what opened it, is in none of its files.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from muser_dist import __version__
from muser_dist.config import RunConfig, from_dict
from muser_dist.data.config import read_label_values
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage, redact
from muser_dist.errors import CheckpointError, ConfigError
from muser_dist.evaluate.formats import share
from muser_dist.evaluate.summary import by_field
from muser_dist.files import write_whole
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import MODEL_FILES, Muser, save_model
from muser_dist.train.checkpoint import FORMAT, Pieces
from muser_dist.train.engine import AVERAGE, BUFFER, WEIGHT
from muser_dist.train.preflight import LABEL_VALUES
from muser_dist.train.runlog import METRICS, last_line
from muser_dist.train.store import CheckpointStore, problem_of

CARD = "README.md"


def export(run: Path, out: Path, force: bool = False) -> str:
    """Writes a folder that `Muser.from_pretrained` reads: model.safetensors, config.json, tokenizer/, README.md.

    Args:
        run: folder of a run that has ended, or that has a checkpoint.
        out: the folder; made when missing.
        force: replaces a model that is there, with its card; other files stay.

    Returns:
        what the weights are of, in words.

    Raises:
        CheckpointError: `run` is no run, has neither an exported model nor an intact checkpoint; or `out` is not
            empty, or a run's own folder.
    """
    try:
        config = from_dict(json.loads((run / "config.json").read_text()), str(run / "config.json"))
        record = json.loads((run / "run.json").read_text())
    except (OSError, ValueError, ConfigError) as error:  # an exported model has a config.json too, of another form
        raise CheckpointError(f"{run} is no run's folder ({error}); give the one that jobs/pretrain.py made") from None
    if not config.train.checkpoint_storage:  # the folder may have been moved
        config = replace(config, storage=str(run.absolute().parent), name=run.absolute().name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise CheckpointError(f"{out} is not empty; give another --out, or --force to replace what is in it")
    if (out / "run.json").exists():
        raise CheckpointError(f"{out} is a run's folder, which needs its own config.json; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=out.absolute().parent) as folder:
        made = Path(folder) / "model"
        if (run / "model" / "config.json").exists():
            muser = Muser.from_pretrained(run)
            save_model(made, muser.model.state_dict(), muser.config)
            samples, state = config.train.steps * config.train.global_batch, "the end of the run"
        else:
            if (labels := run / LABEL_VALUES).exists():  # heads are sized by them
                config = replace(config, data=replace(config.data, label_values=read_label_values(str(labels))))
            weights, step = last_weights(config, CheckpointStore(config, Storage.of(config.data)))
            save_model(made, weights, config)
            samples, state = step * config.train.global_batch, f"the checkpoint at step {step:,}"
        write_whole(made / CARD, card(run, config, record, samples, state))
        for name in (CARD, *MODEL_FILES[::-1]):  # also what this model lacks: a tokenizer that stays would be another's
            old = out / name
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
        for name in (*MODEL_FILES, CARD):
            if (made / name).exists():
                (made / name).replace(out / name)
    return f"{state}, {samples:,} samples"


def last_weights(config: RunConfig, store: CheckpointStore) -> tuple[dict[str, Tensor], int]:
    """Weights out of a run's last intact checkpoint (their moving average, where the run keeps one), and its step.

    Raises:
        CheckpointError: there is none.
    """
    problem = "there is none"
    for step in store.steps()[::-1]:
        with TemporaryDirectory(prefix="muser-checkpoint-") as folder:
            try:
                description = store.describe(step)
                if description["format"] != FORMAT:
                    raise CheckpointError(f"is of format {description['format']}, and this version reads {FORMAT}")
                paths = [store.fetch(step, part["name"], folder) for part in description["parts"]]
                for path, part in zip(paths, description["parts"], strict=True):
                    if broken := problem_of(path, part):
                        raise CheckpointError(broken)
            except (OSError, ValueError, KeyError, CheckpointError) as error:
                problem = f"the one at step {step:,}: {redact(str(error))}"
                continue
            model = MultimodalModel(config)
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            state = AVERAGE if config.train.ema_samples else WEIGHT
            weights = {}
            with Pieces(paths) as read:
                for name, value in model.state_dict(keep_vars=True).items():
                    kind = BUFFER if id(value) not in names else state if value.requires_grad else WEIGHT
                    of = names.get(id(value), name)  # a parameter that two modules share is there once
                    weights[name] = read(kind, of, 0, value.numel()).view(value.shape)
            return weights, step
    raise CheckpointError(f"{store.url} has no checkpoint to export ({problem}); let the run go on to its next one")


def card(run: Path, config: RunConfig, record: dict[str, Any], samples: int, state: str) -> str:
    """The model card, in the form of Hugging Face: YAML, then Markdown."""
    towers = "\n".join(
        f"| {name} | `{tower.build}` | {', '.join(f'{k} {_name(v)}' for k, v in tower.options.items()) or 'defaults'} |"
        for name, tower in config.model.towers().items()
    )
    sources = "\n".join(_source(run, source.name, source.weight) for source in config.data.training_sources())
    line = last_line(run / METRICS) or {}
    read, bad = line.get("rows_read"), line.get("rows_quarantined")
    used = f" Of {read:,} rows read, {bad:,} could not be used." if read is not None and bad is not None else ""
    objective, reads_text = config.objective, "text" in config.model.towers()
    templates = "\n".join(f"- `{template}`" for template in config.data.templates)
    sentences = f"Sentences:\n{templates}\n\n" if reads_text else ""
    pairs = ", ".join(f"{pair.first}–{pair.second}" for pair in objective.pairs)
    over = f" over {pairs} with targets `{objective.targets}`" if pairs else ""
    use = example(config, "muser").replace("'", '"')
    return f"""---
library_name: muser_dist
pipeline_tag: feature-extraction
tags: [audio, music{", contrastive" if pairs else ""}]
license: other
license_name: to-be-chosen
---

# {config.name}

{_purpose(config)}, trained with
muser_dist {__version__} ({_start(record["command"]) or config.name}). The weights are those of {state}.

**Licence: not chosen yet.** `license_name` above is a placeholder: whoever publishes this folder has to replace it, and
to look what the licences of the training data allow.

## Use

```python
from muser_dist import Muser

muser = Muser.from_pretrained("FOLDER")  # this one
print({use})
```

{_takes(config)}

## Training

{samples:,} samples in global batches of {config.train.global_batch:,}, objective `{objective.name}`{over},
seed {config.seed}, code at commit {record.get("commit") or "unknown"}.{used}

| source | weight | shards | rows |
|---|---|---|---|
{sources}

{sentences}| tower | built by | options |
|---|---|---|
{towers}

## Scores

{_scores(run)}
"""


def example(config: RunConfig, muser: str) -> str:
    """Python that tries a model: what it says of a clip, the clip's embedding, or its cosine with a sentence's.

    Args:
        config: the model's.
        muser: the variable that holds it.
    """
    modality, *others = config.model.towers()
    files = {"symbolic": "YOUR_TUNE.abc", "features": "YOUR_SONG.npy", "text": "a slow waltz"}
    given = f"(['{files.get(modality, 'YOUR_SONG.mp3')}'])"
    if config.data.label_kinds():
        return f"{muser}.classify{given}"
    embedded = f"{muser}.encode_{modality}{given}"
    return f"{muser}.encode_text(['a slow waltz']) @ {embedded}.T" if "text" in others else embedded


def _purpose(config: RunConfig) -> str:
    """What a model is, in words."""
    towers, fields = ", ".join(config.model.towers()), ", ".join(config.data.label_kinds())
    if fields:
        return f"Tells values of {fields} apart by {next(iter(config.model.towers()))}"
    if config.objective.pairs:
        return f"One embedding space of {config.model.projection_dim} dimensions for {towers}"
    return f"An encoder of {towers}"


def _takes(config: RunConfig) -> str:
    """How much the tower of `example` takes at a time, and what becomes of the rest."""
    data, modality = config.data, next(iter(config.model.towers()))
    if modality == "text":
        return f"It reads the first {data.max_tokens} tokens of a sentence."
    takes, one_part = {
        "symbolic": (f"reads {data.symbolic.max_patches} patches of ABC or MIDI", "head is read"),
        "features": (f"reads {data.features.max_windows} windows' features", "head is read"),
    }.get(modality, (f"hears {data.crop_seconds:g} s at {data.sample_rate:,} Hz", "middle is heard"))
    longer = f"of longer ones the {one_part}" if data.label_kinds() else "longer ones are cut into such windows"
    return f"It {takes} at a time; {longer}."


def _start(command: str) -> str:
    """What a run began with, out of its command: a recipe, or the name of another run without the folders around it."""
    _, program, start = (command.split(" --")[0].split(maxsplit=2) + 3 * [""])[:3]
    folder = Path(start)
    name = folder.parent.name if folder.name == "model" else folder.name
    return f"{'fine-tuned from' if 'finetune' in program else 'recipe'} `{name}`" if name else ""


def _name(option: Any) -> Any:
    """An option without the folder that it may name: that is nobody's business."""
    return Path(option).name if isinstance(option, str) else option


def _source(run: Path, name: str, weight: float) -> str:
    """A source's line: its name and size, and not where it lies."""
    path = run / f"{name}-index.json"
    if not path.exists():
        return f"| {name} | {weight:g} | unknown | unknown |"
    index = ShardIndex.load(path)
    return f"| {name} | {weight:g} | {len(index):,} | {index.total:,} |"


def _scores(run: Path) -> str:
    """What evaluation.json says, as a table for each kind of task that it has; a dash where nothing could be scored."""
    path = run / "evaluation.json"
    if not path.exists():
        return "Not scored: the run has no evaluation.json."
    evaluation = json.loads(path.read_text())
    lines = [f"On {evaluation['rows']:,} validation rows."]
    scored = list(evaluation["retrieval"].items())
    lines += _table("retrieval", ("R@1", "R@10", "chance_R@10", "MRR"), scored)
    by_fields = [(name if how == "zero-shot" else f"{name}, {how}", s) for how, name, s in by_field(evaluation)]
    lines += _table("classes", ("accuracy", "macro_f1", "chance"), by_fields)
    lines += _table("tags", ("roc_auc", "pr_auc", "chance_pr_auc"), by_fields)
    return "\n".join(lines)


def _table(heading: str, metrics: tuple[str, ...], scored: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Lines of a table of those that have these metrics; none without any."""
    rows = [
        f"| {name} | {' | '.join(share(s[metric]) for metric in metrics)} |" for name, s in scored if metrics[0] in s
    ]
    heads = " | ".join(metric.replace("_", " ") for metric in metrics)
    return ["", f"| {heading} | {heads} |", "|---" * (len(metrics) + 1) + "|", *rows] if rows else []
