"""Masks at rest: a task's mask as bytes, without loss, in the codec that suits its density.

    bitpack      one bit a weight
    csc16        the paper's accounting (section 4.1, "scipy.sparse.csc with 16 bit integers"): two
                 bytes a kept weight, and pointers to columns
    enumerative  entropy coding: the information bound, log2 C(n, k) bits for k kept of a leaf's n,
                 and 0.6% at the paper's densities, 1.3% at half; with 32 bytes a mask, 8 a leaf
    xor-delta    what differs from a base, such as an earlier mask or the majority of several, in
                 whichever of the above takes least

A coded mask stands for itself. All numbers are little-endian:

    magic b"SSMK", u8 format, u8 codec, u8 1 for a delta, u8 0
    8 bytes of the layout's sha256: JSON of [[name, shape], ...] in order
    8 bytes of the base's sha256 (the former and its bitpack payload), 0 where there is none
    payload
    8 bytes of the sha256 of everything before

Payloads, leaves and weights in the layout's order:

    bitpack      weight j is bit j % 8 of byte j // 8
    csc16        for each leaf, as [prod(shape[:-1]), shape[-1]], u32 pointers [columns + 1]; then
                 the u16 rows of all kept weights, column by column
    enumerative  u32 kept [leaves], u32 symbols [leaves]; for each leaf bit 0 of all gaps, bit 1,
                 and so on to the last below its shift, as bitpack; u32 states, u16 words of `rans`

*Enumerative.* A leaf is the gaps before its k kept weights (its dropped ones, where those are
fewer). Gaps of a random mask are geometric. One is coded as gap >> shift, an entropy-coded symbol,
and its lower bits as they are. A last symbol, "so many, and more follow", keeps the alphabet small
at no cost, since what is left of a geometric gap is geometric again. Shift and table follow from
n and k in whole numbers (`_gap_model`), so that any machine reads what another wrote.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from supsup_jax.layout import Layout, named_leaves
from supsup_jax.masks import check_binary
from supsup_jax.stores import rans
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.types import PyTree, StoreError, Task, TrainResult

AUTO, DELTA = "auto", "xor-delta"
FORMAT = 1

_MAGIC = b"SSMK"
_DIGEST_BYTES = 8
_HEADER = struct.Struct(f"<4sBBBx{_DIGEST_BYTES}s{_DIGEST_BYTES}s")
_AROUND = _HEADER.size + _DIGEST_BYTES
_MAX_ROWS = 1 << 16


class CodedBytes(NamedTuple):
    """Bytes of one coded mask, whole, found without coding it.

    bitpack, csc16: exact; csc16 is None where a leaf has more rows than it can count.
    csc16_indices: the row indices alone, two bytes a kept weight: the paper's figure.
    enumerative: as expected of it, to 1% or 50 bytes.
    xor_delta: the smallest of these for the difference from the base; None without one.
    bound: sum over leaves of log2 C(n, k) / 8, what no code of masks with k kept goes below.
    """

    bitpack: int
    csc16: int | None
    csc16_indices: int
    enumerative: int
    xor_delta: int | None
    bound: float


def encode(mask: PyTree, codec: str = AUTO, base: PyTree = None) -> bytes:
    """One task's mask as bytes that `decode` takes back.

    mask: as a Task holds it: bool, or any dtype that holds only 0 and 1; None where not masked.
    codec: one of CODECS; "auto" is the one that takes least, by formula, among them.
    base: a mask of the same leaves, for "xor-delta" and "auto". Decoding will ask for it again.
    Raises TypeError or ValueError, naming the leaf, for what is no mask or, in csc16, has more
    than 65,536 rows.
    """
    if codec not in (AUTO, *CODECS):
        raise ValueError(f"codec must be {AUTO!r} or one of {list(CODECS)}, got {codec!r}")
    if codec == DELTA and base is None:
        raise ValueError(f"codec {DELTA!r} needs base=, the mask to code against")
    if codec not in (AUTO, DELTA) and base is not None:
        raise ValueError(f"base is for the codecs {AUTO!r} and {DELTA!r}, got {codec!r}")
    layout = _layout_of(mask)
    if codec == "csc16":
        _check_rows(layout)
    leaves, against = _bits(layout, mask, "the mask"), None
    # Whether against the base, and what there is to code then.
    choices = {} if codec == DELTA else {False: leaves}
    if base is not None:
        against = _bits(layout, base, "the base")
        choices[True] = _differing(leaves, against)
    sizes = {
        (delta, name): size
        for delta, choice in choices.items()
        for name, size in _sizes(choice).items()
        if codec in (AUTO, DELTA, name)
    }
    delta, name = min(sizes, key=sizes.get)
    header = _HEADER.pack(
        _MAGIC,
        FORMAT,
        list(_PLAIN).index(name),
        delta,
        _layout_digest(layout),
        _base_digest(layout, against) if delta else bytes(_DIGEST_BYTES),
    )
    coded = header + _PLAIN[name].write(choices[delta])
    return coded + _digest(coded)


def decode(coded: bytes, layout: Layout, base: PyTree = None) -> PyTree:
    """The mask of `encode`: a pytree of NumPy bools as in a Task, None where not masked.

    layout: the network's or the store's (`net.layout`, `store.layout`).
    base: the mask it was coded against; not looked at where it was coded without.
    Raises StoreError for bytes that are damaged, foreign, or of another layout or base, and
    ValueError, naming the leaf, for a base that is no mask of this layout.
    """
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be one such as net.layout, got {type(layout).__name__}")
    header, payload = _opened(coded)
    if header.layout != _layout_digest(layout):
        raise StoreError(
            "the coded mask is of another layout: its leaves have other names or shapes than "
            f"{layout.shapes}"
        )
    if header.delta:
        if base is None:
            raise StoreError("the mask was coded against another: pass that one as base=")
        against = _bits(layout, base, "the base")
        if header.base != _base_digest(layout, against):
            raise StoreError("the mask was coded against another base than the one given")
    leaves = _PLAIN[header.codec].read(payload, list(layout.shapes.values()))
    return layout.tree(_differing(leaves, against) if header.delta else leaves)


def codec_of(coded: bytes) -> str:
    """The one of CODECS that `coded` is in. Raises StoreError for damaged or foreign bytes."""
    header, _ = _opened(coded)
    return DELTA if header.delta else header.codec


def coded_bytes(mask: PyTree, base: PyTree = None) -> CodedBytes:
    """What each codec takes for this mask. Raises as `encode`."""
    layout = _layout_of(mask)
    leaves = _bits(layout, mask, "the mask")
    sizes = _sizes(leaves)
    delta = None
    if base is not None:
        delta = min(_sizes(_differing(leaves, _bits(layout, base, "the base"))).values())
    return CodedBytes(
        bitpack=sizes["bitpack"],
        csc16=sizes.get("csc16"),
        csc16_indices=2 * sum(map(_kept, leaves)),
        enumerative=sizes["enumerative"],
        xor_delta=delta,
        bound=bound_bytes(mask),
    )


def bound_bytes(mask: PyTree) -> float:
    """The information bound: sum over leaves of log2 C(n, k) / 8 bytes. Raises as `encode`."""
    leaves = _bits(_layout_of(mask), mask, "the mask")
    return sum(bound_of(leaf.size, _kept(leaf)) for leaf in leaves)


def bound_of(n: int, k: int) -> float:
    """log2 C(n, k) / 8 bytes: the information in which k of n weights are kept."""
    nats = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return nats / math.log(2) / 8


def majority(masks: MaskStore | Iterable[PyTree]) -> PyTree:
    """The mask of the weights that more than half of the masks keep: a base for "xor-delta".

    masks: of a store, or several of the same leaves, gone through once. NumPy bools, as `decode`.
    Raises ValueError when there is none.
    """
    if isinstance(masks, MaskStore):
        return jax.tree.map(lambda mean: np.asarray(mean) > 0.5, masks.mixture())
    masks = iter(masks)
    if (first := next(masks, None)) is None:
        raise ValueError("majority needs at least one mask, got none")
    layout, total = _layout_of(first), 1
    counts = [leaf.astype(np.int32) for leaf in _bits(layout, first, "mask 0")]
    for mask in masks:
        for count, leaf in zip(counts, _bits(layout, mask, f"mask {total}"), strict=True):
            count += leaf
        total += 1
    return layout.tree([2 * count > total for count in counts])


class _Header(NamedTuple):
    codec: str
    delta: bool
    layout: bytes
    base: bytes


def _opened(coded):
    """Header and payload, once the whole is seen to be unharmed."""
    if not isinstance(coded, bytes | bytearray | memoryview):
        raise TypeError(f"coded must be bytes, got {type(coded).__name__}")
    coded = memoryview(coded).cast("B")
    if len(coded) < _AROUND or coded[: len(_MAGIC)] != _MAGIC:
        raise StoreError(f"these {len(coded)} bytes are not a coded mask")
    body, check = coded[:-_DIGEST_BYTES], coded[-_DIGEST_BYTES:]
    if _digest(body) != check:
        raise StoreError("the coded mask does not match its checksum: it is damaged or cut short")
    _, version, codec, delta, layout, base = _HEADER.unpack_from(body)
    if version != FORMAT:
        raise StoreError(
            f"the coded mask has format {version}, this release reads {FORMAT}: "
            "upgrade supsup_jax to read it"
        )
    if codec >= len(_PLAIN) or delta > 1:
        raise StoreError(f"the coded mask has a header that makes no sense: {body[:8].hex()}")
    return _Header(list(_PLAIN)[codec], bool(delta), layout, base), body[_HEADER.size :]


def _write_bitpack(leaves):
    flat = np.concatenate([leaf.reshape(-1) for leaf in leaves])
    return np.packbits(flat, bitorder="little").tobytes()


def _read_bitpack(payload, shapes):
    sizes = [math.prod(shape) for shape in shapes]
    packed, rest = _take(payload, "u1", -(-sum(sizes) // 8))
    _check(not rest)
    flat = np.unpackbits(packed, count=sum(sizes), bitorder="little").view(bool)
    parts = np.split(flat, np.cumsum(sizes))[:-1]
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _bitpack_bytes(leaves):
    return -(-sum(leaf.size for leaf in leaves) // 8)


def _check_rows(layout):
    for name, shape in layout.shapes.items():
        if (rows := _matrix(shape)[0]) > _MAX_ROWS:
            raise ValueError(
                f"codec 'csc16' counts {_MAX_ROWS:,} rows, and {name!r} of shape {shape} has "
                f"{rows:,}: choose another codec"
            )


def _write_csc16(leaves):
    pointers, indices = [], []
    for leaf in leaves:
        rows, columns = _matrix(leaf.shape)
        place = np.flatnonzero(leaf.reshape(rows, columns).T)
        first = np.arange(columns + 1) * rows
        pointer = np.searchsorted(place, first)
        pointers.append(pointer.astype("<u4"))
        indices.append((place - np.repeat(first[:-1], np.diff(pointer))).astype("<u2"))
    return b"".join(array.tobytes() for array in (*pointers, *indices))


def _read_csc16(payload, shapes):
    pointers = []
    for shape in shapes:
        pointer, payload = _take(payload, "<u4", _matrix(shape)[1] + 1)
        pointers.append(pointer.astype(np.int64))
    leaves = []
    for shape, pointer in zip(shapes, pointers, strict=True):
        rows, columns = _matrix(shape)
        kept, lengths = int(pointer[-1]), np.diff(pointer)
        _check(pointer[0] == 0 and (lengths >= 0).all())
        index, payload = _take(payload, "<u2", kept)
        _check((index < rows).all())
        leaf = np.zeros(rows * columns, bool)
        leaf[np.repeat(np.arange(columns) * rows, lengths) + index] = True
        _check(_kept(leaf) == kept)
        leaves.append(np.ascontiguousarray(leaf.reshape(columns, rows).T).reshape(shape))
    _check(not payload)
    return leaves


def _csc16_bytes(leaves):
    matrices = [_matrix(leaf.shape) for leaf in leaves]
    if any(rows > _MAX_ROWS for rows, _ in matrices):
        return None
    pointers = sum(columns + 1 for _, columns in matrices)
    return 4 * pointers + 2 * sum(map(_kept, leaves))


class _GapModel(NamedTuple):
    """How the gaps of a leaf are coded.

    few: how many: one a kept weight, or one a dropped weight where those are fewer.
    shift: lower bits of a gap that are stored as they are, as if all of their values were equally
      likely. Their probabilities differ by a quarter at most, which costs 0.004 bits a gap.
    table: of gap >> shift, for `rans`; its last symbol, `many`, is "so many, and more follow".
    """

    few: int
    shift: int
    table: np.ndarray

    @property
    def many(self) -> int:
        return len(self.table) - 2


def _gap_model(n, kept):
    few = min(kept, n - kept)
    # A leaf without gaps gets the model of one, which nothing will ask.
    n, k = max(n, 2), max(few, 1)
    shift = (n // (8 * k)).bit_length()
    # Probabilities in units of 2**-64: that a gap goes on past 2**shift weights, and past all
    # symbols so far. The table ends where that is rarer than 1 in 64.
    ratio = ((n - k) << 64) // n
    for _ in range(shift):
        ratio = ratio * ratio >> 64
    tail, table = 1 << 64, [0]
    while tail >> 58:
        tail = tail * ratio >> 64
        table.append((1 << rans.PRECISION) - (tail >> (64 - rans.PRECISION)))
    return _GapModel(few, shift, np.array([*table, 1 << rans.PRECISION], np.uint32))


def _write_enumerative(leaves):
    kept = [_kept(leaf) for leaf in leaves]
    models = [_gap_model(leaf.size, k) for leaf, k in zip(leaves, kept, strict=True)]
    symbols, low = [], [np.zeros(0, bool)]
    for leaf, k, model in zip(leaves, kept, models, strict=True):
        flat = leaf.reshape(-1)
        gaps = np.diff(np.flatnonzero(flat if k == model.few else ~flat), prepend=-1) - 1
        low += [(gaps >> bit & 1).astype(bool) for bit in range(model.shift)]
        times, rest = np.divmod(gaps >> model.shift, model.many)
        part = np.full(model.few + times.sum(), model.many, np.uint8)
        part[np.cumsum(times + 1) - 1] = rest
        symbols.append(part)
    states, words = rans.encode(symbols, [model.table for model in models])
    parts = (
        np.array(kept, "<u4"),
        np.array([len(part) for part in symbols], "<u4"),
        np.packbits(np.concatenate(low), bitorder="little"),
        states.astype("<u4"),
        words.astype("<u2"),
    )
    return b"".join(part.tobytes() for part in parts)


def _read_enumerative(payload, shapes):
    sizes = [math.prod(shape) for shape in shapes]
    kept, payload = _take(payload, "<u4", len(shapes))
    counts, payload = _take(payload, "<u4", len(shapes))
    kept, counts = kept.tolist(), counts.tolist()
    _check(all(k <= n for n, k in zip(sizes, kept, strict=True)))
    models = [_gap_model(n, k) for n, k in zip(sizes, kept, strict=True)]
    for n, count, model in zip(sizes, counts, models, strict=True):
        most = model.few and model.few + n // (model.many << model.shift)
        _check(model.few <= count <= most)
    num_low = sum(model.few * model.shift for model in models)
    low, payload = _take(payload, "u1", -(-num_low // 8))
    states, payload = _take(payload, "<u4", rans.num_lanes(sum(counts)))
    words, payload = _take(payload, "<u2", len(payload) // 2)
    _check(not payload)
    symbols = rans.decode(counts, [model.table for model in models], states, words)
    low = np.unpackbits(low, count=num_low, bitorder="little")
    leaves = []
    for shape, n, k, model, part in zip(shapes, sizes, kept, models, symbols, strict=True):
        last = part != model.many
        _check(np.count_nonzero(last) == model.few)
        rest = np.zeros(model.few, np.int64)
        planes, low = np.split(low, [model.few * model.shift])
        for bit, plane in enumerate(planes.reshape(model.shift, model.few)):
            rest |= plane.astype(np.int64) << bit
        steps = part.astype(np.int64) << model.shift
        steps[last] += rest + 1
        place = np.cumsum(steps)[last] - 1
        _check(not model.few or place[-1] < n)
        flat = np.zeros(n, bool)
        flat[place] = True
        leaves.append((flat if k == model.few else ~flat).reshape(shape))
    return leaves


def _enumerative_bytes(leaves):
    bits, gaps = 0.0, 0
    for leaf in leaves:
        n, k = leaf.size, _kept(leaf)
        gaps += min(k, n - k)
        bits += sum(count * math.log2(n / count) for count in (k, n - k) if count)
    # As `rans` says, a lane takes 3 bytes beyond its symbols.
    return round(8 * len(leaves) + bits / 8 + 3 * rans.num_lanes(gaps))


class _Plain(NamedTuple):
    """A codec of masks for themselves; leaves are bool arrays in the layout's order.

    write: leaves -> payload. read: payload, shapes -> leaves; StoreError for a forged one.
    num_bytes: leaves -> bytes of the payload, None where they cannot be coded.
    """

    write: Callable[[list[np.ndarray]], bytes]
    read: Callable[[memoryview, list[tuple[int, ...]]], list[np.ndarray]]
    num_bytes: Callable[[list[np.ndarray]], int | None]


# By their order the header names them: append only.
_PLAIN = {
    "bitpack": _Plain(_write_bitpack, _read_bitpack, _bitpack_bytes),
    "csc16": _Plain(_write_csc16, _read_csc16, _csc16_bytes),
    "enumerative": _Plain(_write_enumerative, _read_enumerative, _enumerative_bytes),
}
CODECS = (*_PLAIN, DELTA)


def _sizes(leaves):
    """Whole bytes of each plain codec that can code the leaves."""
    sizes = {name: plain.num_bytes(leaves) for name, plain in _PLAIN.items()}
    return {name: _AROUND + size for name, size in sizes.items() if size is not None}


def _layout_of(mask):
    if isinstance(mask, Task | TrainResult):
        raise TypeError(f"mask must be a task's mask, got the {type(mask).__name__} itself")
    shapes = tuple((name, np.shape(leaf)) for name, leaf in named_leaves(mask).items())
    if not shapes:
        raise ValueError("mask must have at least one leaf, got none")
    for name, shape in shapes:
        if math.prod(shape) >= 1 << 32:
            raise ValueError(f"a leaf may have 2**32 - 1 weights, {name!r} has shape {shape}")
    return Layout(jax.tree.structure(mask), shapes)


def _bits(layout, mask, what):
    """The leaves of a mask as bool arrays, in order."""
    leaves = layout.leaves(mask, what)
    for name, leaf in zip(layout.shapes, leaves, strict=True):
        check_binary(name, leaf)
    return [np.asarray(leaf).astype(bool, copy=False) for leaf in leaves]


def _differing(leaves, others):
    return [a ^ b for a, b in zip(leaves, others, strict=True)]


def _kept(leaf):
    return int(np.count_nonzero(leaf))


def _matrix(shape):
    """Rows and columns of a leaf: a column an output."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _layout_digest(layout):
    text = json.dumps([[name, list(shape)] for name, shape in layout.named_shapes])
    return _digest(text.encode())


def _base_digest(layout, leaves):
    return _digest(_layout_digest(layout) + _write_bitpack(leaves))


def _digest(data):
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]


def _take(payload, dtype, count):
    """An array off the front of the payload, and the rest. Allocates nothing."""
    size = count * np.dtype(dtype).itemsize
    _check(size <= len(payload))
    return np.frombuffer(payload[:size], dtype), payload[size:]


def _check(sensible):
    # Behind the checksum: only what was forged, or written by another program, comes here.
    if not sensible:
        raise StoreError("the coded mask has a payload that makes no sense")
