"""The pictures that commands leave: samples, how tokens fill in, the curves of training and of a sweep."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Image = np.ndarray  # uint8 [height, width, 3]


def samples(path: str | pathlib.Path, prompts: Sequence[str], pictures: Mapping[str, Sequence[Image]]) -> None:
    """Writes a sheet with, for each prompt, one picture a column side by side and the prompt under them.

    Args:
      path: the PNG to write.
      prompts: one for each row of pictures.
      pictures: column title -> one picture for each prompt, such as those of one decoder.
    """
    columns = 2 if len(prompts) > 1 else 1  # prompts beside each other
    rows = -(-len(prompts) // columns)
    width = len(pictures)
    captions = ["\n".join(textwrap.wrap(prompt, 28 * width)) for prompt in prompts]
    lines = 1 + max(caption.count("\n") for caption in captions)
    size = (columns * width * 1.9, rows * (2.15 + 0.14 * lines))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    for i, (caption, cell) in enumerate(
        zip(captions, figure.subfigures(rows, columns, squeeze=False).flat, strict=False)
    ):
        for axes, (title, column) in zip(cell.subplots(1, width, squeeze=False)[0], pictures.items(), strict=True):
            _show(axes, column[i])
            axes.set_title(title, fontsize=7, color="0.4", pad=2)
        cell.supxlabel(caption, fontsize=8, parse_math=False)
    figure.savefig(path)


def decoding(path: str | pathlib.Path, prompt: str, rows: Mapping[str, Sequence[Image]], shown: int = 8) -> None:
    """Writes how one prompt's tokens fill in: a row for each model, a column for each of some steps.

    Args:
      path: the PNG to write.
      prompt: the prompt.
      rows: title -> a picture after each decoding step, masked tokens covered.
      shown: how many steps of a row are drawn, evenly spaced, the last one among them.
    """
    width = min(shown, max(len(frames) for frames in rows.values()))
    figure = Figure(figsize=(width * 1.5, len(rows) * 1.95 + 0.3), dpi=110)
    grid = figure.subplots(len(rows), width, squeeze=False)
    titles = {title: textwrap.wrap(title, 22, max_lines=3) for title in rows}
    beside = (0.1 + 0.14 * max(map(len, titles.values()))) / (width * 1.5)
    figure.subplots_adjust(left=max(0.04, beside), right=0.99, top=0.9, bottom=0.09, wspace=0.05, hspace=0.3)
    for axes, (title, frames) in zip(grid, rows.items(), strict=True):
        chosen = np.unique(np.linspace(0, len(frames) - 1, min(width, len(frames))).round().astype(int))
        for axis in axes[len(chosen) :]:
            axis.axis("off")
        for axis, step in zip(axes, chosen, strict=False):
            _show(axis, frames[step])
            axis.set_title(f"step {step + 1} of {len(frames)}", fontsize=7, color="0.4", pad=2)
        axes[0].set_ylabel("\n".join(titles[title]), fontsize=8)
    figure.supxlabel(prompt, fontsize=9, parse_math=False)
    figure.savefig(path)


def cover_masked(picture: Image, masked: np.ndarray) -> Image:
    """Draws a fine grey checkerboard over the places of masked tokens.

    Args:
      picture: uint8 [h, w, 3].
      masked: bool [rows, columns]; h and w are multiples of them.
    """
    factors = [side // tokens for side, tokens in zip(picture.shape, masked.shape, strict=False)]
    places = np.kron(masked, np.ones(factors, bool)).astype(bool)
    board = np.where(np.indices(places.shape).sum(0) % 2, 150, 205).astype(np.uint8)
    return np.where(places[..., None], board[..., None], picture)


def curves(path: str | pathlib.Path, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes the training and held-out loss of every stage over its steps.

    Args:
      path: the PNG to write.
      records: stage -> the lines of its metrics.jsonl, each with "step"; "loss" is drawn as it was
        written, "eval/loss" as dots.
    """
    figure = Figure(figsize=(3.4 * len(records), 2.8), dpi=110, layout="constrained")
    for axes, (stage, lines) in zip(figure.subplots(1, len(records), squeeze=False)[0], records.items(), strict=True):
        for key, style in (("loss", "-"), ("eval/loss", "o")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, markersize=3, label=key)
        axes.set_title(stage, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(path)


def sweep(path: str | pathlib.Path, figures: Mapping[str, Any]) -> None:
    """Writes accuracy and Fréchet distance over the number of steps, of schedules and of samplers.

    Args:
      path: the PNG to write.
      figures: from `evaluation.sweep.measure`.
    """
    titles = {"accuracy": f"share of {figures['accuracy_of']} that hold", "frechet": "Fréchet distance"}
    figure = Figure(figsize=(10, 7), dpi=110, layout="constrained")
    for row, kind in zip(figure.subplots(2, 2), ("schedules", "samplers"), strict=True):
        for axes, (key, title) in zip(row, titles.items(), strict=True):
            for name, points in figures[kind].items():
                axes.plot([p["steps"] for p in points], [p[key] for p in points], "o-", markersize=3, label=name)
            if key == "frechet":
                axes.axhline(figures["tokenizer"], color="0.6", linestyle="--", label="reconstructions")
                axes.set_yscale("log")
            axes.set_xscale("log", base=2)
            axes.set_title(f"{kind}: {title}", fontsize=9)
            axes.set_xlabel("decoding steps", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    figure.savefig(path)


def _show(axes, picture: Image) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("0.85")
