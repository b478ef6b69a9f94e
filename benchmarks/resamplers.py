"""Speed and quality of resamplers on what decoding asks of them: 5 s from 44.1 kHz to 16 kHz, one thread.

python benchmarks/resamplers.py --json benchmarks/results/resamplers.json

Quality is heard in two tones. One at 7 kHz must pass: the error is what is left when the same tone
at the new rate is taken off. One at 9 kHz has no place below 8 kHz: what comes out of it is alias.
Times are process time, the resamplers taking turns; a ratio is the median over the rounds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from math import gcd
from pathlib import Path

import numpy as np
import scipy.signal
import soxr
import torch
from torchaudio.transforms import Resample

OLD, NEW, SECONDS, ROUNDS = 44_100, 16_000, 5, 30


def contestants() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Functions from (frames,) float32 at the old rate to the new one, by name."""
    torch.set_num_threads(1)
    usual, sharp = Resample(OLD, NEW), Resample(OLD, NEW, lowpass_filter_width=64, rolloff=0.9476)
    common = gcd(OLD, NEW)
    found: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        f"soxr {quality}": lambda x, quality=quality: soxr.resample(x, OLD, NEW, quality=quality)
        for quality in ("VHQ", "HQ", "MQ", "LQ", "QQ")
    }
    return found | {
        "torchaudio, its default": lambda x: usual(torch.from_numpy(x)).numpy(),
        "torchaudio, width 64": lambda x: sharp(torch.from_numpy(x)).numpy(),
        "scipy resample_poly": lambda x: scipy.signal.resample_poly(x, NEW // common, OLD // common),
    }


def tone(hertz: float, rate: int) -> np.ndarray:
    """Five seconds of a tone."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(SECONDS * rate) / rate)).astype(np.float32)


def decibels(error: np.ndarray, of: np.ndarray) -> float:
    """Level of the error over that of the tone, without the ends, where filters swing in."""
    middle = slice(NEW // 2, -NEW // 2)
    return round(float(10 * np.log10(np.mean(error[middle] ** 2) / np.mean(of[middle] ** 2) + 1e-16)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    options = parser.parse_args()
    from muser_dist.train.preflight import provenance

    music = np.random.default_rng(0).standard_normal(SECONDS * OLD).astype(np.float32) * 0.1
    seconds: dict[str, list[float]] = {}
    functions = contestants()
    for number in range(ROUNDS + 1):
        for name, function in functions.items():
            start = time.process_time()
            function(music)
            if number:  # the first round warms up
                seconds.setdefault(name, []).append(time.process_time() - start)
    rows = []
    for name, function in functions.items():
        passed, expected = function(tone(7_000, OLD)), tone(7_000, NEW)
        rows.append(
            {
                "resampler": name,
                "ms": round(1000 * statistics.median(seconds[name]), 3),
                "error_at_7_khz_db": decibels(passed[: len(expected)] - expected[: len(passed)], expected),
                "alias_of_9_khz_db": decibels(function(tone(9_000, OLD)), expected),
            }
        )
    chosen = seconds["soxr HQ"]
    ratios = {
        f"{name}_over_soxr_hq": round(statistics.median(a / b for a, b in zip(times, chosen, strict=True)), 2)
        for name, times in seconds.items()
    }
    record = provenance(["python", *sys.argv])
    record |= {"cpu": record.pop("machine")["platform"], "gpu": None, "rows": rows, "ratios": ratios}
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    table = [
        f"{r['resampler']:<26}{r['ms']:>8} ms{r['error_at_7_khz_db']:>9} dB{r['alias_of_9_khz_db']:>9} dB" for r in rows
    ]
    print("\n".join([f"{'':<26}{'CPU':>11}{'7 kHz':>12}{'9 kHz':>12}", *table]))


if __name__ == "__main__":
    main()
