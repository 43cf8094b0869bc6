import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supsup_jax.layout import Layout, pack, unpack

# Shape of a leaf -> its rows and columns: the last axis, unless too few rows would fill words.
MATRICES = {
    (64, 5): (64, 5),
    (3, 3, 32, 4): (288, 4),
    (57, 3): (57, 3),
    (56, 3): (168, 1),
    (3, 3, 3, 16): (432, 1),
    (33,): (33, 1),
    (1, 1, 7): (7, 1),
}


@pytest.mark.parametrize(("shape", "matrix"), MATRICES.items())
def test_a_word_holds_32_rows_of_a_column(shape, matrix):
    rows, columns = matrix
    groups = -(-rows // 32)
    rng = np.random.default_rng(rows)
    mask = {"a": np.ones((2, 2), bool), "w": rng.random(shape) < 0.5}
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), mask)
    layout = Layout.of(params, lambda name, leaf: True)
    assert layout.columns == ((4, 1, 1), (rows, groups, columns))
    words = np.asarray(jax.jit(lambda mask: pack(layout.ravel(mask, "it")))(mask))
    assert words.shape == (layout.num_words,) == (1 + groups * columns,)
    bits = mask["w"].reshape(rows, columns)
    for r, c in np.ndindex(rows, columns):
        assert (int(words[1 + c * groups + r % groups]) >> (r // groups)) & 1 == bits[r, c]
    assert sum(int(word).bit_count() for word in words) == 4 + bits.sum()
    back = layout.unravel(unpack(words).reshape(-1))
    jax.tree.map(np.testing.assert_array_equal, back, mask)


def test_ravel_and_unravel_keep_the_order_of_leaves():
    params = {
        "b": np.zeros((2, 3), np.float32),
        "a": [np.zeros((1, 4), np.float32), np.zeros(2, np.float32)],
    }
    layout = Layout.of(params, lambda name, leaf: leaf.ndim == 2)
    assert list(layout.shapes) == ["a/0", "b"]
    tree = {"b": jnp.arange(6.0).reshape(2, 3) + 1, "a": [jnp.arange(4.0)[None] + 10, None]}
    flat = layout.ravel(tree, "it").reshape(32, 2)
    np.testing.assert_array_equal(flat[:4, 0], [10, 11, 12, 13])
    np.testing.assert_array_equal(flat[:6, 1], [1, 2, 3, 4, 5, 6])
    assert not flat[4:, 0].any() and not flat[6:, 1].any()
    back = layout.unravel(flat)
    assert back["a"][1] is None
    np.testing.assert_array_equal(back["b"], tree["b"])
