"""The language suite: a small GPT-2 pretrained on 24 million characters, and its fine-tunes on 9 or 13 tasks.

A text's features are those of its last token, `<|endoftext|>`, and the head has no bias, as in Hugging Face's
`GPT2ForSequenceClassification`: transformers opens every directory, with its tokenizer.
"""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import converters
from converters import gpt2
from examples.evidence import language_tasks, suites, training, words
from examples.evidence.mixed import mixed
from examples.evidence.suites import Head, Suite, Tuned, class_names, place
from examples.evidence.training import Progress, Recipe

GROUPS, files = language_tasks.GROUPS, language_tasks.files
KNOWN = (*language_tasks.GENERATED, *language_tasks.TASKS)
COUNT = 9  # tasks of the main table
PART, STEP = 40, 16  # texts that are computed at once, and steps of their length
# No weight decay, as in transformers' Trainer: embeddings of tokens that a task does not have stay as they are.
RECIPES = {
    "fast": Recipe(training.adamw, 5e-3, 100, batch=50),
    "adamw": Recipe(training.adamw, 5e-4, 400, batch=32),
    "sgd": Recipe(training.sgd, 3e-2, 400, batch=32),
}
RECIPES["frozen-head"] = dataclasses.replace(RECIPES["adamw"], frozen="score")
RECIPES["lora"] = dataclasses.replace(RECIPES["frozen-head"], rate=5e-3, rank=8)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sizes of everything; the defaults are those of the results."""

    vocabulary: int = 4096
    context: int = 128
    width: int = 192
    layers: int = 4
    heads: int = 3
    batch: int = 16
    epochs: float = 2.3
    rate: float = 2e-3
    share: float = 1.0  # of the pretraining
    seed: int = 0

    @classmethod
    def fast(cls) -> "Settings":
        """For tests: seconds, on generated sentences."""
        return cls(vocabulary=360, context=48, width=32, layers=1, heads=2, batch=25, epochs=4, rate=1e-2)


def pretrain(
    data: Path | None, out: Path, *, progress: Progress, settings: Settings = Settings(), bfloat16: bool = False
) -> None:
    """Trains the base to predict the next token and saves it as a Hugging Face directory `out`/base."""
    texts = language_tasks.corpus(data)
    if not _files(out)[0].exists():
        words.write(_files(out)[0].parent, words.learn(texts, settings.vocabulary))
    tokenizer = words.read(_files(out)[0].parent)
    train, held = _windows(words.stream(tokenizer, texts), settings.context + 1)
    module = gpt2.MODELS["GPT2LMHeadModel"](_config(settings, tokenizer), rngs=nnx.Rngs(settings.seed))
    graph, params = nnx.split(mixed(module) if bfloat16 else module)
    steps = int(settings.share * settings.epochs * len(train) / settings.batch)

    def loss(params, windows, key):
        logits = nnx.merge(graph, params)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    index = training.shuffled(len(train), settings.batch, seed=settings.seed)
    params = training.fit(
        params,
        loss,
        lambda step: train[index(step)],
        training.adamw(settings.rate, steps),
        steps,
        out=out / "pretraining",
        progress=progress,
    )
    measure = jax.jit(lambda params, windows: jax.vmap(lambda window: loss(params, window[None], None))(windows))
    nats = float(suites.features(measure, params, held, settings.batch).mean())
    characters = sum(map(len, texts)) / (len(train) + len(held)) / (settings.context + 1)
    report = {"perplexity": float(np.exp(nats)), "bits_per_character": nats / float(np.log(2)) / characters}
    module = nnx.merge(graph, params)
    report |= suites.origin(settings)
    suites.save(out / "base", module, module.config, report, files=_files(out))


def finetune(
    data: Path | None, out: Path, name: str, recipe: str, seed: int, *, progress: Progress, bfloat16: bool = False
) -> None:
    """Fine-tunes the base on a task, from a linear probe's head on; saves `out`/RECIPE/seedSEED/NAME."""
    directory, how = place(out, recipe, seed, name), RECIPES[recipe]
    base, params = converters.load(out / "base")
    task = language_tasks.task(data, name, words.read(out / "base"))
    apply = encode(base)
    seen = [suites.features(apply, params["transformer"], part.inputs) for part in task[1:4]]
    head = suites.probe(seen[0], task.train.labels, seen[1], task.validation.labels, task.classes)

    config = dataclasses.replace(base.config, labels=class_names(task.classes))
    module = gpt2.MODELS["GPT2ForSequenceClassification"](config, rngs=nnx.Rngs(0))
    module.transformer = base.transformer
    module.score.kernel[...] = jnp.array(_without_bias(suites.calmed(head, seen[0]), seen[0]))
    graph, params = nnx.split(mixed(module) if bfloat16 else module)

    def loss(params, batch, key):
        logits = nnx.merge(graph, params)(batch.inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    steps = directory.with_suffix(".training")

    def prepared(batch):
        return batch._replace(inputs=shortened(batch.inputs, config.pad_token_id))

    params = training.finetune(
        params, loss, task.train, how, out=steps, seed=seed, progress=progress, prepared=prepared
    )
    tuned = suites.features(apply, params["transformer"], task.test.inputs)
    report = {
        "probe": suites.share_right(seen[2], head, task.test.labels),
        "tuned": suites.share_right(tuned, _head(params), task.test.labels),
    }
    suites.save(directory, nnx.merge(graph, params), config, report, files=_files(out))
    shutil.rmtree(steps)


def load(
    data: Path | None, out: Path, recipe: str, seed: int, names: tuple[str, ...], *, bfloat16: bool = False
) -> Suite:
    """Reads the base and its fine-tunes, as anyone would read Hugging Face directories."""
    module, base = converters.load(out / "base")
    tokenizer, apply = words.read(out / "base"), encode(mixed(module) if bfloat16 else module)
    tuned = []
    for name in names:
        _, params = converters.load(place(out, recipe, seed, name))
        task = language_tasks.task(data, name, tokenizer)
        tuned.append(Tuned(task, params["transformer"], _head(params), apply))
    layout = converters.layout(module)
    return Suite(base["transformer"], tuned, lambda path: layout(f"transformer/{path}"))


def encode(module) -> suites.Encode:
    """Gives the jitted function of a backbone's parameters and tokens (N, length): features of the last (N, width).

    Half of a batch is padding, which nothing looks at: NumPy's tokens are computed in parts of texts of like lengths.
    """
    graph, pad = nnx.graphdef(module.transformer), module.config.pad_token_id

    def apply(params, tokens):
        last = (tokens != pad).sum(-1) - 1
        return nnx.merge(graph, params)(tokens)[jnp.arange(len(tokens)), last]

    jitted = jax.jit(apply)

    def by_length(params, tokens):
        if not isinstance(tokens, np.ndarray):
            return jitted(params, tokens)
        order = np.argsort((tokens != pad).sum(-1), kind="stable")
        parts = np.array_split(order, max(len(order) // PART, 1))
        found = np.concatenate([jitted(params, shortened(tokens[part], pad)) for part in parts])
        return found[np.argsort(order)]

    return by_length


def shortened(tokens: np.ndarray, pad: int) -> np.ndarray:
    """Tokens (N, length) without padding that all texts have, in steps of `STEP`, each of which is compiled for."""
    longest = int((tokens != pad).sum(-1).max())
    return tokens[:, : -(-longest // STEP) * STEP]


def _config(settings: Settings, tokenizer) -> gpt2.Config:
    end = words.number(tokenizer, words.END)
    return gpt2.Config(
        vocab_size=settings.vocabulary,
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=words.number(tokenizer, words.PAD),
    )


def _windows(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts tokens into windows (N, length): to train on, and every hundredth to measure by."""
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    held = np.arange(len(windows)) % 100 == 99
    return windows[~held], windows[held]


def _head(params: nnx.State) -> Head:
    kernel = np.asarray(params["score"]["kernel"][...])
    return Head(kernel, np.zeros(kernel.shape[-1], kernel.dtype))


def _without_bias(head: Head, seen: np.ndarray) -> np.ndarray:
    """A kernel that does alone what a head does on the features (N, F) that were seen.

    The last layer norm's output lies in a plane beside the origin: some direction is the same in all features.
    """
    constant = np.linalg.lstsq(seen, np.ones(len(seen), seen.dtype), rcond=1e-4)[0]
    return head.kernel + np.outer(constant, head.bias)


def _files(out: Path) -> list[Path]:
    return [out / "tokenizer" / name for name in words.FILES]
