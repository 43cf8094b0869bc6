import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supsup_jax import devices
from supsup_jax.kernels import contraction

IMPLEMENTATIONS = ["reference", "popcount", "select", "matrix", None]


@pytest.fixture(params=["cpu", "elsewhere"])
def platform(request, monkeypatch):
    """The form of this platform, and the one that GPUs and TPUs take, run here."""
    if request.param == "elsewhere":
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands)
        )
    return request.param


def problem(num_words, num_tiles, lanes, num_tasks, batch=None, seed=0):
    """Words of random masks, zero beyond num_tasks; the masks as floats [K, 32 nw]; vectors."""
    rng = np.random.default_rng(seed)
    masks = rng.random((num_tiles * lanes, 32 * num_words)) < 0.5
    masks[num_tasks:] = False
    shape = (32 * num_words,) if batch is None else (batch, 32 * num_words)
    v = rng.standard_normal(shape).astype(np.float32)
    return tiled(masks, lanes), masks.astype(np.float64), v, np.int32(num_tasks)


def tiled(masks, lanes):
    """Words [tiles, nw, lanes] of masks [K, 32 nw], in NumPy: weight j is bit j // nw."""
    planes = masks.reshape(-1, lanes, 32, masks.shape[1] // 32).astype(np.uint32)
    words = (planes << np.arange(32, dtype=np.uint32)[:, None]).sum(axis=2, dtype=np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, 1, 2))


def contract(words, v, num_tasks, *how):
    """Compiled for this call alone: some tests exchange what the form is made of."""
    program = jax.jit(lambda *arrays: contraction.contract(*arrays, *how))
    return np.asarray(program(words, v, num_tasks))


# One of everything; and tiles that are full, half full and empty.
SIZES = [(1, 1, 1, 1), (5, 3, 4, 6)]


@pytest.mark.parametrize(("size", "batch"), [(SIZES[0], None), (SIZES[1], None), (SIZES[1], 3)])
def test_products_equal_numpy(size, batch, platform):
    words, masks, v, num_tasks = problem(*size, batch)
    alphas = np.random.default_rng(1).random((*v.shape[:-1], len(masks)))
    check_products(IMPLEMENTATIONS, words, masks, v, alphas, num_tasks)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_blocks_that_do_not_divide_the_words(rows, monkeypatch):
    """Of 9 word rows; popcount and select share rows between blocks, the others have a rest."""
    lanes = 6
    monkeypatch.setattr(contraction, "CPU_BLOCK_FLOATS", rows * 32 * lanes)
    monkeypatch.setattr(contraction, "BLOCK_LANES", rows * lanes)
    words, masks, v, num_tasks = problem(9, 2, lanes, 12, batch=2)
    alphas = np.random.default_rng(1).random(12)
    check_products(["popcount", "select", "matrix"], words, masks, v, alphas, num_tasks)


def check_products(implementations, words, masks, v, alphas, num_tasks):
    """contract by each implementation, and superpose, in one program made for this call alone."""

    @jax.jit
    def products(words, v, alphas, num_tasks):
        scores = [contraction.contract(words, v, num_tasks, name) for name in implementations]
        return scores, contraction.superpose(words, alphas, num_tasks)

    found, mixed = products(words, v, alphas.astype(np.float32), num_tasks)
    for name, scores in zip(implementations, found, strict=True):
        assert scores.dtype == np.float32
        want = np.asarray(v, np.float64) @ masks.T
        np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-5, err_msg=str(name))
    np.testing.assert_allclose(mixed, alphas @ masks, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("planes", [4, 9, 20, 24])
def test_popcount_errs_by_half_a_step_a_weight_at_most(planes):
    words, masks, v, num_tasks = problem(7, 2, 5, 7)
    got = contract(words, v, num_tasks, "popcount", planes)
    steps = np.abs(v.reshape(32, 7)).max(axis=0) / (2 ** (planes - 1) - 1)
    worst = masks.reshape(-1, 32, 7).sum(axis=1) @ steps / 2
    error = np.abs(got - v.astype(np.float64) @ masks.T)
    assert (error <= worst + 1e-5).all()
    if planes == 4:
        assert error.max() > 1e-2  # fewer planes are another computation, not another name


def test_half_precision_vectors_are_not_rounded_again():
    words, masks, v, num_tasks = problem(7, 2, 5, 7)
    check_products(IMPLEMENTATIONS, words, masks, v.astype(jnp.bfloat16), masks[:, 0], num_tasks)


def test_bfloat16_rounds_the_vectors_only(platform):
    words, masks, v, num_tasks = problem(7, 2, 5, 7, batch=3)
    got = contract(words, v, num_tasks, "matrix_bf16")
    rounded = np.asarray(jnp.asarray(v).astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(got, rounded @ masks.T, rtol=1e-4, atol=1e-4)
    assert np.abs(got - v.astype(np.float64) @ masks.T).max() > 1e-3


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_no_loop_over_words_on_an_accelerator(platform):
    """One vector's product is one reduction; many vectors' loops run over tiles and blocks."""
    shape = (3, 8600, 848)
    words = jax.ShapeDtypeStruct(shape, jnp.uint32)
    num_tasks = jax.ShapeDtypeStruct((), jnp.int32)

    def program(v_shape):
        v = jax.ShapeDtypeStruct(v_shape, jnp.float32)
        return jax.export.export(jax.jit(contraction.contract), platforms=[platform])(
            words, v, num_tasks
        ).mlir_module()

    assert "stablehlo.while" not in program((32 * 8600,))
    many = program((128, 32 * 8600))
    assert many.count("stablehlo.while") == 2
    _, blocks_a_tile = contraction._blocks(words, contraction.BLOCK_FLOATS)
    assert blocks_a_tile <= 4


@pytest.mark.parametrize("batch", [None, 5])
def test_each_is_the_transpose_of_the_other(batch):
    words, masks, v, num_tasks = problem(3, 2, 4, 6, batch)
    s_bar = np.random.default_rng(1).standard_normal((*v.shape[:-1], 8), np.float32)
    for function, at, bar, matrix in (
        (contraction.contract, v, s_bar, masks),
        (contraction.superpose, s_bar, v, masks.T),
    ):
        along = functools.partial(function, words, num_tasks=num_tasks)
        got = jax.jit(lambda at, bar, along=along: jax.vjp(along, at)[1](bar)[0])(at, bar)
        np.testing.assert_allclose(got, bar.astype(np.float64) @ matrix, rtol=1e-4, atol=1e-5)


def test_second_derivatives():
    words, masks, _, num_tasks = problem(3, 1, 4, 4)
    squares = jax.grad(lambda a: (contraction.superpose(words, a, num_tasks) ** 2).sum())
    got = jax.jit(jax.jacrev(squares))(np.full(4, 0.25, np.float32))
    np.testing.assert_allclose(got, 2 * masks @ masks.T, rtol=1e-5)


def test_vmap_equals_a_loop():
    words, _, v, num_tasks = problem(3, 2, 4, 6, batch=2)
    got = jax.jit(jax.vmap(lambda v: contraction.contract(words, v, num_tasks)))(v)
    want = np.stack([contract(words, row, num_tasks) for row in v])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_time_follows_tasks_not_capacity():
    """Tiles without a task are not read: garbage put there does not come out."""
    words, _, v, num_tasks = problem(3, 3, 4, 4)
    words[1:] = 0xFFFFFFFF
    for implementation in ("popcount", "select", "matrix"):
        got = contract(words, v, num_tasks, implementation)
        assert (got[4:] == 0).all()
    program = jax.jit(lambda *arrays: contraction.superpose(*arrays))
    assert np.max(program(words, np.ones(12, np.float32), num_tasks)) <= 4


def test_an_unknown_implementation_never_falls_back():
    words, _, v, num_tasks = problem(1, 1, 2, 2)
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        contraction.contract(words, v, num_tasks, "pallas")
    with pytest.raises(ValueError, match=r"planes must lie in \[2, 24\], got 25"):
        contraction.contract(words, v, num_tasks, "popcount", 25)
    with pytest.raises(ValueError, match="v must end in 32"):
        contraction.contract(words, jnp.ones(31), num_tasks)
    with pytest.raises(ValueError, match="alphas must end in 2"):
        contraction.superpose(words, jnp.ones(3), num_tasks)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes devices see a machine, its /proc/cpuinfo and flags of XLA; undoes it after."""

    def seen(name, flags, xla=""):
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags} sse4_2\n")
        monkeypatch.setattr(devices.platform, "machine", lambda: name)
        monkeypatch.setattr(devices, "CPU_INFO", tmp_path / ("cpuinfo" if flags else "absent"))
        monkeypatch.setenv("XLA_FLAGS", xla)
        devices.has_vector_popcount.cache_clear()

    monkeypatch.delenv("SUPSUP_JAX_CPU_FORM", raising=False)
    yield seen
    devices.has_vector_popcount.cache_clear()


@pytest.mark.parametrize(
    ("name", "flags", "xla", "want"),
    [
        ("x86_64", "avx512f avx512_vpopcntdq", "", "popcount"),
        ("x86_64", "avx2 avx512f", "", "select"),
        ("AMD64", None, "", "select"),
        ("arm64", None, "", "popcount"),
        ("x86_64", "avx512_vpopcntdq", "--xla_cpu_max_isa=AVX2", "select"),
        ("x86_64", "avx512_vpopcntdq", "--xla_cpu_max_isa=AVX512_VNNI", "popcount"),
    ],
)
def test_cpu_s_form_follows_what_the_cpu_has(machine, monkeypatch, name, flags, xla, want):
    machine(name, flags, xla)
    assert contraction.cpu_form() == want
    for form in ("select", "popcount"):
        monkeypatch.setenv("SUPSUP_JAX_CPU_FORM", form)
        assert contraction.cpu_form() == form
    monkeypatch.setenv("SUPSUP_JAX_CPU_FORM", "fast")
    with pytest.raises(ValueError, match="unset, 'popcount' or 'select', got 'fast'"):
        contraction.cpu_form()
