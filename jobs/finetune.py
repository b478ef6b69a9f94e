"""Fine-tune a tower to classify or to tag: `python jobs/finetune.py FOLDER_OR_RECIPE --data.classes genre`.

Pretrained, all of it trained (PT + FT):   python jobs/finetune.py runs/NAME --data.classes genre \\
                                               --data.train 'DATA/train-*.tar' --data.val 'DATA/val-*.tar'
Pretrained, its head alone (PT):           ... --model.audio.freeze
From scratch, the same tower:              ... --model.audio.weights '' --model.audio.lr 1e-3
From scratch, a recipe's tower:            python jobs/finetune.py tiny --data.tags tags ...
With a tenth of the labels:                ... --data.train-share 0.1 --seed 1
Another tower than audio:                  ... --tower spectrogram

Settings, flags and the run's folder are those of jobs/pretrain.py. Scores (accuracy, macro F1, ROC-AUC, PR-AUC) are on
data.val: at the end in evaluation.json and on the page, and with --evaluate.every-samples while it trains.
"""

import argparse
import sys
from pathlib import Path

from muser_dist.cli import main, train_job
from muser_dist.config import MODALITIES
from muser_dist.errors import require


def job(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tower", choices=MODALITIES)
    options, rest = parser.parse_known_args(arguments)
    if not arguments or rest[:1] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    require(
        bool(rest) and not rest[0].startswith("-"),
        "the first argument must be a run's folder or a recipe: python jobs/finetune.py runs/NAME --data.classes genre",
    )
    from muser_dist.recipes.finetune import finetune  # after the options: importing torch takes seconds

    folder = Path(rest[0])
    name = folder.resolve().parent.name if folder.name == "model" else folder.name
    train_job(rest, "jobs/finetune.py", lambda start: (f"finetune-{name}", finetune(start, options.tower)))


if __name__ == "__main__":
    main(job)
