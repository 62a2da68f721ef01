"""Several sources as one, each with its weight; see `muse_jax.data.make_source`."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from muse_jax.data.loader import Order

_DRAWS = 2**31  # of one source, as Grain counts them; no run gets there


class Mixture:
    """The examples of several sources, one source after the other; `order` mixes them.

    Of any stretch of positions each source has its weight's share, to within a few examples: one of two
    sources, about three of ten. Weights count in whole hundredths of the smallest one. Each source goes through
    its own epochs, in its own order, with the crops that it would have alone.

    Args:
      sources: {label: (weight, source)}.

    Raises:
      ValueError: if one source has pictures and another precomputed tokens.
    """

    def __init__(self, sources: Mapping[str, tuple[float, Any]]):
        self._labels = list(sources)
        self._weights = [weight for weight, _ in sources.values()]
        self._sources = [source for _, source in sources.values()]
        self._starts = np.cumsum([0, *map(len, self._sources)])
        keys = {label: set(source[0]) - {"label"} for label, (_, source) in sources.items()}
        first = keys[self._labels[0]]
        for label, found in keys.items():
            if found != first:
                raise ValueError(
                    f"data.sources.{label} gives {', '.join(sorted(found))}, but data.sources.{self._labels[0]} gives "
                    f"{', '.join(sorted(first))}; sources of a mixture must give the same."
                )
        self._keys = first

    @property
    def sources(self) -> dict[str, Any]:
        """{label: source}."""
        return dict(zip(self._labels, self._sources, strict=True))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(index, (0, index))

    def example(self, index: int, seed: tuple[int, ...]) -> dict[str, Any]:
        """An example, without its label: not every source has one."""
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        source, own = self._sources[which], index - int(self._starts[which])
        *stream, example_id = seed
        seed = (*stream, example_id // len(self) * len(source) + own)
        if hasattr(source, "batch"):
            made = {key: values[0] for key, values in source.batch([own], [seed]).items()}
        else:
            made = source.example(own, seed)
        return {key: made[key] for key in self._keys}

    def order(self, seed: int) -> "MixedOrder":
        """In which order the examples come."""
        return MixedOrder([len(source) for source in self._sources], self._weights, seed)

    def captions(self) -> Iterator[str]:
        """Every caption of every source."""
        return itertools.chain.from_iterable(source.captions() for source in self._sources)

    def fingerprint(self) -> str:
        """Changes with any source and any weight."""
        parts = zip(self._weights, self._sources, strict=True)
        return "mixture:" + "+".join(f"{weight:g}*({source.fingerprint()})" for weight, source in parts)


class MixedOrder:
    """The example ids of a mixture, by position; see `loader.Order`.

    Args:
      lengths, weights: of the sources.
      seed: of each source's order.
    """

    def __init__(self, lengths: list[int], weights: list[float], seed: int):
        self._total = sum(lengths)
        self._lengths = lengths
        self._starts = [sum(lengths[:which]) for which in range(len(lengths))]
        self._orders = [Order(length, seed) for length in lengths]
        draws = [grain.MapDataset.range(_DRAWS).map(functools.partial(_pair, which)) for which in range(len(lengths))]
        self._draws = grain.MapDataset.mix(draws, weights)

    def id(self, position: int) -> int:
        """The example id at a position."""
        which, draw = self._draws[position]
        epoch, own = divmod(self._orders[which].id(draw), self._lengths[which])
        epochs = max((2**31 - 1) // self._total, 1)
        return epoch % epochs * self._total + self._starts[which] + own


def _pair(which: int, draw: int) -> tuple[int, int]:
    return which, int(draw)
