"""What the documentation shows is run: code blocks, doctests, and the table of methods."""

import contextlib
import doctest
import importlib
import importlib.util
import io
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import converters
import tadrop_jax

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")] if p.exists())
MODULES = sorted(
    module.name
    for package in (tadrop_jax, converters)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


def code(page: Path) -> str:
    """The Python code of a page, blank lines for the rest. Blocks go on from those before, as a reader does."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside, line = line == "```python", ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", [p for p in PAGES if code(p).strip()], ids=lambda p: p.name)
def test_code_of_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code(page), str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("name", ["tadrop_jax", "converters", *MODULES])
def test_doctests(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0


def test_every_public_function_has_an_example():
    """Classes aside, and one-line helpers for steps of one's own."""
    helpers = {"at_least", "floor_times", "safe_ratio"}
    functions = {name: getattr(tadrop_jax, name) for name in set(tadrop_jax.__all__) - helpers}
    bare = [n for n, f in functions.items() if not isinstance(f, type) and ">>>" not in (f.__doc__ or "")]
    assert bare == []


def generator(subject: str):
    """The script that writes a page."""
    script = ROOT / "docs" / f"generate_{subject}.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("subject", ["methods", "converters"])
def test_generated_pages_are_up_to_date(subject):
    assert (ROOT / "docs" / f"{subject}.md").read_text() == generator(subject).page()


def test_stub_is_up_to_date():
    assert (ROOT / "tadrop_jax" / "__init__.pyi").read_text() == generator("methods").stub()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    absent = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert absent == []


def test_reference_has_every_public_name():
    """By itself, as a member of a module that has it, or with the whole of its module."""
    page, listed = (ROOT / "docs" / "reference.md").read_text(), set()
    for name, members in re.findall(r"^::: (\S+)(?:\n +options:\n +members: \[([^]]+)\])?$", page, re.MULTILINE):
        for member in re.split(r",\s+", members) if members else ():
            assert hasattr(importlib.import_module(name), member), f"{name} has no {member}"
            listed.add(member)
        if not members:
            listed.add(name.rpartition(".")[2])
            listed |= {public for public, home in tadrop_jax.HOMES.items() if f"tadrop_jax.{home}" == name}
    listed.add("EMRBundle")  # another name of Bundle
    assert sorted({*tadrop_jax.__all__, *converters.__all__} - listed) == []


def test_pages_are_all_in_the_site():
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {p.name for p in ROOT.glob("docs/*.md")}
    assert jax.device_count() > 1  # the sharded example of python.md runs on several devices
