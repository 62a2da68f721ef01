"""Which of several pictures of a prompt follows it best."""

from collections.abc import Sequence

import numpy as np

from muse_jax.evaluation import prompts as statements


def check(prompts: Sequence[str]) -> None:
    """Raises ValueError for a prompt that pictures can't be ranked by: one outside the grammar of scenes."""
    for prompt in prompts:
        try:
            statements.parse(prompt)
        except statements.CaptionError as error:
            raise ValueError(
                f"pictures are ranked by what can be read from a generated scene, and {prompt!r} is no caption of one "
                f"({error}); leave --best_of out, or write the prompt as in 'a large red circle on a white background'."
            ) from error


def best(images: Sequence[np.ndarray], prompts: Sequence[str], each: int, side: int | None = None) -> list[int]:
    """The index of the best picture of each group; of equals the first.

    Args:
      images: uint8 [h, w, 3] each; pictures of one prompt are neighbours.
      prompts: of each picture.
      each: pictures in a group.
      side: of the square scenes that the model was trained on, for pictures that are larger; see `reader.read`.

    Raises:
      ValueError: as `check`.
    """
    check(prompts)
    pairs = zip(images, prompts, strict=True)
    held = [list(statements.score(image, prompt, side).values()) for image, prompt in pairs]
    shares = np.array([np.mean(values) for values in held]).reshape(-1, each)
    return (np.arange(len(shares)) * each + shares.argmax(axis=1)).tolist()
