from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muser_dist.data.symbolic.abc import clean_abc
from muser_dist.data.symbolic.characters import BOS, EOS, MASK, PAD
from muser_dist.data.symbolic.midi import midi_to_mtf
from muser_dist.data.symbolic.patches import (
    PATCH_CHARACTERS,
    split_abc,
    split_mtf,
    to_ascii,
    to_patches,
    to_text,
)
from tests.data.symbolic.notation import midi_files

LINES = st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=150), max_size=12)


def test_patches_are_characters_between_begin_and_end():
    patches, length = to_patches(["K:C\n", "AB|"], 6, None)
    assert patches.dtype == np.uint8 and patches.shape == (6, 64) and length == 4
    assert patches[0].tolist() == [BOS] * 63 + [EOS]
    assert patches[1].tolist() == [BOS, *b"K:C\n", EOS] + [PAD] * 58
    assert patches[2].tolist() == [BOS, *b"AB|", EOS] + [PAD] * 59
    assert patches[3].tolist() == [BOS] + [EOS] * 63
    assert not patches[4:].any()


def test_what_is_longer_than_a_patch_goes_on_in_the_next():
    patches, length = to_patches(["x" * (PATCH_CHARACTERS + 1)], 8, None)
    assert length == 4
    assert [(row > MASK).sum() for row in patches[:length]] == [0, PATCH_CHARACTERS, 1, 0]


@given(LINES)
def test_patches_rebuild_the_text(lines):
    text = "".join(f"{line}\n" for line in lines)
    pieces = split_abc(text)
    patches, length = to_patches(pieces, 512, None)
    assert to_text(patches[:length]) == to_text(patches) == text


@given(st.lists(st.sampled_from(["A2 B", "[CE]2", "^f/g/" * 30, '"Am"A|b', "!f!a'||:"]), min_size=1), st.integers(1, 3))
def test_patches_of_abc_are_its_bars_and_rebuild_it(bars, voices):
    body = "".join(f"V:{voice}\n{'|'.join(bars)}|\n" for voice in range(1, voices + 1))
    text = clean_abc(f"M:C\nK:C\n{body}", ("M", "K", "V"))
    pieces = split_abc(text)
    assert all(piece.count("[V:") <= 1 and piece.count("\n") <= 1 for piece in pieces)
    assert to_text(to_patches(pieces, 4096, None)[0]) == text


@given(midi_files())
def test_patches_of_midi_rebuild_it(data):
    text = midi_to_mtf(data, 1000)
    pieces = split_mtf(text)
    assert to_text(to_patches(pieces, 512, None)[0]) == text
    for piece in pieces:
        assert "\t" not in piece or len(piece) <= PATCH_CHARACTERS
    for one, other in pairwise(pieces):  # nothing is left that would have had room
        name, _, values = other.partition("\t")[0].partition(" ")
        assert one.split(" ")[0] != name or len(one) + len(values) + ("\t" in other) > PATCH_CHARACTERS


def test_messages_of_a_type_share_a_patch():
    text = "ticks_per_beat 480\nnote_on 0 0 60 90\nnote_on 0 0 64 90\nnote_off 480 0 60 0\nend_of_track 0\n"
    assert split_mtf(text) == [
        "ticks_per_beat 480\n",
        "note_on 0 0 60 90\t0 0 64 90\n",
        "note_off 480 0 60 0\n",
        "end_of_track 0\n",
    ]


@pytest.mark.parametrize(("last", "shared"), [("9" * 8, True), ("9" * 9, False)])
def test_a_patch_is_filled_to_its_last_character(last, shared):
    first = f"note_on {'1' * 20} 0 60 90\n"
    second = f"{last} 0 60 {'9' * 10}\n"
    assert len(first) + len(second) == PATCH_CHARACTERS + (not shared)
    pieces = split_mtf(f"{first}note_on {second}")
    assert pieces == ([f"{first[:-1]}\t{second}"] if shared else [first, f"note_on {second}"])


PIECES = [f"{i}|" for i in range(20)]


@given(st.integers(4, 30), st.integers(0, 2**32))
def test_a_window_is_a_part_of_the_whole_and_its_seed_decides_which(most, seed):
    whole, total = to_patches(PIECES, 22, None)
    patches, length = to_patches(PIECES, most, np.random.default_rng(seed))
    again, _ = to_patches(PIECES, most, np.random.default_rng(seed))
    assert length == min(most, total) and np.array_equal(patches, again)
    starts = [i for i in range(total - length + 1) if np.array_equal(whole[i : i + length], patches[:length])]
    assert len(starts) == 1
    assert not patches[length:].any()


def test_windows_are_heads_tails_and_what_lies_between():
    starts = []
    for seed in range(600):
        patches, _ = to_patches(PIECES, 10, np.random.default_rng(seed))
        text = to_text(patches)
        starts.append(0 if patches[0, 1] == BOS else int(text.partition("|")[0]) + 1)
    counts = np.bincount(starts, minlength=13) / 600
    assert len(counts) == 13
    assert counts[0] == pytest.approx(1 / 3, abs=0.08) and counts[12] == pytest.approx(1 / 3, abs=0.08)
    assert (counts[1:12] > 0).all()
    assert np.array_equal(to_patches(PIECES, 10, None)[0], to_patches(PIECES, 22, None)[0][:10])


@given(st.text())
def test_any_text_becomes_one_line_of_ascii(text):
    assert to_ascii(text).isascii()
    assert to_ascii(text).isprintable()


@given(st.binary(min_size=64, max_size=640))
def test_any_patches_have_a_text(data):
    patches = np.frombuffer(data[: len(data) // 64 * 64], np.uint8).reshape(-1, 64)
    assert isinstance(to_text(patches), str)
