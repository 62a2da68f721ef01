"""Converts published weights to a folder that a run starts from.

  python -m muse_jax.import_weights --list
  python -m muse_jax.import_weights --from=t5_hf --path=originals/flan-t5-xl --out=weights/flan_t5_xl

Nothing is downloaded. The folder appears when it is whole; a file that is damaged or another model's
is refused by its tensor's name and nothing is written. Large models are converted layer by layer.

Exit codes: 0 done; 1 refused, with one message.
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()  # before jax is imported

import math
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from muse_jax.interop import folder, registry
from muse_jax.interop.tensors import WeightsError


def import_weights(format_name: str, path: str, out: str, dtype: str = "source") -> dict[str, Any]:
    """Converts weights and writes them; see `interop.folder.write` for the folder.

    Args:
      format_name: a name in `interop.registry.FORMATS`.
      path: of the weights; what the format says.
      out: folder to be written; one written before is replaced.
      dtype: "source", "float32" or "bfloat16".

    Returns:
      The manifest.

    Raises:
      WeightsError: if the weights are refused; the message names the tensor.
    """
    if format_name not in registry.FORMATS:
        raise WeightsError(f"--from={format_name!r} is no format; expected {', '.join(registry.FORMATS)}.")
    if dtype not in folder.DTYPES:
        raise WeightsError(f"--dtype={dtype!r}; expected {', '.join(folder.DTYPES)}.")
    converted = registry.FORMATS[format_name].convert(path)
    return folder.write(out, converted, {"from": format_name, "path": path}, dtype)


def listing() -> str:
    """What `--list` prints."""
    lines = []
    for name, known in registry.FORMATS.items():
        lines += [f"--from={name}", f"  {known.about}", f"  --path: {known.path}", f"  for: {known.setting}"]
        lines += [f"  - {one.name}: {one.where}; {one.size}; {one.licence}" for one in known.published]
        lines.append("")
    return "\n".join(lines)


def summary(format_name: str, out: str, manifest: Mapping[str, Any]) -> str:
    """What was written, and the config's values that go with it."""
    count = sum(math.prod(entry["shape"]) for entry in manifest["tensors"].values())
    lines = [f"{out}: {manifest['kind']}, {count:,} parameters in {len(manifest['tensors'])} tensors"]
    lines.append(f"  --config.{registry.FORMATS[format_name].setting}={out}")
    if manifest["kind"] == "text_encoder":
        lines.append("  --config.model.text.trainable=False")
        lines += [f"  --config.model.text.{name}={value}" for name, value in manifest["model"].items()]
    return "\n".join(lines)


def _bucket_errors() -> tuple[type[Exception], ...]:
    """Of TensorFlow, through which etils reads buckets; none where it wasn't loaded."""
    errors = getattr(sys.modules.get("tensorflow"), "errors", None)
    return (errors.OpError,) if errors else ()


def main(argv: Sequence[str]) -> None:
    process.quiet()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if _LIST.value:
        print(listing())
        return
    missing = [name for name, flag in (("from", _FROM), ("path", _PATH), ("out", _OUT)) if not flag.value]
    if missing:
        raise app.UsageError(f"--{missing[0]} is missing; --list shows the formats")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the draft is removed
    try:
        manifest = import_weights(_FROM.value, _PATH.value, _OUT.value, _DTYPE.value)
    except (WeightsError, OSError, *_bucket_errors()) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    print(summary(_FROM.value, _OUT.value, manifest))


if __name__ == "__main__":
    _LIST = flags.DEFINE_bool("list", False, "Show the formats, where they are published, sizes and licences.")
    _FROM = flags.DEFINE_enum("from", None, list(registry.FORMATS), "The format.")
    _PATH = flags.DEFINE_string("path", None, "The weights; see --list.")
    _OUT = flags.DEFINE_string("out", None, "Folder to be written.")
    _DTYPE = flags.DEFINE_enum(
        "dtype", "source", list(folder.DTYPES), "What to store; bfloat16 keeps norms and the position bias in float32."
    )
    app.run(main)
