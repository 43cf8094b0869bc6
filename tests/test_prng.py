"""One seed, one network: whatever generator the user's keys come from."""

import contextlib

import jax
import numpy as np
import pytest

from tests.conftest import relu_net

# Threefry in plain Python, Salmon et al. 2011, 20 rounds.
ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def threefry(key, counter):
    mask = 0xFFFFFFFF
    keys = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (counter[0] + keys[0]) & mask, (counter[1] + keys[1]) & mask
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            x = (x + y) & mask
            y = ((y << rotation | y >> (32 - rotation)) & mask) ^ x
        x = (x + keys[(block + 1) % 3]) & mask
        y = (y + keys[(block + 2) % 3] + block + 1) & mask
    return x, y


def test_signs_are_threefrys():
    import zlib

    key = threefry((0, 7), (0, zlib.crc32(b"weights") & 0x7FFFFFFF))
    for leaf, (shape, kernel) in enumerate((((6, 5), "kernel0"), ((5, 3), "kernel1"))):
        own = threefry(key, (0, leaf))
        bits = [threefry(own, (0, i)) for i in range(shape[0] * shape[1])]
        want = [1 if (a ^ b) >> 31 == 0 else -1 for a, b in bits]
        got = np.sign(relu_net((6, 5, 3), seed=7).params[kernel]).reshape(-1)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "flags",
    [
        {"jax_default_prng_impl": "rbg"},
        {"jax_threefry_partitionable": False},
        {"jax_enable_x64": True},
    ],
)
def test_weights_follow_from_their_seed_alone(flags):
    want = relu_net((6, 5, 3), seed=7).fingerprint
    with contextlib.ExitStack() as stack:
        for name, value in flags.items():
            stack.callback(jax.config.update, name, getattr(jax.config, name))
            jax.config.update(name, value)
        assert relu_net((6, 5, 3), seed=7).fingerprint == want
