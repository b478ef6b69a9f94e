"""Second views of a clip: another crop, drawn and augmented apart, which changes nothing where it is not used."""

from dataclasses import replace

import numpy as np

from muser_dist.config import ModelConfig, ObjectiveConfig, PairConfig, RunConfig
from muser_dist.data.config import AugmentConfig
from muser_dist.data.pipeline import evaluation_chunks, plan_digest
from muser_dist.train.accounting import Accounting
from tests.shardmaker import bad_samples, encode, sample, write_shard, write_shards
from tests.small import LOCAL, index_of, reader_of, small_config

CLIPS = AugmentConfig(gain=1.0, gain_db=(-12.0, 0.0))


def views_config(**train) -> RunConfig:
    """The small config with its audio tower alone."""
    config = small_config(train=train)
    return replace(
        config,
        data=replace(config.data, augment=CLIPS),
        model=ModelConfig(audio=config.model.audio, projection_dim=8),
        objective=ObjectiveConfig(pairs=(PairConfig("audio", "view"),), targets="instance"),
    )


def beside_text() -> RunConfig:
    config = small_config(data={"augment": CLIPS})
    pairs = (*config.objective.pairs, PairConfig("audio", "view", 0.3))
    return replace(config, objective=replace(config.objective, pairs=pairs))


def test_a_second_view_is_another_crop_of_the_same_clip(tmp_path):
    config = views_config()
    reader = reader_of(config, write_shards(tmp_path, [8, 8]))
    (chunk,) = reader.read([0])
    c, samples = config.train.chunk, config.data.crop_samples
    assert (chunk["view"].shape, chunk["view"].dtype) == ((c, samples), np.int16)
    assert (chunk["view_length"].tolist(), chunk["view_length"].dtype) == ([samples] * c, np.int32)
    assert chunk["valid_view"].tolist() == [True] * c
    assert chunk["crop"].shape == (c, 2) and (chunk["crop"][:, 0] != chunk["crop"][:, 1]).all()
    loudness = np.abs(chunk["audio"]).max(axis=1) / np.abs(chunk["view"]).max(axis=1)
    assert (np.abs(loudness - 1) > 0.01).any()  # each view has its own augmentation
    assert not any(name.startswith(("text_l", "text_ids", "label/")) for name in chunk)
    assert reader.chunk_bytes == 2 * 2 * c * samples


def test_views_depend_on_seed_pass_and_row_alone(tmp_path):
    pattern = write_shards(tmp_path, [8, 8])
    views = []
    for config in (views_config(), views_config(workers=3, chunk=4), views_config(global_batch=4)):
        reader, of_rows = reader_of(config, pattern), {}
        for chunk in reader.read(range(4 * reader.slots_per_step)):
            for i, (row, epoch) in enumerate(zip(chunk["row"].tolist(), chunk["epoch"].tolist(), strict=True)):
                if row >= 0 and epoch == 0:
                    of_rows[row] = chunk["view"][i].tobytes()
        views.append(of_rows)
    assert len(views[0]) == 16
    assert views[0] == views[1] == {**views[0], **views[2]}
    assert len(set(views[0].values())) == 16
    (other,) = reader_of(replace(views_config(), seed=1), pattern).read([0])
    assert not {view.tobytes() for view in other["view"]} & set(views[0].values())


def test_asking_for_views_changes_nothing_else(tmp_path):
    pattern = write_shards(tmp_path, [8, 8])
    without = list(reader_of(small_config(data={"augment": CLIPS}), pattern).read(range(6)))
    with_views = list(reader_of(beside_text(), pattern).read(range(6)))
    for one, two in zip(without, with_views, strict=True):
        assert {"view", "view_length", "valid_view"} == two.keys() - one.keys()
        for name in one.keys() - {"seconds", "crop"}:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
        np.testing.assert_array_equal(one["crop"], two["crop"][:, 0])
    (chunk, *_) = evaluation_chunks(beside_text(), index_of(pattern), LOCAL)
    assert "view" not in chunk and chunk["crop"].ndim == 1


def test_the_digest_tells_where_second_views_lie(tmp_path):
    pattern = write_shards(tmp_path, [8, 8])
    config = views_config()
    reader, accounting = reader_of(config, pattern), Accounting(config.taking_part)
    for chunk in reader.read(range(2 * config.train.chunks_per_step)):
        accounting.add(chunk)
    accounting.flush()
    assert accounting.totals["digest"] == plan_digest(reader, 2)
    assert plan_digest(reader, 2) != plan_digest(reader_of(small_config(), pattern), 2)


def test_rows_need_no_text_where_nothing_reads_it(tmp_path):
    silence_behind = np.concatenate([np.full(4000, 0.3, np.float32), np.zeros(200_000, np.float32)])
    samples = [(key, members) for key, members, _ in bad_samples()]
    samples += [("halfsilent", {"flac": encode(silence_behind)}), ("good", sample(1))]
    write_shard(tmp_path / "train-0.tar", samples)
    config = views_config(global_batch=len(samples), chunk=len(samples))
    (chunk,) = reader_of(config, f"{tmp_path}/train-*.tar").read([0])
    heard = {key for key, valid in zip(chunk["key"], chunk["valid_audio"], strict=True) if valid}
    told = {key for key in chunk["key"] if any(f'"key": "{key}"' in problem for problem in chunk["problems"])}
    fine = {"brokenjson", "notobject", "notext", "emptycaption", "hugenumber", "good"}
    assert fine <= heard and not fine & told
    assert {"undecodable", "silent", "noaudio"} <= told
    # A clip may be silent where one of the crops lies.
    seen = {key: (a, v) for key, a, v in zip(chunk["key"], chunk["valid_audio"], chunk["valid_view"], strict=True)}
    assert not all(seen["halfsilent"]) and "halfsilent" in told
    accounting = Accounting(config.taking_part)
    accounting.add(chunk)
    accounting.flush()
    totals = accounting.totals
    assert totals["rows_used"] == len(fine) and totals["rows_read"] == len(samples)
