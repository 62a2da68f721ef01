"""Compiles a run for a TPU on a machine that has none, and says what it would take.

    python -m muse_jax.compile --config=configs/base_3b.py --topology=v4:4x8x8 --json=base_3b.json
    python -m muse_jax.compile --config=configs/superres_512.py --topology=v4:2x2x1 --mode=sample --batch=8

--mode=train compiles the step that muse_jax.train runs (`Program.compile_train`), for all chips of the
topology; --mode=sample the decoding loops that muse_jax.sample runs, on one of its chips. libtpu does it
(`pip install muse_jax[tpu_compile]`); nothing is allocated, no TPU is looked for, and no weights are read:
see muse_jax/ahead.py for where the shapes of earlier stages come from. --optimization_level=O0 takes less than
half of the minutes: it says whether a run compiles and fits, but its program is slower than `train`'s.

FLOPs, bytes and collectives are read from the compiled program with its loops multiplied out
(muse_jax/hlo.py). Times are estimates from the chips' published rates (muse_jax/roofline.py).
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()

import importlib.util
import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from muse_jax import ahead, cascade, flops, hlo, roofline, specs, traffic, train
from muse_jax.training import executable, sharding, trees

AS_TRAINED = "UNKNOWN"  # jax's name for the optimization level that each compiler has by itself
PAPER_STEP_S = 0.6  # Muse, section 3: a week for 1M steps on 256 TPU v4 chips
# libtpu describes a TPU host by these; without them it asks the network about a machine that isn't there.
# It is also made for one process a machine, which holds for the TPU and not for compiling.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(topology: str) -> tuple[roofline.Chip, list[Any]]:
    """The chip and the devices of a topology such as "v4:4x8x8".

    Raises:
      specs.SpecError: for a chip without rates, or without libtpu.
    """
    name, _, sides = topology.partition(":")
    if name not in roofline.CHIPS:
        raise specs.SpecError(f"topology is {topology!r}; expected one of {', '.join(roofline.CHIPS)}, then :4x8x8.")
    _check_sides(topology, sides.split("x"), roofline.CHIPS[name])
    if importlib.util.find_spec("libtpu") is None:
        raise specs.SpecError("libtpu is not installed; pip install muse_jax[tpu_compile].")
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")  # constants are made there; libtpu only compiles
    from jax.experimental import topologies

    # The two cores of a v4 or v5p chip are one device.
    cores = {"chip_config_name": "megacore"} if name in ("v4", "v5p") else {}
    host = (1, 1, 1) if sides == "1x1" else (2, 2, 1)
    settings = dict(**cores, chips_per_host_bounds=host, num_slices=1)
    try:
        described = topologies.get_topology_desc(topology, "tpu", **settings)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise specs.SpecError(f"topology is {topology!r}, which libtpu doesn't know: {reason}") from error
    return roofline.CHIPS[name], list(described.devices)


def _check_sides(topology: str, sides: Sequence[str], chip: roofline.Chip) -> None:
    """Refuses machines that aren't built, though libtpu would describe some of them."""
    example = "4x8x8" if chip.torus == 3 else "16x16"
    if len(sides) != chip.torus or not all(side.isdecimal() and int(side) for side in sides):
        raise specs.SpecError(f"topology is {topology!r}; expected {chip.torus} sides of the torus, as in {example}.")
    if math.prod(map(int, sides)) > chip.largest:
        raise specs.SpecError(f"topology is {topology!r}; the largest slice of this chip has {chip.largest} chips.")


def compile_train(spec: specs.Spec, configs: pathlib.Path, topology: str, text: str = "") -> dict[str, Any]:
    """The report of the train step; `text` is a file for the compiled program."""
    chip, devices = topology_devices(topology)
    program = ahead.program(spec, sharding.make_mesh(spec.mesh, devices), configs)
    compiled = program.compile_train(program.lower_train(program.abstract_batch(ahead.batch(spec))))
    if text:
        pathlib.Path(text).write_text(compiled.as_text())
    module = hlo.parse(compiled.as_text())
    chips = program.mesh.size
    coordinates = [device.coords for device in program.mesh.devices.flat]
    model = flops.train(spec, ahead.tokenizers(spec, configs))
    times = roofline.estimate(module, chip, coordinates)
    return {
        "mode": "train",
        "topology": topology,
        "chips": chips,
        "mesh": dict(program.mesh.shape),
        "parameters": _parameters(program.state.params),
        "frozen_parameters": _parameters(program.frozen),
        "chip": memory(compiled, chip),
        "flops": work(model, hlo.flops(module) * chips),
        "collectives": traffic.collectives(module),
        "unknown_loops": hlo.unknown_loops(module),
        "estimate": roofline.report(times, model, chip, chips),
        "paper": {"step_s": PAPER_STEP_S, "days_1m_steps": 7.0},
    }


def compile_sample(
    spec: specs.Spec, configs: pathlib.Path, topology: str, batch: int, base: str, decoder: str
) -> dict[str, Any]:
    """The report of sampling with everything on one chip; see `muse_jax.cascade`."""
    chip, devices = topology_devices(topology)
    networks, programs = cascade.lower(spec, configs, batch, devices[0], base, decoder)
    parts, resident = {}, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(networks))
    for name, lowered in programs.items():
        compiled = lowered.program.compile()
        module = hlo.parse(compiled.as_text())
        times = roofline.estimate(module, chip)
        parts[name] = {
            "chip": memory(compiled, chip),
            "flops": work(lowered.model_flops, hlo.flops(module)),
            "collectives": traffic.collectives(module),
            "unknown_loops": hlo.unknown_loops(module),
            "estimate": roofline.report(times, lowered.model_flops, chip, 1),
        }
    return {
        "mode": "sample",
        "topology": topology,
        "chips": 1,
        "batch": batch,
        "parameters": _parameters(networks),
        **_together(parts, resident, chip),
        "programs": parts,
        "paper": {"seconds": 1.3 if "superres" in parts else 0.5, "batch": 1},
    }


def _together(parts: Mapping[str, Any], resident: int, chip: roofline.Chip) -> dict[str, Any]:
    """The programs one after another, with every network staying on the chip."""
    temporary = max(p["chip"]["temporary_bytes"] for p in parts.values())
    times = {k: sum(p["estimate"][k] for p in parts.values()) for k in ("compute_s", "memory_s", "interconnect_s")}
    step = sum(p["estimate"]["step_s"] for p in parts.values())
    model, program = (sum(p["flops"][k] for p in parts.values()) for k in ("model", "program"))
    longest = max(times, key=times.get)
    return {
        "chip": {
            "argument_bytes": resident,
            "temporary_bytes": temporary,
            "total_bytes": resident + temporary,
            "memory_bytes": chip.memory_bytes,
        },
        "flops": work(model, program),
        "collectives": {},
        "estimate": {
            **times,
            "step_s": step,
            "binds": longest.removesuffix("_s"),
            "utilisation": model / (step * chip.flops),
            "days_1m_steps": step * 1e6 / 86400,
        },
    }


def memory(compiled: Any, chip: roofline.Chip) -> dict[str, float]:
    """Bytes on one chip."""
    parts = executable.memory(compiled)
    return {
        "argument_bytes": parts["arguments"],
        "temporary_bytes": parts["temporaries"],
        "total_bytes": sum(parts.values()),
        "memory_bytes": chip.memory_bytes,
    }


def work(model: float, program: float) -> dict[str, float]:
    """FLOPs on all chips, and the share of what is run that the model's definition doesn't ask for."""
    share = max(0.0, 1 - model / program) if program else 0.0
    return {"model": model, "program": program, "recomputed_share": share}


def _parameters(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in trees.named_leaves(tree).values())


def check_files(*files: str | None) -> None:
    """Raises SpecError, before minutes are spent on compiling, for a file that couldn't be written then."""
    for file in filter(None, files):
        folder = pathlib.Path(file).absolute().parent
        if not folder.is_dir():
            raise specs.SpecError(f"can't write {file}: there is no folder {folder}.")
        if pathlib.Path(file).is_dir():
            raise specs.SpecError(f"can't write {file}: it is a folder.")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise specs.SpecError(f"can't write {file}: {error.strerror} in {folder}.") from error


def said(report: Mapping[str, Any]) -> str:
    """A report for people."""
    chip, work, times = report["chip"], report["flops"], report["estimate"]
    gib = {name: value / 2**30 for name, value in chip.items()}
    lines = [
        f"{report['topology']}, {report['chips']} chips: {report['parameters'] / 1e6:,.0f}M parameters",
        f"a chip      {gib['argument_bytes']:.2f} GiB arguments, {gib['temporary_bytes']:.2f} GiB temporaries, "
        f"{gib['total_bytes']:.2f} of {gib['memory_bytes']:.0f} GiB",
        f"FLOPs       {work['model']:.3e} of the model, {work['program']:.3e} of the program "
        f"({work['recomputed_share']:.1%} beyond the model's)",
    ]
    for kind, found in sorted(report["collectives"].items()):
        lines.append(f"{kind:20} {found['count']:6.0f} times, {found['bytes'] / 1e9:.2f} GB a chip")
    lines.append(
        f"estimate    compute {times['compute_s']:.4f} s, memory {times['memory_s']:.4f} s, interconnect "
        f"{times['interconnect_s']:.4f} s; {times['binds']} binds"
    )
    if report["mode"] == "train":
        lines.append(
            f"estimate    step {times['step_s']:.4f} s ({times['exposed_interconnect_s']:.4f} s of it waiting for "
            f"others), utilisation {times['utilisation']:.0%}, {times['days_1m_steps']:.1f} days for 1M steps "
            f"(the paper: {PAPER_STEP_S} s, a week)"
        )
    else:
        lines.append(
            f"estimate    {times['step_s']:.3f} s for a batch of {report['batch']} (the paper: "
            f"{report['paper']['seconds']} s for a batch of {report['paper']['batch']})"
        )
    if report["optimization_level"] != AS_TRAINED:
        lines.append(f"compiled at optimization level {report['optimization_level']}: train's program has other times")
    if report.get("unknown_loops"):
        lines.append(f"counted once, since their length isn't known: {', '.join(report['unknown_loops'])}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    process.quiet()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    configs = pathlib.Path(file).resolve().parent
    try:
        if _HLO.value and _MODE.value != "train":
            raise specs.SpecError(f"--hlo={_HLO.value} is for --mode=train, whose program is one; leave it out.")
        check_files(_JSON.value, _HLO.value)
        spec = specs.from_config(_CONFIG.value)
        jax.config.update("jax_optimization_level", _OPTIMIZATION_LEVEL.value)
        if _MODE.value == "train":
            report = compile_train(spec, configs, _TOPOLOGY.value, _HLO.value)
        else:
            report = compile_sample(spec, configs, _TOPOLOGY.value, _BATCH.value, _BASE.value, _DECODER.value)
    except specs.SpecError as error:
        print(f"SpecError: {error}", file=sys.stderr)
        sys.exit(1)
    report["optimization_level"] = _OPTIMIZATION_LEVEL.value
    print(said(report))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
    _TOPOLOGY = flags.DEFINE_string("topology", "v4:4x8x8", "Chip and the torus' sides.")
    _MODE = flags.DEFINE_enum("mode", "train", ["train", "sample"], "What is compiled.")
    _BATCH = flags.DEFINE_integer("batch", 1, "sample: pictures at a time.", lower_bound=1)
    _BASE = flags.DEFINE_string("base", "runs/base_3b", "sample: stage before a super-resolution model.")
    _DECODER = flags.DEFINE_string("decoder", "", "sample: stage that makes pictures; the model's own tokenizer.")
    _OPTIMIZATION_LEVEL = flags.DEFINE_enum(
        "optimization_level", AS_TRAINED, [AS_TRAINED, "O0", "O1", "O2", "O3"], "jax's setting; train leaves it alone."
    )
    _HLO = flags.DEFINE_string("hlo", "", "train: file for the text of the compiled program.")
    _JSON = flags.DEFINE_string("json", None, "File for the report.")
    flags.mark_flags_as_required(["config"])
    app.run(main, flags_parser=train.parse_flags)
