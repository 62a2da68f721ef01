"""What stands in for examples that turn out to be broken when they are read."""

from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from muse_jax.data.transforms import UnusableError

_TRIED = 1000  # examples in the place of a broken one, before giving up


class Substitutes:
    """Reads examples, and for each broken one another that depends on its index alone.

    So the same examples are seen on every machine and after every restart, and no broken file ends a run.
    Each is logged once; `broken` has them all.

    Args:
      length: number of examples.
      name_of: an example's name for the log, from its index.
    """

    def __init__(self, length: int, name_of: Callable[[int], str]):
        self._length = length
        self._name_of = name_of
        self.broken: dict[int, str] = {}  # index -> reason

    def read(self, index: int, read: Callable[[int], Any]) -> Any:
        """``read(index)``, or of the first sound example in its place.

        Raises:
          RuntimeError: if a thousand examples in its place are broken too.
        """
        for attempt in range(_TRIED):
            at = index if attempt == 0 else int(np.random.default_rng((index, attempt)).integers(self._length))
            if at in self.broken:
                continue
            try:
                return read(at)
            except (UnusableError, OSError) as error:
                self.broken[at] = str(error)
                logging.warning(
                    "Skipped %s (%s); another example stands in for it. So far %d of %d turned out broken.",
                    self._name_of(at), error, len(self.broken), self._length,
                )  # fmt: skip
        raise RuntimeError(
            f"{self._name_of(index)} and all examples tried in its place are broken: "
            + "; ".join(f"{self._name_of(i)} ({reason})" for i, reason in list(self.broken.items())[:5])
        )
