"""The page shows a run's numbers, treats all text as text, and makes do with what files there are."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from muser_dist.config import to_dict
from muser_dist.errors import CheckpointError
from muser_dist.evaluate.geometry import geometry
from muser_dist.evaluate.probes import few_shot, probe
from muser_dist.evaluate.report import write_report
from muser_dist.evaluate.retrieval import directions, retrieval
from muser_dist.evaluate.scores_page import write_evaluation
from muser_dist.evaluate.zero_shot import robustness, zero_shot
from muser_dist.recipes.tiny import tiny

CONFIG = replace(tiny(), train=replace(tiny().train, samples=65_536))

HOSTILE = "</pre><script>alert('&amp;')</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}$\\frac"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """The page's text, its tags with their attributes, and whether every tag is closed in its place."""

    def __init__(self, path: Path):
        super().__init__()
        self.html = path.read_text("utf-8")
        self.text, self.tags, self.open = "", [], []
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.text += data


def check(path: Path) -> Page:
    """Well formed, nothing from outside, nothing that runs."""
    page = Page(path)
    assert not page.open
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "link", "iframe", "object", "form", "base"})
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "srcset", "action") and not (name.endswith("href") and value[0] != "#")
    assert not re.search(r"http|@import|url\((?!#)", page.html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return page


def metrics_line(step: int, **changes) -> str:
    values = {"step": step, "samples": step * 128, "loss": 2.5 - step / 1000, "loss_minus_entropy": 1.25}
    values |= {f"{kind}/{pair}": 0.5 for kind in ("loss", "temperature") for pair in ("audio-text", "spectrogram-text")}
    values |= {"lr": 1e-3, "grad_norm": 1.5, "samples_per_second": 51.5, "wait_share": 0.043}
    values |= {"rows_read": step * 130, "rows_used": step * 128, "rows_quarantined": 2, "time": {"encode": 1.0}}
    return json.dumps(values | changes) + "\n"


def scores(classes: list[str]) -> dict:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(classes), 300)
    return zero_shot(rng.normal(size=(300, 8)), rng.normal(size=(len(classes), 8)), classes, labels)


def extended(text: str) -> dict:
    """What an evaluation with training rows holds besides, with `text` for names."""
    rng = np.random.default_rng(3)
    features, prompts = rng.normal(size=(60, 4)), rng.normal(size=(2, 3, 4))
    labels = np.arange(60) % 3
    tags = rng.random((60, 3)) < 0.5
    tags[:, 2] = True
    names = [text, "flute", f"always {text}"]
    probed, _ = probe("linear", features, labels, features, labels, names)
    curves = [few_shot(features, y, features, y, names, shares=(0.02, 0.5, 1.0), seeds=2) for y in (labels, tags)]
    every = dict.fromkeys((text, "text"), np.ones(60, bool))
    return {
        "model": text,
        "tagging": {text: {text: zero_shot(features, prompts[0], names, tags)}},
        "probes": {text: {text: {"linear": probed}}},
        "few_shot": {text: {text: curves[0]}, "tags": {text: curves[1]}},
        "robustness": {text: {text: robustness(features, prompts, labels)}},
        "geometry": geometry({text: features, "text": features + 1}, every, np.arange(60)),
        "probes_on": "tower",
        "train_rows": 60,
    }


def write_run(folder: Path, text: str) -> dict:
    """A whole run's files, with `text` wherever text can come from outside; returns its evaluation."""
    config = to_dict(CONFIG)
    config["name"], config["data"]["templates"] = text, [text]
    run = {"command": f"muser-dist train {text}", "versions": {text: text}, "commit": text, "started": text}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(run | {"machine": {text: text}}))
    lines = [metrics_line(step, **{f"loss/{text}": 1.0}) for step in range(10, 520, 10)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    rng = np.random.default_rng(1)
    audio, words = rng.normal(size=(2, 40, 8))
    asked = directions(
        {text: audio, "text": words}, dict.fromkeys((text, "text"), np.ones(40, bool)), np.arange(40) % 20
    )
    retrieved = {name: retrieval(*arrays) for name, arrays in asked}
    named = scores([text, "flute"])
    evaluation = {
        "data": [text],
        "rows": 40,
        "rows_without": {text: 7},
        "retrieval": retrieved,
        "zero_shot": {text: {text: named}},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation | {"skipped_fields": {text: text}}))
    entry = {"epoch": 0, "row": 3, "shard": text, "key": text, "member": text, "reason": text, "offset": 10_240}
    (folder / "quarantine.jsonl").write_text((json.dumps(entry) + "\n") * 5 + json.dumps(entry | {"reason": "empty"}))
    return evaluation


def percent(value: float) -> str:
    return f"{100 * value:.{1 if value >= 0.01 or value == 0 else 2}f}\u202f%"


def test_page_has_the_numbers(tmp_path):
    evaluation = write_run(tmp_path, "a-run")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html" and sorted(p.name for p in tmp_path.glob("report*")) == ["report.html"]
    page = check(path)
    for shown in (
        "a-run",
        "trained, evaluated",
        "65\u202f280 of 65\u202f536",
        "51.5",
        "4.3\u202f%",
        "1.25",
        "7 of them have no usable a-run",
    ):
        assert shown in page.text
    for direction in evaluation["retrieval"].values():
        for name in ("R@1", "R@5", "R@10", "chance_R@1", "chance_R@5", "chance_R@10"):
            assert percent(direction[name]) in page.text
        assert f"{direction['chance_MRR']:.3g}" in page.text
    named = evaluation["zero_shot"]["a-run"]["a-run"]
    for name in ("accuracy", "macro_f1", "majority", "majority_macro_f1", "chance"):
        assert percent(named[name]) in page.text
    assert all(str(count) in page.text for row in named["confusion"] for count in row)
    assert "5 × a-run" in page.text and "1 × empty" in page.text and "at byte 10\u202f240" in page.text
    assert "train.global_batch" in page.text and "muser-dist train a-run" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 7
    first = path.read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_what_watching_records_is_shown(tmp_path):
    """Fields that a run may or may not record: each has its curve, and what sums them up."""
    watched = {f"grad_norm/{tower}": 0.25 for tower in ("audio", "text")} | {"duplicates": 0.031}
    watched |= {"variance/audio": 0.0077, "dimensions/audio": 61.3, "alignment/audio-text": 0.83}
    watched |= {"clips_cached": 70, "clips_decoded": 30}
    watched |= {"decode_wait_share": 0.052, "transfer_share": 0.021, "rank_wait_share": 0.11}
    lines = [metrics_line(step, checkpoint_seconds=0.5, **watched) for step in (10, 20)]
    lines += [
        metrics_line(step, straggler=3, **watched | {"rank_wait_share": 0.21, "restarts": 2}) for step in (30, 40)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    page = check(write_report(tmp_path))
    assert sum(tag == "svg" for tag, _ in page.tags) == 11
    for shown in ("audio: 0.25", "all: 1.5", "audio: 0.0077", "audio: 61.3", "audio-text: 0.83", "3.1\u202f%"):
        assert shown in page.text
    assert "data: 5.2\u202f%" in page.text and "copies to the device: 2.1\u202f%" in page.text
    assert "other workers: 21.0\u202f%" in page.text  # at the end; and in the mean:
    words = " ".join(re.sub(r"<[^>]*>", " ", page.html).split())
    assert "Time waiting for other workers, mean 16.0 %" in words
    assert "Slowest worker 3, in 2 of 4 lines" in words and "Restarts 2 " in words
    assert "Seconds stopped for checkpoints 1 " in words and "Clips from the cache 280 of 400" in words


@pytest.mark.parametrize(
    ("milliseconds", "said"),
    [
        (20.0, "up to 100 rows/s for 40 samples/s, enough"),
        (42.0, "up to 47.6 rows/s for 40 samples/s, less than 1.2 times what training takes: give more slots"),
    ],
)
def test_the_page_says_whether_decoding_keeps_up(tmp_path, milliseconds, said):
    supply = {"decode_ms_per_row": milliseconds, "decode_slots": 2, "samples_per_second": 40.0}
    lines = [metrics_line(10, **supply | {"wait_share": 0.9})]
    lines += [metrics_line(step, **supply | {"wait_share": 0.04}) for step in (20, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    words = " ".join(re.sub(r"<[^>]*>", " ", check(write_report(tmp_path)).html).split())
    assert said in words
    assert "Time waiting for data after the first line, mean 4.0 %" in words


@pytest.mark.parametrize("text", ["audio", HOSTILE])
def test_an_evaluation_has_a_page_of_its_own(tmp_path, text):
    evaluation = write_run(tmp_path, text) | extended(text)
    json.dumps(evaluation, allow_nan=False)
    page = check(write_evaluation(tmp_path / "scores.html", evaluation))
    words = " ".join(page.text.split())
    assert page.text.count(text) > 15 and sum(tag == "svg" for tag, _ in page.tags) == 2
    tagging = evaluation["tagging"][text][text]
    assert f"{tagging['roc_auc']:.3f}" in page.text and f"{tagging['pr_auc']:.3f}" in page.text
    assert f"undefined, for all rows have them or none: always {text}" in words
    assert percent(evaluation["probes"][text][text]["linear"]["accuracy"]) in page.text
    assert f"{text}: 2.0 % of the labels are too few for a row of each class" in words
    assert f"{evaluation['robustness'][text][text]['agreement']:.3f}" in page.text
    pair = evaluation["geometry"]["pairs"][f"{text}-text"]
    assert all(f"{pair[name]:.3f}" in page.text for name in ("modality_gap", "separability", "alignment"))
    assert "the towers' output" in words and "Training" not in page.text and "Quarantine" not in page.text


def test_text_from_data_is_only_text(tmp_path):
    write_run(tmp_path, HOSTILE)
    page = check(write_report(tmp_path))
    assert page.text.count(HOSTILE) > 15  # letter for letter, also what looks like a template or an entity
    title = next(value for tag, attributes in page.tags if tag == "td" for value in [attributes.get("title")] if value)
    assert title.startswith(HOSTILE)


@pytest.mark.parametrize("missing", ["config.json", "run.json", "metrics.jsonl", "evaluation.json", "quarantine.jsonl"])
def test_each_file_may_be_missing(tmp_path, missing):
    write_run(tmp_path, "a-run")
    (tmp_path / missing).unlink()
    check(write_report(tmp_path))


def test_an_empty_folder_has_a_page_and_a_missing_one_an_error(tmp_path):
    page = check(write_report(tmp_path))
    assert tmp_path.name in page.text and "not evaluated; no training recorded" in page.text
    assert "No metrics are recorded." in page.text and "No retrieval scores are recorded." in page.text
    with pytest.raises(CheckpointError, match="no such folder"):
        write_report(tmp_path / "nowhere")


def test_files_of_a_run_that_died(tmp_path):
    """One line of metrics, half a line after it, and JSON that ends early."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(CONFIG)))
    (tmp_path / "metrics.jsonl").write_text(metrics_line(128, loss=float("nan"), lr=None) + '{"step": 138, "sam')
    (tmp_path / "evaluation.json").write_text('{"rows": 1')
    (tmp_path / "run.json").write_text("[]")
    page = check(write_report(tmp_path))
    assert "25 % trained, not evaluated" in page.text
    assert "metrics.jsonl: 1 of 2 lines cannot be read" in page.text
    assert "evaluation.json cannot be read" in page.text and "run.json holds no JSON object" in page.text
    assert "Learning rate" not in page.text and "Temperature" in page.text


def test_scores_without_rows_and_large_confusion_matrices(tmp_path):
    """No score is a dash; of very many classes the frequent ones are shown and the counts stay whole."""
    nothing = {"text->audio": retrieval(np.ones((2, 3)), np.ones((2, 3)), np.arange(2), np.arange(2) + 2)}
    many = scores([f"class {i}" for i in range(60)])
    unlabelled = zero_shot(np.ones((2, 3)), np.eye(3), list("abc"), [-1, -1])
    evaluation = {"retrieval": nothing, "zero_shot": {"kind": {"audio": many}, "mode": {"audio": unlabelled}}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    page = check(write_report(tmp_path))
    assert "37 others" in page.text and "–" in page.text
    cells = [value for tag, attributes in page.tags if tag == "td" and (value := attributes.get("title"))]
    assert sum(int(cell.rsplit(": ", 1)[1].split(" of ")[0]) for cell in cells) == 300


def test_long_metrics_are_thinned_to_their_last_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(metrics_line(step, lr=step / 1e6) for step in range(1, 5_000)))
    path = write_report(tmp_path)
    page = check(path)
    assert "0.005" in page.text and len(page.html) < 1_000_000
