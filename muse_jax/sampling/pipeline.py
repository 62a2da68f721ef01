"""`MusePipeline`: from a prompt or a class to a picture. The one place that puts models and decode loops together."""

import dataclasses
import importlib.resources
import os
import pathlib
import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta
from safetensors import numpy as safetensors

from muse_jax import specs
from muse_jax.models import predictors, vqgan
from muse_jax.sampling import editing, guidance, sampler
from muse_jax.sampling import folder as pipeline_folder
from muse_jax.sampling.folder import PipelineError
from muse_jax.sampling.output import OUTPUT_TYPES, MuseOutput
from muse_jax.sampling.requests import Requests, Some, list_of_texts, make_requests
from muse_jax.text import vocabulary
from muse_jax.training import checkpoint

STREAMS = {"base": 0, "superres": 1}  # of the stages' randomness
# Numbers; lists are welcome.
PER_PICTURE = ("guidance_scale", "token_temperature", "choice_temperature", "top_p", "typical_p")
NUMBERS = ("guidance_power", "guidance_start", "guidance_end", "remasking")  # one a call
WORDS = ("schedule", "guidance_ramp", "selection_rule")
PER_CALL = ("num_inference_steps", "top_k", *WORDS, *NUMBERS)


@dataclasses.dataclass(frozen=True)
class Way:
    """Pictures of one prompt, or on the way from one to another.

    Attributes:
      texts: the prompt, or the first and the second, once for each picture.
      weights: float32 [n], of the second; None of one prompt.
    """

    texts: tuple[tuple[str, ...], ...]
    weights: np.ndarray | None = None


class MusePipeline(editing.Editing):
    """Every stage from prompt to picture, and the sampler settings they are meant to be used with.

    With "superres" and "tokenizer_high" among the stages pictures have a low and a high resolution, without
    them one. If "base" is conditioned on classes (MaskGIT), a prompt is the name of one, or its number.

    Calls may come from several threads. What has been compiled for a batch shape and a number of
    steps serves all prompts, seeds, guidance values, temperatures and schedules.

    Attributes:
      token_stages: names of the stages with a decode loop, in their order.
      classes: the names of the classes, of which the places are their numbers; () if prompts are texts.
      stages: name -> the loaded stage; parameters are float32 NumPy arrays, named as its model names them.
      manifest: of the pipeline's making.
      max_batch_size: pictures made at a time; a longer list is made in pieces.
    """

    def __init__(
        self,
        stages: Mapping[str, checkpoint.Stage],
        manifest: Mapping[str, Any] | None = None,
        max_batch_size: int = 16,
    ):
        pipeline_folder.check({name: stage.spec for name, stage in stages.items()})
        self.stages = {n: _checked(n, stages[n]) for n in pipeline_folder.STAGES if n in stages}
        self.manifest = dict(manifest or {})
        self.max_batch_size = max_batch_size
        self.token_stages = tuple(name for name in STREAMS if name in stages)
        self._vocabularies = {name: _vocabulary(name, stages[name]) for name in self.token_stages}
        self.classes = getattr(self._vocabularies["base"], "names", ())
        self._params = {name: jax.device_put(stage.params) for name, stage in self.stages.items()}
        if "decoder" in self.stages:
            _check_codebooks(self._params["decoder"], self._params[self.finest], stages[self.finest].path)

    # ------------------------------------------------------------------------------- folders

    @classmethod
    def load(cls, folder: str | os.PathLike[str] | None = None, **settings: Any) -> "MusePipeline":
        """Opens a pipeline folder; without one, the small pipeline for scenes that comes with the package.

        Raises:
          PipelineError: if the folder is no pipeline, or its stages don't fit each other.
        """
        if folder is None:
            folder = pathlib.Path(str(importlib.resources.files("muse_jax"))) / "pretrained"
            if not (folder / pipeline_folder.FILE).exists():
                raise PipelineError("This installation has no packaged pipeline; name a pipeline folder.")
        paths, manifest = pipeline_folder.read(folder)
        return cls._of({name: checkpoint.load_stage(path) for name, path in paths.items()}, manifest, **settings)

    @classmethod
    def _of(cls, stages: Mapping[str, checkpoint.Stage], *args: Any, **settings: Any) -> "MusePipeline":
        """The pipeline of stages: `PaellaPipeline` if the base model is one of Paella's."""
        from muse_jax.sampling.paella import PaellaPipeline  # a kind of this class

        paella = "base" in stages and isinstance(stages["base"].spec.model, specs.PaellaSpec)
        return (PaellaPipeline if paella else cls)(stages, *args, **settings)

    @classmethod
    def assemble(
        cls,
        out: str | os.PathLike[str],
        stages: Mapping[str, str | os.PathLike[str]],
        manifest: Mapping[str, Any] | None = None,
        dtype: str = "",
    ) -> "MusePipeline":
        """Writes a pipeline folder from stage folders (or workdirs of runs), and returns it opened.

        Args:
          out: the folder to write, whole or not at all.
          stages: name ("tokenizer_low", "base", with a high resolution "tokenizer_high" and "superres",
            and, if there is one, "decoder") -> stage folder.
          manifest: of its making: command, seed, versions, figures.
          dtype: as in `save`.
        """
        pipeline = cls._of({name: checkpoint.load_stage(path) for name, path in stages.items()}, manifest)
        pipeline.save(out, dtype)
        return pipeline

    def save(self, folder: str | os.PathLike[str], dtype: str = "") -> None:
        """Writes the pipeline as a folder, whole or not at all.

        Args:
          folder: replaced if it is a pipeline already.
          dtype: what the parameters are stored as; "float16" halves the folder, "" is float32.
        """

        def save_stage(path: pathlib.Path, stage: checkpoint.Stage) -> None:
            params = jax.tree.map(lambda x: x.astype(dtype or x.dtype), stage.params)
            checkpoint.save_stage(path, stage.spec, params, stage.vocabulary, stage.step)

        pipeline_folder.write(folder, self.stages, self.manifest, save_stage)

    # ------------------------------------------------------------------------------ sampling

    def __call__(
        self,
        prompt: Some = None,
        negative_prompt: Some = None,
        guidance_scale: Some = None,
        num_inference_steps: Any = None,
        num_images_per_prompt: Any = 1,
        seed: Some = 0,
        output_type: str = "pil",
        *,
        class_label: Some = None,
        history: bool = False,
        **settings: Any,
    ) -> MuseOutput:
        """Makes pictures of prompts. A setting that is None is what the stage was made to be used with.

        The picture of a prompt and a seed does not depend on what else is in the call.

        Args:
          prompt: one or a list; '' is a picture of anything. With classes, a class's name or number.
          negative_prompt: what to move away from, instead of from pictures in general; one, or one
            a prompt. It has no effect without guidance.
          guidance_scale: s in logits = u + s (c - u), of the base model; 1 is off.
          num_inference_steps: decoding steps of the base model.
          num_images_per_prompt: with seeds seed, seed + 1, ...
          seed: from 0 to 2^32 - 1; one, or one a prompt or a picture.
          output_type: "pil", "np" (float32 in [0, 1]), "uint8" or "latent" (token ids).
          class_label: another word for the prompt of a pipeline with classes.
          history: keep the steps, for `MuseOutput.decoding`.
          **settings: of the base model, those of `PER_PICTURE` and `PER_CALL` as `sampler.make_plan`
            describes them; and all of them, guidance_scale and num_inference_steps too, with the prefix
            superres_ for super-resolution.

        Raises:
          ValueError, TypeError: naming the argument, before anything is compiled.
        """
        if prompt is None and class_label is None:
            raise ValueError("give a prompt" + (" or a class_label." if self.classes else "."))
        if prompt is not None and class_label is not None:
            raise ValueError("prompt and class_label are both given; give one, not both.")
        if class_label is not None and not self.classes:
            raise ValueError("class_label is given, but this pipeline's model is conditioned on text; give a prompt.")
        prompt = class_label if prompt is None else prompt
        requests = self._requests(prompt, negative_prompt, num_images_per_prompt, seed)
        given = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, **settings}
        return self._call(requests, given, output_type, history)

    def interpolate(
        self,
        prompt: Sequence[Some],
        num_pictures: int = 5,
        negative_prompt: Some = None,
        guidance_scale: Some = None,
        num_inference_steps: Any = None,
        seed: int = 0,
        output_type: str = "pil",
        *,
        history: bool = False,
        **settings: Any,
    ) -> MuseOutput:
        """Pictures on the way from one prompt to another, all from the same noise.

        Muse blends the logits of the two, Paella what its layers make of them.

        Args:
          prompt: two prompts, or classes by name or number.
          num_pictures: at least 2; the first has the first prompt alone, the last the second.
        """
        texts = list_of_texts(self._named(prompt))
        if len(texts) != 2:
            raise ValueError(f"interpolation is between 2 prompts, and {len(texts)} are given.")
        if isinstance(num_pictures, bool) or not isinstance(num_pictures, int | np.integer) or num_pictures < 2:
            raise ValueError(f"num_pictures is {num_pictures!r}; expected a whole number of at least 2.")
        weights = np.linspace(0.0, 1.0, num_pictures, dtype=np.float32)
        digits = max(0, len(str(num_pictures - 2)) - 2)  # so many that no two pictures have the same label
        labels = [f"{1 - weight:.{digits}%} {texts[0]}, {weight:.{digits}%} {texts[1]}" for weight in weights]
        requests = make_requests(labels, self._named(negative_prompt), 1, [seed] * num_pictures)
        given = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, **settings}
        way = Way(((texts[0],) * num_pictures, (texts[1],) * num_pictures), weights)
        return self._interpolate(requests, way, given, output_type, history)

    def _interpolate(
        self, requests: Requests, way: Way, given: Mapping[str, Any], output_type: str, history: bool
    ) -> MuseOutput:
        return self._call(requests, given, output_type, history, way=way)

    def _requests(self, prompt: Some, negative_prompt: Some, num_images_per_prompt: Any, seed: Some) -> Requests:
        """See `make_requests`; here numbers of classes become names, and names as the model has them."""
        return make_requests(self._named(prompt), self._named(negative_prompt), num_images_per_prompt, seed)

    def class_name(self, label: str | int | np.integer) -> str:
        """The name of a class from its name, written in any way, or its number; '' is no class.

        Raises:
          ValueError: if there is no such class; names those that there are.
        """
        if isinstance(label, str) and label.strip().isdecimal() and label.strip() not in self.classes:
            label = int(label)
        return self._vocabularies["base"].name(label)

    def _named(self, value: Some) -> Some:
        if not self.classes:
            return value
        if isinstance(value, str | int | np.integer) and not isinstance(value, bool):
            return self.class_name(value)
        return [self._named(one) for one in value] if isinstance(value, list | tuple | np.ndarray) else value

    def _call(
        self,
        requests: Requests,
        given: Mapping[str, Any],
        output_type: str,
        history: bool,
        loops: Mapping[str, editing.Loop] | None = None,
        way: Way | None = None,
    ) -> MuseOutput:
        """The decode loops, of empty canvases or of what `loops` holds for each stage."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; expected one of {', '.join(map(repr, OUTPUT_TYPES))}.")
        resolved = self._settings(given, requests)
        way = way or Way((requests.prompts,))
        self._warn(dataclasses.replace(requests, prompts=sum(way.texts, ())), resolved)
        if loops is None:
            places = {name: np.prod(self.grid(name)) for name in self.token_stages}
            starts = {name: np.full((len(requests), n), self.mask_ids[name], np.int32) for name, n in places.items()}
            loops = {name: editing.Loop(start) for name, start in starts.items()}
        pieces = [
            self._make(requests, way, resolved, loops, slice(start, start + self.max_batch_size), history)
            for start in range(0, len(requests), self.max_batch_size)
        ]
        tokens = [np.concatenate([piece[name][0] for piece in pieces]) for name in self.token_stages]
        steps = {n: _joined([piece[n][1] for piece in pieces]) for n in self.token_stages} if history else None
        return MuseOutput(
            prompts=requests.prompts,
            negative_prompts=requests.negative_prompts,
            seeds=requests.seeds,
            tokens=tokens[-1],
            low_tokens=tokens[0],
            settings={name: _plain(resolved[name]) for name in self.token_stages},
            output_type=output_type,
            decode=self.decode_tokens,
            best="decoder" if "decoder" in self.stages else self.finest,
            finest=self.finest,
            steps=steps,
        )

    def decode_tokens(self, stage: str, tokens: np.ndarray) -> np.ndarray:
        """Pictures of token ids.

        Args:
          stage: "tokenizer_low", "tokenizer_high" or "decoder".
          tokens: int [n, rows, columns]; any rows and columns.

        Returns:
          uint8 [n, height, width, 3].
        """
        images = []
        for start in range(0, len(tokens), self.max_batch_size):
            piece = np.asarray(tokens[start : start + self.max_batch_size], np.int32)
            padded = _padded(piece, self._bucket(len(piece)))
            images.append(_run(_decode, self._params[stage], padded, spec=self.stages[stage].spec.model)[: len(piece)])
        return np.concatenate(images)

    def encode(self, stage: str, images: np.ndarray) -> np.ndarray:
        """Token ids of pictures.

        Args:
          stage: "tokenizer_low" or "tokenizer_high".
          images: [n, height, width, 3], 0 to 255; sides are multiples of the tokenizer's factor.

        Returns:
          int32 [n, rows, columns].
        """
        tokens = []
        for start in range(0, len(images), self.max_batch_size):
            piece = images[start : start + self.max_batch_size]
            padded = _padded(piece, self._bucket(len(piece)))
            tokens.append(_run(_encode, self._params[stage], padded, spec=self.stages[stage].spec.model)[: len(piece)])
        return np.concatenate(tokens)

    @property
    def mask_ids(self) -> dict[str, int]:
        """{stage: what a masked token is}."""
        return {name: self.stages[name].spec.model.codebook_size for name in self.token_stages}

    @property
    def finest(self) -> str:
        """The tokenizer of the pictures that are made in the end."""
        return pipeline_folder.finest(self.stages)

    def grid(self, stage: str) -> tuple[int, int]:
        """Rows and columns of a token stage's tokens."""
        return tuple(self.stages[stage].spec.model.grid)

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.grid(self.token_stages[-1])[0] * self.stages[self.finest].spec.model.factor

    @property
    def low_image_size(self) -> int:
        """Side of the low-resolution pictures in pixels."""
        return self.grid("base")[0] * self.stages["tokenizer_low"].spec.model.factor

    @property
    def cell(self) -> int:
        """Pixels of a picture that one low-resolution token stands for, along a side."""
        return self.image_size // self.grid("base")[0]

    def _settings(self, given: Mapping[str, Any], requests: Requests) -> dict[str, dict[str, Any]]:
        """{stage: {setting: value}}: what was given, else the stage's own; numbers one a picture."""
        resolved = {name: dataclasses.asdict(self.stages[name].spec.sample) for name in self.token_stages}
        for key, value in given.items():
            stage = "superres" if key.startswith("superres_") else "base"
            name = key.removeprefix("superres_")
            if stage not in resolved:
                raise TypeError(f"{key} is given, but this pipeline has no super-resolution; leave it out.")
            if name not in resolved[stage]:
                raise TypeError(
                    f"MusePipeline has no setting {key!r}; expected one of {', '.join((*PER_PICTURE, *PER_CALL))}, "
                    "with superres_ before it for super-resolution."
                )
            if value is None:
                continue
            if name in ("num_inference_steps", "top_k") and (
                isinstance(value, bool) or not isinstance(value, int | np.integer)
            ):
                raise TypeError(f"{key} is {value!r}; expected a whole number.")
            if name in WORDS and not isinstance(value, str):
                raise TypeError(f"{key} is {value!r}; expected a name.")
            if name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float | np.number)):
                raise TypeError(f"{key} is {value!r}; expected a number.")
            resolved[stage][name] = value
        for stage in self.token_stages:
            prefix = "superres_" if stage == "superres" else ""
            for name in PER_PICTURE:
                resolved[stage][name] = requests.spread(prefix + name, resolved[stage][name])
            self._plan(stage, resolved[stage])  # refuses what cannot be, before the first piece is made
        return resolved

    def _plan(self, stage: str, settings: Mapping[str, Any]) -> sampler.Plan:
        rows, columns = self.grid(stage)
        try:
            return sampler.make_plan(tokens=rows * columns, grid=(rows, columns), **settings)
        except ValueError as error:
            raise ValueError(f"{stage}: {error}") from None

    def _warn(self, requests: Requests, resolved: Mapping[str, Mapping[str, Any]]) -> None:
        texts = dict.fromkeys((*requests.prompts, *requests.negative_prompts))
        unknown = dict.fromkeys(word for text in texts for word in self._vocabularies["base"].unknown(text))
        if unknown:
            words = ", ".join(map(repr, unknown))
            warnings.warn(f"The model has never seen these words and cannot draw them: {words}.", stacklevel=3)
        if any(requests.negative_prompts) and not any(any_guided(settings) for settings in resolved.values()):
            warnings.warn("negative_prompt has no effect at guidance_scale=1; use a larger one.", stacklevel=3)

    def _guided(self, stage: str) -> bool:
        """Whether a stage is meant to be guided: its program then is, at a scale of 1 too; see `guidance.optional`."""
        return self.stages[stage].spec.sample.guidance_scale != 1

    def _make(
        self,
        requests: Requests,
        way: Way,
        resolved: Mapping[str, Mapping[str, Any]],
        loops: Mapping[str, editing.Loop],
        piece: slice,
        history: bool,
    ) -> dict[str, Any]:
        """One batch: {stage: (tokens [n, rows, columns], steps or None)}."""
        count = len(requests.prompts[piece])
        bucket = self._bucket(count)
        seeds = _padded(np.asarray(requests.seeds[piece], np.uint32), bucket)
        weights = None if way.weights is None else _padded(way.weights[piece], bucket)
        made, low = {}, None
        for name in self.token_stages:
            model = self.stages[name].spec.model
            own = {k: _padded(v[piece], bucket) if k in PER_PICTURE else v for k, v in resolved[name].items()}
            texts = [text[piece] for text in (*way.texts, requests.negative_prompts)]
            length = self.stages[name].spec.condition_length
            encoded = [self._vocabularies[name].encode_batch(text, length) for text in texts]
            ids, mask = (np.concatenate([_padded(text[i], bucket) for text in encoded]) for i in range(2))
            loop = loops[name]
            known = loop.start != model.codebook_size if loop.known is None else loop.known
            low, steps = _run(
                _fill,
                self._params[name],
                ids,
                mask,
                low,
                _padded(loop.start[piece], bucket),
                _padded(known[piece], bucket),
                seeds,
                weights,
                loop.plan(self._plan(name, own)),
                any_guided(resolved[name]),
                spec=model,
                rule=loop.rule,
                stream=STREAMS[name],
                guided=self._guided(name),
                history=history,
            )
            shaped = low[:count].reshape(count, *model.grid)
            kept = (steps.predicted, steps.masked) if history else ()
            made[name] = shaped, tuple(x[:, :count].reshape(-1, count, *model.grid) for x in kept)
        return made

    def _bucket(self, count: int) -> int:
        """Batches are filled up to a power of two, so that few shapes are compiled."""
        return min(1 << (count - 1).bit_length(), max(self.max_batch_size, 1))


# ------------------------------------------------------------------------------ jitted functions
# Of the module, not of a pipeline: pipelines of the same architecture share what is compiled.

_LOCK = threading.Lock()
_COMPILED: set[Any] = set()


def _run(function: Any, *args: Any, **static: Any) -> Any:
    """Calls a jitted function; of threads that need a new program, one compiles and the others wait."""
    leaves, structure = jax.tree.flatten(args)
    key = (function, tuple(static.items()), structure, tuple((x.shape, str(x.dtype)) for x in leaves))
    if key in _COMPILED:
        return jax.device_get(function(*args, **static))
    with _LOCK:
        result = jax.device_get(function(*args, **static))
        _COMPILED.add(key)
    return result


@partial(jax.jit, static_argnames=("spec", "rule", "stream", "guided", "history"))
def _fill(
    params,
    text_ids,
    text_mask,
    low_tokens,
    tokens,
    known,
    seeds,
    weights,
    plan,
    guides,
    *,
    spec,
    rule: sampler.Select | None,
    stream: int,
    guided: bool,
    history: bool,
):
    """Fills in the masked ones of a stage's tokens.

    The texts are [prompts; negative prompts], with weights [prompts; other prompts; negative prompts].
    """
    apply = partial(predictors.from_spec(spec).apply, {"params": params})

    def condition(ids, mask):
        low = None if low_tokens is None else jnp.concatenate([low_tokens] * (len(ids) // len(tokens)))
        return apply(apply(ids, mask, method="encode_text"), mask, low, method="condition")

    logits = partial(apply, method="logits")
    if guided:
        memory = condition(text_ids, text_mask)  # once: no step changes it

        def both(tokens):
            return logits(tokens, memory)

        predict = guidance.guided(both if weights is None else guidance.between(both, weights))
    else:
        told = tuple(x.reshape(-1, len(tokens), x.shape[-1]) for x in (text_ids, text_mask))
        predict = guidance.optional(condition, logits, spec.codebook_size, told, guides, weights)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), stream))(seeds)
    return sampler.decode(predict, tokens, plan, keys, spec.codebook_size, known=known, select=rule, history=history)


@partial(jax.jit, static_argnames="spec")
def _encode(params, images, *, spec):
    return vqgan.VQGAN(spec).apply({"params": params}, vqgan.to_unit(images), method="tokens")


@partial(jax.jit, static_argnames="spec")
def _decode(params, tokens, *, spec):
    return vqgan.to_uint8(vqgan.VQGAN(spec).apply({"params": params}, tokens, method="decode_tokens"))


def any_guided(settings: Mapping[str, Any]) -> np.bool_:
    """Whether any picture is guided: told of a whole call's settings, so that all its pieces are drawn in one way."""
    return np.any(settings["guidance_scale"] != 1)


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """Filled up with copies of the last one."""
    return np.concatenate([values, np.repeat(values[-1:], size - len(values), axis=0)])


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON values; a list only where pictures differ."""
    lists = {name: np.asarray(value).tolist() for name, value in settings.items()}
    return {k: v[0] if isinstance(v, list) and len(set(v)) == 1 else v for k, v in lists.items()}


def _joined(pieces: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Predicted tokens and masks [steps, n, rows, columns] of all pieces."""
    return tuple(np.concatenate(arrays, axis=1) for arrays in zip(*pieces, strict=True))


def _model(spec: Any) -> Any:
    return vqgan.VQGAN(spec) if isinstance(spec, specs.VQGANSpec) else predictors.from_spec(spec)


def _vocabulary(name: str, stage: checkpoint.Stage) -> vocabulary.Vocabulary:
    if stage.vocabulary is None:
        raise PipelineError(f"{name} ({stage.path}) has no vocabulary.json; write this stage again.")
    words = vocabulary.from_json(stage.vocabulary)
    if isinstance(words, vocabulary.ClassVocabulary):
        _check_classes(name, stage, words)
        return words
    expected = stage.spec.model.text.vocabulary_size
    if isinstance(words, vocabulary.WordVocabulary) and words.size > expected:  # others' sizes take long to know
        raise PipelineError(
            f"{name} ({stage.path}) has a vocabulary of {words.size} ids, but its text encoder knows {expected}; "
            "use the vocabulary it was trained with."
        )
    return words


def _check_classes(name: str, stage: checkpoint.Stage, words: vocabulary.ClassVocabulary) -> None:
    found = getattr(stage.spec.model, "classes", 0)
    if len(words.names) != found:
        raise PipelineError(
            f"{name} ({stage.path}) has names of {len(words.names)} classes, but its model knows {found}; "
            "use the vocabulary.json that it was trained with."
        )


def _checked(name: str, stage: checkpoint.Stage) -> checkpoint.Stage:
    """The stage with parameters as float32, of exactly the names and shapes that its model has."""
    own = {part: value for part, value in stage.params.items() if part != "discriminator"}
    text = getattr(stage.spec.model, "text", None)
    if text is not None and not text.trainable and "text_encoder" not in own:
        own["text_encoder"] = _text_encoder(name, stage)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), own)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in _leaves(params)}
    expected = {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in _leaves(_shapes(stage.spec))}
    for leaf in sorted({*found, *expected}):
        if found.get(leaf) != expected.get(leaf):
            raise PipelineError(
                f"{name} ({stage.path}): its config gives the parameter {leaf} the shape {expected.get(leaf)}, and the "
                f"file has {found.get(leaf)}; the config and the parameters are not of the same run."
            )
    return dataclasses.replace(stage, params=params)


def _text_encoder(name: str, stage: checkpoint.Stage) -> Any:
    """The frozen text encoder, which a run's checkpoints leave out; a saved pipeline has it."""
    path = pathlib.Path(stage.spec.model.text.weights) / "params.safetensors"
    if not path.is_file():
        raise PipelineError(f"{name} ({stage.path}) was trained with the text encoder {path}, which is not there.")
    return traverse_util.unflatten_dict(safetensors.load_file(path), sep="/")


def _check_codebooks(decoder: Any, tokenizer: Any, path: str) -> None:
    if not np.array_equal(decoder["quantizer"]["codebook"], tokenizer["quantizer"]["codebook"]):
        raise PipelineError(
            "decoder and the tokenizer have different codebooks, so the decoder was fine-tuned from another "
            f"tokenizer; fine-tune it from {path}, or leave it out."
        )


def _leaves(tree: Any) -> list[Any]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _shapes(spec: specs.Spec) -> Any:
    """The model's parameters as shapes; nothing is computed."""
    model = _model(spec.model)
    if isinstance(spec.model, specs.VQGANSpec):
        args = [jnp.zeros((1, spec.model.factor, spec.model.factor, 3))]
    else:
        places = spec.model.grid[0] * spec.model.grid[1]
        text = jnp.zeros((1, spec.condition_length), jnp.int32)
        args = [jnp.zeros((1, places), jnp.int32), text, text > 0]
        if isinstance(spec.model, specs.SuperResSpec):
            args.append(jnp.zeros((1, spec.model.low_grid[0] * spec.model.low_grid[1]), jnp.int32))
    return jax.eval_shape(lambda *args: meta.unbox(model.init(jax.random.key(0), *args)["params"]), *args)
