"""How many parameters configs have, and where each lives: python -m muse_jax.parameters configs/*.py.

Nothing is allocated. With --write=DIR every config's layout is written to DIR, one line for each parameter
and each leaf of the optimizer's state (name, shape, dtype, logical axes, mesh axes), as on the 256 chips of
Muse, section 3:

    python -m muse_jax.parameters --write=tests/golden configs/*.py configs/base_3b.py:precomputed

tests/test_layout.py compares what is there with what the code makes.
"""

import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags

from muse_jax import ahead, process, specs
from muse_jax.training import step, trees

_FOREIGN = ("text_encoder", "discriminator")  # counted by themselves


def program_of(config: str, chips: int = 0) -> step.Program:
    """The program of a config (FILE.py or FILE.py:variant), on as few chips as its mesh has if 0."""
    spec = specs.from_config(ahead.read_config(config))
    folder = pathlib.Path(config.partition(":")[0]).resolve().parent
    mesh = ahead.abstract_mesh(spec.mesh, chips or ahead.fewest_chips(spec.mesh))
    return ahead.program(spec, mesh, folder)


def counts(program: step.Program) -> dict[str, int]:
    """Parameters of the model, of what is trained (discriminators too), and of the frozen networks."""
    trained = trees.named_leaves(program.state.params)
    frozen = trees.named_leaves(program.frozen)
    model = {name: leaf for name, leaf in trained.items() if name.split("/")[0] not in _FOREIGN}
    return {part: _size(leaves) for part, leaves in (("model", model), ("state", trained), ("frozen", frozen))}


def _size(leaves: dict[str, Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def layout(program: step.Program) -> str:
    """One line for each leaf of parameters, optimizer state and frozen networks."""
    state = program.state
    lines = [f"mesh {dict(program.mesh.shape)}"]
    for part, tree in (("params", state.params), ("optimizer", state.optimizer), ("frozen", program.frozen)):
        for name, leaf in trees.named_leaves(tree).items():
            axes = _text(program.axes[name]) if part == "params" else "-"
            mesh = _text(tuple(leaf.sharding.spec)) or "whole"
            lines.append(f"{part}/{name} {list(leaf.shape)} {leaf.dtype.name} | {axes} | {mesh}")
    return "\n".join(lines) + "\n"


def _text(axes: Sequence[Any]) -> str:
    return ", ".join("+".join(a) if isinstance(a, tuple) else a or "." for a in axes)


def golden_name(config: str) -> str:
    """The file of a config's layout: its path below configs/, with "_" for what a file's name can't have."""
    return pathlib.Path(config).name.replace(".py", "").replace(":", "_") + ".txt"


def main(argv: Sequence[str]) -> None:
    process.quiet()
    jax.config.update("jax_platforms", "cpu")  # shapes need no accelerator
    if _WRITE.value and not pathlib.Path(_WRITE.value).is_dir():
        print(f"SpecError: can't write to {_WRITE.value}: there is no such folder.", file=sys.stderr)
        sys.exit(1)
    print(f"{'config':36}{'model':>16}{'trained state':>16}{'frozen':>16}")
    for config in argv[1:]:
        try:
            program = program_of(config, ahead.V4_POD_CHIPS if _WRITE.value else 0)
        except specs.SpecError as error:
            print(f"SpecError: {config}: {error}", file=sys.stderr)
            sys.exit(1)
        found = counts(program)
        print(f"{config:36}" + "".join(f"{found[part]:16,}" for part in ("model", "state", "frozen")))
        if _WRITE.value:
            (pathlib.Path(_WRITE.value) / golden_name(config)).write_text(layout(program))


if __name__ == "__main__":
    _WRITE = flags.DEFINE_string("write", None, "Folder for the layouts of the configs.")
    app.run(main)
