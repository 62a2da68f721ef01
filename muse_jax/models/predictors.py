"""From a model's spec to its token predictor; tasks and samplers need to know no more of it."""

from typing import Any

import flax.linen as nn

from muse_jax.models import maskgit, muse, paella


def from_spec(spec: Any) -> nn.Module:
    """The network that predicts tokens as a `BaseSpec`, `SuperResSpec`, `MaskGITSpec` or `PaellaSpec` says.

    It has the methods `encode_text`, `condition` and `logits`; see `muse`.
    """
    if hasattr(spec, "widths"):
        return paella.Paella(spec)
    return maskgit.MaskGIT(spec) if hasattr(spec, "classes") else muse.TokenTransformer(spec)
