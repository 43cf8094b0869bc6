"""The task of the largest score, from a coarse pass whose error is bounded.

All masks are scored with v in fixed point of COARSE_PLANES bits. The rounding errors e of v are
known, so for two masks the error of the difference of their scores is at most sum_j |e_j|: the two
differ by -1, 0 or 1 at each weight. Whatever lies further below the best cannot be the best. Most
often nothing else is left, and the answer is certain; a short list is scored again exactly, and a
long one makes the whole pass exact. The task is therefore the one that exact scores name, up to
the rounding of float32 sums, which the bound counts too.
"""

import jax
import jax.numpy as jnp
from jax import lax

from supsup_jax.devices import ONE_DEVICE, OneDevice
from supsup_jax.kernels import contraction, fixed_point
from supsup_jax.layout import WORD_BITS, column, unpack

# Among 2,500 masks (500 trained on permuted MNIST, the others random), 9 planes settle 95% of
# single-image decisions at once and leave more than 16 masks in doubt in .5%; 8 planes settle 81%,
# 10 99%. Each plane costs a tenth of a read of the masks.
COARSE_PLANES = 9
SHORTLIST = 16


def best_scores(
    words: jax.Array, v: jax.Array, num_tasks: jax.Array, devices: OneDevice = ONE_DEVICE
) -> jax.Array:
    """Scores [num_tiles * lanes] of v [32 nw] whose argmax over the first T is the exact one.

    Those in doubt are exact (float32), the others within the bound; beyond T they are -inf.
    devices: those among whose masks the largest score is sought.
    """
    v = v.astype(jnp.float32)
    live = jnp.arange(words.shape[0] * words.shape[2]) < num_tasks

    def scores(planes):
        s = contraction.contract(words, v, num_tasks, "popcount", planes)
        return jnp.where(live, s, -jnp.inf)

    coarse = scores(COARSE_PLANES)
    # Written so that a slack that is not a number leaves nothing out.
    best = devices.largest(coarse.max())
    in_doubt = live & ~(coarse < best - slack(words, v, COARSE_PLANES))
    count = devices.total(in_doubt.sum())
    ids = jnp.nonzero(in_doubt, size=SHORTLIST, fill_value=0)[0].astype(jnp.int32)

    def certain():
        return coarse

    def rescore():
        def exact(n, s):
            return s.at[ids[n]].set(jnp.vdot(v, unpack(column(words, ids[n])).reshape(-1)))

        return lax.fori_loop(0, in_doubt.sum(), exact, coarse)

    def all_exact():
        return scores(contraction.PLANES)

    doubt = (count > 1).astype(jnp.int32) + (count > SHORTLIST)
    return lax.switch(doubt, [certain, rescore, all_exact])


def slack(words: jax.Array, v: jax.Array, planes: int) -> jax.Array:
    """How far below another's a mask's coarse score may lie though its exact one is higher."""
    values = v.reshape(WORD_BITS, -1)
    rounding = jnp.abs(fixed_point.residual(values, planes)).sum()
    # Each of the two float32 sums adds at most this many terms in a row, each time rounding by
    # 2^-24 of what is never more than sum_j |v_j|; twice that covers the residual's own sums.
    terms = contraction.longest_sum(words) + WORD_BITS
    return rounding + 4 * terms * 2.0**-24 * jnp.abs(values).sum()
