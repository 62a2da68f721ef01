"""Learning a tokenizer: VQGAN (Esser et al. 2021; Muse 2.2) and the fine-tuning of its decoder (Muse 2.5)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muse_jax import specs
from muse_jax.models import lpips, quantizer, vqgan
from muse_jax.models.discriminator import Discriminator
from muse_jax.tasks import losses
from muse_jax.tasks.task import Batch, Mean, Metrics, Params

CANDIDATES = 32  # latents a step that dead codes can be moved to
SHOWN = 8  # pictures in the log
GENERATOR = ("encoder", "quantizer", "decoder")


class TokenizerTask:
    """Reconstruction, codebook, perceptual and adversarial losses; two optimizers, one forward pass."""

    def __init__(self, spec: specs.Spec, start: Params | None = None, perceptual: Params | None = None):
        """Args:
        start: trained parameters to go on from. With trainable="decoder" the decoder may be larger than
          theirs: it starts from what fits, and layers that theirs lacks start by passing on what they get.
        perceptual: LPIPS parameters (`models.lpips.load_lpips`), needed if task.perceptual > 0.
        """
        self.spec = spec
        self.start = start
        self.perceptual = perceptual
        self.model = vqgan.VQGAN(spec.model)
        self.discriminator = Discriminator(
            spec.model.discriminator_channels, spec.model.discriminator_layers, spec.model.dtype
        )
        self.decoder_only = spec.task.trainable == "decoder"
        self.adversarial = spec.task.adversarial > 0

    # -------------------------------------------------------------------------------- parameters

    def init(self, key: jax.Array) -> Params:
        """See `Task.init`; what was given as `start` takes the place of the random start."""
        image = jnp.zeros((1, self.spec.data.image_size, self.spec.data.image_size, 3))
        params = dict(self.model.init(key, image)["params"])
        if self.start is not None:
            kept = ("encoder", "quantizer") if self.decoder_only else GENERATOR
            params |= {name: _boxed_as(params[name], self.start[name]) for name in kept}
            if self.decoder_only:
                params["decoder"] = _grown(params["decoder"], self.start["decoder"])
        if self.adversarial:
            params["discriminator"] = self.discriminator.init(jax.random.fold_in(key, 1), image)["params"]
        return params

    def frozen(self) -> Params:
        """See `Task.frozen`."""
        return {} if self.perceptual is None else {"lpips": self.perceptual}

    def labels(self, params: Params) -> Params:
        """ "generator", "discriminator", or "frozen": the codes' counters, and all but a fine-tuned decoder."""

        def label(path: Any, _: Any) -> str:
            part = path[0].key
            if part == "discriminator":
                return "discriminator"
            still = self.decoder_only and part != "decoder"
            return "frozen" if still or path[-1].key == "unused" else "generator"

        return jax.tree_util.tree_map_with_path(label, params)

    # ---------------------------------------------------------------------------------- learning

    def grads(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[Params, Metrics, Any]:
        """See `Task.grads`. One forward pass of the generator serves both sides."""
        task = self.spec.task
        images = vqgan.to_unit(batch["image"])
        generator = {name: params[name] for name in GENERATOR}
        (output, quantized), pull = jax.vjp(lambda p: self.model.apply({"params": p}, images), generator)
        (_, metrics), by_output = jax.value_and_grad(self._distance, has_aux=True)(output, images, frozen)
        grads: dict[str, Params] = {}
        if self.adversarial:
            by_adversary, grads["discriminator"], more = self._adversary(
                params, generator, images, output, by_output, step
            )
            by_output = by_output + by_adversary
            metrics |= more
        places = quantized.ids.size
        cotangent = quantizer.Quantized(
            latents=jnp.zeros_like(quantized.latents),
            codes=jnp.zeros_like(quantized.codes),
            ids=np.zeros(quantized.ids.shape, jax.dtypes.float0),
            codebook_loss=jnp.full(quantized.ids.shape, task.codebook / places),
            commitment_loss=jnp.full(quantized.ids.shape, task.commitment / places),
        )
        grads |= pull((by_output, cotangent))[0]
        metrics |= self._quantizer_metrics(quantized)
        loss = (
            metrics["distance"].total
            + task.codebook * jnp.mean(quantized.codebook_loss)
            + task.commitment * jnp.mean(quantized.commitment_loss)
        )
        metrics["loss"] = Mean.of(loss)
        return {name: grads[name] for name in params}, metrics, self._extras(quantized, output, images, key)

    def _distance(self, output: jax.Array, images: jax.Array, frozen: Params) -> tuple[jax.Array, dict[str, Mean]]:
        """How far the reconstruction is: pixels, and LPIPS."""
        task = self.spec.task
        squared = jnp.mean(jnp.square(output - images), axis=(1, 2, 3))
        pixels = task.reconstruction * (jnp.mean(jnp.abs(output - images)) + jnp.mean(squared))
        metrics = {"reconstruction": Mean.of(pixels), "psnr": Mean.of(_psnr(squared))}
        total = pixels
        if task.perceptual:
            perceptual = jnp.mean(lpips.LPIPS().apply({"params": frozen["lpips"]}, output, images))
            metrics["perceptual"] = Mean.of(perceptual)
            total = total + task.perceptual * perceptual
        return total, metrics | {"distance": Mean.of(total)}

    def _adversary(
        self, params: Params, generator: Params, images: jax.Array, output: jax.Array, by_output: jax.Array, step: Any
    ) -> tuple[jax.Array, Params, dict[str, Mean]]:
        """The adversarial term's gradient by the output, the discriminator's gradients, metrics."""
        task = self.spec.task
        active = (step >= task.adversarial_start).astype(jnp.float32)
        learning = (step >= task.adversarial_start - task.adversarial_warmup).astype(jnp.float32)

        def judge(p: Params, x: jax.Array) -> jax.Array:
            return self.discriminator.apply({"params": p}, x)

        def fool(y: jax.Array) -> jax.Array:
            return losses.hinge_generator(judge(params["discriminator"], y))

        def tell_apart(p: Params) -> tuple[jax.Array, Any]:
            real, fake = judge(p, images), judge(p, jax.lax.stop_gradient(output))
            return losses.hinge_discriminator(real, fake), (jnp.mean(real), jnp.mean(fake))

        adversarial, by_adversary = jax.value_and_grad(fool)(output)
        weight = task.adversarial * active
        adaptive = jnp.ones(())
        if task.adaptive_weight:
            pull_last = self._pull_last(generator, images)
            adaptive = losses.adaptive_weight(pull_last(by_output), pull_last(by_adversary))
        (loss, (real, fake)), grads = jax.value_and_grad(tell_apart, has_aux=True)(params["discriminator"])
        metrics = {
            "adversarial": Mean.of(adversarial),
            "adaptive_weight": Mean.of(adaptive),
            "discriminator": Mean.of(loss),
            "logits_real": Mean.of(real),
            "logits_fake": Mean.of(fake),
        }
        return weight * adaptive * by_adversary, jax.tree.map(lambda g: g * learning, grads), metrics

    def _pull_last(self, generator: Params, images: jax.Array) -> Any:
        """Gradients by the decoder's last layer alone; XLA shares the forward pass with the whole one."""
        decoder = generator["decoder"]

        def output(last: Params) -> jax.Array:
            params = {**generator, "decoder": {**decoder, "pixels": last}}
            return self.model.apply({"params": params}, images)[0]

        return jax.vjp(output, decoder["pixels"])[1]

    def _quantizer_metrics(self, quantized: quantizer.Quantized) -> dict[str, Mean]:
        counts = self._counts(quantized.ids).astype(jnp.float32)
        entropy = losses.entropy_of_counts(counts)
        return {
            "codebook": Mean.of(jnp.mean(quantized.codebook_loss)),
            "commitment": Mean.of(jnp.mean(quantized.commitment_loss)),
            "codebook_used": Mean.of(jnp.mean(counts > 0)),
            "token_entropy": Mean.of(entropy),
            "perplexity": Mean.of(jnp.exp(entropy)),
        }

    def _counts(self, ids: jax.Array) -> jax.Array:
        return jnp.bincount(ids.reshape(-1), length=self.spec.model.codebook_size)

    def _extras(self, quantized: quantizer.Quantized, output: jax.Array, images: jax.Array, key: jax.Array) -> Any:
        """How often each code was used, and latents drawn where the reconstruction is worst.

        Revived on flat background a code is no gain: it splits what one code said well. So latents
        are drawn in proportion to the error of their patch.
        """
        if not self.spec.task.revive_after or self.decoder_only:
            return None
        error = jnp.mean(jnp.square(output - images), axis=-1, keepdims=True)
        error = jnp.mean(vqgan.space_to_depth(error, self.spec.model.factor), axis=-1).reshape(-1)
        score = jnp.log(error + 1e-9) + jax.random.gumbel(key, error.shape)
        latents = quantized.latents.reshape(-1, quantized.latents.shape[-1])
        return {"used": self._counts(quantized.ids), **_best(score, latents)}

    def merge(self, extras: Any, more: Any) -> Any:
        """See `Task.merge`."""
        if extras is None:
            return None
        score, candidates = (jnp.concatenate([extras[name], more[name]]) for name in ("score", "candidates"))
        return {"used": extras["used"] + more["used"], **_best(score, candidates)}

    def after_update(self, params: Params, extras: Any, key: jax.Array, step: jax.Array) -> Params:
        """Revives the codes that died."""
        if extras is None:
            return params
        revived = quantizer.revive(
            params["quantizer"], extras["used"], extras["candidates"], self.spec.task.revive_after
        )
        return {**params, "quantizer": revived}

    # -------------------------------------------------------------------------------- looking at

    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> Metrics:
        """Distance, PSNR and the use of the codebook on a held-out batch."""
        images = vqgan.to_unit(batch["image"])
        output, quantized = self._reconstruct(params, images)
        _, metrics = self._distance(jnp.clip(output, -1, 1), images, frozen)
        return metrics | self._quantizer_metrics(quantized) | {"loss": metrics["distance"]}

    def samples(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Pictures above, their reconstructions below."""
        images = batch["image"][:SHOWN]
        output, _ = self._reconstruct(params, vqgan.to_unit(images))
        return {"reconstructions": jnp.concatenate([images, vqgan.to_uint8(output)], axis=1)}

    def _reconstruct(self, params: Params, images: jax.Array) -> tuple[jax.Array, quantizer.Quantized]:
        return self.model.apply({"params": {name: params[name] for name in GENERATOR}}, images)


def _best(score: jax.Array, candidates: jax.Array) -> dict[str, jax.Array]:
    """The candidates of the highest scores, the highest first."""
    score, best = jax.lax.top_k(score, min(CANDIDATES, score.size))
    return {"score": score, "candidates": candidates[best]}


def _psnr(squared_error: jax.Array) -> jax.Array:
    """In dB, of mean squared errors of pictures in [-1, 1]."""
    return 10 * jnp.log10(4.0 / jnp.maximum(squared_error, 1e-10))


def _boxed_as(boxes: Params, values: Params) -> Params:
    """`values` in the metadata boxes of `boxes`."""
    return jax.tree.map(
        lambda box, value: box.replace_boxed(jnp.asarray(value)),
        boxes,
        values,
        is_leaf=lambda x: hasattr(x, "replace_boxed"),
    )


def _grown(boxes: Params, trained: Params) -> Params:
    """A decoder that starts from a smaller trained one.

    What has the same name and shape is taken over; a residual block that the trained one lacks adds
    nothing at first, so that with equal channels the larger decoder starts as the trained one.
    """

    def start(path: Any, box: Any) -> Any:
        names = [key.key for key in path if hasattr(key, "key")]
        found: Any = trained
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        if found is not None and found.shape == box.value.shape:
            return box.replace_boxed(jnp.asarray(found))
        new_block = names[0] not in trained and "conv2" in names
        return box.replace_boxed(jnp.zeros_like(box.value)) if new_block else box

    return jax.tree_util.tree_map_with_path(start, boxes, is_leaf=lambda x: hasattr(x, "replace_boxed"))
