"""The page of clamp_table.py."""

from typing import Any

from muser_table_page import differences, spread
from record import head, table

_DIRECTIONS = {
    "text→ABC": "text->symbolic",
    "text→MIDI": "text->notation",
    "ABC→text": "symbolic->text",
    "ABC→MIDI": "symbolic->notation",
    "MIDI→ABC": "notation->symbolic",
}
_PROBED = {"ABC": "symbolic", "MIDI": "notation"}


def page(results: dict[str, Any], name: str) -> str:
    """The results in Markdown."""
    rows, pretraining, copied = results["rows"], results["pretraining"], results["header_copy"]
    before = sum(row["seconds"] for row in pretraining) / 60 / len(pretraining)
    trained = [row["seconds"] for row in rows if row["curve"] and row["curve"][-1]["samples"] == results["samples"]]
    ends = [spread([row["curve"][i]["loss"] for row in pretraining]) for i in (0, -1)]
    chances = {title: rows[0]["retrieval"][key]["chance_MRR"] for title, key in _DIRECTIONS.items()}
    parts = [
        head("CLaMP 2 with and without its pretraining", results, name),
        f"Seeds: {len(pretraining)}. Each alignment trains on {results['samples']:,} pieces "
        f"({sum(trained) / 60 / len(trained):.1f} minutes of one thread on average), the pretraining on "
        f"{results['m3_samples']:,} ({before:.1f} minutes), in which the loss in nats for each character falls from "
        f"{ends[0]} to {ends[1]}. Figures are means over seeds, with the least and the greatest. Of the ABC headers M, "
        "L, K, Q, V and P reach the encoder, and no text of the MIDI.",
        "## Retrieval on the validation tunes: MRR",
        f"The header copy puts tunes with the right K: and M: in front, {copied['candidates']:,} tunes for "
        f"{copied['queries']:,} texts. In all other rows texts are the bridge between ABC and MIDI, but where a pair "
        f"of the two is named, on which {results['samples'] // 4:,} pieces more were trained, at 3e-4.",
        table(
            ["", *_DIRECTIONS],
            [
                ["chance", *(f"{value:.3f}" for value in chances.values())],
                ["header copy", f"{copied['MRR']:.3f}", *[""] * (len(_DIRECTIONS) - 1)],
                *(
                    [
                        variant,
                        *(spread([row["retrieval"][key]["MRR"] for row in seeds]) for key in _DIRECTIONS.values()),
                    ]
                    for variant, seeds in _by_variant(rows).items()
                ),
            ],
        ),
        "## Linear probes on the encoder's output: accuracy",
        _probes(results),
        "## With m3 minus without, row by row, with the paired 95 % interval",
        differences(results["comparison"]),
    ]
    return "\n\n".join(parts) + "\n"


def _by_variant(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["recipe"], []).append(row)
    return found


def _probes(results: dict[str, Any]) -> str:
    rows, copied = results["rows"], results["header_copy"]["probes"]
    fields = list(rows[0]["probes"])
    lines = [["header copy", *(f"{copied[field]['accuracy']:.3f}" if field in copied else "" for field in fields)]]
    lines[0] += [""] * len(fields)
    for variant, seeds in _by_variant(rows).items():
        found = [
            spread([row["probes"][field][modality]["linear"]["accuracy"] for row in seeds])
            for modality in _PROBED.values()
            for field in fields
        ]
        lines.append([variant, *found])
    return table(["", *(f"{field} by {notation}" for notation in _PROBED for field in fields)], lines)
