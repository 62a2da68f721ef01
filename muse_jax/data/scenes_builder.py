"""The generated scenes as a TFDS data set.

  tfds build muse_jax/data/scenes_builder.py --data_dir=DIR --file_format=array_record --config=64

writes them to DIR/scenes/64/1.0.0; fewer of them with ``--max_examples_per_split=1000``. TFDS's command
imports apache-beam and mlcroissant for its other uses (``pip install -e '.[tfds_build]'``), and stops where
they are not installed; the same build without them is

  python -m muse_jax.data.scenes_builder --data_dir=DIR --config=64

They are read with ``data.name="tfds"``, ``data.dataset="scenes/64"``, ``data.path=DIR`` and
``data.text_key="caption"``. Training on scenes does not need this: ``data.name="scenes"`` makes them as
it goes.
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from muse_jax.data import scenes

COUNTS = {"train": 50_000, "test": 2_000, "held_out": 2_000}
_CHUNK = 256  # scenes rendered at once


class ScenesConfig(tfds.core.BuilderConfig):
    """Scenes of one resolution; its name is the side in pixels."""

    def __init__(self, image_size: int):
        super().__init__(name=str(image_size), description=f"{image_size} x {image_size} pixels")
        self.image_size = image_size


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Coloured shapes on a background, with captions and the truth about every object."""

    VERSION = tfds.core.Version(f"{scenes.VERSION}.0.0")
    RELEASE_NOTES = {f"{scenes.VERSION}.0.0": "As muse_jax.data.scenes has them."}
    BUILDER_CONFIGS = [ScenesConfig(size) for size in (64, 32, 128, 256)]

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.image_size
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "index": np.int64,
                    "background": tfds.features.ClassLabel(names=list(scenes.BACKGROUNDS)),
                    "objects": tfds.features.Sequence(
                        {
                            "shape": tfds.features.ClassLabel(names=list(scenes.SHAPES)),
                            "color": tfds.features.ClassLabel(names=list(scenes.COLORS)),
                            "size": tfds.features.ClassLabel(names=list(scenes.SIZES)),
                            "x": np.float32,
                            "y": np.float32,
                            "diameter": np.float32,
                        }
                    ),
                }
            ),
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for start in range(0, COUNTS[split], _CHUNK):
            indices = range(start, min(start + _CHUNK, COUNTS[split]))
            made = scenes.scenes(indices, split=split)
            pictures = scenes.render_batch(made, self.builder_config.image_size)
            for index, scene, picture in zip(indices, made, pictures, strict=True):
                yield (
                    index,
                    {
                        "image": picture,
                        "caption": scene.caption,
                        "index": index,
                        "background": scene.background,
                        "objects": [_object(scene, thing) for thing in scene.objects],
                    },
                )


def _object(scene: scenes.Scene, thing: scenes.SceneObject) -> dict[str, Any]:
    group = scene.groups[thing.group]
    truth = {"shape": group.shape, "color": group.color, "size": group.size}
    return {**truth, "x": thing.x, "y": thing.y, "diameter": thing.diameter}


def main(arguments: list[str] | None = None) -> None:
    """TFDS's own build command on this file, without what its other commands import."""
    from tensorflow_datasets.scripts.cli import build, cli_utils

    given = sys.argv[1:] if arguments is None else arguments
    parse = cli_utils.make_flags_parser(build.Args, description=__doc__)
    parse(["scenes_builder", __file__, "--file_format=array_record", *given]).execute()


if __name__ == "__main__":
    main()
