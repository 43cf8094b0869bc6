import itertools
import math
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import supsup_jax as ss
from experiments import benchmark_codecs
from supsup_jax.layout import Layout
from supsup_jax.stores import codecs

PLAIN = ("bitpack", "enumerative")
SHAPES = {"scalar": (), "one": (1,), "odd": (7,), "conv": (3, 3, 2, 5), "dense": (61, 33)}


def layout_of(shapes):
    """Of a dict of leaves, with one beside them that is not masked."""
    tree = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tree["bias"] = np.zeros(3, np.float32)
    return Layout.of(tree, lambda name, leaf: name != "bias")


def draw(layout, density, seed=0):
    """A mask of independent bits."""
    rng = np.random.default_rng(seed)
    return layout.tree([rng.random(shape) < density for shape in layout.shapes.values()])


def with_kept(layout, kept, seed=0):
    """A mask of exactly so many kept weights in each leaf."""
    rng = np.random.default_rng(seed)
    leaves = []
    for shape, k in zip(layout.shapes.values(), kept, strict=True):
        leaf = np.zeros(math.prod(shape), bool)
        leaf[rng.choice(leaf.size, k, replace=False, shuffle=False)] = True
        leaves.append(leaf.reshape(shape))
    return layout.tree(leaves)


def erdos_renyi(network, s):
    """Layout and kept counts of one of the authors' networks."""
    layout, kept = benchmark_codecs.kept_counts(network, s)
    return layout, [kept[name] for name in layout.shapes]


def signed(body):
    """`body` with the checksum that makes it whole."""
    return body + codecs._digest(body)


def changed(coded, at, new):
    body = bytearray(coded[:-8])
    body[at : at + len(new)] = new
    return signed(bytes(body))


@pytest.fixture
def small():
    layout = layout_of({"a": (5, 3), "b": (17,)})
    return layout, draw(layout, 0.3)


@pytest.mark.parametrize("density", [0, 0.002, 0.1, 0.4, 0.5, 0.6, 0.97, 1])
@pytest.mark.parametrize("codec", ["auto", *PLAIN])
def test_round_trip(codec, density):
    layout = layout_of(SHAPES)
    mask = draw(layout, density, seed=1)
    decoded = codecs.decode(codecs.encode(mask, codec), layout)
    chex.assert_trees_all_equal(decoded, mask)
    assert all(leaf.dtype == bool for leaf in jax.tree.leaves(decoded))


@pytest.mark.parametrize("codec", PLAIN)
def test_round_trip_of_few_weights_and_of_long_gaps(codec):
    trips = [((n, 1), (3, n), k, k) for n in (0, 1, 2, 8, 9) for k in range(n + 1)]
    for first, second, *kept in [*trips, ((300, 200), (60_000, 2), 9_000, 40)]:
        layout = layout_of({"w": first, "v": second})
        mask = with_kept(layout, kept)
        chex.assert_trees_all_equal(codecs.decode(codecs.encode(mask, codec), layout), mask)
    for only in (0, -1):  # one gap through all of a leaf
        layout, leaf = layout_of({"w": (3, 30_000)}), np.zeros((3, 30_000), bool)
        leaf.flat[only] = True
        mask = layout.tree([leaf])
        chex.assert_trees_all_equal(codecs.decode(codecs.encode(mask, codec), layout), mask)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_masks_of_zeros_and_ones_are_masks(small, dtype):
    _, mask = small
    numbers = jax.tree.map(lambda leaf: leaf.astype(dtype), mask)
    assert codecs.encode(numbers) == codecs.encode(mask)


def test_bitpack_reads_as_its_page_says(small):
    _, mask = small
    payload = codecs.encode(mask, "bitpack")[24:-8]
    flat = np.concatenate([mask["a"].ravel(), mask["b"]])
    assert len(payload) == -(-len(flat) // 8)
    for j, kept in enumerate(flat):
        assert (payload[j // 8] >> (j % 8)) & 1 == kept


def test_csc16_counts_what_scipy_stores():
    layout = layout_of({"conv": (3, 3, 4, 6), "dense": (50, 7)})
    leaves = jax.tree.leaves(mask := draw(layout, 0.2))
    matrices = [sparse.csc_matrix(leaf.reshape(-1, leaf.shape[-1])) for leaf in leaves]
    sizes = codecs.coded_bytes(mask)
    assert sizes.csc16_indices == sum(m.indices.astype("<u2").nbytes for m in matrices)
    pointers = sum(m.indptr.astype("<u4").nbytes for m in matrices)
    assert sizes.csc16 == 32 + pointers + sizes.csc16_indices
    for rows, counted in ((65_536, True), (65_537, False)):  # of 16 bits
        sizes = codecs.coded_bytes({"w": np.ones((rows, 1), bool)})
        assert (sizes.csc16 is not None) == counted


def read_plainly(coded, sizes):
    """Enumerative masks read bit by bit, in Python's whole numbers, by the format's page."""
    data = coded[24:-8]
    kept = [int.from_bytes(data[4 * i : 4 * i + 4], "little") for i in range(len(sizes))]
    few = [min(k, n - k) for n, k in zip(sizes, kept, strict=True)]
    shifts = []
    for n, k in zip(sizes, few, strict=True):
        shift, x = 0, (n - k) * 2**64 // n
        while k and x**2 + x * 2**64 > 2**128:
            shift, x = shift + 1, x**2 // 2**64
        shifts.append(shift)
    data = data[4 * len(sizes) :]
    low_bytes = -(-sum(k * shift for k, shift in zip(few, shifts, strict=True)) // 8)
    lower, unary = (
        iter([byte >> i & 1 for byte in part for i in range(8)])
        for part in (data[:low_bytes], data[low_bytes:])
    )
    leaves = []
    for n, k, rare, shift in zip(sizes, kept, few, shifts, strict=True):
        leaf, place = [k != rare] * n, -1
        for _ in range(rare):
            gap = sum(next(lower) << i for i in range(shift))
            gap += sum(1 for _ in iter(unary.__next__, 1)) << shift
            place += gap + 1
            leaf[place] = not leaf[place]
        leaves.append(leaf)
    assert not any(unary)
    return leaves


def test_enumerative_reads_as_its_page_says():
    layout = layout_of({"a": (90, 60), "b": (41,), "c": (3,), "d": (2000,), "e": (500,)})
    mask = with_kept(layout, (1500, 0, 3, 7, 400))
    coded = codecs.encode(mask, "enumerative")
    leaves = read_plainly(coded, [5400, 41, 3, 2000, 500])
    for leaf, name in zip(leaves, "abcde", strict=True):
        np.testing.assert_array_equal(np.reshape(leaf, mask[name].shape), mask[name])


@pytest.mark.parametrize(
    "codec, length, checksum",
    [
        ("bitpack", 8285, "d12d97ec46682749"),
        ("enumerative", 3456, "630e998cc1b8d65e"),
        ("xor-delta", 1324, "16eb74ef184c7a43"),
    ],
)
def test_format_3_stays_as_it_is(codec, length, checksum):
    """A release that writes other bytes must raise the format's number and go on reading these."""
    layout = layout_of({"w": (300, 200), "v": (300, 20), "u": (17,)})

    def regular(modulus, below):
        return layout.tree(
            [
                (np.arange(math.prod(shape)) ** 2 % modulus < below).reshape(shape)
                for shape in layout.shapes.values()
            ]
        )

    base = regular(10_007, 1_000) if codec == "xor-delta" else None
    coded = codecs.encode(regular(10_007, 800), codec, base)
    assert (len(coded), coded[-8:].hex()) == (length, checksum)


def test_the_shift_is_the_best_there_is():
    """Of all shifts it takes the fewest bits, for geometric gaps as random masks have."""
    for n, k in itertools.product([2, 3, 64, 1000, 2_359_296], [1, 2, 7, 400, 50_000, 900_000]):
        if k > n // 2:
            continue
        reached = [(1 - k / n) ** 2**shift for shift in range(40)]
        bits = [shift + 1 / (1 - min(x, 1 - 1e-12)) for shift, x in enumerate(reached)]
        assert bits[codecs._shift(n, k)] <= min(bits) * (1 + 1e-9)


@pytest.mark.parametrize("n, k", [(1, 0), (10, 10), (10, 3), (5000, 1), (5000, 40), (5000, 2500)])
def test_bound_is_the_logarithm_of_a_whole_number(n, k):
    layout = layout_of({"w": (n,), "v": (2, n)})
    mask = with_kept(layout, (k, k))
    want = math.log2(math.comb(n, k)) + math.log2(math.comb(2 * n, k))
    np.testing.assert_allclose(codecs.coded_bytes(mask).bound, want / 8, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "density, over",
    [
        *((0.001, 0.012), (0.01, 0.013), (0.1, 0.015), (0.113, 0.028), (0.214, 0.036)),
        *((0.38, 0.043), (0.5, 0.0), (0.7, 0.012), (0.99, 0.013)),
    ],
)
def test_enumerative_is_near_the_bound(density, over):
    """Rice's codes of geometric gaps are up to .12 bits a kept weight above it, bits as they are at
    a half; a rounding of either side aside.
    """
    n = 250_000
    layout = layout_of({"w": (500, 500)})
    k = round(density * n)
    coded = codecs.encode(with_kept(layout, (k,)), "enumerative")
    bound = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8
    assert bound < len(coded) < (1.002 + over) * bound + 40


@pytest.mark.parametrize(
    "s, total, csc16_mb, bound_mb",
    [
        (4, 204_596, 40.9, 19.2),
        (8, 402_968, 80.6, 33.3),
        (16, 795_696, 159.1, 56.2),
        (32, 1_566_816, 313.4, 91.4),
    ],
)
def test_resnet50_at_the_papers_densities(s, total, csc16_mb, bound_mb):
    """MB for 100 tasks; sizes depend on how many weights are kept, hardly on which."""
    layout, kept = erdos_renyi("ResNet50", s)
    assert sum(kept) == total and layout.num_weights == 23_475_392
    mask = with_kept(layout, kept)
    sizes, coded = codecs.coded_bytes(mask), codecs.encode(mask)
    assert (codecs.codec_of(coded), len(coded)) == ("enumerative", sizes.enumerative)
    chex.assert_trees_all_equal(codecs.decode(coded, layout), mask)
    assert sizes.csc16_indices == 2 * total and round(sizes.csc16_indices / 1e4, 1) == csc16_mb
    assert round(sizes.bound / 1e4, 1) == bound_mb
    assert sizes.bitpack == 23_475_392 // 8 + 32
    assert sizes.enumerative < 1.01 * sizes.bound < 0.5 * sizes.csc16_indices


@pytest.mark.parametrize("density", [0, 0.01, 0.1, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("side", [3, 200])
def test_sizes_are_exact_and_auto_takes_the_smallest(density, side):
    layout = layout_of({"w": (side, side), "v": (side,)})
    mask = draw(layout, density)
    sizes = codecs.coded_bytes(mask)
    lengths = {codec: len(codecs.encode(mask, codec)) for codec in PLAIN}
    assert (sizes.bitpack, sizes.enumerative) == (lengths["bitpack"], lengths["enumerative"])
    coded = codecs.encode(mask)
    assert len(coded) == lengths[codecs.codec_of(coded)] == min(lengths.values())


@pytest.mark.parametrize("density", [0, 0.003, 0.5, 1])
def test_a_mask_takes_what_differs_from_its_base(density):
    layout = layout_of(SHAPES)
    base, moved = draw(layout, 0.5), draw(layout, density, seed=2)
    mask = jax.tree.map(np.logical_xor, base, moved)
    coded = codecs.encode(mask, "xor-delta", base)
    assert codecs.codec_of(coded) == "xor-delta"
    assert len(coded) == len(codecs.encode(moved))
    chex.assert_trees_all_equal(codecs.decode(coded, layout, base), mask)


def test_a_wrong_base_is_told(small):
    layout, mask = small
    base = draw(layout, 0.5, seed=3)
    coded = codecs.encode(mask, "xor-delta", base)
    with pytest.raises(ss.StoreError, match="coded against another: pass that one as base="):
        codecs.decode(coded, layout)
    for flipped in range(17):
        wrong = jax.tree.map(np.copy, base)
        wrong["b"][flipped] ^= True
        with pytest.raises(ss.StoreError, match="another base than the one given"):
            codecs.decode(coded, layout, wrong)
    with pytest.raises(ValueError, match="the base lacks the masked leaf 'b'"):
        codecs.decode(coded, layout, {"a": base["a"]})


def test_another_layout_is_told(small):
    _, mask = small
    for codec in PLAIN:
        coded = codecs.encode(mask, codec)
        for other in ({"a": (3, 5), "b": (17,)}, {"a": (5, 3), "c": (17,)}, {"a": (5, 3)}):
            with pytest.raises(ss.StoreError, match="is of another layout"):
                codecs.decode(coded, layout_of(other))


@pytest.mark.parametrize("codec", PLAIN)
def test_what_is_signed_anew_is_refused_or_a_mask(small, codec):
    """Behind the checksum: no flip, cut or addition brings anything but StoreError or a mask."""
    layout, mask = small
    body = codecs.encode(mask, codec)[:-8]
    forged = [body + b"\0", body + b"\0\0"]
    forged += [body[:size] for size in range(24, len(body))]
    for payload in forged:
        with pytest.raises(ss.StoreError, match="makes no sense"):
            codecs.decode(signed(payload), layout)
    for bit in range(8 * len(body)):
        damaged = bytearray(body)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            decoded = codecs.decode(signed(bytes(damaged)), layout)
        except ss.StoreError:
            continue
        chex.assert_trees_all_equal_shapes_and_dtypes(decoded, mask)


def test_headers_of_other_formats_and_codecs_are_told(small):
    layout, mask = small
    coded = codecs.encode(mask)
    with pytest.raises(ss.StoreError, match="has format version 4, this release reads 3: upgrade"):
        codecs.decode(changed(coded, 4, b"\4"), layout)
    with pytest.raises(ss.StoreError, match=r"written by supsup_jax 0\.1\.0 in format 1; this"):
        codecs.decode(changed(coded, 4, b"\1"), layout)
    for at, new in ((5, b"\2"), (6, b"\2")):
        with pytest.raises(ss.StoreError, match="header that makes no sense"):
            codecs.codec_of(changed(coded, at, new))
    for foreign in (b"", b"SSMK", b"PK\3\4" + bytes(100)):
        with pytest.raises(ss.StoreError, match=f"these {len(foreign)} bytes are not a coded mask"):
            codecs.codec_of(foreign)


def test_forged_counts_are_refused_before_memory_is_taken(small):
    layout, mask = small
    coded = codecs.encode(mask, "enumerative")
    for count in (2**32 - 1, 2**31, 10**6, 16):
        tracemalloc.start()
        with pytest.raises(ss.StoreError, match="makes no sense"):
            codecs.decode(changed(coded, 24, count.to_bytes(4, "little")), layout)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()


def test_gaps_beyond_the_leaf_are_refused():
    """The last weight is kept; then all lower bits of the gaps are set."""
    layout = layout_of({"w": (100,)})
    coded = codecs.encode({"w": np.isin(np.arange(100), (49, 99)), "bias": None}, "enumerative")
    with pytest.raises(ss.StoreError, match="makes no sense"):
        codecs.decode(changed(coded, 28, b"\xff"), layout)


def test_what_is_no_mask_is_told(small):
    layout, mask = small
    for error, message, call, *arguments in (
        (ValueError, "only 0 and 1 at 'a'", codecs.encode, {"a": np.array([0.5])}),
        (TypeError, "got the Task itself", codecs.encode, ss.Task(mask)),
        (ValueError, "at least one leaf", codecs.encode, {"a": None}),
        (
            ValueError,
            "base must have shape",
            codecs.encode,
            mask,
            "xor-delta",
            mask | {"b": np.ones(1)},
        ),
        (ValueError, "one of .*'xor-delta'.*, got 'zip'", codecs.encode, mask, "zip"),
        (ValueError, "got codec 'xor-delta' without one", codecs.encode, mask, "xor-delta"),
        (
            ValueError,
            "takes base=.* codec 'bitpack' with one",
            codecs.encode,
            mask,
            "bitpack",
            mask,
        ),
        (TypeError, "coded must be bytes, got str", codecs.decode, "text", layout),
        (TypeError, r"one such as net\.layout, got dict", codecs.decode, codecs.encode(mask), mask),
    ):
        with pytest.raises(error, match=message):
            call(*arguments)


def test_the_benchmark_states_what_its_codecs_take(tmp_path, capsys):
    result = benchmark_codecs.main(benchmark_codecs.Args(tiny=True, out=tmp_path))
    (row,) = result["rows"]
    layout, kept = erdos_renyi("GEMResNet18", 4)
    assert row["kept"] == sum(kept) and row["mb"]["indices"] == 200 * sum(kept) / 1e6
    assert row["mb"]["bitpack"] == 100 * (32 + math.ceil(layout.num_weights / 8)) / 1e6
    assert row["mb"]["xor-delta"] < row["mb"]["bound"] < row["mb"]["enumerative"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "benchmark_codecs.json",
        "benchmark_codecs.md",
    }
    assert (tmp_path / "benchmark_codecs.md").read_text() == capsys.readouterr().out
