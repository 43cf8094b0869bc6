"""Flax NNX networks of the paper's experiments, built to be masked: no biases anywhere."""

from supsup_jax.models.bnnet import BNNet, bnnet, is_norm_scale
from supsup_jax.models.conv_net import ConvNet
from supsup_jax.models.mlp import MLP, fc_1024_1024, lenet_300_100, notebook_300_300
from supsup_jax.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    gem_resnet18,
    resnet18,
    resnet50,
)

__all__ = [
    "MLP",
    "BNNet",
    "BasicBlock",
    "Bottleneck",
    "ConvNet",
    "ResNet",
    "bnnet",
    "fc_1024_1024",
    "gem_resnet18",
    "is_norm_scale",
    "lenet_300_100",
    "notebook_300_300",
    "resnet18",
    "resnet50",
]
