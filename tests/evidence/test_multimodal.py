"""The multimodal suite, fast: a base that looks at pictures, one task of each path, merged under EMR's BEiT3 rule."""

import json

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")

import converters
import tadrop_jax as tj
from converters.mapping import flatten
from examples.evidence import __main__ as command
from examples.evidence import experiments, multimodal, multimodal_tasks, words
from examples.evidence import multimodal_pictures as pictures
from examples.evidence.multimodal_pretraining import masked
from tadrop_jax.cli import main

# The probe's optimiser stops early, which costs it nothing that counts here.
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
NAMES = multimodal_tasks.GENERATED


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What the command leaves."""
    directory = tmp_path_factory.mktemp("multimodal")
    options = ("--rules", "EMR", "--sparsifiers", "none")
    with pytest.MonkeyPatch.context() as patch:
        # The table of ratios is the other suites': here it would compile for every shape of two experts.
        patch.setattr(experiments, "describe", lambda suite, out, seed: None)
        command.main(["multimodal", "--fast", "--seeds", "0", "--out", str(directory), *options])
    return directory


@pytest.fixture(scope="module")
def suite(out):
    """The base and one fine-tune of each path: images, texts, both."""
    return multimodal.load(None, out, "fast", 0, NAMES)


def test_the_models_learn_and_the_merge_knows_its_tasks(out):
    base = json.loads((out / "base.json").read_text())
    assert base["words_of_captions"] > base["words_of_captions_without_picture"] + 0.1
    [line] = experiments.read(out / "fast.csv")
    merged = [float(value) for value in line["by_task"].split()]
    for name, chance, right in zip(NAMES, (0.34, 0.34, 0.1), merged, strict=True):
        measured = json.loads((out / "fast" / "seed0" / f"{name}.json").read_text())
        assert measured["tuned"] > chance + 0.1, name
        assert right > chance, name


def test_what_is_shared_and_what_a_path_leaves_alone(out, suite):
    shared = set(flatten(suite.base))
    assert {"beit3/text_embed/embedding", "beit3/encoder/layers/0/ffn/B/fc1/kernel"} < shared
    own = ("mlm_head", "head", "pooler", "fc_norm", "beit3/encoder/layer_norm")
    assert not [path for path in shared if path.startswith(own)]
    stacks = flatten(tj.task_vectors(suite.base, [tuned.params for tuned in suite.tuned]))
    moved = {path: np.any(np.asarray(stack) != 0, tuple(range(1, stack.ndim))) for path, stack in stacks.items()}
    for path, (by_count, by_doer, by_matching) in moved.items():
        if "mask_token" in path:
            continue
        language = {"B", "text_embed"} & set(path.split("/"))
        assert (by_count, by_doer, by_matching) == (not language, bool(language), True), path


def test_the_command_line_merges_as_the_suite_does(out, suite, tmp_path):
    models = [str(multimodal.place(out, "fast", 0, name)) for name in NAMES]
    options = ["--method", "emr", "--differing", "own", "--quiet"]
    given = ["merge", "--base", str(out / "base"), "--models", *models, *options, "--out", str(tmp_path / "bundle")]
    assert main(given) == 0
    wanted = tj.merge(suite.base, [tuned.params for tuned in suite.tuned], tj.emr(), layout=suite.layout)
    for number, (name, tuned) in enumerate(zip(NAMES, suite.tuned, strict=True)):
        rebuilt = tmp_path / name
        assert main(["task", str(tmp_path / "bundle"), "--task", name, "--out", str(rebuilt), "--quiet"]) == 0
        module, params = converters.load(rebuilt)
        found, before = flatten(params), flatten(converters.load(models[number])[1])
        ours = flatten(wanted.task_params(number))
        assert found.keys() == before.keys() > ours.keys()
        for path, array in found.items():
            if path in ours:
                np.testing.assert_allclose(array, ours[path], rtol=1e-5, atol=1e-6, err_msg=path)
            else:
                np.testing.assert_array_equal(array, before[path], err_msg=path)
        # The rebuilt model's own forward pass gives the logits that the suite judges by.
        few = tuned.task.test.take(slice(20))
        logits = tuned.encode(wanted.task_params(number), few.inputs) @ tuned.head.kernel + tuned.head.bias
        prepared = multimodal.prepared(few.inputs)
        theirs = multimodal.logits(multimodal_tasks.form(name), module, prepared)
        np.testing.assert_allclose(logits, theirs, atol=1e-3)


def test_questions_statements_and_choices(out):
    """Forms that the fast run does not train: even guesses, features for a head, a probe."""
    tokenizer, (base, _) = words.read(out / "base"), converters.load(out / "base")
    for name in ("questions", "statements"):
        kind, task = multimodal_tasks.form(name), multimodal_tasks.task(None, name, tokenizer)
        assert len(np.unique(task.train.labels)) == task.classes
        few = task._replace(train=task.train.take(slice(80)), test=task.test.take(slice(40)))
        module = multimodal.started(base, kind, few.classes, seed=0)
        inputs = multimodal.prepared(few.train.inputs)
        even = np.log(few.classes)
        assert float(multimodal.loss(kind, module, inputs, few.train.labels)) == pytest.approx(even, rel=0.3)
        tree = multimodal.tensors(module)
        features = multimodal.encode(kind, module.config, tree)({}, few.train.inputs)
        head = multimodal.head_of(kind, tree)
        wanted = multimodal.logits(kind, module, inputs)
        np.testing.assert_allclose(features @ head.kernel + head.bias, wanted, atol=1e-3)
        if kind == "statement":
            assert 0.4 < task.train.labels.mean() < 0.6
            assert 0.2 < multimodal.probe(base, few, kind) < 0.9
    seen = pictures.Seen([(0, "disc", "red"), (3, "cross", "blue")])
    rng = np.random.default_rng(0)
    right, *wrong = pictures.choices(seen, [pictures.Seen([(1, "disc", "red")])] * 5, ("disc", "cross"), rng)
    assert right == "a red disc , a blue cross"
    assert len(wrong) == 9
    assert right not in wrong


def test_sentences_are_true():
    rng = np.random.default_rng(0)
    seen = pictures.Seen([(0, "disc", "red"), (1, "cross", "blue"), (3, "disc", "red")])
    facts = {
        "what colour is the disc ?": "red",
        "what colour is the cross ?": "blue",
        "what is below the blue cross ?": "disc",
        "what is right of the red disc ?": "cross",
        "how many red things are there ?": "two",
        "how many green things are there ?": "zero",
        "is there a red disc ?": "yes",
        "is there a red cross ?": "no",
        "what is in the top right ?": "cross",
    }
    asked = dict(pictures.question(seen, ("disc", "cross"), rng) for _ in range(1000))
    assert "what is right of the red disc ?" not in asked  # which of the two?
    assert facts.items() & asked.items() == {(text, facts[text]) for text in facts.keys() & asked.keys()}
    assert len(facts.keys() & asked.keys()) == 8
    empty = pictures.Seen([(2, "cross", "blue")])
    for wanted in (True, False):
        said = {pictures.statement(seen, empty, wanted, rng) for _ in range(200)}
        assert ("both pictures have a blue thing" in said) == wanted
        assert ("there are 4 things in all" in said) == wanted
        assert ("the left picture has more red things than the right one" in said) == wanted
        assert ("the right picture has a red disc" in said) != wanted


def test_masked_words_are_words():
    tokens = np.array([[0, 5, 6, 7, 8, 0, 1, 1], [0, 9, 0, 1, 1, 1, 1, 1]])
    found = masked(tokens, 0.5, 99, np.random.default_rng(0))
    assert (found["tokens"] == 99).sum(1).tolist() == [2, 1]
    assert found["weights"].sum(1).tolist() == [2, 1]
    for row in range(2):
        for place, word, weight in zip(*(found[name][row] for name in ("places", "words", "weights")), strict=True):
            assert tokens[row, place] == word
            assert (found["tokens"][row, place] == 99) == (weight == 1)
