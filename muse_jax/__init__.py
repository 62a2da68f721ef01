"""Muse and its two neighbours, MaskGIT and Paella: one JAX framework to train, sample and edit."""

__version__ = "0.1.0"

from muse_jax import process as _process

_process.keep_off_libtpu()
