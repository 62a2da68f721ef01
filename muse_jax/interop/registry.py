"""The formats that `import_weights` reads: one entry each."""

import dataclasses
from collections.abc import Callable, Mapping

from muse_jax.interop import folder, lpips, t5_hf, t5x


@dataclasses.dataclass(frozen=True)
class Published:
    """Weights in a format, as they are published.

    Attributes:
      name, where: what they are, and where their owners publish them.
      size: of what has to be fetched; "about" where it follows from the number of parameters.
      licence: of the weights.
    """

    name: str
    where: str
    size: str
    licence: str


@dataclasses.dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
      about: what it is, in one line.
      path: what `--path` names.
      convert: path -> the weights under our names.
      setting: the config's key that takes the folder written.
      published: who publishes weights in it.
    """

    about: str
    path: str
    convert: Callable[[str], folder.Converted]
    setting: str
    published: tuple[Published, ...]


_APACHE = "Apache-2.0"

FORMATS: Mapping[str, Format] = {
    "t5_hf": Format(
        "T5 1.1, Flan-T5 and T5 v1.0 encoders from Hugging Face: safetensors, whole or in parts; else a torch file",
        "the folder with config.json and model.safetensors (and spiece.model)",
        t5_hf.convert,
        "model.text.weights",
        (
            Published("T5 1.1 XXL", "huggingface.co/google/t5-v1_1-xxl (a torch file)", "44.5 GB", _APACHE),
            Published("T5 1.1 small, base, large, xl", "huggingface.co/google/t5-v1_1-SIZE", "not known", _APACHE),
            Published("Flan-T5 small to xxl", "huggingface.co/google/flan-t5-SIZE", "xxl: about 45 GB", _APACHE),
            Published("T5 v1.0 small to 11b", "huggingface.co/google-t5/t5-SIZE", "11b: about 45 GB", _APACHE),
        ),
    ),
    "t5x": Format(
        "T5 encoders from T5X checkpoints (zarr arrays and a msgpack tree); layers not scanned",
        "the folder of one checkpoint, which holds the file `checkpoint`; may be gs://",
        t5x.convert,
        "model.text.weights",
        (
            Published(
                "T5 1.1 XXL",
                "gs://t5-data/pretrained_models/t5x/t5_1_1_xxl/checkpoint_1000000",
                "about 45 GB, of which the encoder is 19 GB",
                _APACHE,
            ),
            Published(
                "Flan-T5 XXL",
                "gs://t5-data/pretrained_models/t5x/flan_t5_xxl/checkpoint_1114000",
                "about 45 GB",
                _APACHE,
            ),
            Published(
                "other sizes, v1.0 too", "github.com/google-research/t5x/blob/main/docs/models.md", "not known", _APACHE
            ),
        ),
    ),
    "lpips": Format(
        "LPIPS: torchvision's VGG16 with the linear heads of the lpips package (or an lpips.LPIPS saved whole)",
        "the folder with both files (*.safetensors or *.pth), or the files joined by a comma",
        lpips.convert,
        "task.perceptual_weights",
        (
            Published(
                "VGG16",
                "download.pytorch.org/models/vgg16-397923af.pth",
                "528 MB",
                "BSD-3-Clause (torchvision); trained on ImageNet, which has terms of its own",
            ),
            Published("LPIPS heads", "PyPI's lpips, weights/v0.1/vgg.pth", "7 kB", "BSD-2-Clause"),
        ),
    ),
}
