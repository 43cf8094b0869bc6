"""Settings that must stand before JAX starts, and the small networks that many tests share."""

import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Most of the suite's time is LLVM's, over programs that run for milliseconds: nearly half is saved
# by asking it for less. Flags of your own, such as --xla_cpu_max_isa=AVX2, bring full optimisation.
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def known(flags):
    """Whether this jaxlib has the flags: XLA aborts over one that it does not know."""
    parse = "from jaxlib import xla_client; xla_client.CompileOptions()"
    env = os.environ | {"XLA_FLAGS": flags}
    return not subprocess.call([sys.executable, "-c", parse], env=env, stderr=subprocess.DEVNULL)


os.environ["JAX_PLATFORMS"] = "cpu"
if "XLA_FLAGS" not in os.environ:  # xdist's workers inherit what was found
    os.environ["XLA_FLAGS"] = FLAGS if known(FLAGS) else " ".join(filter(known, FLAGS.split()))

import jax  # noqa: E402

gc.set_threshold(100_000, 50, 100)  # tracing makes objects by the million, few of them in cycles
jax.config.update("jax_num_cpu_devices", 8)  # for shard_map
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from flax import nnx  # noqa: E402

import supsup_jax as ss  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
MAPS = Path("/proc/self/maps")  # Linux's; a process may have 65,530


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Compiled programs take maps of memory: those of all tests in one process more than there are.

    jax.clear_caches() gave back three in four (jax 0.10.2). Compiling again costs, so not after
    each file: worker processes never come as far.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


def golden(name):
    return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


def relu_apply(params, x):
    """A dense ReLU net of any depth over params {"kernel0": ..., ...}."""
    *hidden, last = [params[name] for name in sorted(params)]
    for kernel in hidden:
        x = jax.nn.relu(x @ kernel)
    return x @ last


def relu_net(sizes, seed=0):
    """relu_apply with signed constant weights of the given layer sizes."""
    shapes = itertools.pairwise(sizes)
    params = {f"kernel{i}": np.zeros(shape, np.float32) for i, shape in enumerate(shapes)}
    return ss.signed_constant(ss.Network(relu_apply, params), seed)


def random_masks(net, count, seed=0, density=0.5):
    """`count` masks of independent bits, as pytrees of NumPy bools."""
    rng = np.random.default_rng(seed)
    return [
        net.layout.tree([rng.random(shape) < density for shape in net.layout.shapes.values()])
        for _ in range(count)
    ]


def filled_store(net, masks, capacity=64):
    store = ss.MaskStore.create(net, capacity)
    for mask in masks:
        store = store.append(mask, donate=True)
    return store


class NormNet(nnx.Module):
    """Dense, batch norm without scale or offset, ReLU, dense: statistics but no biases."""

    def __init__(self, sizes=(6, 8, 5), dropout=0.0, *, rngs):
        self.layer0 = nnx.Linear(sizes[0], sizes[1], use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(
            sizes[1], use_scale=False, use_bias=False, momentum=0.9, rngs=rngs
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.layer1 = nnx.Linear(sizes[1], sizes[2], use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.layer0(x)))
        if self.dropout is not None:
            x = self.dropout(x)
        return self.layer1(x)


class ConvNet(nnx.Module):
    """A residual network over 8x8 images, flat or not; its classifier's name does not sort last."""

    def __init__(self, num_outputs=5, width=4, *, rngs):
        def norm():
            return nnx.BatchNorm(width, use_scale=False, use_bias=False, momentum=0.9, rngs=rngs)

        self.stem = nnx.Conv(1, width, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.stem_norm = norm()
        self.block = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.block_norm = norm()
        self.head = nnx.Linear(width, num_outputs, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.stem_norm(self.stem(x.reshape(len(x), 8, 8, 1))))
        x = jax.nn.relu(x + self.block_norm(self.block(x)))
        return self.head(x.mean((1, 2)))


@pytest.fixture(scope="session")
def problem():
    """66 weights, five tasks in eight slots, 20 inputs: batches on both sides of the forms."""
    net = relu_net((6, 6, 5))
    x = np.random.default_rng(0).standard_normal((20, 6), np.float32)
    return net, filled_store(net, random_masks(net, 5), capacity=8), x


@pytest.fixture(scope="session")
def reference():
    """The golden network, its store of seven tasks (capacity 8) and its inputs."""
    z = golden("one_shot")
    net = ss.Network(relu_apply, {f"kernel{i}": z[f"kernel{i}"] for i in range(3)})
    masks = [{f"kernel{i}": z[f"scores{i}"][t] >= 0 for i in range(3)} for t in range(7)]
    return net, filled_store(net, masks, capacity=8), z["x"], z


@pytest.fixture
def norm_net():
    return ss.signed_constant(ss.Network.from_nnx(NormNet(rngs=nnx.Rngs(0))), 0)


@pytest.fixture
def small_net():
    """66 weights, so that the last of its three words is not full."""
    return relu_net((6, 6, 5))
