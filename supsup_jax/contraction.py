"""The two products of packed masks with floats, each the transpose of the other.

    contract:  s_k = sum_j M[k, j] v_j      a weight vector against every task's mask
    superpose: w_j = sum_k M[k, j] a_k      every task's mask at coefficient a_k

Words are [num_tiles, nw, lanes] (see packing); v and w are [..., 32 nw], s and a are
[..., num_tiles * lanes]. Only the tiles that hold a task (`num_tasks` of them) are read, and no
form ever holds more than a block of unpacked masks. Both are reverse-differentiable to any order
(in v and a), and work under jit and vmap.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from supsup_jax.packing import WORD_BITS, unpack

# Unpacked float32 block of the matrix forms: half a core's L2 cache.
BLOCK_FLOATS = 128 * 1024
# A vector a time, the select form reads the words once each; from about this many vectors on,
# unpacking a block for all of them is cheaper (CPU, measured at K = 256 and 2,560).
MATRIX_FROM = 4


def contract(
    words: jax.Array, v: jax.Array, num_tasks: jax.Array, implementation: str | None = None
) -> jax.Array:
    """s [..., num_tiles * lanes] of v [32 nw] or [B, 32 nw], float32.

    implementation: "select" (a scan over words, 32 selects each; CPU), "matrix" (blocks of
    masks unpacked for a matrix product; any device, any B) or "reference" (all masks unpacked:
    for tests). None chooses by device and B.
    Raises ValueError for another name.
    """
    if implementation not in (None, *_IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be None or one of {sorted(_IMPLEMENTATIONS)}, "
            f"got {implementation!r}"
        )
    if v.shape[-1] != WORD_BITS * words.shape[1]:
        raise ValueError(f"v must end in {WORD_BITS * words.shape[1]}, got shape {v.shape}")
    return _contract(implementation, words, v, num_tasks)


def superpose(words: jax.Array, alphas: jax.Array, num_tasks: jax.Array) -> jax.Array:
    """w [..., 32 nw] of alphas [num_tiles * lanes] or [B, num_tiles * lanes], float32."""
    num_tiles, _, lanes = words.shape
    if alphas.shape[-1] != num_tiles * lanes:
        raise ValueError(f"alphas must end in {num_tiles * lanes}, got shape {alphas.shape}")
    return _superpose(words, alphas, num_tasks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(implementation, words, v, num_tasks):
    if implementation is not None:
        return _IMPLEMENTATIONS[implementation](words, v, num_tasks)
    if v.ndim > 1 and v.shape[0] >= MATRIX_FROM:
        return _matrix(words, v, num_tasks)
    return lax.platform_dependent(words, v, num_tasks, cpu=_select, default=_matrix)


def _contract_fwd(implementation, words, v, num_tasks):
    return _contract(implementation, words, v, num_tasks), (words, num_tasks)


def _contract_bwd(implementation, residuals, s_bar):
    words, num_tasks = residuals
    return None, _superpose(words, s_bar, num_tasks), None


_contract.defvjp(_contract_fwd, _contract_bwd)


@jax.custom_vjp
def _superpose(words, alphas, num_tasks):
    num_tiles, num_words, lanes = words.shape
    batched = alphas.reshape(-1, num_tiles, lanes)

    def add_tile(tile, w):
        tile_alphas = lax.dynamic_index_in_dim(batched, tile, 1, keepdims=False)

        def block_sum(rows):
            planes = unpack(rows).astype(jnp.float32)  # [32, R, lanes]
            return jnp.einsum("prl,bl->bpr", planes, tile_alphas, precision=lax.Precision.HIGHEST)

        return w + _over_blocks(block_sum, words, tile)

    w = jnp.zeros((batched.shape[0], WORD_BITS, num_words), jnp.float32)
    w = lax.fori_loop(0, _live_tiles(words, num_tasks), add_tile, w)
    return w.reshape(*alphas.shape[:-1], WORD_BITS * num_words)


def _superpose_fwd(words, alphas, num_tasks):
    return _superpose(words, alphas, num_tasks), (words, num_tasks)


def _superpose_bwd(residuals, w_bar):
    words, num_tasks = residuals
    return None, _contract(None, words, w_bar, num_tasks), None


_superpose.defvjp(_superpose_fwd, _superpose_bwd)


def _over_blocks(block_sum, words, tile):
    """block_sum(rows [R, lanes]) -> [B, 32, R] of each block of words, joined to [B, 32, nw]."""
    _, num_words, lanes = words.shape
    rows = min(num_words, max(1, BLOCK_FLOATS // (WORD_BITS * lanes)))

    def block(start, size):
        return block_sum(_rows(words, tile, start, size))

    whole = num_words // rows
    blocks = lax.map(lambda i: block(i * rows, rows), jnp.arange(whole, dtype=jnp.int32))
    joined = jnp.moveaxis(blocks, 0, 2).reshape(blocks.shape[1], WORD_BITS, whole * rows)
    if rest := num_words - whole * rows:
        joined = jnp.concatenate([joined, block(whole * rows, rest)], axis=2)
    return joined


def _select(words, v, num_tasks):
    """One word row a step: each lane adds the 32 values its bits select, as a balanced tree."""
    num_tiles, num_words, lanes = words.shape

    def one(v):
        values = v.reshape(WORD_BITS, num_words).T

        def add_row(s, row):
            word, value = row
            terms = [jnp.where((word >> b) & 1 != 0, value[b], 0.0) for b in range(WORD_BITS)]
            while len(terms) > 1:
                terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
            return s + terms[0], None

        def add_tile(tile, s):
            rows = lax.dynamic_index_in_dim(words, tile, 0, keepdims=False)
            tile_s, _ = lax.scan(add_row, jnp.zeros(lanes, jnp.float32), (rows, values))
            return lax.dynamic_update_index_in_dim(s, tile_s, tile, 0)

        s = jnp.zeros((num_tiles, lanes), jnp.float32)
        return lax.fori_loop(0, _live_tiles(words, num_tasks), add_tile, s).reshape(-1)

    return one(v) if v.ndim == 1 else lax.map(one, v)


def _matrix(words, v, num_tasks):
    """Blocks of word rows, unpacked to floats, times the matching columns of v."""
    num_tiles, num_words, lanes = words.shape
    planes = v.reshape(-1, WORD_BITS, num_words)
    rows = min(num_words, max(1, BLOCK_FLOATS // (WORD_BITS * lanes)))
    whole = num_words // rows

    def add_tile(tile, s):
        def block(start, size):
            masks = (
                unpack(_rows(words, tile, start, size))
                .astype(jnp.float32)
                .reshape(WORD_BITS * size, lanes)
            )
            columns = lax.dynamic_slice_in_dim(planes, start, size, 2)
            return jnp.dot(
                columns.reshape(-1, WORD_BITS * size), masks, precision=lax.Precision.HIGHEST
            )

        tile_s = lax.fori_loop(
            0,
            whole,
            lambda i, total: total + block(i * rows, rows),
            jnp.zeros((planes.shape[0], lanes), jnp.float32),
        )
        if rest := num_words - whole * rows:
            tile_s = tile_s + block(whole * rows, rest)
        return lax.dynamic_update_index_in_dim(s, tile_s, tile, 1)

    s = jnp.zeros((planes.shape[0], num_tiles, lanes), jnp.float32)
    s = lax.fori_loop(0, _live_tiles(words, num_tasks), add_tile, s)
    return s.reshape(*v.shape[:-1], num_tiles * lanes)


def _reference(words, v, num_tasks):
    """All masks as floats, one product. What the other forms must equal."""
    num_tiles, num_words, lanes = words.shape
    masks = jax.vmap(unpack)(words).astype(jnp.float32)  # [tiles, 32, nw, lanes]
    masks = masks.reshape(num_tiles, WORD_BITS * num_words, lanes)
    s = jnp.einsum("...j,tjl->...tl", v, masks, precision=lax.Precision.HIGHEST)
    s = s.reshape(*v.shape[:-1], num_tiles * lanes)
    return jnp.where(jnp.arange(num_tiles * lanes) < num_tasks, s, 0)


def _rows(words, tile, start, size):
    """Words [size, lanes] of a tile, from row `start`."""
    tile_words = lax.dynamic_index_in_dim(words, tile, 0, keepdims=False)
    return lax.dynamic_slice_in_dim(tile_words, start, size, 0)


def _live_tiles(words, num_tasks):
    lanes = words.shape[2]
    return (num_tasks + lanes - 1) // lanes


_IMPLEMENTATIONS = {"select": _select, "matrix": _matrix, "reference": _reference}
