import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from muser_dist.data.symbolic.config import SymbolicConfig
from muser_dist.data.symbolic.encode import encode_symbolic
from muser_dist.data.symbolic.patches import to_text
from muser_dist.errors import ConfigError, DataError
from tests.data.symbolic.notation import TUNE, melody, note, score

CONFIG = SymbolicConfig()
NAMED = TUNE.replace("P:A\n", 'V:1 treble nm="Violin"\n')
BOTH = {"abc": NAMED.encode(), "mid": melody(60, 62, 64, program=40), "json": b"{}"}


def text_of(members: dict[str, bytes], config: SymbolicConfig = CONFIG, seed: int | None = None) -> str:
    patches, length = encode_symbolic(members, config, seed)
    assert patches.shape == (config.max_patches, 64) and patches.dtype == np.uint8
    assert patches[:length, 0].all() and not patches[length:].any()
    return to_text(patches)


def test_evaluation_takes_the_first_notation_and_draws_nothing():
    assert text_of(BOTH).startswith("M:6/8\n")
    assert text_of(BOTH, replace(CONFIG, notations=("midi", "abc"))).startswith("ticks_per_beat 480\n")
    assert text_of({"midi": BOTH["mid"]}).startswith("ticks_per_beat 480\n")
    assert text_of({"musicxml": score([[note("C5", 32)]]).encode()}).endswith("\nc8|\n")
    assert 'nm="Violin"' in text_of(BOTH)
    assert "Violin" not in text_of(BOTH, replace(CONFIG, drop_instruments=1.0))


def test_training_draws_the_notation_and_hides_instruments_with_their_probabilities():
    texts = [text_of(BOTH, seed=seed) for seed in range(600)]
    abc = [text for text in texts if text.startswith("M:")]
    midi = [text for text in texts if text.startswith("ticks")]
    assert len(abc) + len(midi) == 600
    assert len(abc) / 600 == pytest.approx(0.5, abs=0.08)
    shown = sum("Violin" in text for text in abc) + sum("program_change 0 0 40" in text for text in midi)
    assert shown / 600 == pytest.approx(0.1, abs=0.05)
    assert all("program_change 0 0 0\n" in text or "program_change 0 0 40\n" in text for text in midi)
    assert texts == [text_of(BOTH, seed=seed) for seed in range(600)]


def test_what_else_a_row_has_does_not_change_the_window():
    config = replace(CONFIG, max_patches=6, notations=("midi",))
    for seed in range(20):
        alone = encode_symbolic({"mid": BOTH["mid"]}, config, seed)
        both = encode_symbolic(BOTH, config, seed)
        assert alone[1] == both[1] and np.array_equal(alone[0], both[0])


@pytest.mark.parametrize("seed", [None, *range(8)])
@pytest.mark.parametrize("members", [{"abc": TUNE.encode()}, {"mid": BOTH["mid"]}], ids=["abc", "midi"])
def test_no_answer_reaches_the_encoder(members, seed):
    """Titles, people, places and dances, in whatever field or event: what texts are made of."""
    text = text_of(members, seed=seed).lower()
    for (
        word
    ) in "wistful brindle someone somewhere remark ireland hornpipe transcriber slowly segno plays sing tune".split():  # noqa: SIM905
        assert word not in text
    for line in text.splitlines():
        assert re.match(r"[mlkqvp]:|ticks_per_beat|[a-z_]+ [-\da-g#m ]+$|\S", line)
    if "abc" in members:
        assert set(re.findall(r"(?:^|\[)([a-z]):", text, re.MULTILINE)) <= set("mlkqvp")


def test_key_and_meter_can_be_hidden():
    text = text_of(BOTH, replace(CONFIG, headers=("L", "Q", "V", "P")))
    assert not re.search(r"[KM]:", text) and "L:1/8" in text


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "no member with notation"),
        ({"json": b"{}", "ogg": b""}, "no member with notation"),
        ({"abc": b""}, "no key"),
        ({"abc": b"K:C\n" + b"A" * (4 << 20)}, "data.symbolic.max_bytes"),
        ({"mid": b"MThd" + bytes(30_000_000)}, "data.symbolic.max_bytes"),
        ({"mid": b"RIFF"}, "MThd"),
        ({"xml": b"<!DOCTYPE"}, "broken MusicXML"),
        ({"mxl": b"PK\3\4"}, "broken .mxl"),
    ],
)
def test_rows_that_cannot_be_used_say_why(members, reason):
    with pytest.raises(DataError, match=reason):
        encode_symbolic(members, CONFIG)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "tail",
    ["[K:", '"', "!", "[V:1]A", "|", "(3", "{", ":", "A", "[1", "&", "%", "x\n", "V:a\n", "\\", "é", "[r:", "+f"],
)
def test_abc_that_means_harm_takes_no_time(tail):
    data = f"K:C\nA|{tail * ((1 << 18) // len(tail.encode()))}".encode()
    assert 0 < encode_symbolic({"abc": data}, CONFIG)[1] <= CONFIG.max_patches


@given(st.sampled_from(["abc", "mid", "xml", "mxl"]), st.binary(max_size=300), st.integers(0, 99) | st.none())
def test_any_bytes_give_patches_or_the_error(extension, data, seed):
    try:
        encode_symbolic({extension: data}, CONFIG, seed)
    except DataError:
        return


@given(st.sampled_from(["abc", "mid"]), st.randoms(use_true_random=False), st.integers(0, 99))
def test_any_damage_gives_patches_or_the_error(extension, random, seed):
    data = bytearray(BOTH[extension])
    for _ in range(random.randint(1, 5)):
        data[random.randrange(len(data))] = random.randrange(256)
    try:
        encode_symbolic({extension: bytes(data)}, CONFIG, seed)
    except DataError:
        return


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"notations": ()}, "notations is empty"),
        ({"notations": ("abc", "abc")}, "twice"),
        ({"headers": ("K", "key")}, "'key' is no header"),
        ({"headers": ("w",)}, "'w' is no header"),
        ({"drop_instruments": 1.1}, "probability"),
        ({"max_patches": 3}, "at least 4"),
        ({"max_bytes": 0}, "max_bytes must be positive"),
        ({"max_events": 0}, "max_events must be positive"),
    ],
)
def test_settings_are_checked(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        SymbolicConfig(**settings)


def test_settings_come_back_from_json():
    adapter = TypeAdapter(SymbolicConfig)
    config = SymbolicConfig(notations=("midi",), headers=("K",), max_patches=128)
    assert adapter.validate_python(json.loads(adapter.dump_json(config))) == config
