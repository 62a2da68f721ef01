"""Trains the whole cascade on this machine, draws from it and measures how well it follows prompts.

    python -m muse_jax.quickstart                              # 11 to 20 minutes on 2 CPU cores
    python -m muse_jax.quickstart --variant=long               # better pictures: 1 to 2 hours
    python -m muse_jax.quickstart --configs=configs/pictures --data_path=FOLDER --workdir=DIR

Every stage is a run of `python -m muse_jax.train`, from configs/scenes/*.py; on a CPU with several cores some
of them side by side (`LANES`). Stopped at any point and started again it goes on. In the workdir: a folder for
each stage, `pipeline/` for `python -m muse_jax.sample`, samples.png, decoding.png, curves.png and report.json.
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import app, flags

from muse_jax import lanes

_BEGAN = time.monotonic()  # before the imports that take seconds
# In the order of training; a stage's config says in which of these keys it wants an earlier one.
STAGES: dict[str, dict[str, str]] = {
    "tokenizer_low": {},
    "tokenizer_high": {},
    "base": {"tokenizer": "tokenizer_low"},
    "superres": {"tokenizer": "tokenizer_high", "low_tokenizer": "tokenizer_low"},
    "decoder": {"init_from": "tokenizer_high"},
}
# What is trained at the same time on the cores of a CPU, when the stage that both lanes read is there.
FIRST = "tokenizer_low"
LANES = (("base",), ("tokenizer_high", "superres", "decoder"))
TITLES = {"low_images": "low resolution", "high_images": "high resolution", "images": "fine-tuned decoder"}
PROMPTS = (
    "a large red circle above a small blue square on a white background",
    "three small green triangles on a black background",
    "on a gray background, two big yellow crosses to the left of a little purple circle",
    "a blue square is below two red circles on a pink background",
    "a small orange cross on a black background",
    "on a white background, a large green square right of a small red triangle",
    "two large purple circles on a gray background",
    "a pink background with a little blue triangle above a big yellow square",
)
TRAINING = "training"  # all stages; those of several lanes take less than the sum of their minutes
EVALUATED = {"": 500, "long": 500, "tiny": 4}  # held-out prompts


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the flags say."""

    configs: pathlib.Path  # folder with a config for each stage
    variant: str  # of these configs
    workdir: pathlib.Path  # holds all that is written; what is finished there is not done again
    data_path: str = ""  # instead of the configs' data.path

    @property
    def command(self) -> str:
        """For the manifest."""
        given = {"variant": self.variant, "data_path": self.data_path}
        return " ".join(["python -m muse_jax.quickstart", *(f"--{k}={v}" for k, v in given.items() if v)])


class Minutes:
    """Time spent in each part, kept in a file: it adds up over restarts, whatever ended the process.

    Parts may be within others, or at the same time.
    """

    def __init__(self, path: pathlib.Path, every: float = 2.0):
        self._path, self._every, self._writing = path, every, threading.Lock()
        self.parts: dict[str, float] = read_json(path) or {}

    def add(self, part: str, seconds: float) -> None:
        """Counts time that has passed already."""
        self._note(part, self.parts.get(part, 0.0) + seconds / 60)

    def total(self) -> float:
        """Minutes from start to end; stages are a part of the training."""
        return sum(spent for part, spent in self.parts.items() if part not in STAGES)

    def _note(self, part: str, spent: float) -> None:
        with self._writing:  # parts may overlap
            self.parts[part] = spent
            write_json(self._path, self.parts)

    @contextlib.contextmanager
    def spent_on(self, part: str) -> Iterator[None]:
        """Counts the time within; a thread writes it down every few seconds, as a kill asks nobody."""
        before, start, done = self.parts.get(part, 0.0), time.monotonic(), threading.Event()

        def note() -> None:
            self._note(part, before + (time.monotonic() - start) / 60)

        def keep_noting() -> None:
            while not done.wait(self._every):
                note()

        thread = threading.Thread(target=keep_noting, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            note()


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is nothing or, which is said, something else."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        print(f"Warning: {path} is damaged; what it held is made anew or left out.", file=sys.stderr)
        return None
    return found


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def configs_folder() -> pathlib.Path:
    """configs/ of the checkout, or where an installation without one keeps it."""
    package = pathlib.Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def stage_overrides(where: Setup, stage: str) -> dict[str, str]:
    """What a stage's config gets on the command line: the stages before it, in the workdir, and the data."""
    found = {f"task.{key}": str(where.workdir / earlier) for key, earlier in STAGES[stage].items()}
    return found | ({"data.path": where.data_path} if where.data_path else {})


def stage_config(where: Setup, stage: str) -> Any:
    """The config of a stage as it is trained."""
    path = where.configs / f"{stage}.py"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; --configs must name a folder with a config for each stage.")
    spec = importlib.util.spec_from_file_location(f"muse_jax_config_{stage}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(where.variant)
    config.update_from_flattened_dict(stage_overrides(where, stage))
    return config


def job(where: Setup, stage: str) -> lanes.Job:
    """The command that trains a stage."""
    config = f"{where.configs / stage}.py" + (f":{where.variant}" if where.variant else "")
    overrides = (f"--config.{key}={value}" for key, value in stage_overrides(where, stage).items())
    command = ("muse_jax.train", f"--config={config}", f"--workdir={where.workdir / stage}", *overrides)
    return lanes.Job(stage, command)


def train_stages(where: Setup, minutes: Minutes) -> tuple[dict[str, Any], bool]:
    """Trains what is not finished; returns each stage's steps and last loss, and whether all were finished.

    Raises:
      lanes.JobError: if a stage could not be trained.
    """
    from muse_jax import specs
    from muse_jax.training import trainer

    wanted = {stage: specs.from_config(stage_config(where, stage)) for stage in STAGES}

    def finished() -> dict[str, Any]:
        found = {stage: trainer.already_finished(spec, str(where.workdir / stage)) for stage, spec in wanted.items()}
        return {stage: result for stage, result in found.items() if result is not None}

    before = finished()
    for stage, result in before.items():
        _say(f"[{_number(stage)}] {stage}: was finished at step {result.step}")

    @contextlib.contextmanager
    def around(started: lanes.Job) -> Iterator[None]:
        stage = started.title
        _say(f"[{_number(stage)}] {stage}: {where.workdir / stage}")
        with minutes.spent_on(stage):
            yield

    with minutes.spent_on(TRAINING):
        for group in groups():
            left = [[job(where, stage) for stage in lane if stage not in before] for lane in group]
            lanes.run([lane for lane in left if lane], around)
    after = finished()
    trained = {stage: {"steps": after[stage].step, "loss": after[stage].metrics["loss"]} for stage in STAGES}
    return trained, before.keys() == after.keys()


def groups() -> list[tuple[tuple[str, ...], ...]]:
    """What is trained one after another, in groups of lanes that are trained at once."""
    if process.accelerated(os.environ) or len(lanes.cores()) < len(LANES):
        return [(tuple(STAGES),)]  # one network has the whole accelerator, or the only core
    return [((FIRST,),), LANES]


def _number(stage: str) -> str:
    return f"{list(STAGES).index(stage) + 1}/{len(STAGES)}"


def prompts_for(pipeline: Any) -> list[str]:
    """Prompts to draw: our own for scenes, captions that training held out for other pictures."""
    from muse_jax import data

    spec = pipeline.stages["base"].spec.data
    if spec.name == "scenes":
        return list(PROMPTS)
    source = data.make_source(spec, "eval")
    return [source[index]["text"] for index in range(min(len(source), len(PROMPTS)))]


def draw(pipeline: Any, workdir: pathlib.Path, prompts: list[str]) -> None:
    """Writes samples.png, decoding.png and curves.png."""
    from muse_jax import figures
    from muse_jax.training import logs

    output = pipeline(prompts, seed=0, output_type="uint8", history=True)
    figures.samples(workdir / "samples.png", prompts, {title: getattr(output, name) for name, title in TITLES.items()})
    rows = {
        name: [figures.cover_masked(image, masked) for image, masked in zip(*frames, strict=True)]
        for name, frames in output.decoding(0).items()
    }
    figures.decoding(workdir / "decoding.png", prompts[0], rows)
    figures.curves(workdir / "curves.png", {stage: logs.read_metrics(workdir / stage) for stage in STAGES})


def run(where: Setup) -> dict[str, Any]:
    """The whole quickstart; returns what report.json holds.

    Raises:
      SpecError, ResumeError, ...: as `train.train` does.
    """
    from muse_jax.training import locks

    with locks.held(where.workdir):
        minutes = Minutes(where.workdir / "minutes.json")
        minutes.add("startup", time.monotonic() - _BEGAN)
        stages, all_were_finished = train_stages(where, minutes)
        done = where.workdir / "report.json"
        if all_were_finished and (before := read_json(done)):
            return before
        report = finish(where, minutes)
        for stage, values in stages.items():
            # A kill just after a stage's end, or a minutes.json that is gone, leaves nothing known.
            values["minutes"] = round(minutes.parts[stage], 3) if stage in minutes.parts else None
        total = {"minutes": round(minutes.total(), 3), "stages": stages}
        write_json(done, {**total, **report})
        return {**total, **report}


def finish(where: Setup, minutes: Minutes) -> dict[str, Any]:
    """Makes the pipeline of the trained stages, draws from it and measures it."""
    from muse_jax.assemble import assemble
    from muse_jax.evaluate import evaluate, versions

    with minutes.spent_on("pipeline"):
        pipeline = assemble(where.workdir, where.workdir / "pipeline", command=where.command)
    _say("drawing samples")
    with minutes.spent_on("pictures"):
        prompts = prompts_for(pipeline)
        draw(pipeline, where.workdir, prompts)
    _say(f"measuring on {EVALUATED[where.variant]} held-out prompts")
    with minutes.spent_on("evaluation"):
        figures = evaluate(pipeline, EVALUATED[where.variant])
    with minutes.spent_on("pipeline"):  # again, with the figures in its manifest
        assemble(where.workdir, where.workdir / "pipeline", command=where.command, figures=figures)
    return {**figures, "prompt": prompts[0], "command": where.command, "versions": versions()}


def summary(report: Mapping[str, Any], workdir: pathlib.Path) -> str:
    """What the quickstart says at its end."""
    from muse_jax import evaluate

    lines = [f"{'stage':<22}{'steps':>7}{'loss':>9}{'minutes':>9}"]
    for name, stage in report["stages"].items():
        spent = "?" if stage["minutes"] is None else f"{stage['minutes']:.1f}"
        lines.append(f"{name:<22}{stage['steps']:>7}{stage['loss']:>9.4f}{spent:>9}")
    lines += [
        "",
        evaluate.table(report),
        "",
        f"{report['minutes']:.1f} minutes in all. Look at",
        *(f"  {workdir / name}" for name in ("samples.png", "decoding.png", "curves.png", "report.json")),
        "and draw your own:",
        f'  python -m muse_jax.sample --pipeline={workdir / "pipeline"} --prompt="{report["prompt"]}"',
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)


def _stop(number: int, _frame: Any) -> None:
    """Ends the program; what is being trained is stopped, and saves, on the way out."""
    print("\nstopped by SIGTERM\nThe same command goes on from here.", file=sys.stderr)
    sys.exit(128 + number)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if "://" in _WORKDIR.value:
        raise app.UsageError(f"--workdir is {_WORKDIR.value!r}; the quickstart's is a folder of this machine")
    process.quiet()
    signal.signal(signal.SIGTERM, _stop)
    from muse_jax import train
    from muse_jax.sampling.folder import PipelineError

    workdir = pathlib.Path(_WORKDIR.value)
    configs = pathlib.Path(_CONFIGS.value) if _CONFIGS.value else configs_folder() / "scenes"
    where = Setup(configs, _VARIANT.value, workdir, _DATA_PATH.value)
    try:
        print("\n" + summary(run(where), workdir))
    except KeyboardInterrupt:
        print("\nstopped\nThe same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except lanes.JobError as failed:
        print("\nThe same command goes on from here." if failed.was_stopped else f"\n{failed}", file=sys.stderr)
        sys.exit(failed.exit_code)
    except (*train.MENDABLE, PipelineError, FileNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Holds all that is written; the same again goes on.")
    _VARIANT = flags.DEFINE_enum("variant", "", list(EVALUATED), "Of the configs: as they are, long, or tiny (tests).")
    _CONFIGS = flags.DEFINE_string("configs", "", "Folder with a config for each stage; by default configs/scenes.")
    _DATA_PATH = flags.DEFINE_string("data_path", "", "Folder of pictures, for configs that need one.")
    app.run(main)
