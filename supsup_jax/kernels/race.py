"""The task of the largest score, from as few of the masks' bits as settle it.

All tasks race over the words, those with the most of the gradient's energy first, in v of a few
bits of fixed point. After each round whatever lies further below the leader than unread words and
rounding can make up for has lost. The race ends when one task is left, or all is read: a few that
are left then are scored again in float32, and of many all are, so that no answer is wrong for want
of time. Words on which v is 0, such as those of dead units, are not read.

What can be made up for, the slack, has two forms. Of two masks each weight contributes -v, 0 or v
to the difference of their scores, so that with e the error of rounding

    certain (error None)   sum |e| over read weights + sum |v| over unread ones
    with probability       sqrt(L/2 sum step^2) over read + sqrt(L sum v^2) over unread ones,
      1 - error            L = ln(2 T rounds / error)

Certain, v is rounded to the nearest. Otherwise it is rounded up or down at random, without bias, by
a hash of v and the place: the first root is Hoeffding's inequality (1963) over that dither, of
masks made without it in view, and its union runs over the leaders that may put the best task out.
The second assumes of unread bits that given those read each is drawn for itself, as often 1 as in
any other mask: the difference of two is then sub-Gaussian of variance v^2 / 2 at most, and the
union runs over the tasks that may come to be the best, the leader being fixed by what was read.
Each takes half of the error, and T tasks and all rounds share it. Both count the rounding of
float32 sums; of scores that those cannot tell apart, either task may be named.
"""

import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from supsup_jax.devices import ONE_DEVICE, OneDevice, varying_like
from supsup_jax.kernels import contraction, fixed_point
from supsup_jax.kernels.fixed_point import Planes
from supsup_jax.layout import WORD_BITS, column, unpack

# Bits of v. Certain: among 2,500 masks (500 trained on permuted MNIST, the others random), 9 planes
# settle 95% of single-image decisions at once and leave more than 16 masks in doubt in .5%.
CERTAIN_PLANES, PLANES = 9, 5
# Word rows of a run, and those of them that are added up before sums are written.
RUN_ROWS, STEP_ROWS = 16, 8
# A round is as many runs as make about so many sums of a tile, within these bounds: at its end
# threads meet, and the standing is looked at.
ROUND_SUMS, MIN_RUNS, MAX_RUNS = 24 * 1024, 16, 64
# Of more tasks than these all are scored exactly: a mask is a column, whose words lie on as many
# lines of memory as those of 16 tasks.
SHORTLIST = 16


class Finish(NamedTuple):
    """scores [num_tiles * lanes]: the largest is exact, or the only one left; beyond T -inf.
    share: float32 [], the words read over all words, up to 2 where all are read again.
    """

    scores: jax.Array
    share: jax.Array


class Course(NamedTuple):
    """What is read: R rounds of runs, those of most energy first.

    runs: int32 [R, round_runs]; run r is the words from r RUN_ROWS on.
    unread: float32 [R + 1], after so many rounds, the sum over unread words of what they hold back.
    rounds: int32 [], those in which v is not 0. salt: uint32 [], of the dither, a hash of v.
    scale: float32 [], a power of two: all is of v times that, which is 1/2 to 1 at its largest, so
      that no square of what matters is too small or too large.
    """

    runs: jax.Array
    unread: jax.Array
    rounds: jax.Array
    salt: jax.Array
    scale: jax.Array


class Standing(NamedTuple):
    """How it stands after int32 [] rounds.

    sums: float32 [num_tiles, round_runs, lanes], of the words read. rounding: float32 [], what
    rounding holds back of them. left: int32 [], how many tasks may still win.
    """

    rounds: jax.Array
    sums: jax.Array
    rounding: jax.Array
    left: jax.Array


def best_scores(
    words: jax.Array,
    v: jax.Array,
    num_tasks: jax.Array,
    error: float | None = None,
    devices: OneDevice = ONE_DEVICE,
) -> Finish:
    """Scores of v [32 nw] whose argmax over the first T is the exact one; of equal ones the lower.

    Off the CPU all scores are exact: loops of small programs cost more there than they save.
    error: with what probability another task may win; None: with none.
    devices: those among whose masks the largest score is sought.
    Raises TypeError or ValueError for an error that is no number between 0 and 1.
    """
    check_error(error)

    def on_cpu(words, v, num_tasks):
        return _race(words, v, num_tasks, error, devices)

    def elsewhere(words, v, num_tasks):
        scores = contraction.contract(words, v, num_tasks)
        scores = jnp.where(_live(words, num_tasks), scores, -jnp.inf)
        return Finish(scores, varying_like(jnp.float32(1), scores))

    v = jnp.asarray(v, jnp.float32)
    return lax.platform_dependent(words, v, num_tasks, cpu=on_cpu, default=elsewhere)


def check_error(error: float | None) -> None:
    """Raises TypeError or ValueError unless it is None or lies between 0 and 1."""
    if error is None:
        return
    if isinstance(error, bool) or not isinstance(error, numbers.Real):
        raise TypeError(f"error must be a probability between 0 and 1, got {error!r}")
    if not 0 < error < 1:
        raise ValueError(f"error must lie between 0 and 1, both excluded, got {error}")


def _race(words, v, num_tasks, error, devices):
    course = _course(words, v, error)
    live = _live(words, num_tasks)
    all_tasks = devices.total(num_tasks)
    slack = _slack(v, course, error, all_tasks)

    def judged(standing):
        """Scores as far as read, which of them may still win, and how many those are."""
        scores = jnp.where(live, standing.sums.sum(axis=1).reshape(-1), -jnp.inf)
        # Written so that a slack that is not a number leaves nothing out.
        in_doubt = live & ~(scores < devices.largest(scores.max()) - slack(standing))
        return scores, in_doubt, devices.total(in_doubt.sum(dtype=jnp.int32))

    def goes_on(standing):
        # Alike on all devices along `task`, which wait for each other within a round.
        return (standing.rounds < course.rounds) & (standing.left > 1)

    def one_round(standing):
        standing = _add_round(words, v, course, standing, error, num_tasks)
        return standing._replace(left=judged(standing)[2])

    num_tiles, _, lanes = words.shape
    sums = jnp.zeros((num_tiles, course.runs.shape[1], lanes), jnp.float32)
    zero, none = jnp.zeros_like(course.unread[0]), jnp.zeros_like(course.rounds)
    sums = varying_like(varying_like(sums, words), v)
    end = lax.while_loop(goes_on, one_round, Standing(none, sums, zero, all_tasks + none))
    scores, in_doubt, left = judged(end)
    scores = scores / course.scale
    branch = (left > 1).astype(jnp.int32) + (left > SHORTLIST).astype(jnp.int32)
    scores = lax.switch(
        branch,
        [
            lambda: scores,
            lambda: _rescored(words, v, scores, in_doubt),
            # The form that is as exact where weights of a word differ a million times in size.
            lambda: jnp.where(live, contraction.contract(words, v, num_tasks, "select"), -jnp.inf),
        ],
    )
    share = (end.rounds / len(course.runs)).astype(jnp.float32)
    return Finish(scores, jnp.where(branch == 2, share + 1, share))


def _live(words, num_tasks):
    return jnp.arange(words.shape[0] * words.shape[2]) < num_tasks


def _rescored(words, v, scores, in_doubt):
    """The scores, exact where in doubt."""
    ids = jnp.nonzero(in_doubt, size=SHORTLIST, fill_value=0)[0].astype(jnp.int32)

    def rescore(n, s):
        mask = unpack(column(words, ids[n])).reshape(-1).astype(v.dtype)
        return s.at[ids[n]].set(jnp.vdot(v, mask))

    return lax.fori_loop(0, in_doubt.sum(dtype=jnp.int32), rescore, scores)


def _course(words, v, error):
    num_words, lanes = words.shape[1:]
    runs = -(-num_words // RUN_ROWS)
    round_runs = min(runs, max(MIN_RUNS, min(MAX_RUNS, ROUND_SUMS // lanes)))
    num_rounds = -(-runs // round_runs)
    # What fills up the last round does not count.
    spare = num_rounds * round_runs * RUN_ROWS - num_words

    def by_run(of_words):
        return jnp.pad(of_words, (0, spare)).reshape(-1, RUN_ROWS).sum(axis=1)

    largest = jnp.abs(v).max()
    usual = (largest > 0) & (largest < jnp.inf)
    exponent = jnp.where(usual, jnp.frexp(jnp.where(usual, largest, 1))[1], 0)
    scale = jnp.ldexp(jnp.float32(1), -jnp.clip(exponent, -126, 126))
    values = scale * v.reshape(WORD_BITS, -1)
    energy = by_run(jnp.square(values).sum(axis=0))
    held_back = energy if error else by_run(jnp.abs(values).sum(axis=0))
    first = jnp.argsort(-energy)
    # Summed from the end, so that what is 0 comes out as 0.
    of_rounds = held_back[first].reshape(num_rounds, round_runs).sum(axis=1)
    unread = jnp.concatenate([jnp.cumsum(of_rounds[::-1])[::-1], jnp.zeros(1)])
    return Course(
        runs=first.astype(jnp.int32).reshape(num_rounds, round_runs),
        unread=unread,
        rounds=-(-(energy != 0).sum(dtype=jnp.int32) // round_runs),
        salt=fixed_point.checksum(energy),
        scale=scale,
    )


def _slack(v, course, error, num_tasks):
    """Of a standing, how far below the best a mask may lie that will yet win."""
    num_rounds, round_runs = course.runs.shape
    # Two float32 sums add at most this many terms in a row, each time rounding by 2^-24 of what is
    # never more than sum_j |v_j|, nor that than sqrt(32 nw sum_j v_j^2). Twice that covers the
    # bound's own sums.
    terms = num_rounds * RUN_ROWS + round_runs + WORD_BITS
    size = course.unread[0] if error is None else jnp.sqrt(v.size * course.unread[0])
    always = 4 * terms * 2.0**-24 * size
    if error is None:
        return lambda standing: standing.rounding + course.unread[standing.rounds] + always
    # In two logarithms, so that no error is too small for a float32.
    log = jnp.log(num_tasks.astype(jnp.float32)) + (math.log(2 * num_rounds) - math.log(error))

    def slack(standing):
        unread = jnp.sqrt(log * course.unread[standing.rounds])
        return jnp.sqrt(log / 2 * standing.rounding) + unread + always

    return slack


def _add_round(words, v, course, standing, error, num_tasks):
    """The next round read, run by run, in the tiles that hold a task."""
    runs = course.runs[standing.rounds]
    row = jnp.arange(RUN_ROWS, dtype=jnp.int32)
    rows = (runs[:, None] * RUN_ROWS + row[None]).reshape(-1)
    # Rows behind the last, of which the last round may have some, count as zeros.
    values = v.reshape(WORD_BITS, -1).at[:, rows].get(mode="fill", fill_value=0) * course.scale
    if error is None:
        planes = fixed_point.bit_planes(values, CERTAIN_PLANES)
        rounding = jnp.abs(fixed_point.residual(values, CERTAIN_PLANES)).sum()
    else:
        bit = lax.broadcasted_iota(jnp.uint32, values.shape, 0)
        places = WORD_BITS * rows.astype(jnp.uint32)[None] + bit + course.salt
        planes = fixed_point.bit_planes(values, PLANES, fixed_point.dither(places))
        rounding = (jnp.square(planes.step) * (values != 0).sum(axis=0, dtype=jnp.float32)).sum()

    def by_part(of_rows):
        """[..., runs RUN_ROWS] -> [parts, STEP_ROWS, ..., runs]."""
        parts = of_rows.reshape(*of_rows.shape[:-1], len(runs), -1, STEP_ROWS)
        return jnp.moveaxis(parts, (-2, -1), (0, 1))

    parts = Planes(*map(by_part, planes))
    places = by_part(jnp.minimum(rows, words.shape[1] - 1))

    def add(tile, sums):
        def add_part(i, total):
            # Written out: one loop over [runs, lanes] for several rows of a run, which XLA
            # vectorises and, as its result is whole, splits over threads.
            for row in range(STEP_ROWS):
                mine = words.at[tile, places[i, row]].get(mode="promise_in_bounds")
                here = Planes(parts.bits[i, row], parts.step[i, row])
                total = total + fixed_point.word_sums(mine, here)
            return total

        total = lax.fori_loop(0, RUN_ROWS // STEP_ROWS, add_part, sums[tile])
        return lax.dynamic_update_index_in_dim(sums, total, tile, 0)

    lanes = words.shape[2]
    sums = lax.fori_loop(0, (num_tasks + lanes - 1) // lanes, add, standing.sums)
    return Standing(standing.rounds + 1, sums, standing.rounding + rounding, standing.left)
