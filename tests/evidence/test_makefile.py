"""`make evidence` asks for what the page shows, and for not much more: counted, not made."""

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from examples.evidence import belonging, experiments, options

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
# Tables of docs/results, and where the command makes their lines.
TABLES = {
    "vision": "vision/adamw",
    "vision-growth": "vision/adamw",
    "vision-growth-earlier": "vision/adamw-earlier",
    "vision-base1": "vision-base1/adamw",
    "vision-sgd": "vision-base1/sgd",
    "vision-frozen-head": "vision/frozen-head",
    "vision-turned": "vision/low-rate",
    "vision-third": "vision-third/adamw",
    "vision-third-photos": "vision-photos/low-rate",
    "vision-small-turned": "vision-small/turned",
    "vision-small-sgd": "vision-small/sgd",
    "vision-small-lora": "vision-small/lora",
    "language": "language/adamw",
    "language-second": "language-second/adamw",
    "language-sgd": "language/sgd",
    "language-lora": "language/lora",
    "language-frozen-head": "language/frozen-head",
    "language-opinions": "language/frozen-head",
    "language-opinions-rules": "language/frozen-head",
    "language-third": "language-third/frozen-head",
    "language-small": "language-small/frozen-head",
    "multimodal": "multimodal/adamw",
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Every merge that is asked for, as (table, tasks, seed, rule, sparsifier)."""
    if not shutil.which("make"):
        pytest.skip("no make")
    there = tmp_path_factory.mktemp("make")
    # In place of Python: writes its arguments down.
    script = f"#!/bin/sh\n{{ printf '%s\\t' \"$@\"; echo; }} >> {there / 'calls'}\n"
    (there / "python").write_text(script)
    (there / "python").chmod(0o755)
    (there / "installed").touch()
    os.utime(there / "installed", (2**32, 2**32))  # newer than what it is made of
    names = {"BIN": there, "STAMP": there / "installed", "DATA": there, "OUT": there / "out"}
    command = ["make", "evidence", *(f"{name}={value}" for name, value in names.items())]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for suite in options.SUITES:
            patch.setattr(importlib.import_module(f"examples.evidence.{suite}"), "files", lambda name: [])
        for call in (there / "calls").read_text().splitlines():
            parser = options.parser(None)
            plan = options.plan(parser, parser.parse_args(call.split("\t")[2:-1]))
            # As a run would, so that two kinds of lines in one table are refused here.
            plan.out.mkdir(parents=True, exist_ok=True)
            plan.table.write_text(",".join(experiments.FIELDS) + "\n")
            belonging.record(plan.table, plan.recipe, plan.names, bfloat16=plan.bfloat16)
            table = str(plan.table.with_suffix("").relative_to(there / "out"))
            found += [
                (table, str(len(plan.names)), str(seed), rule, name)
                for seed in plan.seeds
                for name, rule in plan.merges
            ]
    return found


def test_every_line_of_the_page_is_asked_for(asked):
    missing = set()
    for name, table in TABLES.items():
        for line in experiments.read(RESULTS / f"{name}.csv"):
            missing.add((table, line["tasks"], line["seed"], line["rule"], line["sparsifier"]))
    # The first eight of the earlier list are the main table's: they are not merged twice.
    missing = {line for line in missing - set(asked) if line[:2] != ("vision/adamw-earlier", "8")}
    assert sorted(missing) == []


def test_not_much_more_is_asked_for(asked):
    assert len(set(asked)) < 7000
