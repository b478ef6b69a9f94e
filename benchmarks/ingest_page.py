"""The page of ingest.py: its results in words and tables, every number out of the JSON."""

import statistics
from typing import Any

_WHAT = {
    "limit": "bare loops over our decoder, one process for each core: seek, read, decode, nothing else; with the "
    "allocator setting that our decoding processes make for themselves",
    "ours": "`ray_dataset` as one training worker consumes it, in order and shuffled; also renders sentences, "
    "tokenizes them and makes everything else that a chunk holds",
    "usual_stack": "webdataset and a torch DataLoader; decodes the whole clip, resamples it whole with torchaudio, "
    "then crops and makes a mel spectrogram",
    "webdataset_same_decode": "webdataset and a torch DataLoader with our decoder",
    "ray_webdataset": "`ray.data.read_webdataset` and `map_batches` with our decoder, in Ray Data's default settings, "
    "not shuffled",
    "webdataset_same_decode_tuned": "as webdataset_same_decode, with our allocator setting",
    "ray_webdataset_tuned": "as ray_webdataset, with our allocator setting",
}


def page(results: dict[str, Any], json_name: str) -> str:
    """Markdown.

    Args:
        results: what ingest.py wrote as JSON.
        json_name: file name of that JSON.
    """
    parts = [_head(results, json_name), _speed(results), _processes(results), _slow(results)]
    if "plan" in results:
        parts.append(_plan(results["plan"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: dict[str, Any], json_name: str) -> str:
    versions = results["versions"]
    names = ("python", "ray", "torch", "webdataset", "soundfile")
    others = [max(row["cores_used_by_others"], 0.0) for row in results["rows"]]
    data = "; ".join(
        f"{kind}: {made['shards']} shards of {made['rows_per_shard']} rows, {made['kbit_per_second']} kbit/s, "
        f"{made['distinct_clips']} distinct clips repeated under other keys"
        for kind, made in results["data"].items()
    )
    return f"""# Ingest: how fast training chunks come out of the data path

`{json_name}` holds the numbers. Commit {results["commit"]}, {results["cpu"]}; {
        ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    }. The command:

```
{results["command"]}
```

Clips of 30 s, 44.1 kHz, stereo, composed and played by the demo corpus with a hiss at -50 dB ({data}).
The shards lie in the page cache, so no disk is measured. Of each clip 5 s at a random place are
delivered as 16 kHz mono. Our decoder seeks to the crop and resamples it alone.

{results["cores"]} processes decode for each contestant; the consumer does nothing
with what it gets. Every contestant is a process of its own, libraries have one thread each, and they
take turns, round by round. Figures begin a quarter of the time after the first batch. Other
programs used {statistics.mean(others):.2f} cores meanwhile on average, {max(others):.2f} at most."""


def _speed(results: dict[str, Any]) -> str:
    parts = ["## Speed", "\n".join(f"- **{name}**: {_WHAT[name]}." for name in _names(results))]
    for kind in results["data"]:
        lines = [
            "| contestant | rows/s | CPU ms a clip | wait p50 / p95 / p99, s | first batch, s | ours / it | by round |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in _names(results):
            rows = _rows(results, name, kind, "fast")
            ratios = results["ratios_by_round"][kind].get(f"ours_over_{name}", [])
            waits = " / ".join(f"{_median(row['wait_seconds'][p] for row in rows):.2f}" for p in ("p50", "p95", "p99"))
            lines.append(
                f"| {name} | {_median(row['rows_per_second'] for row in rows):.1f} "
                f"| {1000 * _median(row['cpu_seconds_per_clip'] for row in rows):.2f} | {waits} "
                f"| {_median(row['seconds_to_first_batch'] for row in rows):.1f} "
                f"| {f'{_median(ratios):.2f}' if ratios else ''} | {', '.join(f'{ratio:.2f}' for ratio in ratios)} |"
            )
        rounds = 1 + max((row["round"] for row in results["rows"] if row["format"] == kind), default=0)
        parts.append(f"{kind}, {rounds} round{'s' if rounds > 1 else ''}; medians:\n\n" + "\n".join(lines))
    if "cpu_ours_over_limit" in results["ratios"]:
        parts.append(
            f"In CPU seconds a clip, which a busy machine disturbs less than rows a second, ours is\n"
            f"{results['ratios']['cpu_ours_over_limit']:.2f} of the limit on {next(iter(results['data']))}."
        )
    parts.append(
        "Waits are the time blocked for a batch of 128, idle consumer. The first batch counts from the start of\n"
        "Python, with imports and, where there is one, the start of Ray. CPU is that of the whole tree of\n"
        "processes, Ray's daemons included."
    )
    return "\n\n".join(parts)


def _processes(results: dict[str, Any]) -> str:
    kind = next(iter(results["data"]))
    rows = _rows(results, "ours", kind, "fast")
    if not rows:
        return ""
    titles = list(dict.fromkeys(title for row in rows for title in row["cpu_seconds_by_process"]))
    spent = {title: 1000 * _median(row["cpu_seconds_by_process"].get(title, 0.0) for row in rows) for title in titles}
    shown = sorted((title for title in titles if spent[title] >= 0.01), key=lambda title: -spent[title])
    lines = [f"| {title} | {spent[title]:.2f} |" for title in shown]
    table = "| process | CPU ms a clip |\n|---|---|\n" + "\n".join(lines)
    return f"## Where our CPU goes\n\n{kind}; processes below 0.01 ms are left out:\n\n{table}"


def _slow(results: dict[str, Any]) -> str:
    rows = [row for row in results["rows"] if row["consumer"] == "slow"]
    if not rows:
        return ""
    lines = []
    for row in rows:
        fast = _rows(results, row["contestant"], row["format"], "fast")
        store = row["object_store"]
        lines.append(
            f"| {row['contestant']} | {max(other['object_store']['peak_mb'] for other in fast):.0f} "
            f"| {max(other['object_store']['spilled_mb'] for other in fast):.0f} | {store['peak_mb']:.0f} "
            f"| {store['end_mb']:.0f} | {store['spilled_mb']:.0f} | {row['cores_used']:.2f} |"
        )
    return (
        "## Memory, and a consumer that is slower\n\n"
        "The slow consumer sleeps so as to take a quarter of the rows, over an object store of "
        f"{rows[0]['object_store']['capacity_mb']} MB,\nof which `data.buffer_mib` gives ours half. Cores are "
        "those used in the last 40 % of its time;\nwhat it takes needs a quarter of those of full speed.\n\n"
        "| contestant | fast: peak MB | spilled MB | slow: peak MB | MB at the end | spilled MB | slow: cores |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(lines)
    )


def _plan(plan: list[dict[str, Any]]) -> str:
    lines = [
        f"| {row['shards']:,} | {row['plan_seconds']:.3f} | {row['start_seconds']:.2f} | {row['resumed_seconds']:.2f} |"
        for row in plan
    ]
    return (
        "## Cost of the plan\n\n"
        "Real shards named again and again, a new dataset each time on a Ray that is warm; medians of "
        f"{len(plan[0]['each']['plan'])}.\n"
        '"Plan" is from the index file to the reader, "first chunk" from `ray_dataset` to the consumer, with the\n'
        "start of the processes that Ray makes anew for each dataset.\n\n"
        "| shards | plan, s | first chunk at the start, s | at 90 % of the pass, s |\n|---|---|---|---|\n"
        + "\n".join(lines)
    )


def _names(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["contestant"] for row in results["rows"]))


def _rows(results: dict[str, Any], name: str, kind: str, consumer: str) -> list[dict[str, Any]]:
    wanted = (name, kind, consumer)
    return [row for row in results["rows"] if (row["contestant"], row["format"], row["consumer"]) == wanted]


def _median(values: Any) -> float:
    return statistics.median(values)
