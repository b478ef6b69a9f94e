"""What can be known of a set of shards before training on it: its audio, fields, faults, copies and leaks."""

from collections import Counter
from typing import Any

import numpy as np

from muser_dist.data.catalogue import Catalogue, entries, value_id
from muser_dist.data.fingerprint import recordings
from muser_dist.data.storage import redact
from muser_dist.data.text import read_fields
from muser_dist.errors import DataError

_EXAMPLES = 5

_LONGEST_VALUE = 100  # characters shown of a field's value


def inspect(catalogue: Catalogue, batch: int) -> dict[str, Any]:
    """All numbers about a set of shards, ready for JSON.

    Args:
        catalogue: its rows.
        batch: rows of a global batch, for the false negatives.

    Returns:
        shards: how many, their bytes and rows; those that break off, and those whose index counts
            otherwise. `looked_at` is the number of rows that all that follows is about.
        usable: rows with text, and audio that can be decoded or notation.
        problems: for each kind of reason the number of rows, and the first one. A row may have two.
        notation: rows by extension of a member that holds notation; what is in it is not looked at.
        audio: hours by the headers, rows by format, rate and channels, seconds of the clips.
        fields: for each metadata field the share of rows that have it, the number of distinct
            values and the most frequent ones with their rows, as far as they occur twice.
        copies: rows that share the same file, title (and artist), recording or text, see `_copies`.
        false_negatives: see `false_negatives`.
    """
    looked = len(catalogue.ends)
    texts = catalogue.text[catalogue.text >= 0]
    return {
        "shards": _shards(catalogue),
        "usable": catalogue.usable,
        "problems": [
            {"kind": kind, "rows": problem.rows, "reason": problem.reason, **_name(catalogue, problem.row)}
            for kind, problem in sorted(catalogue.problems.items(), key=lambda item: (-item[1].rows, item[0]))
        ],
        "notation": dict(catalogue.notation.most_common()),
        "audio": _audio(catalogue),
        "fields": {name: _field(catalogue, name, looked) for name in sorted(catalogue.fields)},
        "copies": {
            "file": _copies(catalogue, catalogue.file),
            "title": _copies(catalogue, catalogue.title),
            "recording": _copies(catalogue, recordings(catalogue.prints, catalogue.ends)),
            "text": _copies(catalogue, catalogue.text),
        },
        "false_negatives": false_negatives(np.unique(texts, return_counts=True)[1], batch),
    }


def leakage(catalogue: Catalogue, against: Catalogue) -> dict[str, Any]:
    """What two sets of shards share.

    Returns:
        for "file", "title" and "recording": the rows of each set that the other one has too, and
        examples of pairs.
    """
    words = len(catalogue.prints)
    recording = recordings(
        np.concatenate([catalogue.prints, against.prints]), np.concatenate([catalogue.ends, words + against.ends])
    )
    split = len(catalogue.ends)
    return {
        name: _shared(catalogue, ours, against, theirs)
        for name, ours, theirs in (
            ("file", catalogue.file, against.file),
            ("title", catalogue.title, against.title),
            ("recording", recording[:split], recording[split:]),
        )
    }


def false_negatives(counts: np.ndarray, batch: int) -> dict[str, float]:
    """How many rows of a batch state the same facts as an anchor, and what that does to plain InfoNCE.

    Of R rows, n_v state the facts v, and B of them are drawn without replacement. For an anchor
    with the facts v, the number K of others in its batch is hypergeometric:

        P(K = k) = C(n_v - 1, k) C(R - n_v, B - 1 - k) / C(R - 1, B - 1)

    Anchors are as frequent as their facts, n_v / R; hence on average
    E K = (B - 1) sum_v n_v (n_v - 1) / (R (R - 1)). Equal texts have equal logits. So K + 1 of an
    audio clip's logits are equal, and its loss is at least log(K + 1); and K + 1 clips share one
    text's distribution, whose mean loss over them is at least that too. The floor is E log(K + 1), in
    nats: what is left of the loss when a model has learnt all there is.

    Args:
        counts: (texts,) n_v, at least 1 each.
        batch: B; more than R counts as R.

    Returns:
        rows (R), batch (B), texts (how many v), per_anchor (E K), share (of the anchors with
        K > 0) and loss_floor.
    """
    rows, batch = int(counts.sum()), min(batch, int(counts.sum()))
    result = {"rows": rows, "batch": batch, "texts": len(counts), "per_anchor": 0.0, "share": 0.0, "loss_floor": 0.0}
    if batch < 2:
        return result
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, rows + 1)))])  # logarithms

    def choose(n: int, k: np.ndarray | int) -> Any:
        return factorial[n] - factorial[k] - factorial[n - k]

    for count, texts in zip(*map(np.ndarray.tolist, np.unique(counts, return_counts=True)), strict=True):
        k = np.arange(max(0, batch - 1 - (rows - count)), min(count, batch))
        p = np.exp(choose(count - 1, k) + choose(rows - count, batch - 1 - k) - choose(rows - 1, batch - 1))
        weight = count * texts / rows
        result["per_anchor"] += weight * (batch - 1) * (count - 1) / (rows - 1)
        result["share"] += weight * float(p[k > 0].sum())
        result["loss_floor"] += weight * float(p @ np.log1p(k))
    return result


def _shards(catalogue: Catalogue) -> dict[str, Any]:
    named = list(zip(map(redact, catalogue.urls), catalogue.samples.tolist(), strict=True))
    return {
        "shards": len(named),
        "bytes": catalogue.bytes,
        "rows": int(catalogue.samples.sum()),
        "looked_at": len(catalogue.ends),
        "damaged": [
            {"shard": shard, "problem": damage}
            for (shard, _), damage in zip(named, catalogue.damage, strict=True)
            if damage is not None
        ],
        "index_differs": [
            {"shard": shard, "index": indexed, "rows": rows}
            for (shard, rows), indexed in zip(named, catalogue.indexed, strict=True)
            if indexed is not None and indexed != rows
        ],
    }


def _audio(catalogue: Catalogue) -> dict[str, Any]:
    known = catalogue.seconds[~np.isnan(catalogue.seconds)]
    ends: tuple[Any, ...] = (None,) * 4
    if len(known):
        ends = tuple(np.quantile(known.astype(np.float64), (0, 0.5, 0.95, 1)).tolist())
    by: tuple[Counter, Counter, Counter] = (Counter(), Counter(), Counter())
    for names, rows in catalogue.formats.items():
        for counter, name in zip(by, names, strict=True):
            counter[str(name)] += rows
    formats, rates, channels = (dict(counter.most_common()) for counter in by)
    return {
        "hours": float(known.sum(dtype=np.float64)) / 3600,
        "formats": formats,
        "sample_rates": rates,
        "channels": channels,
        "seconds": dict(zip(("min", "median", "p95", "max"), ends, strict=True)),
        "unknown_length": sum(catalogue.formats.values()) - len(known),
    }


def _field(catalogue: Catalogue, name: str, looked: int) -> dict[str, Any]:
    table = catalogue.fields[name]
    values, first, counts = np.unique(table[:, 1], return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))[:_EXAMPLES]  # of equally frequent ones, what comes first
    rows = len(np.unique(table[:, 0]))
    return {
        "rows": rows,
        "share": rows / looked,
        "distinct": len(values),
        "most_frequent": [
            {"value": _value(catalogue, int(table[first[i], 0]), name, int(values[i])), "rows": int(counts[i])}
            for i in order
            if counts[i] > 1
        ],
    }


def _value(catalogue: Catalogue, number: int, name: str, wanted: int) -> str:
    """The value with an id, read from its row again: a million of them are not kept."""
    row = catalogue.row(number)
    for label, value in entries(read_fields(row.read("json"), row.read("txt"))):
        if label == name and value_id(value) == wanted:
            return value[:_LONGEST_VALUE]
    raise DataError(f"{row.shard} was changed while it was read; run the job again")


def _copies(catalogue: Catalogue, ids: np.ndarray) -> dict[str, Any]:
    """Groups of rows with the same id, -1 being none.

    Returns:
        groups of two or more, rows in such groups, surplus (rows beyond the first of their group),
        and the largest groups with some of their rows.
    """
    values, counts = np.unique(ids[ids >= 0], return_counts=True)
    several = counts > 1
    values, counts = values[several], counts[several]
    largest = np.argsort(-counts, kind="stable")[:_EXAMPLES]
    return {
        "groups": len(counts),
        "rows": int(counts.sum()),
        "surplus": int(counts.sum()) - len(counts),
        "largest": [
            {
                "rows": int(counts[i]),
                "examples": [_name(catalogue, row) for row in np.flatnonzero(ids == values[i])[:_EXAMPLES].tolist()],
            }
            for i in largest
        ],
    }


def _shared(catalogue: Catalogue, ours: np.ndarray, against: Catalogue, theirs: np.ndarray) -> dict[str, Any]:
    common = np.intersect1d(ours[ours >= 0], theirs[theirs >= 0])
    mine, others = np.flatnonzero(np.isin(ours, common)), np.flatnonzero(np.isin(theirs, common))
    examples = []
    for row in mine[:_EXAMPLES].tolist():
        other = int(np.flatnonzero(theirs == ours[row])[0])
        examples.append({"row": _name(catalogue, row), "against": _name(against, other)})
    return {"rows": len(mine), "against": len(others), "examples": examples}


def _name(catalogue: Catalogue, number: int) -> dict[str, str]:
    row = catalogue.row(number)
    return {"shard": row.shard, "key": row.key}
