"""HopSupSup: masks as memories of a Hopfield network (`store`), found again by images alone
(`recovery`). A topic of the public interface, so its names are here: `ss.hopfield.recover`.
"""

from supsup_jax.hopfield.recovery import (
    BestRecovery,
    Recovery,
    RecoveryConfig,
    recover,
    recover_best,
)
from supsup_jax.hopfield.store import HopfieldStore

__all__ = [
    "BestRecovery",
    "HopfieldStore",
    "Recovery",
    "RecoveryConfig",
    "recover",
    "recover_best",
]
