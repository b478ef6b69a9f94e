import io
import itertools
import math
import sys

import av
import numpy as np
import pytest

from muser_dist.data.audio import probe
from muser_dist.data.catalogue import Catalogue, scan
from muser_dist.data.inspection import false_negatives, inspect, leakage
from muser_dist.errors import ConfigError, DataError
from tests.fatal import install
from tests.planted import plant
from tests.shardmaker import encode, sample, tone, write_shard, write_shards
from tests.small import LOCAL


def catalogue(pattern: str, template: str = "{caption}", rows: int | None = None) -> Catalogue:
    return scan(LOCAL, LOCAL.expand([pattern], "shards"), (template,), rows)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The catalogues of the planted training and validation shards, by decoders that die of FATAL."""
    folder = tmp_path_factory.mktemp("planted")
    plant(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(install(folder)), *sys.path])
        return catalogue(f"{folder}/train-*.tar"), catalogue(f"{folder}/val-*.tar")


@pytest.fixture(scope="module")
def report(planted):
    return inspect(planted[0], batch=4)


def test_shards(report):
    shards = report["shards"]
    assert (shards["shards"], shards["rows"], shards["looked_at"]) == (3, 24, 24)
    (damaged,) = shards["damaged"]
    assert damaged["shard"].endswith("train-00002.tar") and "cut short" in damaged["problem"]
    (differs,) = shards["index_differs"]
    assert differs["shard"].endswith("train-00001.tar")
    assert (differs["index"], differs["rows"]) == (15, 16)


def test_what_cannot_be_used_is_counted_by_kind(report):
    assert report["usable"] == 8
    assert {problem["kind"]: (problem["rows"], problem["key"]) for problem in report["problems"]} == {
        "broken JSON or text": (2, "brokenjson"),
        "cannot be decoded": (2, "undecodable"),
        "empty": (2, "empty"),
        "no .json and no .txt member": (2, "notext"),  # and twosongs is none: its several songs come first
        "cut short": (1, "whole"),
        "has samples that are NaN or infinite": (1, "notfinite"),
        "its decoder died twice": (1, "fatal"),
        "no audio member": (1, "noaudio"),
        "no text": (1, "emptycaption"),
        "several audio members": (1, "twosongs"),
        "silent": (1, "silent"),
        "the JSON is no object": (1, "notobject"),
        "unsafe member name …": (1, "../escape"),
    }
    reasons = {problem["key"]: problem["reason"] for problem in report["problems"]}
    assert reasons["fatal"] == "its decoder died twice (SIGSEGV)"
    assert "escape.flac" in reasons["../escape"]


def test_audio(report):
    audio = report["audio"]
    assert audio["formats"] == {"flac": 12, "wav": 3, "mp3": 1}
    assert audio["sample_rates"] == {"16000": 13, "22050": 2, "8000": 1}
    assert audio["channels"] == {"1": 15, "2": 1}
    # 12 of a second (one of them silent, one NaN), one empty, one of 3 and two of 10 seconds
    assert audio["hours"] == pytest.approx((12 + 0 + 3 + 2 * 10) / 3600)
    assert audio["seconds"] == {"min": 0, "median": 1, "p95": 10, "max": pytest.approx(10)}
    assert audio["unknown_length"] == 0


def test_fields(report):
    fields = report["fields"]
    assert set(fields) == {"artist", "caption", "instrument", "mode", "tags", "title"}
    assert (fields["tags"]["rows"], fields["tags"]["distinct"]) == (2, 2)
    assert fields["tags"]["most_frequent"] == [{"value": "old", "rows": 2}]
    assert fields["caption"]["share"] == 16 / 24
    assert fields["caption"]["distinct"] == 8
    assert fields["caption"]["most_frequent"] == [
        {"value": "Piece 0 for flute.", "rows": 8},
        {"value": "Piece 2 for horn.", "rows": 2},
    ]
    assert fields["title"]["most_frequent"] == []  # what occurs once is not frequent


def test_copies(report):
    copies = report["copies"]
    assert {name: (found["groups"], found["rows"], found["surplus"]) for name, found in copies.items()} == {
        "file": (2, 8, 6),
        "title": (0, 0, 0),
        "recording": (1, 2, 1),
        "text": (2, 10, 8),
    }

    def examples(name: str, group: int) -> list[str]:
        return [row["key"] for row in copies[name]["largest"][group]["examples"]]

    assert examples("file", 0) == ["plain", "brokenjson", "notobject", "notext", "emptycaption"]
    assert examples("file", 1) == ["twin", "twincopy"]
    assert examples("recording", 0) == ["music", "musiccopy"]
    assert examples("text", 1) == ["other", "twincopy"]


def test_false_negatives_of_the_report(report):
    found = report["false_negatives"]
    assert (found["rows"], found["batch"], found["texts"]) == (16, 4, 8)
    assert found["per_anchor"] == pytest.approx(3 * (8 * 7 + 2 * 1) / (16 * 15))


def test_leakage(planted):
    found = leakage(*planted)
    assert {name: (shared["rows"], shared["against"]) for name, shared in found.items()} == {
        "file": (1, 1),
        "title": (1, 1),
        "recording": (2, 1),
    }
    pairs = {
        name: [(pair["row"]["key"], pair["against"]["key"]) for pair in shared["examples"]]
        for name, shared in found.items()
    }
    assert pairs == {
        "file": [("other", "samefile")],
        "title": [("plain", "sametitle")],
        "recording": [("music", "samemusic"), ("musiccopy", "samemusic")],
    }
    assert found["file"]["examples"][0]["against"]["shard"].endswith("val-00000.tar")


@pytest.mark.parametrize("kind", ["flac", "wav", "ogg", "mp3"])
def test_headers(kind):
    rate, channels, seconds = probe(encode(np.stack([tone(0, 2.0, 44_100)] * 2, axis=1), 44_100, kind))
    assert (rate, channels) == (44_100, 2)
    assert seconds == pytest.approx(2.0, abs=0.06)


def test_headers_that_libsndfile_cannot_read():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(0, 2.0, 44_100)[None], format="fltp", layout="mono")
        frame.sample_rate = 44_100
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    rate, channels, seconds = probe(buffer.getvalue())
    assert (rate, channels) == (44_100, 1)
    assert seconds == pytest.approx(2.0, abs=0.06)


def test_headers_that_do_not_tell_the_length(tmp_path):
    streamed = bytearray(sample(0)["flac"])
    streamed[21] &= 0xF0  # the number of samples in STREAMINFO, as encoders to a pipe leave it
    streamed[22:26] = bytes(4)
    assert math.isnan(probe(bytes(streamed))[2])
    write_shard(tmp_path / "a.tar", [("known", sample(0)), ("streamed", sample(1) | {"flac": bytes(streamed)})])
    report = inspect(catalogue(f"{tmp_path}/a.tar"), 2)
    assert (report["usable"], report["audio"]["unknown_length"], report["audio"]["seconds"]["max"]) == (2, 1, 1)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1], [5], [3, 2, 1, 1], [4, 4], [1, 6]])
@pytest.mark.parametrize("batch", [2, 3, 5])
def test_the_closed_form_counts_what_all_batches_hold(counts, batch):
    texts = np.repeat(np.arange(len(counts)), counts)
    others = []
    for rows in itertools.combinations(range(len(texts)), batch):
        drawn = texts[list(rows)]
        others.append((drawn[:, None] == drawn).sum(axis=1) - 1)
    found = false_negatives(np.array(counts), batch)
    assert found["per_anchor"] == pytest.approx(np.mean(others))
    assert found["share"] == pytest.approx(np.mean(np.array(others) > 0))
    assert found["loss_floor"] == pytest.approx(np.mean(np.log1p(others)))


def test_the_closed_form_for_a_large_corpus():
    rng = np.random.default_rng(0)
    counts = rng.zipf(1.6, 3000).clip(max=4000)
    texts = np.repeat(np.arange(len(counts)), counts)
    found = false_negatives(counts, 256)
    others = []
    for _ in range(300):
        _, group, size = np.unique(rng.choice(texts, 256, replace=False), return_inverse=True, return_counts=True)
        others.append(size[group] - 1)
    assert found["per_anchor"] == pytest.approx(np.mean(others), rel=0.02)
    assert found["share"] == pytest.approx(np.mean(np.array(others) > 0), rel=0.02)
    assert found["loss_floor"] == pytest.approx(np.mean(np.log1p(others)), rel=0.02)


def test_no_model_gets_below_the_floor():
    """Equal texts have equal logits; the best that a model can do is to tell the texts apart."""
    texts = np.array([0, 0, 0, 1, 1, 2])
    floor = np.log((texts[:, None] == texts).sum(axis=1)).mean()
    rng = np.random.default_rng(0)
    perfect = 40.0 * (texts[:, None] == texts)
    for logits in (perfect, *(rng.normal(0, scale, (6, 3))[:, texts] for scale in (0, 1, 5))):
        for direction in (logits, logits.T):
            log_p = direction - np.log(np.exp(direction).sum(axis=1, keepdims=True))
            assert -np.diag(log_p).mean() >= floor - 1e-12
    assert -np.diag(perfect - np.log(np.exp(perfect).sum(axis=1, keepdims=True))).mean() == pytest.approx(floor)


def test_a_batch_of_more_than_all_rows_holds_them_all():
    assert false_negatives(np.array([2, 1]), 1024)["batch"] == 3
    assert false_negatives(np.zeros(0, np.int64), 1024)["loss_floor"] == 0


def test_languages_and_lists_are_fields_of_their_own(tmp_path):
    titles = ({"en": "Song", "de": "Lied"}, {"en": "Song"}, "Song")
    write_shard(tmp_path / "a.tar", [(f"p{i}", sample(i, name=title)) for i, title in enumerate(titles)])
    fields = inspect(catalogue(f"{tmp_path}/a.tar"), 2)["fields"]
    assert {name: fields[name]["rows"] for name in ("name", "name[de]", "name[en]")} == {
        "name": 1,
        "name[de]": 1,
        "name[en]": 2,
    }


def test_a_row_of_notation_needs_no_audio(tmp_path):
    tune = {"abc": b"K:D\nDEFG|", "json": sample(0)["json"]}
    rows = {"scored": tune, "both": sample(1) | {"mid": b"MThd"}, "silent": {"json": sample(2)["json"]}}
    rows["unsaid"] = {"abc": tune["abc"]}
    write_shard(tmp_path / "a.tar", list(rows.items()))
    report = inspect(catalogue(f"{tmp_path}/a.tar"), 2)
    assert (report["usable"], report["notation"]) == (2, {"abc": 2, "mid": 1})
    assert {problem["kind"]: problem["key"] for problem in report["problems"]} == {
        "no audio member": "silent",
        "no .json and no .txt member": "unsaid",
    }


def test_some_rows_of_each_shard(tmp_path):
    found = catalogue(write_shards(tmp_path, [6, 3]), "{instrument}", rows=4)
    report = inspect(found, 4)
    assert (report["shards"]["rows"], report["shards"]["looked_at"]) == (9, 4)
    assert [found.row(number).key for number in range(4)] == ["piece00000", "piece00001", "piece00006", "piece00007"]


def test_what_is_no_shard_is_a_finding(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    report = inspect(catalogue(f"{tmp_path}/a.tar"), 4)
    assert "no tar archive" in report["shards"]["damaged"][0]["problem"]
    assert (report["usable"], report["audio"]["hours"], report["fields"]) == (0, 0, {})


def test_errors_name_what_to_mend(tmp_path):
    write_shards(tmp_path, [1])
    with pytest.raises(ConfigError, match="templates: 'no field' names no field"):
        catalogue(f"{tmp_path}/*.tar", "no field")
    (tmp_path / "muser-index.json").write_text("{")
    with pytest.raises(DataError, match=r"muser-index\.json: broken index"):
        catalogue(f"{tmp_path}/*.tar")
