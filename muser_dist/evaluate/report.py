"""The page about one run, drawn from the files in its folder.

The page is one HTML file without scripts or links to anything outside. Text from the data is
put in by the template alone, which escapes it; the charts, which go in as they are, hold only
numbers. A run that died leaves files behind that are missing or end in half a line: the page
then shows what there is and says what there is not.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from muser_dist.errors import CheckpointError
from muser_dist.evaluate.charts import draw_charts
from muser_dist.evaluate.formats import amount, number, percent
from muser_dist.evaluate.scores_page import Values, mapping, page, scores_shown
from muser_dist.files import write_whole

_REASONS, _EXAMPLES = 20, 3


def write_report(folder: Path) -> Path:
    """Draw `report.html` in a run's folder; it replaces an earlier one.

    Args:
        folder: the run's folder. Read, where they exist: config.json, run.json, metrics.jsonl,
            evaluation.json and quarantine.jsonl.

    Returns:
        Path of the page.

    Raises:
        CheckpointError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a run")
    notes: list[str] = []
    config, run, evaluation = (_read_json(folder / f"{name}.json", notes) for name in ("config", "run", "evaluation"))
    metrics = _read_lines(folder / "metrics.jsonl", notes)
    html = page(
        "evaluate/report.html.j2",
        name=config.get("name") or folder.resolve().name,
        state=_state(config, metrics, evaluation),
        run={key: run.get(key) for key in ("command", "commit", "started")},
        versions=mapping(run.get("versions")),
        machine=list(_flat(mapping(run.get("machine")))),
        notes=notes,
        facts=_facts(config, metrics),
        charts=draw_charts(metrics),
        **scores_shown(evaluation),
        quarantine=_quarantine(_read_lines(folder / "quarantine.jsonl", notes)),
        config=list(_flat(config)),
    )
    path = folder / "report.html"
    write_whole(path, html)
    return path


# Files of the run


def _read_json(path: Path, notes: list[str]) -> Values:
    """The file's object; empty, with a note, where it is none."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read and is left out: {error}")
        return {}
    if not isinstance(values, dict):
        notes.append(f"{path.name} holds no JSON object and is left out")
        return {}
    return values


def _read_lines(path: Path, notes: list[str]) -> list[Values]:
    """The objects of a file with one a line; a line that is none is left out, with a note."""
    if not path.exists():
        return []
    entries, broken = [], 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in filter(str.strip, lines):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                entries.append(entry)
            else:
                broken += 1
    if broken:
        notes.append(f"{path.name}: {broken} of {broken + len(entries)} lines cannot be read and are left out")
    return entries


def _flat(values: Values, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names, as the command line has them, and values as JSON."""
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            yield from _flat(value, name)
        else:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Headline

SPARE = 1.2
"""How much faster than it is used data should be decoded, or workers wait for it now and then."""


def _planned(config: Values) -> tuple[float, float]:
    """Samples that the run is to see, and those between two lines of metrics.jsonl; NaN where unknown."""
    train = mapping(config.get("train"))
    samples, batch, log_steps = (number(train.get(key)) for key in ("samples", "global_batch", "log_steps"))
    return samples // batch * batch if batch else math.nan, log_steps * batch


def _state(config: Values, metrics: list[Values], evaluation: Values) -> str:
    scored = "evaluated" if evaluation else "not evaluated"
    if not metrics:
        return f"{scored}; no training recorded"
    (planned, between), done = _planned(config), number(metrics[-1]["samples"])
    # The last steps may have no line of their own, and the plan may be unknown.
    return f"{int(100 * done / planned)} % trained, {scored}" if done + between <= planned else f"trained, {scored}"


def _facts(config: Values, metrics: list[Values]) -> list[tuple[str, str]]:
    """Names and values of the list below the headline."""
    if not metrics:
        return []
    last, (planned, _) = metrics[-1], _planned(config)
    samples = amount(last["samples"]) + (f" of {amount(planned)}" if math.isfinite(planned) else "")
    facts = [("Samples", samples), ("Steps", amount(last.get("step")))]
    facts.append(("Loss above its floor", amount(last.get("loss_minus_entropy"))))
    if speeds := sorted(_recorded(metrics, "samples_per_second")):
        facts.append(("Samples per second, median", amount(speeds[len(speeds) // 2])))
    for key, what in (("wait_share", "data"), ("rank_wait_share", "other workers")):
        if waits := _recorded(metrics, key):
            facts.append((f"Time waiting for {what}, mean", percent(sum(waits) / len(waits))))
    facts += _supply(metrics[1:])  # the first line holds the start
    if cached := _recorded(metrics, "clips_cached"):
        clips = sum(cached) + sum(_recorded(metrics, "clips_decoded"))
        facts.append(("Clips from the cache", f"{amount(sum(cached))} of {amount(clips)}"))
    if late := Counter(_recorded(metrics, "straggler")).most_common(1):
        facts.append(
            ("Slowest worker", f"{amount(late[0][0])}, in {amount(late[0][1])} of {amount(len(metrics))} lines")
        )
    if stops := _recorded(metrics, "checkpoint_seconds"):
        facts.append(("Seconds stopped for checkpoints", amount(sum(stops))))
    counts = {
        "restarts": "Restarts",
        "rows_read": "Rows read",
        "rows_used": "Rows used",
        "rows_quarantined": "Rows quarantined",
        "rows_surplus": "Samples beyond the shards' index",
        "rows_in_val": "Rows read that validation holds too",
    }
    return facts + [(label, amount(last[key])) for key, label in counts.items() if key in last]


def _supply(metrics: list[Values]) -> list[tuple[str, str]]:
    """Whether decoding could keep up with training, and how long that was waited for."""
    wanted, costs, slots = (
        _recorded(metrics, key) for key in ("samples_per_second", "decode_ms_per_row", "decode_slots")
    )
    if not (wanted and slots) or min(costs, default=0.0) <= 0:
        return []
    most, used = 1000 * statistics.median(slots) / statistics.median(costs), statistics.median(wanted)
    waits = _recorded(metrics, "wait_share")
    enough = most >= SPARE * used
    verdict = "enough" if enough else f"less than {SPARE} times what training takes: give more slots or nodes to decode"
    return [
        ("Time waiting for data after the first line, mean", percent(sum(waits) / len(waits))),
        ("Decoding", f"up to {amount(most)} rows/s for {amount(used)} samples/s, {verdict}"),
    ]


def _recorded(metrics: list[Values], key: str) -> list[float]:
    """The finite values of a field, in order."""
    return [value for line in metrics if math.isfinite(value := number(line.get(key)))]


def _quarantine(entries: list[Values]) -> Values:
    """Entries by reason, the most frequent first, with a few examples of each."""
    reasons = Counter(str(entry.get("reason")) for entry in entries)
    whole = dict.fromkeys(("shard", "key", "member", "offset", "epoch", "row"))
    groups, shown = [], 0
    for reason, count in reasons.most_common(_REASONS):
        examples = islice((whole | entry for entry in entries if str(entry.get("reason")) == reason), _EXAMPLES)
        shown += count
        groups.append({"reason": reason, "count": count, "examples": list(examples)})
    distinct = len({(str(entry.get("shard")), str(entry.get("key"))) for entry in entries})
    return {"total": len(entries), "distinct": distinct, "groups": groups, "rest": len(entries) - shown}
