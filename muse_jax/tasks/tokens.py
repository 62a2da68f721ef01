"""Learning to predict masked or noised image tokens: Muse (sections 2.3, 2.4, 2.6), MaskGIT, Paella."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from muse_jax import specs
from muse_jax.models import layers, predictors, t5, vqgan
from muse_jax.sampling import guidance, sampler, schedules
from muse_jax.tasks import corruption, losses
from muse_jax.tasks.task import Batch, Mean, Metrics, Params

EVALUATED_RATIOS = (0.25, 0.5, 0.75, 1.0)
TABLES = ("tokens", "rows", "columns", "embedding", "rel_embedding", "table", "classes")  # looked up by an index
SAMPLED = 8  # prompts in the log's pictures


class Tokenizer(NamedTuple):
    """A trained tokenizer: its spec, and its parameters (nested dict of arrays)."""

    spec: specs.VQGANSpec
    params: Params


class Corrupted(NamedTuple):
    """What the model sees, and what it is asked."""

    tokens: jax.Array  # [b, n] with the mask id, or noise, at masked places
    text_mask: jax.Array  # [b, t]
    low_tokens: jax.Array | None  # [b, l]; Paella: the picture that it is conditioned on
    mask: jax.Array  # [b, n]
    t: jax.Array  # [b] the time at which so many are masked


class TokensTask:
    """Masked token prediction given a text or a class and, for super-resolution, low-resolution tokens."""

    def __init__(
        self,
        spec: specs.Spec,
        tokenizer: Tokenizer,
        low_tokenizer: Tokenizer | None = None,
        text_encoder: Params | None = None,
    ):
        """Args:
          tokenizer: of the predicted tokens.
          low_tokenizer: super-resolution only.
          text_encoder: frozen parameters, {} where batches have its embeddings; None where it is trained along.

        Raises:
          SpecError: if the config's `sample` section can't be sampled with: better now than at the first preview.
        """
        self.spec = spec
        self.model = predictors.from_spec(spec.model)
        self.super_resolution = isinstance(spec.model, specs.SuperResSpec)
        self.noise = spec.task.corruption == "noise"  # instead of a mask id, and the model is told the time
        self.tokenizers = {"tokenizer": tokenizer} | ({"low_tokenizer": low_tokenizer} if low_tokenizer else {})
        self.text_encoder = text_encoder
        self.places = spec.model.grid[0] * spec.model.grid[1]
        self.schedule = schedules.SCHEDULES[spec.task.mask_schedule]
        try:
            self.plan = sampler.make_plan(tokens=self.places, grid=spec.model.grid, **dataclasses.asdict(spec.sample))
        except ValueError as error:
            raise specs.SpecError(f"sample: {error}") from error

    # -------------------------------------------------------------------------------- parameters

    def init(self, key: jax.Array) -> Params:
        """See `Task.init`."""
        model = self.spec.model
        text = jnp.zeros((1, self.spec.condition_length), jnp.int32)
        low = jnp.zeros((1, model.low_grid[0] * model.low_grid[1]), jnp.int32) if self.super_resolution else None
        tokens = jnp.zeros((1, self.places), jnp.int32)
        params = dict(self.model.init(key, tokens, text, text > 0, low)["params"])
        if self.text_encoder is not None:
            del params["text_encoder"]
        if self.spec.task.codebook_init:
            params["embedding"] = _projected(params["embedding"], self.tokenizers["tokenizer"], key)
            if self.super_resolution:
                params["low_embedding"] = _projected(params["low_embedding"], self.tokenizers["low_tokenizer"], key)
            if not self.noise:  # tried with the heads of Muse and MaskGIT; Paella has one of its own
                params["head"] = _projected_head(params["head"], self.tokenizers["tokenizer"], key)
        return params

    def frozen(self) -> Params:
        """See `Task.frozen`. In boxes with their axes' names, so that they are split over the mesh too."""
        networks = {}
        for name, tokenizer in self.tokenizers.items():
            side = tokenizer.spec.factor
            boxes = jax.eval_shape(vqgan.VQGAN(tokenizer.spec).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
            networks[name] = _boxed(boxes["params"], tokenizer.params)
        if self.text_encoder is not None:
            ids = jnp.zeros((1, 1), jnp.int32)
            encoder = t5.from_spec(self.spec.model.text)
            boxes = jax.eval_shape(encoder.init, jax.random.key(0), ids, ids > 0)["params"]
            networks["text_encoder"] = _boxed(boxes, self.text_encoder) if self.text_encoder else {}
        return networks

    def labels(self, params: Params) -> Params:
        """ "embeddings" for the tables that are looked up, "model" for the rest."""

        def label(path: Any, _: Any) -> str:
            return "embeddings" if path[-1].key in TABLES else "model"

        return jax.tree_util.tree_map_with_path(label, params)

    # ---------------------------------------------------------------------------------- learning

    def grads(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[Params, Metrics, None]:
        """See `Task.grads`."""
        del step
        grad = jax.grad(self._loss, has_aux=True)
        grads, metrics = grad(params, frozen, batch, key)
        return grads, metrics, None

    def merge(self, extras: None, more: None) -> None:
        """There are none."""

    def after_update(self, params: Params, extras: Any, key: jax.Array, step: jax.Array) -> Params:
        """The identity."""
        return params

    def _loss(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        task, batch = self.spec.task, self.conditioned(batch)
        tokens, low_tokens = self.tokens(frozen, batch)
        keys = corruption.example_keys(key, batch["example_id"])
        corrupted = self.corrupt(keys, tokens, batch["text_mask"], low_tokens)
        # Micro-batches share the step's key; their first examples differ.
        rngs = {"dropout": jax.random.fold_in(keys[0], 0)} if self.spec.model.dropout else None
        logits = self._logits(params, frozen, corrupted, batch, rngs)
        weights = jnp.where(corrupted.mask, 1.0, task.visible_weight)
        loss = losses.weighted_example_mean(losses.cross_entropy(logits, tokens, task.label_smoothing), weights)
        metrics = self._metrics(logits, tokens, corrupted.mask, loss)
        return jnp.mean(loss), metrics

    def conditioned(self, batch: Batch) -> Batch:
        """The batch with its labels as texts of one id, where it has no texts; a label of -1 is no class."""
        if self.spec.data.text_length:
            return batch
        ids = batch["label"][:, None] + 1
        return {**batch, "text_ids": ids, "text_mask": ids > 0}

    def corrupt(
        self, keys: jax.Array, tokens: jax.Array, text_mask: jax.Array, low_tokens: jax.Array | None
    ) -> Corrupted:
        """Masks tokens, drops texts and replaces low-resolution tokens, each example by its own key."""
        task, model = self.spec.task, self.spec.model
        parts = jax.vmap(functools.partial(jax.random.split, num=4))(keys)
        ratio = functools.partial(
            corruption.mask_ratio, schedule=self.schedule, tokens=self.places, minimum=task.min_mask_ratio
        )
        ratios = jax.vmap(ratio)(parts[:, 0])
        mask = jax.vmap(functools.partial(corruption.random_mask, tokens=self.places))(parts[:, 1], ratios)
        text_mask = jax.vmap(functools.partial(corruption.drop_text, share=task.text_dropout))(parts[:, 2], text_mask)
        if low_tokens is not None and task.low_corruption:
            replace = functools.partial(
                corruption.replace_some, highest=task.low_corruption, codebook_size=model.low_codebook_size
            )
            low_tokens = jax.vmap(replace)(parts[:, 3], low_tokens)
        times = jax.vmap(jax.random.uniform)(parts[:, 0])  # of which mask_ratio made the ratios
        if not self.noise:
            return Corrupted(jnp.where(mask, model.codebook_size, tokens), text_mask, low_tokens, mask, times)
        noised = functools.partial(corruption.noised, codebook_size=model.codebook_size)
        if task.picture_share:
            shown = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(parts[:, 3])
            shown = shown[:, None] < task.picture_share
            low_tokens = jnp.where(shown, tokens, model.codebook_size)
            text_mask = text_mask & ~shown
        return Corrupted(jax.vmap(noised)(parts[:, 3], tokens, mask), text_mask, low_tokens, mask, times)

    def tokens(self, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """The predicted tokens [b, n] and super-resolution's low-resolution ones [b, l].

        Precomputed ones in the batch (`high_tokens`, `low_tokens`) are taken as they are.
        """
        high = "high_tokens" if self.super_resolution else "low_tokens"
        tokens = batch[high] if high in batch else self._encode("tokenizer", frozen, batch["image"])
        if not self.super_resolution:
            return tokens, None
        low = batch["low_tokens"] if "low_tokens" in batch else self._encode_low(frozen, batch["image"])
        return tokens, low

    def precomputable(self, frozen: Params, batch: Batch, embeddings: bool) -> dict[str, jax.Array]:
        """What batches may have instead of pictures and, if `embeddings`, instead of text ids.

        Embeddings are in the model's dtype, which is how it reads them.
        """
        tokens, low = self.tokens(frozen, batch)
        made = {"low_tokens": tokens} if low is None else {"low_tokens": low, "high_tokens": tokens}
        if embeddings:
            found = self._apply({}, frozen, "encode_text", batch["text_ids"], batch["text_mask"])
            made["text_embeddings"] = found.astype(jnp.dtype(self.spec.model.dtype))
        return made

    def _encode_low(self, frozen: Params, images: jax.Array) -> jax.Array:
        """Tokens of the picture decimated to what the low-resolution tokenizer was trained on.

        The mean of each square of pixels, which is how those pictures came by their size; a wider
        filter would blur them, and the tokens would be others than the base model draws.
        """
        factor = self.tokenizers["low_tokenizer"].spec.factor
        rows, columns = (side * factor for side in self.spec.model.low_grid)
        height, width = images.shape[1] // rows, images.shape[2] // columns
        squares = images.astype(jnp.float32).reshape(-1, rows, height, columns, width, 3)
        return self._encode("low_tokenizer", frozen, jnp.mean(squares, axis=(2, 4)))

    def _encode(self, name: str, frozen: Params, images: jax.Array) -> jax.Array:
        tokenizer = vqgan.VQGAN(self.tokenizers[name].spec)
        ids = tokenizer.apply({"params": frozen[name]}, vqgan.to_unit(images), method="tokens")
        return ids.reshape(ids.shape[0], -1)

    def _logits(
        self, params: Params, frozen: Params, corrupted: Corrupted, batch: Batch, rngs: Mapping | None
    ) -> jax.Array:
        memory = self._memory(params, frozen, batch, corrupted.text_mask, corrupted.low_tokens, rngs)
        t = (corrupted.t,) if self.noise else ()
        return self._apply(params, frozen, "logits", corrupted.tokens, memory, *t, rngs is None, rngs=rngs)

    def _memory(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        text_mask: jax.Array,
        low_tokens: jax.Array | None,
        rngs: Mapping | None = None,
    ) -> Any:
        embeddings = batch.get("text_embeddings")
        if embeddings is None:
            # The text as it is: only the layers that attend to it see that it was dropped.
            text = (batch["text_ids"], batch["text_mask"], rngs is None)
            rules = self.spec.rules if self.text_encoder is None else self.spec.rules_of_frozen
            with layers.ruled(rules):
                embeddings = self._apply(params, frozen, "encode_text", *text, rngs=rngs)
        return self._apply(params, frozen, "condition", embeddings, text_mask, low_tokens, rngs is None, rngs=rngs)

    def _apply(self, params: Params, frozen: Params, method: str, *args: Any, rngs: Mapping | None = None) -> Any:
        if self.text_encoder is not None:
            params = {**params, "text_encoder": frozen["text_encoder"]}
        return self.model.apply({"params": params}, *args, method=method, rngs=rngs)

    def _metrics(self, logits: jax.Array, tokens: jax.Array, mask: jax.Array, loss: jax.Array) -> dict[str, Mean]:
        ratios = jnp.mean(mask, axis=-1)
        plain = losses.weighted_example_mean(losses.cross_entropy(logits, tokens), mask.astype(jnp.float32))
        right = losses.weighted_example_mean(
            losses.accuracy(logits, tokens).astype(jnp.float32), mask.astype(jnp.float32)
        )
        counts = jnp.bincount(tokens.reshape(-1), length=self.spec.model.codebook_size).astype(jnp.float32)
        return {
            "loss": Mean.of(loss),
            "accuracy": Mean.of(right),
            "mask_ratio": Mean.of(ratios),
            "unigram_entropy": Mean.of(losses.entropy_of_counts(counts)),
            **losses.by_ratio("cross_entropy", plain, ratios),
            **losses.by_ratio("accuracy", right, ratios),
        }

    # -------------------------------------------------------------------------------- looking at

    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> Metrics:
        """Cross-entropy without smoothing at fixed mask ratios, with the whole text; "loss" is their mean."""
        batch = self.conditioned(batch)
        tokens, low_tokens = self.tokens(frozen, batch)
        keys = corruption.example_keys(key, batch["example_id"])
        memory = self._memory(params, frozen, batch, batch["text_mask"], low_tokens)
        shares = np.float32(EVALUATED_RATIOS)
        times = schedules.time(self.spec.task.mask_schedule, shares, self.places) if self.noise else shares

        def at(given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            share, t = given
            mask = jax.vmap(lambda k: corruption.random_mask(k, share, self.places))(keys)
            seen = jnp.where(mask, self.spec.model.codebook_size, tokens)
            if self.noise:
                noised = functools.partial(corruption.noised, codebook_size=self.spec.model.codebook_size)
                seen = jax.vmap(noised)(jax.vmap(jax.random.fold_in, (0, None))(keys, 1), tokens, mask)
            logits = self._apply(params, frozen, "logits", seen, memory, *((t,) if self.noise else ()))
            weights = mask.astype(jnp.float32)
            right = losses.accuracy(logits, tokens).astype(jnp.float32)
            loss = losses.cross_entropy(logits, tokens)
            return losses.weighted_example_mean(loss, weights), losses.weighted_example_mean(right, weights)

        every, right = jax.lax.map(at, (shares, times))  # a loop, to compile the model once
        metrics = {"loss": Mean.of(every)}
        for index, ratio in enumerate(EVALUATED_RATIOS):
            metrics[f"loss/ratio_{ratio:.2f}"] = Mean.of(every[index])
            metrics[f"accuracy/ratio_{ratio:.2f}"] = Mean.of(right[index])
        return metrics

    def samples(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """The batch's first prompts, drawn as the config's `sample` section says; true pictures above."""
        batch = {name: value[:SAMPLED] for name, value in self.conditioned(batch).items()}
        drawn = self._draw(params, frozen, batch, key)
        return {"samples": jnp.concatenate([batch["image"], drawn], axis=1) if "image" in batch else drawn}

    def _draw(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> jax.Array:
        model = self.spec.model
        _, low_tokens = self.tokens(frozen, batch) if self.super_resolution else (None, None)
        # The conditional half first, then the unconditional one, as `guidance.guided` has it.
        twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), dict(batch))
        text_mask = jnp.concatenate([batch["text_mask"], jnp.zeros_like(batch["text_mask"])])
        low_twice = None if low_tokens is None else jnp.concatenate([low_tokens, low_tokens])
        memory = self._memory(params, frozen, twice, text_mask, low_twice)
        keys = corruption.example_keys(key, batch["example_id"])
        logits = functools.partial(self._apply, params, frozen, "logits")
        if self.noise:
            predict = guidance.guided(lambda tokens, t: logits(tokens, memory, t), timed=True)
            start = sampler.noise(keys, self.places, model.codebook_size)
            tokens, _ = sampler.decode(predict, start, self.plan, keys, start, revisable=True)
        else:
            predict = guidance.guided(lambda tokens: logits(tokens, memory))
            start = jnp.full((text_mask.shape[0] // 2, self.places), model.codebook_size, jnp.int32)
            tokens, _ = sampler.decode(predict, start, self.plan, keys, model.codebook_size)
        tokenizer = vqgan.VQGAN(self.tokenizers["tokenizer"].spec)
        images = tokenizer.apply(
            {"params": frozen["tokenizer"]}, tokens.reshape(-1, *model.grid), method="decode_tokens"
        )
        return vqgan.to_uint8(images)


def _boxed(boxes: Params, values: Params) -> Params:
    """`values` in the metadata boxes of `boxes`."""
    return jax.tree.map(
        lambda box, value: box.replace_boxed(value), boxes, values, is_leaf=lambda x: hasattr(x, "replace_boxed")
    )


def _directions(tokenizer: Tokenizer, width: int, key: jax.Array) -> jax.Array:
    """A random projection of the tokenizer's codes to vectors of unit variance, [codes, width]."""
    codes = jnp.asarray(tokenizer.params["quantizer"]["codebook"], jnp.float32)
    codes = codes / jnp.sqrt(jnp.mean(jnp.sum(jnp.square(codes), axis=-1)))
    return codes @ jax.random.normal(key, (codes.shape[-1], width))


def _projected(embedding: Params, tokenizer: Tokenizer, key: jax.Array) -> Params:
    """The embedding with its codes' rows a projection of the tokenizer's codes.

    Codes that look alike start alike, instead of as far apart as any two.
    """
    table = embedding["tokens"]
    rows = _directions(tokenizer, table.value.shape[-1], jax.random.fold_in(key, 1))
    return {**embedding, "tokens": table.replace_boxed(table.value.at[: rows.shape[0]].set(rows))}


def _projected_head(head: Params, tokenizer: Tokenizer, key: jax.Array) -> Params:
    """The head with logits that are alike for codes that look alike, until it learns to tell them apart."""
    kernel = head["logits"]["kernel"]
    width = kernel.value.shape[0]
    columns = _directions(tokenizer, width, jax.random.fold_in(key, 2)).T / np.sqrt(width)
    return {**head, "logits": {**head["logits"], "kernel": kernel.replace_boxed(columns)}}
