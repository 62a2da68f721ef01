"""Weights that others published, converted to this project's names and layouts (see `registry`)."""
