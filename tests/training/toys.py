"""Tiny tasks for the trainer's tests, and a command that trains one.

python tests/training/toys.py KIND WORKDIR [CHANGES [COORDINATOR PROCESSES PROCESS]]
"""

import dataclasses
import hashlib
import json
import os
import resource
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from muse_jax import specs
from muse_jax.tasks.task import Mean
from muse_jax.training import hosts, locks, sharding, signals, trainer

TOKENS, CODES, WIDTH = 6, 7, 8
RULES = {"batch": ("data", "fsdp"), "vocab": None, "embed": "fsdp", "mlp": "tensor", "layers": None}


def spec(**changes) -> specs.Spec:
    """A spec for a toy; "train.steps"=5 and the like change single values. Models and tasks are only carried along."""
    base = specs.Spec(
        seed=1,
        task=specs.TokenizerTaskSpec(),
        model=specs.VQGANSpec(codebook_size=CODES, code_dim=2, channels=2, channel_multipliers=(1,), res_blocks=1),
        data=specs.DataSpec(name="synthetic", image_size=8),
        optimizer=specs.OptimizerSpec(learning_rate=0.01, weight_decay=0.01, clip_norm=1.0),
        mesh=specs.MeshSpec(data=1),
        rules=RULES,
        train=specs.TrainSpec(steps=8, batch_size=4, log_every=2, eval_batches=1),
        checkpoint=specs.CheckpointSpec(every_steps=3, keep=2),
        sample=specs.SampleSpec(),
    )
    for key, value in changes.items():
        section, _, name = key.partition(".")
        new = dataclasses.replace(getattr(base, section), **{name: value}) if name else value
        base = dataclasses.replace(base, **{section: new})
    return base


def random(key, *shape):
    """Numbers in -1..1 that depend on a key; threefry would take seconds to compile."""
    bits = jax.random.key_data(key).astype(jnp.uint32)
    index = jnp.arange(int(np.prod(shape)), dtype=jnp.uint32).reshape(shape)
    return jnp.sin((index * np.uint32(7919) + bits[0] + bits[1] * 31) % 65521 * 1.0)


def box(value, *names):
    return nn.LogicallyPartitioned(value, names)


class Masked:
    """Predicts masked tokens with two stacked layers; the frozen table embeds them."""

    def init(self, key):
        return {
            "layers": {
                "kernel": box(random(key, 2, WIDTH, WIDTH) * 0.3, "layers", "embed", "mlp"),
                "bias": box(jnp.zeros((2, WIDTH)), "layers", "mlp"),
            },
            "head": {"kernel": box(random(key, WIDTH, CODES) * 0.1, "embed", "vocab")},
            "unused": box(jnp.full((CODES,), -0.0), "vocab"),
        }

    def frozen(self):
        return {"table": np.linspace(-1, 1, (CODES + 1) * WIDTH, dtype=np.float32).reshape(CODES + 1, WIDTH)}

    def labels(self, params):
        return {**jax.tree.map(lambda _: "all", params), "unused": "frozen"}

    def loss(self, params, frozen, batch, key):
        ids = batch["example_id"][:, None]
        masked = jnp.sin(ids * jnp.arange(1, TOKENS + 1) + random(key) * 1000) < jnp.sin(ids * 1.7)
        masked = masked.at[:, 0].set(True)
        x = frozen["table"][jnp.where(masked, CODES, batch["tokens"])]
        x = x + jnp.mean(x, axis=1, keepdims=True)
        for layer in range(2):
            x = x + jnp.tanh(x @ params["layers"]["kernel"][layer] + params["layers"]["bias"][layer])
        log_p = jax.nn.log_softmax(x @ params["head"]["kernel"])
        loss = -jnp.take_along_axis(log_p, batch["tokens"][..., None], -1)[..., 0]
        loss = loss * batch["poison"][:, None]
        mean = Mean.of(loss, masked.astype(jnp.float32))
        return mean.value(), {"loss": mean, "masked": Mean.of(masked)}

    def grads(self, params, frozen, batch, key, step):
        grads, metrics = jax.grad(self.loss, has_aux=True)(params, frozen, batch, key)
        return grads, metrics, None

    def merge(self, extras, more):
        return None

    def after_update(self, params, extras, key, step):
        return params

    def evaluate(self, params, frozen, batch, key):
        return self.loss(params, frozen, batch, key)[1]

    def samples(self, params, frozen, batch, key):
        if "TOY_UNDRAWABLE" in os.environ:
            raise ValueError("it can't be drawn")
        return {"tokens": batch["tokens"].astype(jnp.uint8)[:, :, None, None].repeat(3, -1)}


class Adversaries:
    """Two players with optimizers of their own, and a counter that `after_update` changes."""

    def init(self, key):
        return {
            "generator": {"kernel": box(random(key, TOKENS, WIDTH), "embed", "mlp")},
            "discriminator": {"kernel": box(jnp.ones((WIDTH, 1)), "mlp", None)},
            "unused": box(jnp.zeros((CODES,)), "vocab"),
        }

    def frozen(self):
        return {}

    def labels(self, params):
        return {name: jax.tree.map(lambda _, n=name: "frozen" if n == "unused" else n, p) for name, p in params.items()}

    def grads(self, params, frozen, batch, key, step):
        x = batch["tokens"].astype(jnp.float32) * batch["poison"][:, None]

        def generator(g, d):
            made = jnp.tanh(x @ g["kernel"])
            return jnp.mean(jnp.square(made - 0.5)) - 0.1 * jnp.mean(made @ d["kernel"])

        def discriminator(d, g):
            made = jnp.tanh(x @ jax.lax.stop_gradient(g)["kernel"])
            return jnp.mean(jnp.square(made @ d["kernel"] - 1))

        g, d = params["generator"], params["discriminator"]
        loss, grad_g = jax.value_and_grad(generator)(g, d)
        other, grad_d = jax.value_and_grad(discriminator)(d, g)
        used = jnp.zeros((CODES,)).at[batch["tokens"][:, 0]].add(1)
        metrics = {"loss": Mean.of(loss), "discriminator_loss": Mean.of(other)}
        return {"generator": grad_g, "discriminator": grad_d, "unused": jnp.zeros((CODES,))}, metrics, used

    def merge(self, extras, more):
        return extras + more

    def after_update(self, params, extras, key, step):
        noise = random(key, CODES)
        return {**params, "unused": jnp.where(extras > 0, 0.0, params["unused"] + noise)}

    def evaluate(self, params, frozen, batch, key):
        return self.grads(params, frozen, batch, key, 0)[1]

    def samples(self, params, frozen, batch, key):
        return {}


TASKS = {"masked": Masked, "adversaries": Adversaries}


def batch_of(step: int, size: int, poisoned: bool = False):
    ids = np.arange(step * size, (step + 1) * size, dtype=np.int32)
    tokens = np.random.default_rng(step).integers(0, CODES, (size, TOKENS), dtype=np.int32)
    poison = np.full((size,), np.nan if poisoned else 1.0, np.float32)
    return {"example_id": ids, "tokens": tokens, "poison": poison}


def batches(start: int, size: int = 4, poisoned=(), pause: float = 0.0, part=(0, 1), hang_at: int = -1):
    step = start
    full = [int(word) for word in os.environ.get("TOY_FULL", "").split()]
    while True:
        time.sleep(1e9 if step == hang_at else pause)
        if step in full:  # files can't grow, those of writers in C++ neither, from the first step to the second
            most = 100 if step == full[0] else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        yield part_of(batch_of(step, size, step in poisoned), *part)
        step += 1


def part_of(batch, index: int, count: int):
    """What one of several processes reads."""
    rows = len(batch["example_id"]) // count
    return {name: leaf[index * rows : (index + 1) * rows] for name, leaf in batch.items()}


def train(run: specs.Spec, workdir, task=None, poisoned=(), data="toy", pause=0.0, hang_at=-1, **changes):
    """`trainer.train` on a toy, quietly."""
    size = run.train.batch_size
    part = sharding.process_part(sharding.batch_sharding(sharding.make_mesh(run.mesh), run.rules), size)
    arguments = {
        "workdir": workdir,
        "make_batches": lambda start: batches(start, size, poisoned, pause, part, hang_at),
        "eval_batches": lambda: [part_of(batch_of(10**6 + i, size), *part) for i in range(run.train.eval_batches)],
        "data_fingerprint": data,
        "tensorboard": False,
        "bar": False,
        **changes,
    }
    return trainer.train(run, task or Masked(), **arguments)


def bits(tree) -> str:
    """A digest of all bits of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


def main(kind: str, workdir: str, changes: str = "{}", coordinator=None, processes=None, process=None) -> int:
    """Trains a toy slowly enough to be interrupted; says how it ended."""
    if bucket := os.environ.get("TOY_BUCKET"):
        import gcs

        gcs.use(*bucket.split("|"))
        locks.LEASE = float(os.environ["TOY_LEASE"])
    slow, hang_at = float(os.environ.get("TOY_PAUSE", "0")), int(os.environ.get("TOY_HANG_AT", "-1"))
    run = spec(**json.loads(changes))
    clock, ahead = time.time, float(os.environ.get("TOY_CLOCK_AHEAD", "0"))
    time.time = lambda: clock() + ahead
    if coordinator:
        limits = {"join_seconds": run.deadlines.start, "heartbeat_seconds": run.deadlines.heartbeat}
        hosts.start(coordinator, int(processes), int(process), **limits)
    try:
        result = train(run, epath.Path(workdir), TASKS[kind](), pause=slow, hang_at=hang_at)
    except signals.Stopped as stopped:
        print(stopped, flush=True)
        return stopped.exit_code
    except (hosts.HostError, jax.errors.JaxRuntimeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        hosts.leave(1)
    print("done", result.step, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
