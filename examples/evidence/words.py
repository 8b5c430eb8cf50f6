"""Texts as tokens: a byte-level BPE like GPT-2's, learned here with `tokenizers`; transformers opens its files.

A text ends in `<|endoftext|>`, whose features a classifier looks at; `<|sep|>` stands between the two texts of a pair.
Everything is written small: the model is too little to know a word twice.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END, PAD, BETWEEN = "<|endoftext|>", "<|pad|>", "<|sep|>"
FILES = ("tokenizer.json", "tokenizer_config.json")
LENGTHS = (24, 48, 96)  # of tasks' texts in tokens: few, since each is compiled for


def learn(texts: Iterable[str], size: int) -> Tokenizer:
    """Learns a tokenizer.

    Args:
        texts: what from.
        size: how many tokens there are to be; 259 of them are bytes and special.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END, PAD, BETWEEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = [(token, number(tokenizer, token)) for token in (END, BETWEEN)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {BETWEEN} $B {END}", special_tokens=special
    )
    return tokenizer


def write(directory: Path, tokenizer: Tokenizer) -> None:
    """Writes the two files that transformers' `AutoTokenizer` looks for, the tokenizer itself last."""
    directory.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": PAD, "sep_token": BETWEEN}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / FILES[1]).write_text(json.dumps(described, indent=2) + "\n")
    tokenizer.save(str(directory / FILES[0]))


def read(directory: Path) -> Tokenizer:
    """Reads what `write` wrote."""
    return Tokenizer.from_file(str(directory / FILES[0]))


def number(tokenizer: Tokenizer, token: str) -> int:
    """The number of a token that there is."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All texts' tokens one after another (N,), as a language model is trained on."""
    found = (np.array(text.ids, np.int32) for text in tokenizer.encode_batch_fast(texts))
    return np.concatenate(list(found))


def length(tokenizer: Tokenizer, texts: np.ndarray) -> int:
    """The least of `LENGTHS` that holds nine of ten texts; the last if none does."""
    usual = np.quantile([len(text.ids) for text in _encoded(tokenizer, texts)], 0.9)
    return min((length for length in LENGTHS if length >= usual), default=LENGTHS[-1])


def padded(tokenizer: Tokenizer, texts: np.ndarray, length: int) -> np.ndarray:
    """Texts as tokens (N, length) int32, padded at the end; of a pair that is too long, the longer text is cut.

    Args:
        tokenizer: of `learn`.
        texts: `(N, 2)` strings; the second is empty where a text is no pair.
        length: in tokens.
    """
    tokenizer.enable_truncation(length, strategy="longest_first")
    tokenizer.enable_padding(length=length, pad_id=number(tokenizer, PAD), pad_token=PAD)
    found = np.array([text.ids for text in _encoded(tokenizer, texts)], np.int32)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return found


def _encoded(tokenizer: Tokenizer, texts: np.ndarray):
    return tokenizer.encode_batch_fast([(first, second) if second else first for first, second in texts])


def plain(text: str) -> str:
    """The words of a text and nothing else: small, one space around each."""
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "
