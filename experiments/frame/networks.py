"""The paper's dense networks by the names that scripts take."""

from flax import nnx

import supsup_jax as ss
from supsup_jax import models

_MODELS = {
    "lenet-100": (models.lenet_300_100, 100),
    "lenet-500": (models.lenet_300_100, 500),
    "fc-500": (models.fc_1024_1024, 500),
}
NAMES = tuple(_MODELS)


def build(name: str, seed: int) -> ss.Network:
    """A network of 784 inputs with signed constant weights; the number in its name is C."""
    model, outputs = _MODELS[name]
    return ss.signed_constant(ss.Network.from_nnx(model(outputs, rngs=nnx.Rngs(0))), seed)
