"""Makes Hugging Face directories of GPT-2's structure, of any size: a base and its fine-tunes.

Names and shapes are those of transformers' `GPT2LMHeadModel`; values are random, a fine-tune is the base plus
small noise. Needs no torch.

    python -m benchmarks.gpt2_directories --dir DIR --models 7 [--size 1G]
"""

import argparse
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from tadrop_jax.checkpoints.safetensors import open_sink


class Size(NamedTuple):
    """Of a model; heads are 64 wide or, in small models, 12 in number or fewer."""

    layers: int
    width: int
    vocabulary: int
    positions: int = 1024

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return sum(math.prod(shape) for shape in shapes(self).values())


SMALL = Size(12, 768, 50257)
# By their number of parameters, rounded; "124M" is GPT-2 small itself.
SIZES = {
    "0.1M": Size(2, 48, 500, 64),
    "1M": Size(4, 128, 1500, 128),
    "10M": Size(8, 320, 1000),
    "30M": Size(10, 480, 4000),
    "100M": Size(12, 768, 19000),
    "124M": SMALL,
    "300M": Size(22, 1024, 20000),
    "1G": Size(24, 1792, 40000),
}
DTYPES = {name: np.dtype(name) for name in ("float32", "float16")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
BASE_SCALE, TUNING_SCALE = 0.02, 0.002
DRAWN = 1 << 22


def config(size: Size, dtype: np.dtype, seed: int) -> dict[str, object]:
    """The contents of `config.json`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": size.layers,
        "n_head": math.gcd(size.width, 12) if size.width % 64 else size.width // 64,
        "n_embd": size.width,
        "n_positions": size.positions,
        "vocab_size": size.vocabulary,
        "bos_token_id": size.vocabulary - 1,
        "eos_token_id": size.vocabulary - 1,
        "dtype": str(dtype),
        "seed_of_random_values": seed,
    }


def shapes(size: Size = SMALL) -> dict[str, tuple[int, ...]]:
    """Shape of each stored tensor; the output embedding is the input embedding and is not stored.

    Example:
        >>> sum(math.prod(shape) for shape in shapes().values())
        124439808
    """
    width = size.width
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, 4 * width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (4 * width, width),
        "mlp.c_proj.bias": (width,),
    }
    return {
        "transformer.wte.weight": (size.vocabulary, width),
        "transformer.wpe.weight": (size.positions, width),
        **{f"transformer.h.{layer}.{name}": shape for layer in range(size.layers) for name, shape in block.items()},
        "transformer.ln_f.weight": (width,),
        "transformer.ln_f.bias": (width,),
    }


def tensor(name: str, entries: int, model: int, seed: int = 0) -> np.ndarray:
    """Values of one tensor, flat, float32: model 0 is the base, others are the base plus their own noise.

    Noise is drawn for the first entries and repeated after them, so that a model of a billion parameters is made in
    seconds.
    """

    def noise(of: int) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), of])
        return np.resize(rng.standard_normal(min(entries, DRAWN), np.float32), entries)

    values = noise(0) * BASE_SCALE
    return values + noise(model) * TUNING_SCALE if model else values


def make(directory: Path, models: int, dtype: np.dtype, seed: int = 0, size: Size = SMALL) -> tuple[Path, list[Path]]:
    """Writes `base` and `model_1` ... into a directory; what is there already is kept.

    Args:
        directory: where; made when absent.
        models: number of fine-tunes.
        dtype: of the stored tensors.
        seed: of the random values.
        size: of each model.

    Returns:
        The base's directory, and those of the fine-tunes.
    """
    paths = [directory / name for name in ("base", *(f"model_{i}" for i in range(1, models + 1)))]
    plan = {name: (dtype, shape) for name, shape in shapes(size).items()}
    described = config(size, dtype, seed)
    for number, path in enumerate(paths):
        if path.exists():
            if json.loads((path / "config.json").read_text()) != described:
                raise SystemExit(f"{path}: was made with another size, dtype or seed; choose another --dir.")
            continue
        with open_sink(path, plan) as sink:
            for name, (_, shape) in plan.items():
                sink.write(name, 0, tensor(name, math.prod(shape), number, seed).astype(dtype))
                sink.mark_done(name)
            sink.add_file("config.json", json.dumps(described, indent=2).encode())
            sink.finish()
    return paths[0], paths[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--models", type=int, default=7, help="number of fine-tunes (7)")
    parser.add_argument("--size", choices=SIZES, default="124M", help="parameters (124M: GPT-2 small)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    base, tuned = make(options.dir, options.models, DTYPES[options.dtype], options.seed, SIZES[options.size])
    print(base, *tuned, sep="\n")


if __name__ == "__main__":
    main()
