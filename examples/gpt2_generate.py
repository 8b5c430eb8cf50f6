"""Convert a GPT-2 directory from PyTorch, run it in Flax, and generate text.

    python examples/gpt2_generate.py                                   # a tiny random model, made here
    python examples/gpt2_generate.py path/to/gpt2 --prompt "Once upon" # any Hugging Face GPT-2 directory
    python examples/gpt2_generate.py path/to/gpt2 --temperature 0.8 --top-p 0.9 --seed 1

Words become tokens by the directory's own tokenizer if `transformers` is installed; without it, and for the random
model, each byte of the text is a token.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import converters
from converters import gpt2


def random_directory(where: Path) -> Path:
    """Writes a tiny GPT-2 with random weights as transformers would; its tokens are bytes."""
    config = gpt2.Config(
        vocab_size=256,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    converters.save(where / "random-gpt2", gpt2.MODELS["GPT2LMHeadModel"](config, rngs=nnx.Rngs(0)))
    return where / "random-gpt2"


def coder(directory: Path):
    """The two functions from text to tokens and back."""
    if list(directory.glob("*token*")) or (directory / "vocab.json").exists():
        if importlib.util.find_spec("transformers"):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(directory)
            return tokenizer.encode, tokenizer.decode
        print("transformers is not installed: bytes stand for the model's tokens, and the text will mean nothing")
    return lambda text: list(text.encode()), lambda tokens: bytes(t % 256 for t in tokens).decode(errors="replace")


def main(arguments: list[str] | None = None) -> str:
    """Converts, generates, prints and returns the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="config.json and weights; default: made at random")
    parser.add_argument("--prompt", default="Merging models is")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token each time")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as scratch:
        directory = options.directory or random_directory(Path(scratch))
        model, params = converters.load(directory)
        encode, decode = coder(directory)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{type(model).__name__} with {size:,} parameters on {jax.devices()[0].platform}")

    tokens = gpt2.generate(
        model,
        np.array([encode(options.prompt)]),
        max_new_tokens=options.new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        key=jax.random.key(options.seed),
    )
    text = decode(np.asarray(tokens)[0].tolist())
    print(text)
    return text


if __name__ == "__main__":
    main()
