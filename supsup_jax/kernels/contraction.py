"""The two products of packed masks with floats, each the transpose of the other.

    contract:  s_k = sum_j M[k, j] v_j      a weight vector against every task's mask
    superpose: w_j = sum_k M[k, j] a_k      every task's mask at coefficient a_k

Words are [num_tiles, nw, lanes] (see `layout`); v and w are [..., 32 nw], s and a are
[..., num_tiles * lanes]. No form ever holds more than a block of unpacked masks. Both are
reverse-differentiable to any order (in v and a), and work under jit and vmap.

What is written out bit by bit is a jit of its own, traced once a shape and not once a program.

On CPU loops run over the tiles that hold a task, in blocks of word rows. A block is one elementwise
loop over [rows, lanes] into accumulators of that shape, which XLA vectorises and splits over
threads. (A row a step, into [lanes] accumulators, is 3 times slower; adding up rows inside the loop
costs the vectorisation, 10 times.) Elsewhere one vector's product is one fused reduction over all
words, without a loop.
"""

import functools
import os

import jax
import jax.numpy as jnp
from jax import lax

from supsup_jax.devices import has_vector_popcount, varying_like
from supsup_jax.kernels import fixed_point
from supsup_jax.layout import VECTOR_LANES, WORD_BITS, unpack

# Accumulators of a block: 1.5 MiB, within the L2 caches of two cores. Shorter blocks pay for the
# meeting of threads at the end of each; more rows gain nothing where lanes are few.
BLOCK_LANES = 384 * 1024
BLOCK_ROWS = 1024
# Floats that the matrix forms unpack at a time: on CPU about a core's cache, elsewhere enough to
# fill the device.
CPU_BLOCK_FLOATS = 1024 * 1024
BLOCK_FLOATS = 64 * 1024 * 1024
# Bits of fixed point in the "popcount" form. On gradients of 500 trained tasks its largest error is
# 7e-6 of the scores' deviation; a float32 matrix product's is 1e-5, that of "select" 4e-6.
PLANES = 20


def contract(
    words: jax.Array,
    v: jax.Array,
    num_tasks: jax.Array,
    implementation: str | None = None,
    planes: int = PLANES,
) -> jax.Array:
    """s [..., num_tiles * lanes] of v [32 nw] or [B, 32 nw], float32.

    implementation: each runs on any device; None chooses by device and B, and none falls back.
      "popcount": v as fixed point of `planes` bits, rounded to 2^-19 of the largest of each
        word's 32 weights (see fixed_point). The default of CPUs that count the bits of whole
        vectors, see `cpu_form`.
      "select": every bit selects a float32. The default of one vector elsewhere, and of other
        CPUs, where it is twice as fast as "popcount".
      "matrix": blocks of masks unpacked for a matrix product; elsewhere, where it is the default
        of many vectors, with v in three bfloat16 pieces: float32-class.
      "matrix_bf16": the same with v rounded to bfloat16.
      "reference": all masks unpacked, K n floats. What the others must equal, for tests.
    planes: 2 to 24, of "popcount"; fewer are faster and less accurate.
    Raises ValueError for another name or number.
    """
    check_implementation(implementation)
    if not fixed_point.MIN_PLANES <= planes <= fixed_point.MAX_PLANES:
        raise ValueError(
            f"planes must lie in [{fixed_point.MIN_PLANES}, {fixed_point.MAX_PLANES}], got {planes}"
        )
    if v.shape[-1] != WORD_BITS * words.shape[1]:
        raise ValueError(f"v must end in {WORD_BITS * words.shape[1]}, got shape {v.shape}")
    return _contract(implementation, planes, words, v.astype(jnp.float32), num_tasks)


def check_implementation(implementation: str | None, *others: str) -> None:
    """Raises ValueError unless it is None, a form of `contract`, or among `others`."""
    names = sorted((*IMPLEMENTATIONS, *others))
    if implementation not in (None, *names):
        raise ValueError(
            f"implementation must be None or one of {names}, which run on every device, "
            f"got {implementation!r}"
        )


def cpu_form() -> str:
    """The form of `contract` that is CPU's default: "popcount" where the CPU has it for vectors.

    The environment variable SUPSUP_JAX_CPU_FORM, read when a program is traced, chooses the other.
    Raises ValueError where it names neither.
    """
    own = "popcount" if has_vector_popcount() else "select"
    chosen = os.environ.get("SUPSUP_JAX_CPU_FORM") or own
    if chosen not in ("popcount", "select"):
        raise ValueError(
            f"SUPSUP_JAX_CPU_FORM must be unset, 'popcount' or 'select', got {chosen!r}"
        )
    return chosen


def superpose(words: jax.Array, alphas: jax.Array, num_tasks: jax.Array) -> jax.Array:
    """w [..., 32 nw] of alphas [num_tiles * lanes] or [B, num_tiles * lanes], float32."""
    num_tiles, _, lanes = words.shape
    if alphas.shape[-1] != num_tiles * lanes:
        raise ValueError(f"alphas must end in {num_tiles * lanes}, got shape {alphas.shape}")
    return _superpose(words, alphas, num_tasks)


def count(words: jax.Array, kept: jax.Array, num_tasks: jax.Array) -> jax.Array:
    """How many of the masks `kept` (bool [num_tiles * lanes]) keep each weight: float32 [32 nw].

    What `superpose` makes of 0 and 1, on CPU in a thirtieth of the time. Not differentiable.
    """
    return _on_platform(
        _count_blocks,
        lambda words, kept, *sizes: _superpose_blocks(words, kept.astype(jnp.float32), *sizes),
        words,
        kept,
        num_tasks,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(implementation, planes, words, v, num_tasks):
    if implementation is not None:
        return IMPLEMENTATIONS[implementation](words, v, num_tasks, planes)
    on_cpu = functools.partial(IMPLEMENTATIONS[cpu_form()], planes=planes)
    other = _select if v.ndim == 1 else _matrix
    return lax.platform_dependent(words, v, num_tasks, cpu=on_cpu, default=other)


def _contract_fwd(implementation, planes, words, v, num_tasks):
    return _contract(implementation, planes, words, v, num_tasks), (words, num_tasks)


def _contract_bwd(implementation, planes, residuals, s_bar):
    words, num_tasks = residuals
    return None, _superpose(words, s_bar, num_tasks), None


_contract.defvjp(_contract_fwd, _contract_bwd)


@jax.custom_vjp
def _superpose(words, alphas, num_tasks):
    return _on_platform(_superpose_blocks, _superpose_blocks, words, alphas, num_tasks)


def _superpose_fwd(words, alphas, num_tasks):
    return _superpose(words, alphas, num_tasks), (words, num_tasks)


def _superpose_bwd(residuals, w_bar):
    words, num_tasks = residuals
    return None, _contract(None, PLANES, words, w_bar, num_tasks), None


_superpose.defvjp(_superpose_fwd, _superpose_bwd)


def _popcount(words, v, num_tasks, planes):
    prepare = functools.partial(fixed_point.bit_planes, planes=planes)
    return _over_words(prepare, fixed_point.word_sums, words, v, num_tasks)


def _select(words, v, num_tasks, planes=None):
    return _over_words(lambda values: values, _selected_sums, words, v, num_tasks)


@jax.jit
def _selected_sums(rows, values):
    # Four chains of masked additions: one instruction a bit beside its test.
    sums = []
    for chain in range(4):
        total = jnp.zeros(rows.shape, jnp.float32)
        for b in range(chain, WORD_BITS, 4):
            kept = (rows & jnp.uint32(1 << b)) != 0
            total = jnp.where(kept, total + values[b][:, None], total)
        sums.append(total)
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


def _over_words(prepare, word_sums, words, v, num_tasks):
    """The sum over all words of word_sums(rows [R, lanes], operands) [R, lanes].

    prepare: values [32, W] of W words -> their operands, arrays [..., W]; word_sums gets those of
    its rows.
    """
    if v.ndim > 1:
        each = functools.partial(_over_words, prepare, word_sums, words, num_tasks=num_tasks)
        return lax.map(lambda v: each(v=v), v)
    by_blocks = functools.partial(_by_blocks, prepare, word_sums)
    at_once = functools.partial(_at_once, prepare, word_sums)
    return lax.platform_dependent(words, v, num_tasks, cpu=by_blocks, default=at_once)


def _at_once(prepare, word_sums, words, v, num_tasks):
    del num_tasks  # words beyond it are zero
    operands = prepare(v.reshape(WORD_BITS, -1))
    return jax.vmap(lambda tile: word_sums(tile, operands).sum(axis=0))(words).reshape(-1)


def _by_blocks(prepare, word_sums, words, v, num_tasks):
    num_tiles, _, lanes = words.shape
    num_blocks, rows, block = _blocks_of(prepare, words, v)

    def add_tile(tile, s):
        sums = lax.fori_loop(
            0,
            num_blocks,
            lambda i, sums: sums + word_sums(*block(tile, i)),
            _zeros(words, v, (rows, lanes)),
        )
        return lax.dynamic_update_index_in_dim(s, sums.sum(axis=0), tile, 0)

    live_tiles = (num_tasks + lanes - 1) // lanes
    s = _zeros(words, v, (num_tiles, lanes))
    return lax.fori_loop(0, live_tiles, add_tile, s).reshape(-1)


def _blocks_of(prepare, words, v):
    """How many blocks there are, their rows, and block(tile, i): words [rows, lanes], operands."""
    num_words = words.shape[1]
    num_blocks, rows = _row_blocks(words)
    # The last block ends where the words end. The rows it shares with the one before count as
    # zeros there.
    whole = (num_blocks - 1) * rows
    shared = num_blocks * rows - num_words
    values = v.reshape(WORD_BITS, num_words)
    zeros = jnp.zeros((WORD_BITS, shared), v.dtype)
    operands = prepare(jnp.concatenate([values[:, :whole], zeros, values[:, whole:]], axis=1))

    def block(tile, i):
        mine = jax.tree.map(
            lambda a: lax.dynamic_slice_in_dim(a, i * rows, rows, a.ndim - 1), operands
        )
        return _rows(words, tile, jnp.minimum(i * rows, num_words - rows), rows), mine

    return num_blocks, rows, block


def _row_blocks(words):
    """(blocks, rows of each) that cover the word rows; the last may share rows."""
    return _even_blocks(words.shape[1], min(BLOCK_ROWS, BLOCK_LANES // words.shape[2]))


def _even_blocks(num_words, most):
    num_blocks = -(-num_words // max(1, most))
    return num_blocks, -(-num_words // num_blocks)


def _matrix(words, v, num_tasks, planes=None):
    return _on_platform(
        lambda words, v, *sizes: _matrix_blocks(words, v[None], *sizes),
        lambda words, v, *sizes: _matrix_blocks(words, _bfloat16_pieces(v), *sizes),
        words,
        v,
        num_tasks,
    )


def _matrix_bf16(words, v, num_tasks, planes=None):
    pieces = v.astype(jnp.bfloat16)[None]
    return _on_platform(_matrix_blocks, _matrix_blocks, words, pieces, num_tasks)


def _bfloat16_pieces(v):
    """bfloat16 [3, ...] that add up to v, float32, to 2^-24 of it."""
    pieces = []
    for _ in range(3):
        # Not a cast to and fro: XLA may leave out such a pair.
        pieces.append(lax.reduce_precision(v, exponent_bits=8, mantissa_bits=7))
        v = v - pieces[-1]
    return jnp.stack(pieces).astype(jnp.bfloat16)


def _matrix_blocks(words, pieces, live_tiles, block_floats):
    """s [..., K] of the sum of pieces [P, ..., 32 nw], in the pieces' own dtype."""
    num_tiles, num_words, lanes = words.shape
    columns = pieces.reshape(-1, WORD_BITS, num_words)
    rows, whole = _blocks(words, block_floats)

    def product(tile, start, size):
        masks = unpack(_rows(words, tile, start, size)).astype(pieces.dtype)
        return jnp.dot(
            lax.dynamic_slice_in_dim(columns, start, size, 2).reshape(-1, WORD_BITS * size),
            masks.reshape(WORD_BITS * size, lanes),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def add_tile(tile, s):
        total = lax.fori_loop(
            0,
            whole,
            lambda i, total: total + product(tile, i * rows, rows),
            _zeros(words, pieces, (columns.shape[0], lanes)),
        )
        if rest := num_words - whole * rows:
            total = total + product(tile, whole * rows, rest)
        return lax.dynamic_update_index_in_dim(s, total, tile, 1)

    s = _zeros(words, pieces, (columns.shape[0], num_tiles, lanes))
    s = lax.fori_loop(0, live_tiles, add_tile, s)
    return s.reshape(*pieces.shape[:-1], num_tiles * lanes).sum(axis=0)


def _superpose_blocks(words, alphas, live_tiles, block_floats):
    num_tiles, num_words, lanes = words.shape
    batched = alphas.reshape(-1, num_tiles, lanes)

    def add_tile(tile, w):
        tile_alphas = lax.dynamic_index_in_dim(batched, tile, 1, keepdims=False)

        def block(start, size):
            planes = unpack(_rows(words, tile, start, size)).astype(jnp.float32)  # [32, R, lanes]
            return jnp.einsum("prl,bl->bpr", planes, tile_alphas, precision=lax.Precision.HIGHEST)

        rows, whole = _blocks(words, block_floats)
        blocks = lax.map(lambda i: block(i * rows, rows), jnp.arange(whole, dtype=jnp.int32))
        joined = jnp.moveaxis(blocks, 0, 2).reshape(batched.shape[0], WORD_BITS, whole * rows)
        if rest := num_words - whole * rows:
            joined = jnp.concatenate([joined, block(whole * rows, rest)], axis=2)
        return w + joined

    w = _zeros(words, alphas, (batched.shape[0], WORD_BITS, num_words))
    w = lax.fori_loop(0, live_tiles, add_tile, w)
    return w.reshape(*alphas.shape[:-1], WORD_BITS * num_words)


def _count_blocks(words, kept, live_tiles, block_floats):
    num_tiles, num_words, lanes = words.shape
    kept = kept.reshape(num_tiles, 1, lanes)
    # In words, whose bits are never unpacked. The last block ends where the words end.
    num_blocks, rows = _even_blocks(num_words, 8 * block_floats // (WORD_BITS * lanes))
    shared = num_blocks * rows - num_words

    def add_tile(tile, counts):
        mine = lax.dynamic_index_in_dim(kept, tile, 0, keepdims=False)

        def block(i):
            words_i = _rows(words, tile, jnp.minimum(i * rows, num_words - rows), rows)
            return _bit_counts(jnp.where(mine, words_i, 0))

        blocks = lax.map(block, jnp.arange(num_blocks, dtype=jnp.int32))
        whole = jnp.moveaxis(blocks[:-1], 0, 1).reshape(WORD_BITS, -1)
        joined = jnp.concatenate([whole, blocks[-1, :, shared:]], axis=1)
        return counts + joined.astype(jnp.float32)

    counts = _zeros(words, kept, (WORD_BITS, num_words))
    return lax.fori_loop(0, live_tiles, add_tile, counts).reshape(-1)


@jax.jit
def _bit_counts(words):
    """How many of the words [R, lanes] of each row have each bit: uint32 [32, R]."""
    # A byte counts one bit of every eighth over the vectors of a tile, 64 at most, so a word is
    # added up in 8 steps and not in 32. Written out: a reduction over the vectors is not
    # vectorised, which costs 10 times as much.
    sums = []
    for bit in range(8):
        total = jnp.zeros((len(words), VECTOR_LANES), jnp.uint32)
        for lane in range(0, words.shape[1], VECTOR_LANES):
            total = total + ((words[:, lane : lane + VECTOR_LANES] >> bit) & jnp.uint32(0x01010101))
        sums.append(total)
    sums = jnp.stack(sums)
    # Over the lanes of a vector in halves of a word, where a byte could overflow.
    halves = jnp.stack([sums & 0x00FF00FF, (sums >> 8) & 0x00FF00FF])
    halves = halves.sum(axis=-1, dtype=jnp.uint32)
    return jnp.stack([halves & 0xFFFF, halves >> 16]).reshape(WORD_BITS, -1)


def _reference(words, v, num_tasks, planes=None):
    num_tiles, num_words, lanes = words.shape
    masks = jax.vmap(unpack)(words).astype(jnp.float32)  # [tiles, 32, nw, lanes]
    masks = masks.reshape(num_tiles, WORD_BITS * num_words, lanes)
    s = jnp.einsum("...j,tjl->...tl", v, masks, precision=lax.Precision.HIGHEST)
    s = s.reshape(*v.shape[:-1], num_tiles * lanes)
    return jnp.where(jnp.arange(num_tiles * lanes) < num_tasks, s, 0)


def _on_platform(on_cpu, elsewhere, words, operand, num_tasks):
    """form(words, operand, num_tiles, block_floats): the tiles to read, the size of a block."""
    num_tiles, _, lanes = words.shape

    def cpu(words, operand, num_tasks):
        return on_cpu(words, operand, (num_tasks + lanes - 1) // lanes, CPU_BLOCK_FLOATS)

    def default(words, operand, num_tasks):
        del num_tasks  # to read it would stop the device; tiles beyond it hold zeros
        return elsewhere(words, operand, num_tiles, BLOCK_FLOATS)

    return lax.platform_dependent(words, operand, num_tasks, cpu=cpu, default=default)


def _zeros(words, operand, shape):
    """The start of a sum of both, under shard_map as different between devices as they are."""
    return varying_like(varying_like(jnp.zeros(shape, jnp.float32), words), operand)


def _blocks(words, block_floats):
    """Word rows of a block whose masks unpack to `block_floats`, and how many whole blocks."""
    _, num_words, lanes = words.shape
    rows = min(num_words, max(1, block_floats // (WORD_BITS * lanes)))
    return rows, num_words // rows


def _rows(words, tile, start, size):
    """Words [size, lanes] of a tile, from row `start`."""
    place = [jnp.asarray(index, jnp.int32) for index in (tile, start, 0)]
    return lax.dynamic_slice(words, place, (1, size, words.shape[2]))[0]


IMPLEMENTATIONS = {
    "popcount": _popcount,
    "select": _select,
    "matrix": _matrix,
    "matrix_bf16": _matrix_bf16,
    "reference": _reference,
}
