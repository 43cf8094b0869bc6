import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supsup_jax.layout import Layout, pack, unpack


@pytest.mark.parametrize("n", [1, 31, 32, 33, 66, 1000])
def test_weight_j_is_bit_j_div_nw_of_word_j_mod_nw(n):
    bits = np.random.default_rng(n).random(n) < 0.5
    layout = Layout.of({"w": np.zeros((n, 1), np.float32)}, lambda name, leaf: True)
    words = np.asarray(jax.jit(lambda bits: pack(layout.pad(bits)))(bits))
    assert words.shape == (layout.num_words,) == (-(-n // 32),)
    for j in range(n):
        assert (int(words[j % len(words)]) >> (j // len(words))) & 1 == bits[j]
    unpacked = np.asarray(jax.jit(unpack)(words)).reshape(-1)
    np.testing.assert_array_equal(unpacked, np.pad(bits, (0, len(unpacked) - n)))


def test_ravel_and_unravel_keep_the_order_of_leaves():
    params = {
        "b": np.zeros((2, 3), np.float32),
        "a": [np.zeros((1, 4), np.float32), np.zeros(2, np.float32)],
    }
    layout = Layout.of(params, lambda name, leaf: leaf.ndim == 2)
    assert list(layout.shapes) == ["a/0", "b"]
    tree = {"b": jnp.arange(6.0).reshape(2, 3), "a": [jnp.arange(4.0)[None] + 10, None]}
    flat = layout.ravel(tree, "it")
    np.testing.assert_array_equal(flat, [10, 11, 12, 13, 0, 1, 2, 3, 4, 5])
    back = layout.unravel(flat)
    assert back["a"][1] is None
    np.testing.assert_array_equal(back["b"], tree["b"])
