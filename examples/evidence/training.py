"""The training loop of all suites: one jitted step, a checkpoint now and then, and on from it when started again."""

import csv
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from examples.evidence import low_rank

Params = Any
Batch = Any
Progress = Callable[[int, int], None]  # is told the number of steps done and of all


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How models are fine-tuned: an optimiser of this file, its rate, steps and weight decay.

    `frozen` names the part of the parameters, a key of their top level, that is not trained. With a `rank` nothing is
    but LoRA's factors of the matrices outside it.
    """

    optimiser: Callable[..., optax.GradientTransformation]
    rate: float
    steps: int
    weight_decay: float = 0.0
    batch: int = 128
    frozen: str | None = None
    rank: int | None = None

    def schedule(self) -> optax.GradientTransformation:
        """The optimiser, with everything set."""
        optimiser = self.optimiser(self.rate, self.steps, weight_decay=self.weight_decay)
        if self.frozen is None:
            return optimiser

        def kind(path, _):
            return "frozen" if jax.tree_util.keystr(path[:1], simple=True) == self.frozen else "trained"

        ways = {"trained": optimiser, "frozen": optax.set_to_zero()}
        return optax.partition(ways, lambda params: jax.tree.map_with_path(kind, params))


def fit(
    params: Params,
    loss: Callable[[Params, Batch, jax.Array], jax.Array],
    batch: Callable[[int], Batch],
    optimiser: optax.GradientTransformation,
    steps: int,
    *,
    out: Path,
    seed: int = 0,
    every: int = 250,
    progress: Progress = lambda done, steps: None,
) -> Params:
    """Trains, and goes on from the last checkpoint if there is one.

    Args:
        params: where to start, a pytree of arrays.
        loss: of the parameters, a batch and a random key: a scalar.
        batch: the batch of a step (0, 1, ...): a pytree of arrays. A function of the step alone, so that a run that was
            interrupted sees what it would have seen.
        optimiser: from optax, with its schedule.
        steps: how many.
        out: a directory for checkpoints and `log.csv` (step, mean loss since the last line, seconds since the start).
        seed: of the loss's keys.
        every: steps from one checkpoint, and line of the log, to the next.
        progress: is told the number of steps done and of all.

    Returns:
        The trained parameters.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, batch, key):
        value, gradient = jax.value_and_grad(loss)(params, batch, key)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jax.numpy.array, params)  # a copy, since the step donates
    state = optimiser.init(params)
    with ocp.CheckpointManager((out / "checkpoints").absolute(), options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
            params, state = manager.restore(done, args=ocp.args.StandardRestore(like))
        losses, begin = [], time.time()
        for number in range(done, steps):
            key = jax.random.fold_in(jax.random.key(seed), number)
            params, state, value = step(params, state, batch(number), key)
            losses.append(value)
            progress(number + 1, steps)
            if (number + 1) % every == 0 or number + 1 == steps:
                with (out / "log.csv").open("a", newline="") as file:
                    mean = float(np.mean([float(value) for value in losses]))
                    csv.writer(file).writerow([number + 1, f"{mean:.4f}", f"{time.time() - begin:.0f}"])
                losses.clear()
                manager.save(number + 1, args=ocp.args.StandardSave((params, state)))
        manager.wait_until_finished()
    return params


def finetune(
    params: Params,
    loss: Callable[[Params, Batch, jax.Array], jax.Array],
    data: Any,
    recipe: Recipe,
    *,
    out: Path,
    seed: int,
    progress: Progress,
    prepared: Callable[[Any], Any] = lambda batch: batch,
) -> Params:
    """Trains by a recipe on `data`, a `suites.Part`; the seed is that of the order, the factors and the loss's keys.

    Args:
        params: where to start.
        loss: as in `fit`.
        data: what to train on.
        recipe: how.
        out: as in `fit`.
        seed: of everything random.
        progress: as in `fit`.
        prepared: what is done to each batch before it is computed with.
    """
    index = shuffled(len(data.labels), recipe.batch, seed=seed)

    def trained(start, loss, recipe):
        return fit(
            start,
            loss,
            lambda step: prepared(data.take(index(step))),
            recipe.schedule(),
            recipe.steps,
            out=out,
            seed=seed,
            every=recipe.steps,
            progress=progress,
        )

    if recipe.rank is None:
        return trained(params, loss, recipe)
    start = {"base": params, "factors": low_rank.factors(params, recipe.rank, seed, recipe.frozen)}
    recipe = dataclasses.replace(recipe, frozen="base")
    return low_rank.added(**trained(start, lambda parts, *given: loss(low_rank.added(**parts), *given), recipe))


def shuffled(count: int, size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Gives the indices of each step's batch: a new order of all `count` entries every epoch."""
    size = min(size, count)
    batches = count // size

    @functools.lru_cache(1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(count)

    return lambda step: order(step // batches)[step % batches * size :][:size]


def adamw(
    peak: float, steps: int, *, weight_decay: float = 0.05, warm_up: float = 0.05
) -> optax.GradientTransformation:
    """AdamW with a linear warm-up and a cosine to zero; gradients longer than one are shortened."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, int(warm_up * steps), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay))


def sgd(peak: float, steps: int, *, weight_decay: float = 0.0, warm_up: float = 0.05) -> optax.GradientTransformation:
    """Gradient descent with momentum .9, the same schedule and the same clipping."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, int(warm_up * steps), steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=0.9)
    )
