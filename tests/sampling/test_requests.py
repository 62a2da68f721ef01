"""Prompts, negative prompts, seeds and settings spread over pictures."""

import numpy as np
import pytest

from muse_jax.sampling.requests import make_requests


def test_one_prompt():
    requests = make_requests("a", seed=3)
    assert (requests.prompts, requests.negative_prompts, requests.seeds) == (("a",), ("",), (3,))


def test_pictures_of_a_prompt_are_neighbours_and_seeds_count_up():
    requests = make_requests(["a", "b"], "c", num_images_per_prompt=3, seed=7)
    assert requests.prompts == ("a", "a", "a", "b", "b", "b")
    assert requests.negative_prompts == ("c",) * 6
    assert requests.seeds == (7, 8, 9, 7, 8, 9)


def test_lists():
    requests = make_requests(["a", "b"], ["c", "d"], 2, seed=[10, 20])
    assert requests.negative_prompts == ("c", "c", "d", "d")
    assert requests.seeds == (10, 11, 20, 21)
    assert make_requests(["a", "b"], None, 2, seed=[1, 2, 3, 4]).seeds == (1, 2, 3, 4)
    assert make_requests(np.array(["a", "b"]), seed=np.arange(2)).seeds == (0, 1)
    assert requests.spread("x", 2).tolist() == [2, 2, 2, 2]
    assert requests.spread("x", [1.5, 2]).tolist() == [1.5, 1.5, 2, 2]
    assert requests.spread("x", (1, 2, 3, 4)).tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="guidance_scale has 3 values for 2 prompts of 2 pictures"):
        requests.spread("guidance_scale", [1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "prompt is 3; expected a string"),
        ({"prompt": [b"a"]}, "expected a string or a list of strings"),
        ({"prompt": []}, "empty list"),
        ({"prompt": "a", "negative_prompt": ["b", "c"]}, "negative_prompt has 2 values for 1 prompts"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": "a", "num_images_per_prompt": 1.5}, "num_images_per_prompt is 1.5"),
        ({"prompt": "a", "seed": -1}, "seed is -1; expected 0 to"),
        ({"prompt": "a", "seed": 2**32}, "seed is 4294967296"),
        ({"prompt": "a", "seed": 2**32 - 1, "num_images_per_prompt": 2}, "seed is 4294967295"),
        ({"prompt": "a", "seed": 0.5}, "seed is 0.5; expected a whole number"),
        ({"prompt": ["a", "b", "c"], "seed": [1, 2]}, "seed has 2 values for 3 prompts"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_requests(**arguments)
