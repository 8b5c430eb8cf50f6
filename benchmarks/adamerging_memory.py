"""What a step of AdaMerging keeps in memory, against one model: python benchmarks/adamerging_memory.py.

Compiles the step for a residual network, and reads from XLA's own accounting what it allocates besides its arguments
(the base and T task vectors). "plain" is the obvious way to write it: a stack of task vectors, one merged model a step,
and automatic differentiation through the sum over tasks. Prints a JSON line for each.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tadrop_jax.drivers import common
from tadrop_jax.drivers.adamerging import compiled_step


def network(layers: int, width: int) -> dict[str, jax.Array]:
    """Parameters of a residual network of two matrices a layer."""
    rng = np.random.default_rng(0)
    shapes = {
        f"{i}/{n}": s for i in range(layers) for n, s in (("up", (width, 4 * width)), ("down", (4 * width, width)))
    }
    shapes["head"] = (width, 100)
    return {n: jnp.asarray(rng.normal(size=s) / 50, jnp.float32) for n, s in shapes.items()}


def apply(params, x):
    """Logits of a batch."""
    for i in range((len(params) - 1) // 2):
        x = x + jax.nn.gelu(x @ params[f"{i}/up"]) @ params[f"{i}/down"]
    return x @ params["head"]


def plain(raw, base, stack, batch):
    """Loss and gradient as one would write them down."""

    def loss(raw):
        used = {n: jnp.clip(c, 0, 1) for n, c in raw.items()}
        params = {n: base[n] + jnp.tensordot(used[n], stack[n], 1) for n in base}
        logs = [jax.nn.log_softmax(apply(params, x)) for x in batch]
        return sum(-jnp.mean(jnp.sum(jnp.exp(q) * q, axis=-1)) for q in logs)

    return jax.value_and_grad(loss)(raw)


def main() -> None:
    """Measures the variants."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()

    base = network(given.layers, given.width)
    models = [jax.tree.map(lambda x, t=t: x * (1 + t / 100), base) for t in range(1, given.tasks + 1)]
    problem = common.problem("adamerging", base, models)
    vectors = common.vectors(problem, None, None, None)
    raw = {n: jnp.full(given.tasks, 0.3) for n in base}
    batch = tuple(jnp.ones((given.batch, given.width)) * t for t in range(given.tasks))
    rule = optax.adam(1e-3)
    arguments = (raw, rule.init(raw), problem.base, vectors, {}, batch)
    stack = {n: jnp.stack(v) for n, v in vectors.items()}
    functions = (apply,) * given.tasks
    variants = {
        "remat": (compiled_step(problem, functions, rule, "clip", True), arguments),
        "no remat": (compiled_step(problem, functions, rule, "clip", False), arguments),
        "plain": (jax.jit(plain), (raw, base, stack, batch)),
    }
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    for name, (function, values) in variants.items():
        start = time.perf_counter()
        compiled = function.lower(*values).compile()
        compiling = time.perf_counter() - start
        jax.block_until_ready(compiled(*values))
        start = time.perf_counter()
        for _ in range(3):
            jax.block_until_ready(compiled(*values))
        found = {
            "variant": name,
            "device": jax.devices()[0].device_kind,
            "tasks": given.tasks,
            "model_mb": round(model / 1e6, 1),
            "temporary_in_models": round(compiled.memory_analysis().temp_size_in_bytes / model, 2),
            "compile_s": round(compiling, 2),
            "step_s": round((time.perf_counter() - start) / 3, 3),
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
