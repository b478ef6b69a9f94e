"""The page of htcl_table.py."""

from typing import Any

from muser_table_page import differences, spread
from record import head, table

_QUERY = "history"


def page(results: dict[str, Any], name: str) -> str:
    """The results in Markdown."""
    seeds = results["recommendation"]
    counts = seeds[0]["counts"]
    of_log = ", ".join(f"{what.replace('_', ' ')} {number:,}" for what, number in counts.items())
    minutes = sum(row["seconds"] for row in results["rows"]) / 60
    parts = [
        head("HTCL with simulated listeners", results, name),
        f"**{seeds[0]['simulated']['note']}** The first stage trains on {results['samples_of_stage_1']:,} clips, each "
        f"second one on {results['samples']:,} more, in steps of {results['global_batch']}; {len(seeds)} seeds, of "
        f"ablations one; {minutes:.0f} minutes of training and embedding in all, one "
        "thread each. Figures are means over seeds, with the least and the greatest. A user is the mean of the clips "
        "taken in training; candidates are cold: clips without any interaction before the test period. *facts* "
        "are what these listeners like clips for, one-hot and whitened: no model that hears knows more. Counts of the "
        f"log: {of_log}.",
        "## Recommendation of cold clips",
        _recommendation(seeds, "cold"),
        "## How much of the way from stage 1 to the oracle, in NDCG@10 on cold clips",
        _gaps(seeds),
        "## Warm clips, for comparison",
        _recommendation(seeds, "warm"),
        "## Is the semantic space preserved?",
        _semantics(results["rows"]),
        "Stage 2 minus stage 1, row by row, with the paired 95 % interval:",
        differences(results["comparison"]),
    ]
    return "\n\n".join(parts) + "\n"


def _recommendation(seeds: list[dict[str, Any]], candidates: str) -> str:
    columns = ("NDCG@10", "HR@10", "MRR", "AUC", "coverage@10")
    rows = [row for seed in seeds for row in seed["rows"] if row["candidates_are"] == candidates]
    lines = [
        [method, *(spread([row[column] for row in of_seeds]) for column in columns)]
        for method, of_seeds in _by_method(rows).items()
    ]
    return table(["", *columns], lines)


def _gaps(seeds: list[dict[str, Any]]) -> str:
    lines = [
        [
            method,
            spread([gap["value"] for gap in of_seeds]),
            "; ".join(f"{gap['interval'][0]:.3f} to {gap['interval'][1]:.3f}" for gap in of_seeds if gap["interval"]),
        ]
        for method, of_seeds in _by_method([gap for seed in seeds for gap in seed["gap_closed"]]).items()
    ]
    return table(["", "share", "95 % interval over users, by seed"], lines)


def _by_method(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What was measured of each method, by seed: not all have been trained with every seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["query"] == _QUERY:
            found.setdefault(row["method"], []).append(row)
    return found


def _semantics(rows: list[dict[str, Any]]) -> str:
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_variant.setdefault(row["recipe"], []).append(row)
    fields = list(rows[0]["probes"])
    titles = ["", *(f"zero-shot {field}" for field in fields), *(f"probe {field}" for field in fields)]
    lines = []
    for variant, of_seeds in by_variant.items():
        zero_shot = [[row["zero_shot"][field]["spectrogram"]["accuracy"] for row in of_seeds] for field in fields]
        probes = [[row["probes"][field]["spectrogram"]["linear"]["accuracy"] for row in of_seeds] for field in fields]
        lines.append([variant, *map(spread, zero_shot), *map(spread, probes)])
    return table(titles, lines)
