"""Supermasks in Superposition (arXiv 2006.14769) as a JAX library.

Thousands of tasks in one fixed network, one bit a weight, the right task found by one gradient.
Names listed in `__all__` are the public interface; other modules may change.
"""

from supsup_jax.hopfield.recovery import (
    BestRecovery,
    Recovery,
    RecoveryConfig,
    recover,
    recover_best,
)
from supsup_jax.hopfield.store import HopfieldStore
from supsup_jax.inference.evaluation import evaluate, parse_scenario
from supsup_jax.inference.one_shot import alpha_gradient, one_shot, predict
from supsup_jax.inference.rejection import Rejection, best_score, calibrate, confidence, reject
from supsup_jax.inference.search import Rule, binary_search, descend, oracle, rerank
from supsup_jax.inference.streamed import one_shot_streamed
from supsup_jax.masks import (
    ErdosRenyi,
    kept_count,
    kept_counts,
    signed_topk_mask,
    threshold_mask,
    topk_mask,
)
from supsup_jax.network import Network, signed_constant
from supsup_jax.objectives import Superfluous, entropy, max_confidence, max_logit
from supsup_jax.stores.disk import DiskStore, TaskInfo
from supsup_jax.stores.mask_store import MaskStore
from supsup_jax.stores.sharded import ShardedStore, shard
from supsup_jax.training.batches import TrainProgress, start_training, train_on_batches
from supsup_jax.training.stream import Decision, StreamConfig, StreamState, init_stream, observe
from supsup_jax.training.train import ScoreMean, TrainConfig, train_task, train_tasks
from supsup_jax.types import (
    CapacityError,
    Normalize,
    StoreError,
    Task,
    TaskBelief,
    TaskData,
    TrainResult,
)
from supsup_jax.version import __version__

__all__ = [
    "__version__",
    "BestRecovery",
    "CapacityError",
    "Decision",
    "DiskStore",
    "ErdosRenyi",
    "HopfieldStore",
    "MaskStore",
    "Network",
    "Normalize",
    "Recovery",
    "RecoveryConfig",
    "Rejection",
    "Rule",
    "ScoreMean",
    "ShardedStore",
    "StoreError",
    "StreamConfig",
    "StreamState",
    "Superfluous",
    "Task",
    "TaskBelief",
    "TaskData",
    "TaskInfo",
    "TrainConfig",
    "TrainProgress",
    "TrainResult",
    "alpha_gradient",
    "best_score",
    "binary_search",
    "calibrate",
    "confidence",
    "descend",
    "entropy",
    "evaluate",
    "init_stream",
    "kept_count",
    "kept_counts",
    "max_confidence",
    "max_logit",
    "observe",
    "one_shot",
    "one_shot_streamed",
    "oracle",
    "parse_scenario",
    "predict",
    "recover",
    "recover_best",
    "reject",
    "rerank",
    "shard",
    "signed_constant",
    "signed_topk_mask",
    "start_training",
    "threshold_mask",
    "topk_mask",
    "train_on_batches",
    "train_task",
    "train_tasks",
]
