"""Trains the whole cascade on this machine, draws from it and measures how well it follows prompts.

    python -m muse_jax.quickstart                              # 15 minutes on 2 CPU cores
    python -m muse_jax.quickstart --variant=long               # better pictures: up to 2 hours
    python -m muse_jax.quickstart --workdir=DIR

Every stage is trained by the same function as `python -m muse_jax.train`, from configs/scenes/*.py.
Stopped at any point and started again it goes on. In the workdir: a folder for each stage,
`pipeline/` for `python -m muse_jax.sample`, samples.png, decoding.png, curves.png and report.json.
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()

import contextlib
import gc
import importlib.util
import json
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import app, flags

# In the order of training; a stage's config says in which of these keys it wants an earlier one.
STAGES: dict[str, dict[str, str]] = {
    "tokenizer_low": {},
    "tokenizer_high": {},
    "base": {"tokenizer": "tokenizer_low"},
    "superres": {"tokenizer": "tokenizer_high", "low_tokenizer": "tokenizer_low"},
    "decoder": {"init_from": "tokenizer_high"},
}
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
EVALUATED = {"": 500, "long": 500, "tiny": 4}  # held-out prompts


class Minutes:
    """Time spent in each part, kept in a file: it adds up over restarts, whatever ended the process."""

    def __init__(self, path: pathlib.Path, every: float = 2.0):
        self._path, self._every = path, every
        self.parts: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextlib.contextmanager
    def spent_on(self, part: str) -> Iterator[None]:
        """Counts the time within; a thread writes it down every few seconds, as a kill asks nobody."""
        before, start, done = self.parts.get(part, 0.0), time.monotonic(), threading.Event()

        def note() -> None:
            self.parts[part] = before + (time.monotonic() - start) / 60
            write_json(self._path, self.parts)

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


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def configs_folder() -> pathlib.Path:
    """configs/ of the checkout, or where an installation without one keeps it."""
    package = pathlib.Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def stage_config(folder: pathlib.Path, stage: str, variant: str, workdir: pathlib.Path) -> Any:
    """The config of a stage, reading the stages before it from the workdir."""
    path = folder / f"{stage}.py"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; --configs must name a folder with a config for each stage.")
    spec = importlib.util.spec_from_file_location(f"muse_jax_config_{stage}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    for key, earlier in STAGES[stage].items():
        config.task[key] = str(workdir / earlier)
    return config


def train_stages(folder: pathlib.Path, variant: str, workdir: pathlib.Path, minutes: Minutes) -> dict[str, Any]:
    """Trains every stage that is not finished; returns each one's steps and last loss."""
    import jax

    from muse_jax import specs, train

    trained = {}
    for number, stage in enumerate(STAGES, start=1):
        _say(f"[{number}/{len(STAGES)}] {stage}: {workdir / stage}")
        spec = specs.from_config(stage_config(folder, stage, variant, workdir))
        with minutes.spent_on(stage):
            result = train.train(spec, str(workdir / stage))
        trained[stage] = {"steps": result.step, "loss": result.metrics["loss"]}
        if result.was_finished:
            _say(f"      was finished at step {result.step}")
        jax.clear_caches()  # of programs that no other stage runs
        gc.collect()
    return trained


def draw(pipeline: Any, workdir: pathlib.Path, prompts: tuple[str, ...] = PROMPTS) -> None:
    """Writes samples.png, decoding.png and curves.png."""
    from muse_jax import figures
    from muse_jax.training import logs

    output = pipeline(list(prompts), seed=0, output_type="uint8", history=True)
    figures.samples(workdir / "samples.png", prompts, {title: getattr(output, name) for name, title in TITLES.items()})
    rows = {
        name: [figures.cover_masked(image, masked) for image, masked in zip(*frames, strict=True)]
        for name, frames in output.decoding(0).items()
    }
    figures.decoding(workdir / "decoding.png", prompts[0], rows)
    figures.curves(workdir / "curves.png", {stage: logs.read_metrics(workdir / stage) for stage in STAGES})


def run(folder: pathlib.Path, variant: str, workdir: pathlib.Path) -> dict[str, Any]:
    """The whole quickstart; returns what report.json holds.

    Args:
      folder: a config for each stage.
      variant: of the configs.
      workdir: all that is written; what is finished there is not done again.
    """
    from muse_jax.assemble import assemble, versions

    workdir.mkdir(parents=True, exist_ok=True)
    minutes = Minutes(workdir / "minutes.json")
    stages = train_stages(folder, variant, workdir, minutes)
    command = "python -m muse_jax.quickstart" + (f" --variant={variant}" if variant else "")
    with minutes.spent_on("pipeline"):
        pipeline = assemble(workdir, workdir / "pipeline", command=command)
    _say("drawing samples")
    with minutes.spent_on("pictures"):
        draw(pipeline, workdir)
    _say(f"measuring on {EVALUATED[variant]} held-out prompts")
    with minutes.spent_on("evaluation"):
        figures = measure(pipeline, EVALUATED[variant])
    with minutes.spent_on("pipeline"):
        assemble(workdir, workdir / "pipeline", command=command, figures=figures)
    for stage, values in stages.items():
        values["minutes"] = round(minutes.parts[stage], 3)
    total = {"minutes": round(sum(minutes.parts.values()), 3), "stages": stages}
    report = {**total, **figures, "command": command, "versions": versions()}
    write_json(workdir / "report.json", report)
    return report


def measure(pipeline: Any, count: int) -> dict[str, Any]:
    """The figures of `python -m muse_jax.evaluate`."""
    from muse_jax import evaluate

    return evaluate.evaluate(pipeline, count=count)


def summary(report: Mapping[str, Any], workdir: pathlib.Path) -> str:
    """What the quickstart says at its end."""
    prompts, tokenizers = report["prompts"], report["tokenizers"]
    lines = [f"{'stage':<16}{'steps':>7}{'loss':>9}{'minutes':>9}"]
    lines += [f"{n:<16}{s['steps']:>7}{s['loss']:>9.4f}{s['minutes']:>9.1f}" for n, s in report["stages"].items()]
    lines += ["", f"{'reconstruction':<16}{'PSNR':>7}{'SSIM':>9}{'codes':>9}{'statements read right':>25}"]
    lines += [
        f"{n:<16}{t['psnr']:>7.1f}{t['ssim']:>9.3f}{t['codebook_used']:>9.0%}{t['statements']:>25.1%}"
        for n, t in tokenizers.items()
    ]
    lines += [
        "",
        f"on {prompts['count']} held-out prompts {prompts['statements']:.1%} of the statements are true "
        f"({prompts['statements_unguided']:.1%} without guidance,",
        f"{prompts['statements_held_out']:.1%} where colour and shape were never seen together), "
        f"and {prompts['all_statements']:.1%} of the pictures have every one true",
        "",
        f"{report['minutes']:.1f} minutes in all. Look at",
        *(f"  {workdir / name}" for name in ("samples.png", "decoding.png", "curves.png", "report.json")),
        "and draw your own:",
        f'  python -m muse_jax.sample --pipeline={workdir / "pipeline"} --prompt="{PROMPTS[0]}"',
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)


def _stop(number: int, _frame: Any) -> None:
    """SIGTERM between the stages; the trainer has its own way while it trains."""
    sys.exit(128 + number)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    signal.signal(signal.SIGTERM, _stop)
    from muse_jax import train
    from muse_jax.training import signals

    workdir = pathlib.Path(_WORKDIR.value)
    folder = pathlib.Path(_CONFIGS.value) if _CONFIGS.value else configs_folder() / "scenes"
    try:
        print("\n" + summary(run(folder, _VARIANT.value, workdir), workdir))
    except (signals.Stopped, KeyboardInterrupt) as stopped:
        print(f"\n{stopped or 'stopped'}\nThe same command goes on from here.", file=sys.stderr)
        sys.exit(getattr(stopped, "exit_code", 130))
    except (*train.MENDABLE, FileNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Holds all that is written; the same again goes on.")
    _VARIANT = flags.DEFINE_enum("variant", "", list(EVALUATED), "Of the configs: as they are, long, or tiny (tests).")
    _CONFIGS = flags.DEFINE_string("configs", "", "Folder with a config for each stage; by default configs/scenes.")
    app.run(main)
