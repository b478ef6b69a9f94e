"""Shards with features: what a member holds, what else is in the new shard, and what a second job makes again."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.embed import job
from muser_dist import Muser
from muser_dist.data.chunks import ChunkReader
from muser_dist.data.config import FeaturesConfig
from muser_dist.data.decoder import decoder
from muser_dist.data.rewriting import check_names
from muser_dist.data.windows import cut_consecutive
from muser_dist.embed.features import Source, claim, make_features, write_features
from muser_dist.errors import ConfigError, DataError
from muser_dist.files import alone_in
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from tests.shardmaker import bad_samples, encode, sample, tone, write_shard
from tests.small import LOCAL, index_of, reader_of, small_config
from tests.songs import features_config

SECONDS = (0.2, 0.5, 0.7, 0.8, 1.6)
"""Of clips, with windows of 0.5 s."""


@pytest.fixture(scope="module")
def muser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, MultimodalModel(small_config()).state_dict(), small_config())
    yield Muser.from_pretrained(folder)
    decoder(small_config().data).close()


def clip(i: int) -> np.ndarray:
    return tone(i, SECONDS[i % 5], rate=8_000)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    rows = [(f"piece{i:02d}", sample(i) | {"flac": encode(clip(i), 8_000), "txt": b"words"}) for i in range(10)]
    rows[3][1]["npy"] = b"of another network"
    write_shard(folder / "a-0.tar", rows[:6])
    stale = {"silent": {"npy": b"of another network", "other.npy": b"of a third"}}
    bad = [(key, members | stale.get(key, {})) for key, members, _ in bad_samples()]
    write_shard(folder / "a-1.tar", [*rows[6:], *bad])
    return f"{folder}/a-*.tar"


def written(muser: Muser, shards: str, folder: Path) -> list:
    """What the job does, in this process."""
    index = index_of(shards)
    source = Source.of(muser, "audio", index)
    claim(folder, source, {})
    return [
        write_features(lambda: muser, source, LOCAL, url, int(rows), folder)
        for url, rows in zip(index.urls, index.rows, strict=True)
    ]


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_every_window_of_a_clip_has_the_towers_output(muser, shards, tmp_path):
    first, second = written(muser, shards, tmp_path)
    made = members(tmp_path / "a-0.tar") | members(tmp_path / "a-1.tar")
    for i in range(10):
        values = np.load(io.BytesIO(made[f"piece{i:02d}.npy"]))
        windows = list(cut_consecutive([(clip(i), 8_000)], muser.config.data))
        assert values.shape == (len(windows), 16) and values.dtype == np.float16
        assert len(windows) == (1, 1, 1, 2, 3)[i % 5]  # of 0.2 s of a window of 0.5 s there is nothing else
        waveforms, lengths = zip(*windows, strict=True)
        arrays = {"audio": np.stack(waveforms), "audio_length": np.array(lengths, np.int32)}
        np.testing.assert_allclose(values, muser.encode_chunk("audio", arrays)[1], atol=2e-3)
    assert (first.read, first.made, first.rows, first.problems) == (6, 6, 6, [])
    assert second.read == second.made + len(second.problems) == 4 + len(bad_samples())


def test_other_members_are_copied_and_rows_without_features_named(muser, shards, tmp_path):
    _, second = written(muser, shards, tmp_path)
    for url in index_of(shards).urls:
        old, new = members(Path(url)), members(tmp_path / Path(url).name)
        assert {name: data for name, data in new.items() if not name.endswith(".npy")} == {
            name: data for name, data in old.items() if not name.endswith(".npy") and ".." not in name
        }
    reasons = {problem["key"]: problem["reason"] for problem in second.problems}
    assert {name for name in new if name.startswith("silent.")} == {"silent.flac", "silent.json"}
    # Those whose sound is as it should be, but not their texts, have features.
    for key, *_ in bad_samples():
        assert (key in reasons) == (f"{key}.npy" not in members(tmp_path / "a-1.tar"))
    assert {"undecodable", "silent", "noaudio", "twosongs", "../escape"} <= set(reasons)
    assert "notext" not in reasons and second.rows == 4 + len(bad_samples()) - 1


def test_they_can_be_trained_on(muser, shards, tmp_path):
    written(muser, shards, tmp_path)
    config = features_config()
    config = replace(config, data=replace(config.data, features=FeaturesConfig(16, 2)))
    reader: ChunkReader = reader_of(config, f"{tmp_path}/a-0.tar")
    for chunk in reader.read(range(3)):
        assert chunk["valid_features"].all() and chunk["problems"] == []


def test_what_is_whole_stays_and_a_torn_shard_is_made_again(muser, shards, tmp_path):
    before = written(muser, shards, tmp_path)
    files = [tmp_path / "a-0.tar", tmp_path / "a-1.tar"]
    content = [file.read_bytes() for file in files]
    stamp = files[0].stat().st_mtime_ns
    files[1].unlink()
    assert written(muser, shards, tmp_path) == before
    assert files[0].stat().st_mtime_ns == stamp and [file.read_bytes() for file in files] == content
    (tmp_path / "features" / "a-1.tar.json").write_text("{torn")
    assert written(muser, shards, tmp_path) == before and not list(tmp_path.glob(".*.part"))


def test_a_shard_that_breaks_off_gives_the_rows_before(muser, shards, tmp_path):
    whole = Path(index_of(shards).urls[0]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    source = Source.of(muser, "audio", index_of(shards))
    (tmp_path / "out").mkdir()
    record = write_features(lambda: muser, source, LOCAL, str(tmp_path / "cut.tar"), 6, tmp_path / "out")
    assert record.read == record.made + len(record.problems) == 6 and 0 < record.made < 6
    assert any("cut short" in problem["reason"] for problem in record.problems)
    assert len(members(tmp_path / "out" / "cut.tar")) == 4 * record.made  # flac, json, txt and npy


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_shard_that_is_another_one_under_its_name_is_read_anew(muser, shards, tmp_path, scheme):
    source, url, out = Source.of(muser, "audio", index_of(shards)), f"{scheme}{tmp_path}/a.tar", tmp_path / "out"
    out.mkdir()
    for shard, first in zip(index_of(shards).urls, ("piece00", "piece06"), strict=True):
        (tmp_path / "a.tar").write_bytes(Path(shard).read_bytes())
        write_features(lambda: muser, source, LOCAL, url, 6, out)
        assert f"{first}.npy" in members(out / "a.tar")
    with pytest.raises(ConfigError, match="is where the shards lie"):
        check_names(index_of(url), tmp_path)


def test_another_job_is_refused_the_folder(muser, shards, tmp_path):
    index = index_of(shards)
    source = Source.of(muser, "audio", index)
    claim(tmp_path / "out", source, {})
    with pytest.raises(DataError, match=r"holds other features \(modality: 'audio' there, 'spectrogram' here"):
        claim(tmp_path / "out", Source.of(muser, "spectrogram", index), {})
    with pytest.raises(ConfigError, match="is where the shards lie"):
        check_names(index, Path(index.urls[0]).parent)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs.tar").touch()
    with pytest.raises(DataError, match=r"theirs\.tar was there before"):
        claim(tmp_path / "full", source, {})
    (tmp_path / "out" / "features.json").write_text(json.dumps([]))
    with pytest.raises(DataError, match=r"features\.json is broken"):
        claim(tmp_path / "out", source, {})


def test_a_folder_that_another_job_works_in_is_not_claimed(muser, shards, tmp_path):
    with alone_in(tmp_path), pytest.raises(DataError, match="another job works in"):
        make_features(tmp_path, muser, "audio", index_of(shards), LOCAL, tmp_path, False, {}, lambda done, of: None)
    assert not (tmp_path / "features.json").exists()


def test_options_that_contradict_each_other_are_refused(tmp_path):
    for given in (["--modalities", "text"], ["--modalities", "audio", "spectrogram"], ["--modalities", "symbolic"]):
        with pytest.raises(ConfigError, match="--features are of shards, and of one tower that hears"):
            job(["model", "--features", "--shards", "a.tar", "--out", str(tmp_path), *given])
    for given in (["--windows", "middle"], ["--hop-seconds", "1"], ["--fields", "genre"]):
        with pytest.raises(ConfigError, match="leave --windows, --hop-seconds and --fields out"):
            job(["model", "--features", "--shards", "a.tar", "--out", str(tmp_path), *given])
