"""From a model's spec to the module that predicts tokens; tasks and samplers need to know no more of it."""

from typing import Any

import flax.linen as nn

from muse_jax.models.maskgit import MaskGIT
from muse_jax.models.muse import TokenTransformer


def predictor(spec: Any) -> nn.Module:
    """A module with `encode_text`, `condition` and `logits`: MaskGIT's if the spec has classes, else Muse's."""
    return MaskGIT(spec) if hasattr(spec, "classes") else TokenTransformer(spec)
