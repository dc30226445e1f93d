"""What a method is. Methods differ in what they return, and in nothing else.

Weights are [out, in], activations [tokens, in], `keep` is boolean [out, in] with True = kept, a `budget` is an
integer number of kept weights. Capturing inputs, hooks, propagation, progress, resuming, dtypes and finite checks
belong to the walker, never to a method.
"""

from sparsekit.contracts.activations import ActivationCalibrator, Remainder, Rule, SignalKind, Site
from sparsekit.contracts.basics import (
    LinearInfo,
    Method,
    MethodOptions,
    OpenBlock,
    Options,
    Probes,
    Stat,
    Stats,
    TokenNeed,
    WholeModel,
)
from sparsekit.contracts.pruning import (
    AllocationContext,
    Allocator,
    LayerPruner,
    Level,
    MaskRefiner,
    Pruned,
    WeightUpdate,
)
from sparsekit.contracts.reshaping import Anatomy, Kept, NewLinear, ReshapeContext, Reshaped, Reshaper

__all__ = [
    "ActivationCalibrator",
    "AllocationContext",
    "Allocator",
    "Anatomy",
    "Kept",
    "LayerPruner",
    "Level",
    "LinearInfo",
    "MaskRefiner",
    "Method",
    "MethodOptions",
    "NewLinear",
    "OpenBlock",
    "Options",
    "Probes",
    "Pruned",
    "Remainder",
    "ReshapeContext",
    "Reshaped",
    "Reshaper",
    "Rule",
    "SignalKind",
    "Site",
    "Stat",
    "Stats",
    "TokenNeed",
    "WeightUpdate",
    "WholeModel",
]
