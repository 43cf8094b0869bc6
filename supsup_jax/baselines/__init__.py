"""What the paper compares with, on one frame (`sharing`): bounds, separate heads, BatchE, PSP."""

from supsup_jax.baselines.batche import Factors, FactorStore, batche
from supsup_jax.baselines.heads import lower_bound, separate_heads, upper_bound
from supsup_jax.baselines.psp import psp, rotate_dense
from supsup_jax.baselines.sharing import (
    HE_NORMAL,
    Baseline,
    Learned,
    draw_kernels,
    is_right,
    learn,
    own_bytes,
    own_weights,
    shared_weights,
)

__all__ = [
    "HE_NORMAL",
    "Baseline",
    "FactorStore",
    "Factors",
    "Learned",
    "batche",
    "draw_kernels",
    "is_right",
    "learn",
    "lower_bound",
    "own_bytes",
    "own_weights",
    "psp",
    "rotate_dense",
    "separate_heads",
    "shared_weights",
    "upper_bound",
]
