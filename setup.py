"""Installs muse_jax. `pip install -e .` is enough to run it, `pip install -e .[test]` to test it."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "muse_jax" / "__init__.py").read_text()).group(1)

# jaxlib 0.10.2 computes wrong sums on CPU without a word (jax#39103) and crashes on reductions of
# rank 7 (jax#40412); 0.11.0 and 0.11.1 have the same reduce fusion. tests/test_jaxlib.py has both
# reproducers. Python 3.11's newest is then 0.10.1; Python 3.12 and newer get what is newest.
WITHOUT_WRONG_SUMS = ">=0.10.1,!=0.10.2,!=0.11.0,!=0.11.1"

# The configs stand at the top of the repository, where people look for them, and are installed as
# muse_jax/configs, where the commands find them without a checkout.
CONFIGS = ["muse_jax.configs", *(f"muse_jax.configs.{name}" for name in setuptools.find_namespace_packages("configs"))]

# For muse_jax.convert. It asks for an older protobuf and pyarrow than others would bring, which they run with.
# sentencepiece's protobuf code asks for protobuf 7 from 0.2.3 on, Beam 2.77 for an older one.
CONVERT = ["apache-beam>=2.77", "pyarrow>=18.0", "sentencepiece<0.2.3"]
TFDS_BUILD = ["apache-beam>=2.77", "mlcroissant>=1.0"]  # which TFDS's command imports and does not ask for

setuptools.setup(
    name="muse_jax",
    version=VERSION,
    description="Muse: text-to-image generation by masked generative transformers, in JAX and Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *setuptools.find_namespace_packages(include=["muse_jax", "muse_jax.*"], exclude=["muse_jax.pretrained*"]),
        *CONFIGS,
    ],
    package_dir={"muse_jax.configs": "configs"},
    package_data={"muse_jax": ["pretrained/**", "pretrained/**/*"]},
    install_requires=[
        f"jax{WITHOUT_WRONG_SUMS}",
        f"jaxlib{WITHOUT_WRONG_SUMS}",
        "flax>=0.12.8",
        "optax>=0.2.8",
        # Older ones delete local checkpoints that were copied to a bucket, as if they were unfinished.
        "orbax-checkpoint>=0.12.3",
        # With which Orbax lists and deletes checkpoints in buckets; it doesn't ask for them.
        "google-cloud-storage>=3.0",
        "google-cloud-storage-control>=1.0",
        "grain>=0.2.16",
        "array-record>=0.8.1; sys_platform != 'win32'",
        "msgpack>=1.1",
        "ml-dtypes>=0.5",
        "absl-py>=2.3",
        "clu>=0.0.12",
        # clu's TensorBoard writers import both; TensorFlow itself no longer brings TensorBoard.
        "tensorflow>=2.21",
        "tensorboard>=2.20",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6.0",  # TFDS imports it for a builder in a file, and does not ask for it
        "seqio>=0.0.20",
        "sentencepiece>=0.2.1",
        "ml-collections>=1.1.0",
        "jaxtyping>=0.3.2",
        "matplotlib>=3.10",
        "numpy>=2.0",
        "pillow>=12.0",
        "safetensors>=0.6",
        "scipy>=1.16",
        "tqdm>=4.67",
    ],
    extras_require={
        "convert": CONVERT,
        "tfds_build": TFDS_BUILD,  # `tfds build` of the scenes
        # For muse_jax.compile: libtpu of the version that this jax asks for.
        "tpu_compile": [f"jax[tpu]{WITHOUT_WRONG_SUMS}"],
        "tpu": [f"jax[tpu]{WITHOUT_WRONG_SUMS}"],
        "cuda": [f"jax[cuda12]{WITHOUT_WRONG_SUMS}"],
        "launch": ["xmanager>=0.8.5"],  # launch/xmanager; launch/gke needs PyYAML alone, which flax brings
        "test": [
            *CONVERT,
            *TFDS_BUILD,
            "beartype>=0.22",
            "hypothesis>=6.140",
            "ipykernel>=7.0",  # with the two below, launch/colab's notebook is executed
            "ipywidgets>=8.1",
            "nbclient>=0.10",
            "kubernetes>=34.1",  # its models know the fields and types of manifests
            # For the tests that compile the big configs; of one Python only, since they take minutes.
            f"jax[tpu]{WITHOUT_WRONG_SUMS}; python_version < '3.12' and sys_platform == 'linux'",
            "pytest>=9.0",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
        ],
        # The original implementations, which tests/interop hold the importers against.
        "peers": [
            "lpips>=0.1.4",
            "torch>=2.10",
            "torchvision>=0.25",
            "transformers>=5.0",
        ],
    },
)
