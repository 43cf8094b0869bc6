"""Entropy coding by range asymmetric numeral systems (Duda, arXiv 1311.2540), in NumPy.

Many coders, the lanes, work side by side: symbol j belongs to lane j % lanes, so that a loop of
about SYMBOLS_A_LANE steps over arrays takes the place of one over symbols. Whole numbers only: the
same bytes on every machine, to be read by any other.

A table is the cumulative frequencies of its symbols, uint32 [symbols + 1], from 0 to 2**PRECISION,
strictly increasing, 2 to 256 symbols. A state is uint32, in [2**16, 2**32) between steps: it
gives away its lower 16 bits as a word before a symbol would take it beyond.
"""

from collections.abc import Sequence

import numpy as np

from supsup_jax.types import StoreError

PRECISION = 12
# A lane costs 3 bytes on average, which its state holds beyond the symbols; a step costs time.
SYMBOLS_A_LANE = 1024

_SLOTS = 1 << PRECISION
_START = 1 << 16


def num_lanes(num_symbols: int) -> int:
    return -(-num_symbols // SYMBOLS_A_LANE)


def encode(
    symbols: Sequence[np.ndarray], tables: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of symbols, each coded by the table of its place: states [lanes], words uint16."""
    pairs = list(zip(symbols, tables, strict=True))
    frequency = _joined(np.diff(table)[part] for part, table in pairs)
    start = _joined(table[part] for part, table in pairs)
    lanes = num_lanes(len(frequency))
    states = np.full(lanes, _START, np.uint32)
    words = []
    # Backwards: the decoder takes apart last what was put in first.
    for first in reversed(range(0, len(frequency), max(lanes, 1))):
        f, c = frequency[first : first + lanes], start[first : first + lanes]
        x = states[: len(f)]
        full = np.flatnonzero(x >= f << (32 - PRECISION))
        given = x[full]
        words.append(given.astype(np.uint16))
        x[full] = given >> 16
        quotient = x // f
        x[:] = (quotient << PRECISION) + (x - quotient * f) + c
    return states, _joined(reversed(words), np.uint16)


def decode(
    counts: Sequence[int], tables: Sequence[np.ndarray], states: np.ndarray, words: np.ndarray
) -> list[np.ndarray]:
    """The uint8 symbols of `encode`, of which there are `counts`.

    states: as many as num_lanes(sum(counts)).
    Raises StoreError when states and words are not of so many symbols.
    """
    # All that a step asks of a slot, in one word: frequency, place within it, symbol.
    lookup = _joined(map(_lookup, tables))
    base = np.repeat(np.arange(len(tables), dtype=np.uint32) << PRECISION, counts)
    found = np.empty(len(base), np.uint32)
    states = states.astype(np.uint32)
    lanes, used = len(states), 0
    for first in range(0, len(found), max(lanes, 1)):
        x = states[: len(found) - first]
        entry = lookup[base[first : first + lanes] | (x & (_SLOTS - 1))]
        found[first : first + lanes] = entry
        x >>= PRECISION
        x *= entry >> 20
        x += (entry >> 8) & (_SLOTS - 1)
        low = np.flatnonzero(x < _START)
        if used + len(low) > len(words):
            raise StoreError("the coded symbols end early")
        x[low] = (x[low] << 16) | words[used : used + len(low)]
        used += len(low)
    if used != len(words) or (states != _START).any():
        raise StoreError("the coded symbols do not end where they should")
    return np.split((found & 0xFF).astype(np.uint8), np.cumsum(counts, dtype=np.int64))[:-1]


def _joined(parts, dtype=np.uint32):
    return np.concatenate([np.zeros(0, dtype), *parts])


def _lookup(table):
    frequency = np.diff(table)
    symbol = np.arange(len(frequency), dtype=np.uint32)
    within = np.arange(_SLOTS, dtype=np.uint32) - np.repeat(table[:-1], frequency)
    return np.repeat(frequency << 20 | symbol, frequency) | within << 8
