"""Reading examples one by one: substitutes for broken ones, and a cache of small ones."""

import collections
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from muse_jax.data.transforms import UnusableError, is_outage

CACHE_BYTES = 512 * 2**20  # of decoded pictures kept by one source

PAUSES = (0.1, 0.3, 1.0, 3.0)  # seconds between two tries to read what storage fails to give at the moment
WINDOW = 10_000  # examples read, of which a share may be broken
_TRIED = 1000  # examples in the place of a broken one, before giving up


def patiently(read: Callable[..., Any], *arguments: Any) -> Any:
    """What `read` returns, which is tried again, after pauses, while storage fails."""
    for pause in PAUSES:
        try:
            return read(*arguments)
        except OSError as error:
            if not is_outage(error):
                raise
        time.sleep(pause)
    return read(*arguments)


class Reader:
    """Reads examples by index, without ever failing for a broken one.

    For a broken example another one is read that depends on its index alone, so the same examples are
    seen on every machine and after every restart. Each broken one is logged once; `broken` has them all.
    One that storage doesn't give is not broken: other machines may have it. It is tried again, and then an error.
    Many broken ones are an error too: then it isn't the examples that are at fault, but what wrote or reads them.

    Where nothing about an example is random, it is kept in memory while `CACHE_BYTES` last: decoding a
    file takes as long as a good part of a small network's step.

    Args:
      read: makes a dict with `image` from an index and a seed.
      length: number of examples.
      name_of: an example's name for the log, from its index.
      fixed: whether the seed makes no difference.
      most_broken: share of any `WINDOW` examples that are read one after another, above which it is an error.
      spares: number of examples with the indices after those, for when all of those that were tried are broken.
    """

    def __init__(
        self,
        read: Callable[[int, tuple[int, ...]], dict[str, Any]],
        *,
        length: int,
        name_of: Callable[[int], str],
        fixed: bool,
        most_broken: float = 1.0,
        spares: int = 0,
    ):
        self._read = read
        self._length = length
        self._spares = spares
        self._name_of = name_of
        self._kept: dict[int, dict[str, Any]] = {}
        self._room = CACHE_BYTES if fixed else 0
        self._most_broken = most_broken
        self._reads, self._broken_reads = 0, collections.deque[int]()  # how many, and which of them were of broken ones
        self.broken: dict[int, str] = {}  # index -> reason

    def example(self, index: int, seed: tuple[int, ...]) -> dict[str, Any]:
        """The example, or the first sound one in its place.

        Raises:
          UnusableError: if a thousand examples in its place, and as many spare ones, are broken too,
            more are broken than `most_broken` says, or storage goes on failing.
        """
        for attempt in range(2 * _TRIED if self._spares else _TRIED):
            at = self._tried(index, attempt)
            if at in self._kept:
                return self._kept[at]
            if at in self.broken:
                continue
            self._reads += 1
            try:
                return self._keep(at, patiently(self._read, at, seed))
            except (UnusableError, OSError) as error:
                if is_outage(error):
                    raise UnusableError(
                        f"{self._name_of(at)} could not be read in {len(PAUSES) + 1} tries ({error}), which is "
                        "storage's fault, not the example's; see to it and start again"
                    ) from error
                self.broken[at] = str(error)
                logging.warning(
                    "Skipped %s (%s); another example stands in for it. So far %d of %d turned out broken.",
                    self._name_of(at), error, len(self.broken), self._length,
                )  # fmt: skip
                self._count_broken()
        raise UnusableError(
            f"{self._name_of(index)} and all examples tried in its place, of {self._length}, are broken; mend them",
            "; ".join(f"{self._name_of(i)} ({reason})" for i, reason in list(self.broken.items())[:5]),
        )

    def _count_broken(self) -> None:
        self._broken_reads.append(self._reads)
        while self._broken_reads[0] <= self._reads - WINDOW:
            self._broken_reads.popleft()
        if len(self._broken_reads) > self._most_broken * WINDOW:
            named = "; ".join(f"{self._name_of(i)} ({self.broken[i]})" for i in list(self.broken)[-3:])
            raise UnusableError(
                f"{len(self._broken_reads)} of the last {min(self._reads, WINDOW)} examples read are broken, the "
                f"newest {named}; see to what wrote them, or to what they are read from. data.most_broken "
                f"{self._most_broken:g} allows that share of {WINDOW}"
            )

    def _tried(self, index: int, attempt: int) -> int:
        if attempt == 0:
            return index
        draw = np.random.default_rng((index, attempt)).integers
        return int(draw(self._length) if attempt < _TRIED else self._length + draw(self._spares))

    def _keep(self, index: int, example: dict[str, Any]) -> dict[str, Any]:
        if not self._room:
            return example
        size = example["image"].nbytes
        if size <= self._room:  # several threads may pass at once, and be a few pictures over
            self._room -= size
            example["image"].flags.writeable = False
            self._kept[index] = example
        return example

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_room": self._room + sum(e["image"].nbytes for e in self._kept.values())}
