"""Merge Flax NNX models in memory: two fine-tunes of one base, by TIES, with and without TADrop.

And hand a merged model back to PyTorch: a small Vision Transformer as Hugging Face has it, merged in JAX.

Run it with `python examples/merge_flax.py`; it takes less than half a minute.
"""

import importlib.util
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import converters
import tadrop_jax as tj
from converters import vit


class Net(nnx.Module):
    """A small regression network."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(2, 64, rngs=rngs)
        self.out = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.gelu(self.hidden(x)))[:, 0]


graph, start = nnx.split(Net(nnx.Rngs(0)))
x = jax.random.uniform(jax.random.key(1), (512, 2), minval=-1, maxval=1)
optimiser = optax.adam(1e-2)

# The base learns a function of both inputs; each task adds something in its own half of the plane.
base_target = jnp.sin(3 * x[:, 0]) * x[:, 1]
targets = [base_target + jnp.maximum(x[:, 0], 0), base_target - jnp.maximum(-x[:, 0], 0)]


def error(params, target):
    """Mean squared error of the network on a target."""
    return jnp.mean((nnx.merge(graph, params)(x) - target) ** 2)


@jax.jit
def fit(params, target):
    """Three hundred steps of Adam."""

    def step(carry, _):
        params, state = carry
        updates, state = optimiser.update(jax.grad(error)(params, target), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimiser.init(params)), length=300)[0][0]


base = fit(start, base_target)
tuned = [fit(base, target) for target in targets]

merged = {
    "base": base,
    "task arithmetic": tj.merge(base, tuned, tj.task_arithmetic(0.5)),
    "TIES": tj.merge(base, tuned, tj.ties(0.2)),
    # density=None switches TIES' own trimming off: TADrop takes its place.
    "TIES + TADrop": tj.merge(base, tuned, tj.ties(density=None), sparsifier=tj.tadrop()),
}
for name, params in merged.items():  # each is an nnx.State, as `base` is
    print(f"{name:16s} mean squared error on the two tasks:", *(f"{error(params, t):.4f}" for t in targets))

# One model for each task, from one shared vector and a bit mask a task.
bundle = tj.merge(base, tuned, tj.emr(), sparsifier=tj.tadrop())
errors = [error(bundle.task_params(t), target) for t, target in enumerate(targets)]
print(f"{'EMR + TADrop':16s} mean squared error on the two tasks:", *(f"{e:.4f}" for e in errors))

# --- models that came from PyTorch, and go back to it ---

CONFIG = vit.Config(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    image_size=8,
    patch_size=4,
    num_channels=1,
)
with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    # In place of a download: a directory with config.json and model.safetensors, as `save_pretrained` writes it.
    converters.save(folder / "base", vit.ViTForImageClassification(CONFIG, rngs=nnx.Rngs(0)))

    module, base = converters.load(folder / "base")  # the parameters are an nnx.State
    rng = np.random.default_rng(0)  # in place of training
    tuned = [jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(p.dtype), base) for _ in range(2)]

    # By its layout, rows and random numbers go by PyTorch's tensors: merged there, the models would be the same.
    layout = converters.layout(module)
    merged = tj.merge(base, tuned, tj.average(), sparsifier=tj.dare(0.5), layout=layout, key=jax.random.key(0))
    nnx.update(module, merged)
    converters.save(folder / "merged", module)
    print("saved for PyTorch:", ", ".join(sorted(file.name for file in (folder / "merged").iterdir())))

    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        import torch
        from transformers import ViTForImageClassification

        images = rng.normal(size=(4, 8, 8, 1)).astype(np.float32)
        model = ViTForImageClassification.from_pretrained(folder / "merged").eval()
        with torch.no_grad():
            logits = model(torch.tensor(images.transpose(0, 3, 1, 2))).logits.numpy()
        print(
            f"opened in transformers: logits differ by {np.abs(logits - np.asarray(module(images))).max():.1e} at most"
        )
