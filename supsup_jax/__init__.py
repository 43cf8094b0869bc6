"""Supermasks in Superposition (arXiv 2006.14769) as a JAX library.

Thousands of tasks in one fixed network, one bit a weight, the right task found by one gradient.
Names listed in `__all__` are the public interface; what few call is reached by topic, such as
`ss.rejection.calibrate`. Other modules may change.
"""

from supsup_jax import hopfield, losses, objectives
from supsup_jax.inference import rejection
from supsup_jax.inference.diagnosis import diagnose, measure_statistics
from supsup_jax.inference.evaluation import LabelAccuracy, evaluate, parse_scenario
from supsup_jax.inference.misfit import misfit
from supsup_jax.inference.one_shot import alpha_gradient, one_shot, one_shot_streamed
from supsup_jax.inference.predict import predict
from supsup_jax.inference.search import Rule, binary_search, descend, oracle, rerank
from supsup_jax.labelled_views import LabelledViews
from supsup_jax.masks import (
    ErdosRenyi,
    kept_count,
    kept_counts,
    signed_topk_mask,
    threshold_mask,
    topk_mask,
)
from supsup_jax.network import Network, signed_constant
from supsup_jax.objectives import (
    MaxLogit,
    Standardised,
    Superfluous,
    entropy,
    max_confidence,
    max_logit,
)
from supsup_jax.stores.disk import DiskStore
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.stores.sharded import ShardedStore, shard
from supsup_jax.training import stream
from supsup_jax.training.batches import start_training, train_on_batches
from supsup_jax.training.config import Made, TrainConfig
from supsup_jax.training.steps import ScoreMean
from supsup_jax.training.train import train_task, train_tasks
from supsup_jax.types import (
    CapacityError,
    Normalize,
    StoreError,
    Task,
    TaskBelief,
    TaskData,
    TaskIdError,
    TrainResult,
)
from supsup_jax.version import __version__

__all__ = [
    "__version__",
    "CapacityError",
    "DiskStore",
    "ErdosRenyi",
    "LabelAccuracy",
    "LabelledViews",
    "Made",
    "MaskStore",
    "MaxLogit",
    "Network",
    "Normalize",
    "Rule",
    "ScoreMean",
    "ShardedStore",
    "Standardised",
    "StoreError",
    "Superfluous",
    "Task",
    "TaskBelief",
    "TaskData",
    "TaskIdError",
    "TrainConfig",
    "TrainResult",
    "alpha_gradient",
    "binary_search",
    "descend",
    "diagnose",
    "entropy",
    "evaluate",
    "hopfield",
    "kept_count",
    "kept_counts",
    "losses",
    "max_confidence",
    "max_logit",
    "measure_statistics",
    "misfit",
    "objectives",
    "one_shot",
    "one_shot_streamed",
    "oracle",
    "parse_scenario",
    "predict",
    "rejection",
    "rerank",
    "shard",
    "signed_constant",
    "signed_topk_mask",
    "start_training",
    "stream",
    "threshold_mask",
    "topk_mask",
    "train_on_batches",
    "train_task",
    "train_tasks",
]
