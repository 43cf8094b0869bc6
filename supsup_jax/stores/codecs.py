"""Masks at rest: a task's mask as bytes, without loss, in the codec that suits its density.

    bitpack      one bit a weight
    enumerative  the gaps between kept weights, in Golomb-Rice codes: .03 to .12 bits a kept weight
                 above the information bound, log2 C(n, k) bits for k kept of a leaf's n. That is
                 0.7 to 0.9% at the counts of the paper's ResNet-50, 1.4% at density .1, 4.2% at
                 .38, the worst, and nothing at a half
    xor-delta    what differs from a base, such as an earlier task's mask, in whichever of these
                 takes less. Tasks that start from the mean of earlier ones' scores have masks
                 alike: against the task before, 36% less on permuted MNIST by the threshold rule

A coded mask stands for itself. All numbers are little-endian:

    magic b"SSMK", u8 format, u8 codec (0 bitpack, 1 enumerative), u8 1 for a delta, u8 0
    8 bytes of the layout's sha256: JSON of [[name, shape], ...] in order
    8 bytes of the base's sha256 (the former and its bitpack payload), 0 where there is none
    payload
    8 bytes of the sha256 of everything before

Payloads, leaves and weights in the layout's order:

    bitpack      weight j is bit j % 8 of byte j // 8
    enumerative  u32 kept [leaves]; for each leaf its gaps' lower bits, as many of each gap as the
                 leaf's shift, lowest first; for each leaf gap >> shift zeros and a one, gap by
                 gap. Both as bitpack, padded to whole bytes, without zeros behind the last one

*Enumerative.* A leaf is the gaps before its k kept weights (its dropped ones, where those are
fewer): how many others come before each. Gaps of a random mask are geometric, for which Rice's
codes are the best of their kind. The shift follows from n and k in whole numbers (`_shift`), so
that any machine reads what another wrote; where it is 0 the code is the leaf's bits as they are.

The paper's own accounting (section 4.1, "scipy.sparse.csc with 16 bit integers"), two bytes a kept
weight and pointers to columns, is counted as `csc16` and not written.
"""

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from supsup_jax.layout import Layout, named_leaves
from supsup_jax.stores.base import checked_mask
from supsup_jax.stores.origin import VERSION, check_version
from supsup_jax.types import PyTree, StoreError, Task, TrainResult

AUTO, DELTA = "auto", "xor-delta"

Leaves = Sequence[np.ndarray]

_MAGIC = b"SSMK"
_DIGEST_BYTES = 8
_HEADER = struct.Struct(f"<4sBBBx{_DIGEST_BYTES}s{_DIGEST_BYTES}s")
_AROUND = _HEADER.size + _DIGEST_BYTES
_MAX_ROWS = 1 << 16


class CodedBytes(NamedTuple):
    """Bytes of one coded mask, whole.

    csc16: as the paper's codec would take, None where a leaf has more rows than it can count.
    csc16_indices: the row indices alone, two bytes a kept weight: the paper's figure.
    bound: sum over leaves of log2 C(n, k) / 8, what no code of masks with k kept goes below.
    """

    bitpack: int
    csc16: int | None
    csc16_indices: int
    enumerative: int
    bound: float


def encode(mask: PyTree, codec: str = AUTO, base: PyTree = None) -> bytes:
    """One task's mask as bytes that `decode` takes back.

    mask: as a Task holds it: bool, or any dtype that holds only 0 and 1; None where not masked.
    codec: one of CODECS; "auto" is the one that takes least.
    base: for "xor-delta", a mask of the same leaves. Decoding will ask for it again.
    Raises TypeError or ValueError, naming the leaf, for what is no mask.
    """
    layout, leaves = _checked(mask)
    return encode_leaves(layout, leaves, codec, _of_base(layout, base))


def encode_leaves(
    layout: Layout, leaves: Leaves, codec: str = AUTO, base: Leaves | None = None
) -> bytes:
    """As `encode`, of leaves that are checked: bool, in the layout's order."""
    check_codec(codec, base, CODECS)
    if any(leaf.size >= 1 << 32 for leaf in leaves):
        raise ValueError(f"a leaf may have 2**32 - 1 weights, got {layout.shapes}")
    if codec == DELTA:
        leaves = _differing(leaves, base)
    payloads = {name: _PLAIN[name][0](leaves) for name in _PLAIN if codec in (name, AUTO, DELTA)}
    name = min(payloads, key=lambda name: len(payloads[name]))
    header = _HEADER.pack(
        _MAGIC,
        VERSION,
        list(_PLAIN).index(name),
        codec == DELTA,
        _layout_digest(layout),
        _base_digest(layout, base) if codec == DELTA else bytes(_DIGEST_BYTES),
    )
    coded = header + payloads[name]
    return coded + _digest(coded)


def check_codec(codec: str, base: Any, known: Sequence[str]) -> None:
    """Raises ValueError unless `codec` is one of these, and a base goes with a delta alone."""
    if codec not in (AUTO, *known):
        raise ValueError(f"codec must be {AUTO!r} or one of {list(known)}, got {codec!r}")
    if (codec == DELTA) != (base is not None):
        raise ValueError(
            f"codec {DELTA!r} takes base=, the task or mask to code against; got codec {codec!r} "
            f"{'without' if base is None else 'with'} one"
        )


def decode(coded: bytes, layout: Layout, base: PyTree = None) -> PyTree:
    """The mask of `encode`: a pytree of NumPy bools as in a Task, None where not masked.

    layout: the network's or the store's (`net.layout`, `store.layout`).
    base: the mask it was coded against; not looked at where it was coded without.
    Raises StoreError for bytes that are damaged, foreign, or of another layout or base, and
    ValueError, naming the leaf, for a base that is no mask of this layout.
    """
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be one such as net.layout, got {type(layout).__name__}")
    return layout.tree(decode_leaves(coded, layout, _of_base(layout, base)))


def decode_leaves(
    coded: bytes | memoryview, layout: Layout, base: Leaves | None = None
) -> list[np.ndarray]:
    """As `decode`: leaves in the layout's order, and those of the base."""
    codec, delta, of_layout, of_base, payload = _opened(coded)
    if of_layout != _layout_digest(layout):
        raise StoreError(
            "the coded mask is of another layout: its leaves have other names or shapes than "
            f"{layout.shapes}"
        )
    if delta and base is None:
        raise StoreError("the mask was coded against another: pass that one as base=")
    if delta and of_base != _base_digest(layout, base):
        raise StoreError("the mask was coded against another base than the one given")
    _, read = _PLAIN[codec]
    leaves = read(payload, list(layout.shapes.values()))
    return _differing(leaves, base) if delta else leaves


def codec_of(coded: bytes) -> str:
    """The one of CODECS that `coded` is in. Raises StoreError for damaged or foreign bytes."""
    codec, delta, *_ = _opened(coded)
    return DELTA if delta else codec


def coded_bytes(mask: PyTree) -> CodedBytes:
    """What each codec takes for this mask. Raises as `encode`."""
    _, leaves = _checked(mask)
    return CodedBytes(
        bitpack=_AROUND + len(_write_bitpack(leaves)),
        csc16=_csc16_bytes(leaves),
        csc16_indices=2 * sum(map(_kept, leaves)),
        enumerative=_AROUND + len(_write_enumerative(leaves)),
        bound=sum(bound_of(leaf.size, _kept(leaf)) for leaf in leaves),
    )


def bound_of(n: int, k: int) -> float:
    """log2 C(n, k) / 8 bytes: the information in which k of n weights are kept."""
    nats = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return nats / math.log(2) / 8


def _opened(coded):
    """Codec, whether a delta, digests of layout and base, payload: all seen to be unharmed."""
    if not isinstance(coded, bytes | bytearray | memoryview):
        raise TypeError(f"coded must be bytes, got {type(coded).__name__}")
    coded = memoryview(coded).cast("B")
    if len(coded) < _AROUND or coded[: len(_MAGIC)] != _MAGIC:
        raise StoreError(f"these {len(coded)} bytes are not a coded mask")
    body, check = coded[:-_DIGEST_BYTES], coded[-_DIGEST_BYTES:]
    if _digest(body) != check:
        raise StoreError("the coded mask does not match its checksum: it is damaged or cut short")
    _, version, codec, delta, layout, base = _HEADER.unpack_from(body)
    check_version("the coded mask", version)
    if codec >= len(_PLAIN) or delta > 1:
        raise StoreError(f"the coded mask has a header that makes no sense: {body[:8].hex()}")
    return list(_PLAIN)[codec], bool(delta), layout, base, body[_HEADER.size :]


def _write_bitpack(leaves):
    return _packed(np.concatenate([leaf.reshape(-1) for leaf in leaves]))


def _read_bitpack(payload, shapes):
    bits, rest = _take_bits(payload, sum(map(math.prod, shapes)))
    _check(not rest)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [part.reshape(d) for part, d in zip(np.split(bits, ends)[:-1], shapes, strict=True)]


def _shift(n, k):
    """How many lower bits of a gap are stored as they are, k of n weights being the rarer kind.

    A bit more pays while x**2 + x > 1, where x = (1 - k / n)**(2**shift), the part of gaps that
    reach 2**shift. In whole numbers: units of 2**-64.
    """
    x, one, shift = ((n - k) << 64) // max(n, 1), 1 << 64, 0
    while k and x * x + x * one > one * one:
        x, shift = x * x >> 64, shift + 1
    return shift


def _write_enumerative(leaves):
    kept, lower, steps = [], [], []
    for leaf in leaves:
        n, k = leaf.size, _kept(leaf)
        few, flat = min(k, n - k), leaf.reshape(-1)
        shift = _shift(n, few)
        gaps = np.diff(np.flatnonzero(flat if k == few else ~flat), prepend=-1) - 1
        kept.append(k)
        whole = gaps.astype("<u4").view("u1").reshape(-1, 4)
        lower.append(np.unpackbits(whole, axis=1, bitorder="little")[:, :shift].reshape(-1))
        steps.append((gaps >> shift) + 1)
    ends = np.cumsum(np.concatenate(steps))
    unary = np.zeros(ends[-1] if len(ends) else 0, bool)
    unary[ends - 1] = True
    return np.array(kept, "<u4").tobytes() + _packed(np.concatenate(lower)) + _packed(unary)


def _read_enumerative(payload, shapes):
    sizes = [math.prod(shape) for shape in shapes]
    _check(len(payload) >= 4 * len(sizes))
    kept = np.frombuffer(payload[: 4 * len(sizes)], "<u4").tolist()
    _check(all(k <= n for n, k in zip(sizes, kept, strict=True)))
    few = [min(k, n - k) for n, k in zip(sizes, kept, strict=True)]
    shifts = [_shift(n, k) for n, k in zip(sizes, few, strict=True)]
    counts = [k * shift for k, shift in zip(few, shifts, strict=True)]
    lower, payload = _take_bits(payload[4 * len(sizes) :], sum(counts))
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(payload, "u1"), bitorder="little"))
    _check(len(ends) == sum(few) and len(payload) == (ends[-1] // 8 + 1 if len(ends) else 0))
    quotients = np.split(np.diff(ends, prepend=-1) - 1, np.cumsum(few))[:-1]
    lower = np.split(lower, np.cumsum(counts))[:-1]
    leaves = []
    for n, shift, quotient, bits in zip(sizes, shifts, quotients, lower, strict=True):
        _check(int(quotient.sum()) << shift <= n)
        whole = np.zeros((len(quotient), 32), bool)
        whole[:, :shift] = bits.reshape(-1, shift) if shift else 0
        rest = np.packbits(whole, axis=1, bitorder="little").view("<u4").reshape(-1)
        place = np.cumsum((quotient << shift) + rest + 1) - 1
        _check(not len(place) or place[-1] < n)
        leaf = np.zeros(n, bool)
        leaf[place] = True
        leaves.append(leaf)
    return [
        (leaf if k <= n - k else ~leaf).reshape(shape)
        for leaf, k, n, shape in zip(leaves, kept, sizes, shapes, strict=True)
    ]


def _csc16_bytes(leaves):
    """As [prod(shape[:-1]), shape[-1]]: u32 pointers [columns + 1] a leaf, u16 rows."""
    if any(math.prod(leaf.shape[:-1]) > _MAX_ROWS for leaf in leaves):
        return None
    columns = sum(leaf.shape[-1] if leaf.ndim else 1 for leaf in leaves)
    return _AROUND + 4 * (columns + len(leaves)) + 2 * sum(map(_kept, leaves))


# What writes leaves as a payload, and what reads one: payload, shapes -> leaves, StoreError where
# it was forged. By their order the header names them: append only.
_PLAIN = {
    "bitpack": (_write_bitpack, _read_bitpack),
    "enumerative": (_write_enumerative, _read_enumerative),
}
CODECS = (*_PLAIN, DELTA)


def _checked(mask):
    """The layout of a mask, and its leaves as bool arrays."""
    if isinstance(mask, Task | TrainResult):
        raise TypeError(f"mask must be a task's mask, got the {type(mask).__name__} itself")
    shapes = tuple((name, np.shape(leaf)) for name, leaf in named_leaves(mask).items())
    if not shapes:
        raise ValueError("mask must have at least one leaf, got none")
    layout = Layout(jax.tree.structure(mask), shapes)
    return layout, _bits(layout, mask, "the mask")


def _of_base(layout, base):
    return None if base is None else _bits(layout, base, "the base")


def _bits(layout, mask, what):
    leaves = checked_mask(layout, mask, what)
    return [np.asarray(leaf).astype(bool, copy=False) for leaf in leaves]


def _differing(leaves, others):
    return [a ^ b for a, b in zip(leaves, others, strict=True)]


def _kept(leaf):
    return int(np.count_nonzero(leaf))


def _layout_digest(layout):
    text = json.dumps([[name, list(shape)] for name, shape in layout.named_shapes])
    return _digest(text.encode())


def _base_digest(layout, leaves):
    return _digest(_layout_digest(layout) + _write_bitpack(leaves))


def _digest(data):
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]


def _packed(bits):
    return np.packbits(bits, bitorder="little").tobytes()


def _take_bits(payload, count):
    """So many bits off the front of the payload, bool, and the rest of its bytes."""
    size = -(-count // 8)
    _check(size <= len(payload))
    packed = np.frombuffer(payload[:size], "u1")
    return np.unpackbits(packed, count=count, bitorder="little").view(bool), payload[size:]


def _check(sensible):
    # Behind the checksum: only what was forged, or written by another program, comes here.
    if not sensible:
        raise StoreError("the coded mask has a payload that makes no sense")
