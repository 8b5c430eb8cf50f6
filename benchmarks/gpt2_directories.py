"""Makes Hugging Face directories of GPT-2-small size (124 M parameters): a base and its fine-tunes.

Names and shapes are those of transformers' `GPT2LMHeadModel`; values are random, a fine-tune is the base plus
small noise. Needs no torch.

    python -m benchmarks.gpt2_directories --dir DIR --models 7
"""

import argparse
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from tadrop_jax.checkpoints.safetensors import open_sink

LAYERS, WIDTH, VOCABULARY, POSITIONS = 12, 768, 50257, 1024
CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": LAYERS,
    "n_head": 12,
    "n_embd": WIDTH,
    "n_positions": POSITIONS,
    "vocab_size": VOCABULARY,
    "bos_token_id": VOCABULARY - 1,
    "eos_token_id": VOCABULARY - 1,
}
DTYPES = {name: np.dtype(name) for name in ("float32", "float16")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
BASE_SCALE, TUNING_SCALE = 0.02, 0.002


def shapes() -> dict[str, tuple[int, ...]]:
    """Shape of each stored tensor; the output embedding is the input embedding and is not stored.

    Example:
        >>> sum(math.prod(shape) for shape in shapes().values())
        124439808
    """
    block = {
        "ln_1.weight": (WIDTH,),
        "ln_1.bias": (WIDTH,),
        "attn.c_attn.weight": (WIDTH, 3 * WIDTH),
        "attn.c_attn.bias": (3 * WIDTH,),
        "attn.c_proj.weight": (WIDTH, WIDTH),
        "attn.c_proj.bias": (WIDTH,),
        "ln_2.weight": (WIDTH,),
        "ln_2.bias": (WIDTH,),
        "mlp.c_fc.weight": (WIDTH, 4 * WIDTH),
        "mlp.c_fc.bias": (4 * WIDTH,),
        "mlp.c_proj.weight": (4 * WIDTH, WIDTH),
        "mlp.c_proj.bias": (WIDTH,),
    }
    return {
        "transformer.wte.weight": (VOCABULARY, WIDTH),
        "transformer.wpe.weight": (POSITIONS, WIDTH),
        **{f"transformer.h.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in block.items()},
        "transformer.ln_f.weight": (WIDTH,),
        "transformer.ln_f.bias": (WIDTH,),
    }


def tensor(name: str, model: int, seed: int = 0) -> np.ndarray:
    """Values of one tensor, flat, float32: model 0 is the base, others are the base plus their own noise."""

    def noise(of: int) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), of])
        return rng.standard_normal(math.prod(shapes()[name]), np.float32)

    values = noise(0) * BASE_SCALE
    return values + noise(model) * TUNING_SCALE if model else values


def make(directory: Path, models: int, dtype: np.dtype, seed: int = 0) -> tuple[Path, list[Path]]:
    """Writes `base` and `model_1` ... into a directory; what is there already is kept.

    Args:
        directory: where; made when absent.
        models: number of fine-tunes.
        dtype: of the stored tensors.
        seed: of the random values.

    Returns:
        The base's directory, and those of the fine-tunes.
    """
    paths = [directory / name for name in ("base", *(f"model_{i}" for i in range(1, models + 1)))]
    plan = {name: (dtype, shape) for name, shape in shapes().items()}
    config = CONFIG | {"dtype": str(dtype), "seed_of_random_values": seed}
    for number, path in enumerate(paths):
        if path.exists():
            if json.loads((path / "config.json").read_text()) != config:
                raise SystemExit(f"{path}: was made with another dtype or seed; choose another --dir.")
            continue
        with open_sink(path, plan) as sink:
            for name in plan:
                sink.write(name, 0, tensor(name, number, seed).astype(dtype))
                sink.mark_done(name)
            sink.add_file("config.json", json.dumps(config, indent=2).encode())
            sink.finish()
    return paths[0], paths[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--models", type=int, default=7, help="number of fine-tunes (7)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    base, tuned = make(options.dir, options.models, DTYPES[options.dtype], options.seed)
    print(base, *tuned, sep="\n")


if __name__ == "__main__":
    main()
