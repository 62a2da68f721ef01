"""What stands in for broken examples, and how many may be broken."""

import errno

import numpy as np
import pytest

from muse_jax.data import reading
from muse_jax.data.loader import Batches, Loader
from muse_jax.data.transforms import UnusableError


class Pictures:
    """A source of which every so many examples are broken, or can't be read."""

    def __init__(self, length: int, every: int, error: Exception, **options):
        self._length, self._every, self._error = length, every, error
        self.reader = reading.Reader(self._read, length=length, name_of="p{}".format, fixed=False, **options)

    def __len__(self) -> int:
        return self._length

    def _read(self, index, seed):
        if index % self._every == 0:
            raise self._error
        return {"image": np.full((1, 1, 3), index % 256, np.uint8)}

    def example(self, index, seed):
        return self.reader.example(index, seed)


BROKEN = UnusableError("broken pixel data")


def test_one_broken_example_in_a_hundred_is_replaced_and_more_end_the_run(monkeypatch):
    monkeypatch.setattr(reading, "WINDOW", 1000)
    some = Pictures(5000, 100, BROKEN, most_broken=0.01)
    made = [some.example(i, (i,)) for i in range(5000)]
    assert len(made) == 5000
    assert sorted(some.reader.broken) == list(range(0, 5000, 100))
    many = Pictures(5000, 80, BROKEN, most_broken=0.01)
    with pytest.raises(
        UnusableError, match=r"11 of the last 8\d\d examples .* p800 \(broken pixel data\); .*most_brok"
    ):
        [many.example(i, (i,)) for i in range(5000)]
    allowed = Pictures(5000, 80, BROKEN, most_broken=1.0)
    assert len([allowed.example(i, (i,)) for i in range(5000)]) == 5000


def test_few_pictures_may_be_broken_to_any_share():
    few = Pictures(60, 2, BROKEN, most_broken=0.01)
    assert len([few.example(i, (i,)) for _ in range(3) for i in range(60)]) == 180
    assert len(few.reader.broken) == 30


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "Input/output error"), "storage's fault"),
        (BROKEN, "all examples tried in its place"),
    ],
)
def test_what_ends_a_run_says_so_from_loading_processes_too(monkeypatch, root, workers, error, said):
    monkeypatch.syspath_prepend(root)  # where those find this file
    monkeypatch.setattr(reading, "PAUSES", (0.01,))  # theirs are longer
    loader = Loader(Batches(Pictures(8, 1, error), batch_size=4, seed=0), workers=workers)
    try:
        with pytest.raises(ValueError, match=said) as raised:
            next(loader)
    finally:
        loader.close()
    assert isinstance(raised.value, UnusableError)
