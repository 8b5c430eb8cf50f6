"""The language suite, fast: a base, fine-tunes that beat a probe of it, directories that transformers opens."""

import csv
import gzip
import json

import jax
import numpy as np
import pytest

import converters

pytest.importorskip("tokenizers", reason="the language suite needs the examples extra")

from examples.evidence import __main__ as command
from examples.evidence import language, language_tasks, suites, words


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What the command makes: a base, two fine-tunes, a merge."""
    out, cache = tmp_path_factory.mktemp("language"), jax.config.jax_compilation_cache_dir
    merge = ["--rules", "task arithmetic", "--sparsifiers", "none"]
    command.main(["language", "--fast", "--seeds", "0", "--out", str(out), *merge])
    jax.config.update("jax_compilation_cache_dir", cache)
    return out


def test_fine_tunes_beat_the_probe_and_leave_unseen_tokens_alone(out):
    assert json.loads((out / "base.json").read_text())["perplexity"] < 10
    with (out / "fast-models.csv").open() as file:
        models = {line["task"]: line for line in csv.DictReader(file)}
    assert models.keys() == set(language_tasks.GENERATED)
    suite = language.load(None, out, "fast", 0, language_tasks.GENERATED)
    pad = words.number(words.read(out / "base"), words.PAD)
    for tuned in suite.tuned:
        line = models[tuned.task.name]
        assert float(line["tuned"]) > max(0.8, float(line["probe"]) + 0.1)
        assert suites.accuracy(tuned, tuned.params, tuned.task.test) == pytest.approx(float(line["tuned"]), abs=1e-4)
        moved = np.asarray(tuned.params["wte"]["embedding"][...] != suite.base["wte"]["embedding"][...]).any(1)
        seen = np.unique(tuned.task.train.inputs)
        assert moved[seen[seen != pad]].all()
        assert moved.sum() == len(seen) - 1
    assert suite.layout("h/0/attn/c_attn/kernel")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--base-seed", "is of 0, not 2"),
        ("--pretraining", "is of 1.0, not 2.0"),
        ("--width", "is of 32, not 2"),
        ("--layers", "is of 1, not 2"),
    ],
)
def test_another_base_is_not_taken(option, said, out, capsys):
    with pytest.raises(SystemExit):
        command.main(["language", "--fast", option, "2", "--out", str(out)])
    assert said in capsys.readouterr().err


def test_texts_computed_by_their_lengths_have_the_features_that_they_have_padded(out):
    module, params = converters.load(out / "base")
    apply, params = language.encode(module), params["transformer"]
    texts = language_tasks.task(None, "doer", words.read(out / "base")).test.inputs
    texts = np.pad(texts, ((0, 0), (0, 48 - texts.shape[1])), constant_values=module.config.pad_token_id)
    assert language.shortened(texts, module.config.pad_token_id).shape[1] < 48
    padded = jax.jit(apply)(params, texts)
    np.testing.assert_allclose(apply(params, texts), padded, rtol=1e-4, atol=1e-5)


def test_pairs_have_one_length_and_the_longer_text_is_cut(out):
    tokenizer = words.read(out / "base")
    texts = np.array([("the fox", ""), ("the fox", "the old mole takes the lamp " * 20)], object)
    short, pair = words.padded(tokenizer, texts, 24)
    end, pad, between = (words.number(tokenizer, token) for token in (words.END, words.PAD, words.BETWEEN))
    first = short[: list(short).index(end)]
    assert set(short[len(first) + 1 :]) == {pad}
    assert list(pair[: len(first) + 1]) == [*first, between]
    assert pair[-1] == end
    assert words.length(tokenizer, texts[:1]) == words.LENGTHS[0]
    assert words.length(tokenizer, texts) == words.LENGTHS[-1]


def test_sst2_is_not_trained_on_sentences_that_mr_is_tested_on(out, tmp_path, monkeypatch):
    """And the other way round, whole and in parts."""
    (tmp_path / "text").mkdir()
    film = "a fox of a film that {} never ends , number {}"
    rows = {
        "mr": [("train", film.format("almost", n)) for n in range(30)] + [("test", film.format("gladly", 99))],
        "sst2": [("train", f"fine old film {n}") for n in range(30)]
        + [("train", "film that gladly never ends"), ("train", "a fox"), ("test", film.format("almost", 7))],
    }
    for name, some in rows.items():
        with gzip.open(tmp_path / "text" / f"{name}.tsv.gz", "wt") as file:
            lines = (f"{split}\t{n % 2}\t{text}\t\n" for n, (split, text) in enumerate(some))
            file.write("split\tlabel\ttext1\ttext2\n" + "".join(lines))
    tokenizer = words.read(out / "base")
    shown = {
        name: [
            tokenizer.decode(list(ids)).strip() for ids in language_tasks.task(tmp_path, name, tokenizer).train.inputs
        ]
        for name in rows
    }
    assert "film that gladly never ends" not in shown["sst2"]
    assert film.format("almost", 7) not in shown["mr"]
    assert len(shown["mr"]) >= 25
    assert len(shown["sst2"]) >= 27


@pytest.mark.peers
def test_directories_open_in_transformers(out):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    suite = language.load(None, out, "fast", 0, ("first",))
    directory, task = suites.place(out, "fast", 0, "first"), suite.tuned[0].task
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    assert type(model).__name__ == "GPT2ForSequenceClassification"
    with torch.no_grad():
        theirs = model(torch.tensor(task.test.inputs[:8], dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(converters.load(directory)[0](task.test.inputs[:8]), theirs, rtol=1e-4, atol=1e-4)

    texts = [("The fox hid.", "A café, 2 o'clock?"), ("Well", "the old  mole")]
    peer = transformers.AutoTokenizer.from_pretrained(directory)
    found = peer([a for a, _ in texts], [b for _, b in texts], padding="max_length", max_length=48, truncation=True)
    assert np.array_equal(found["input_ids"], words.padded(words.read(directory), np.array(texts, object), 48))
    base = transformers.AutoModelForCausalLM.from_pretrained(out / "base")
    assert base.lm_head.weight is base.transformer.wte.weight
