"""What a call of the pipeline returns."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

OUTPUT_TYPES = ("pil", "np", "uint8", "latent")


class Frames(NamedTuple):
    """How the tokens of one picture filled in, step by step."""

    images: np.ndarray  # uint8 [steps, height, width, 3]: what each step predicted for the whole picture
    masked: np.ndarray  # bool [steps, rows, columns]: tokens that were still masked after it


@dataclasses.dataclass(frozen=True)
class MuseOutput:
    """Pictures and the tokens they were decoded from; a decoder runs when its pictures are first asked for.

    Attributes:
      prompts, negative_prompts, seeds: of each picture.
      tokens: token ids of the pictures, int32 [n, rows, columns]; of the high resolution if the pipeline has one.
      low_tokens: low-resolution token ids.
      settings: of the decode loops, as JSON values.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    tokens: np.ndarray
    low_tokens: np.ndarray
    settings: Mapping[str, Any]
    output_type: str
    decode: Callable[[str, np.ndarray], np.ndarray] = dataclasses.field(repr=False)  # (stage, tokens) -> uint8 images
    best: str = "tokenizer_high"  # the stage whose decoder makes `images`
    finest: str = "tokenizer_high"  # the tokenizer of `tokens`
    steps: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = dataclasses.field(default=None, repr=False)
    # {stage: (uint8 [n, h, w, 3], bool [n, h, w])}: pictures whose pixels stay but where the mask is True
    originals: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = dataclasses.field(default=None, repr=False)
    # Left, top, right, bottom: what pictures lack of their outermost low-resolution tokens, shares of a token's side.
    cut: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    @functools.cached_property
    def images(self) -> Any:
        """The pictures, from the fine-tuned decoder if the pipeline has one."""
        return self._pictures(self.best, self.tokens)

    @functools.cached_property
    def high_images(self) -> Any:
        """The same tokens from the decoder of the tokenizer itself."""
        return self._pictures(self.finest, self.tokens)

    @functools.cached_property
    def low_images(self) -> Any:
        """What the base model made, at the low resolution."""
        return self._pictures("tokenizer_low", self.low_tokens)

    def decoding(self, index: int = 0) -> dict[str, Frames]:
        """How picture `index` filled in: {"base": ..., "superres": ...}, without the latter if there is none.

        Raises:
          ValueError: if the pipeline was called without history=True.
        """
        if self.steps is None:
            raise ValueError("The steps were not kept; call the pipeline with history=True.")
        last = list(self.steps)[-1]
        frames = {}
        for name, kept in self.steps.items():
            stage = self.best if name == last else "tokenizer_low"
            predicted, masked = (steps[:, index] for steps in kept)
            frames[name] = Frames(self.decode(stage, predicted), masked)
        return frames

    def _pictures(self, stage: str, tokens: np.ndarray) -> Any:
        if self.output_type == "latent":
            return tokens
        images = self.decode(stage, tokens)
        if self.originals is not None:
            original, repainted = self.originals[stage]
            images = np.where(repainted[..., None], images, original)
        images = self._trimmed(images)
        if self.output_type == "pil":
            return [Image.fromarray(image) for image in images]
        return images.astype(np.float32) / 255 if self.output_type == "np" else images

    def _trimmed(self, images: np.ndarray) -> np.ndarray:
        height, width = images.shape[1:3]
        cell = height // self.low_tokens.shape[1]
        left, top, right, bottom = (round(share * cell) for share in self.cut)
        return images[:, top : height - bottom, left : width - right]
