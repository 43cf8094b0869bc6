"""What holds for every rule of inference: inside the caller's programs, and for bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import supsup_jax as ss
from supsup_jax.inference import one_shot, predict, search
from tests.conftest import filled_store, random_masks, relu_net

RTOL, ATOL = 1e-4, 1e-6
RULES = {
    "one_shot": ss.one_shot,
    "binary_search": ss.binary_search,
    "rerank": ss.Rule("rerank", best=2, judge=ss.max_logit),
    "oracle": ss.oracle,
    "descend": ss.Rule("descend", optimizer=optax.sgd(0.05, momentum=0.9), steps=2),
}


@pytest.mark.parametrize("name", RULES)
def test_inside_jit_and_vmap(problem, name):
    net, store, x = problem
    rule = RULES[name]
    plain = rule(net, store, x)
    one = lambda row: jax.tree.map(lambda leaf: leaf[0], rule(net, store, row[None]))  # noqa: E731
    got = jax.jit(jax.vmap(one))(x)
    np.testing.assert_array_equal(got.task, plain.task)
    np.testing.assert_allclose(got.scores, plain.scores, rtol=RTOL, atol=ATOL)


def test_inside_shard_map(problem):
    """Examples split over two devices, the store on both."""
    net, store, x = problem
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("data")

    def everything(x, ids):
        return (
            *[rule(net, store, x).scores for rule in RULES.values()],
            ss.one_shot(net, store, x[:3]).scores,  # by gradients, not to be summed over all
            ss.one_shot(net, store, x[:3], implementation="certified").scores,
            *[
                rule(net, store, x, per_example=False).scores[None]
                for rule in (ss.one_shot, ss.binary_search, ss.rerank)
            ],
            ss.predict(net, store, x, 2),
            ss.predict(net, store, x, ids),
            jax.vmap(lambda row: ss.topk_mask(row, 3))(x),
            ss.topk_mask(x[0], 3)[None] * x,
        )

    x = jnp.concatenate([x, x[::-1]])  # 20 rows a device: the form of large batches
    ids = jnp.arange(40) % 5
    got = jax.jit(jax.shard_map(everything, mesh=mesh, in_specs=split, out_specs=split))(x, ids)
    halves = everything(x[:20], ids[:20]), everything(x[20:], ids[20:])
    for result, *want in zip(got, *halves, strict=True):
        np.testing.assert_allclose(result, np.concatenate(want), rtol=RTOL, atol=ATOL)


def test_an_id_of_64_bits_is_not_taken_for_another(problem):
    net, store, x = problem
    for ids in (2**32, np.full(20, 2**32 + 3), -(2**32)):
        with pytest.raises(ss.TaskIdError, match=r"task must lie in \[0, 5\)"):
            ss.predict(net, store, x, ids)


def test_under_64_bit_types(problem):
    net, store, x = problem
    ids = np.arange(20) % 5
    wants = [rule(net, store, x) for rule in RULES.values()]
    few, shared = ss.one_shot(net, store, x[:3]), ss.one_shot(net, store, x, per_example=False)
    logits = ss.predict(net, store, x, ids)
    with jax.enable_x64(True):
        again = filled_store(net, [store.mask(i) for i in range(5)], capacity=4)
        for rule, want in zip(RULES.values(), wants, strict=True):
            got = rule(net, again, x)
            np.testing.assert_array_equal(got.task, want.task)
            assert got.scores.dtype == jnp.float32
            assert got.scores.shape == (20, 8)
        np.testing.assert_array_equal(ss.one_shot(net, again, x[:3]).task, few.task)
        assert int(ss.one_shot(net, again, x, per_example=False).task) == int(shared.task)
        got = ss.predict(net, again, x, ids)
        np.testing.assert_allclose(got, logits, rtol=RTOL, atol=ATOL)
        assert again.mixture(jnp.ones(5) / 5)["kernel0"].dtype == jnp.float32
        for options in ({"implementation": "certified"}, {"error": 1e-4}):
            np.testing.assert_array_equal(ss.one_shot(net, again, x[:3], **options).task, few.task)
        stream = [ss.TaskData(x, np.arange(20) % 5)] * 5
        rows = ss.evaluate(net, again, stream, "paper")
        assert [row.decisions for row in rows] == [1] * 5


def test_one_compilation_serves_any_number_of_tasks_within_capacity(problem):
    net, _, x = problem
    masks = random_masks(net, 6)
    store = filled_store(net, masks[:2], capacity=8)
    programs = (
        one_shot._one_shot,
        predict._predict,
        search._binary_search,
        search._rerank,
        search._oracle,
    )

    def ask(net, store):
        for name in ("one_shot", "binary_search", "rerank", "oracle"):
            ss.Rule(name)(net, store, x)
        ss.predict(net, store, x, 0)

    ask(net, store)
    before = [program._cache_size() for program in programs]
    for mask in masks[2:]:
        store = store.append(mask)
        ask(relu_net((6, 6, 5)), store)  # nor does the same network, made anew
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize("name", [*RULES, "alpha_gradient", "predict"])
def test_bad_input(problem, norm_net, name):
    net, store, x = problem
    others = {"alpha_gradient": ss.alpha_gradient, "predict": lambda *a: ss.predict(*a, 0)}
    call = {**RULES, **others}[name]
    for error, message, arguments in (
        (ValueError, "the store is empty", (net, ss.MaskStore.create(net), x)),
        (ValueError, "the store holds masks of", (norm_net, store, x)),
        (TypeError, "store must be a MaskStore", (net, store.mask(0), x)),
        (TypeError, "x must be a float array", (net, store, jnp.ones((2, 6), jnp.uint8))),
        (ValueError, r"x must be \[B, ...\]", (net, store, x[0])),
    ):
        with pytest.raises(error, match=message):
            call(*arguments)
    if name != "predict":
        with pytest.raises(TypeError, match="objective must be a hashable function"):
            call(net, store, x, "entropy")
        with pytest.raises(ValueError, match=r"objective must map logits \[B, C\] to \[B\]"):
            call(net, store, x, jax.nn.softmax)
