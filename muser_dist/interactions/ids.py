"""Users and items as 64-bit numbers: what is sorted, shuffled and counted when a log has 10^9 rows.

A number is a hash of the name, so it is the same in every process, with no table that all share. Names come back at the
end; two items with one number would be noticed there (`mining.reduce_items`). Two users with one number would be taken
for one: with 10^7 users, a chance of 3 in 10^6.
"""

from hashlib import blake2b

import numpy as np
import pyarrow as pa


def hash_name(name: str) -> int:
    """The number of a name: BLAKE2b, 64 bits."""
    return int.from_bytes(blake2b(name.encode(errors="replace"), digest_size=8).digest(), "big")


def hash_names(names: pa.Array) -> np.ndarray:
    """`hash_name` of each: (len(names),) uint64, from strings without nulls."""
    return np.fromiter(map(hash_name, names.to_pylist()), np.uint64, len(names))


def mix(numbers: np.ndarray, key: int) -> np.ndarray:
    """Other 64-bit numbers, one for each, that look independent of them: splitmix64's finaliser (Steele et al. 2014).

    Args:
        numbers: uint64.
        key: another key, another permutation.
    """
    x = numbers ^ np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def partition_of(numbers: np.ndarray, partitions: int) -> np.ndarray:
    """Which of 2^k partitions each number belongs to: its highest bits, so partitions in order are numbers in order.

    Args:
        numbers: uint64.
        partitions: a power of two.

    Returns:
        int64.
    """
    bits = partitions.bit_length() - 1
    assert partitions == 1 << bits
    if bits == 0:
        return np.zeros(len(numbers), np.int64)
    return (numbers >> np.uint64(64 - bits)).astype(np.int64)
