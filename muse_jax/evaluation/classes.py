"""How often a pipeline with classes draws what it is told, read from the pixels of one-object scenes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from muse_jax.evaluation import prompts


def measure(pipeline: Any, count: int, *, unguided: int, seed: int = 0) -> dict[str, Any]:
    """How often a pipeline with classes draws what it is told; the classes take turns.

    Returns:
      count; right: share of pictures with just one object, of the class's colour and shape; by_kind: the
      share whose number of objects, colour, shape is right; by_class: {name: right}; right_unguided.
    """
    runs = {"": (count, {}), "_unguided": (unguided, {"guidance_scale": 1.0})}
    figures: dict[str, Any] = {}
    for ending, (number, settings) in runs.items():
        if not number:
            continue
        names = [pipeline.classes[i % len(pipeline.classes)] for i in range(number)]
        output = pipeline(names, seed=[(seed + i) % 2**32 for i in range(number)], output_type="uint8", **settings)
        scores = [prompts.score(image, f"a {name}") for image, name in zip(output.images, names, strict=True)]
        summary = prompts.summarize(scores)
        figures |= {f"count{ending}": number, f"right{ending}": summary["all_statements"]}
        if not ending:
            right = {name: [all(s.values()) for s, n in zip(scores, names, strict=True) if n == name] for name in names}
            figures |= {"by_kind": summary["by_kind"], "by_class": {n: float(np.mean(r)) for n, r in right.items()}}
    return figures


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text, with the three classes that are right least often."""
    worst = sorted(figures["by_class"].items(), key=lambda item: item[1])[:3]
    lines = [f"{'right class':<22}{'pictures':>9}{'right':>8}  " + "".join(f"{kind:>9}" for kind in figures["by_kind"])]
    kinds = "".join(f"{share:>9.1%}" for share in figures["by_kind"].values())
    lines.append(f"{'classes':<22}{figures['count']:>9}{figures['right']:>8.1%}  {kinds}")
    if "right_unguided" in figures:
        lines.append(f"{'without guidance':<22}{figures['count_unguided']:>9}{figures['right_unguided']:>8.1%}")
    lines.append("worst: " + ", ".join(f"{name} {share:.0%}" for name, share in worst))
    return "\n".join(lines)
