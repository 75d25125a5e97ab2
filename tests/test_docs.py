"""What the pages say is so: files, tests, settings, commands and errors that they name."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import generate
import pytest
import yaml

from mlvicx_dist.cli import main
from mlvicx_dist.config import (
    CompareConfig,
    EvaluateConfig,
    PretrainConfig,
    SweepConfig,
    load_as,
)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "cluster" / "README.md"])
KINDS = {"sweep": SweepConfig, "compare": CompareConfig, "evaluate": EvaluateConfig}


def named(page):
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=named)


@each_page
def test_the_tests_that_a_page_names_exist(page):
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


@each_page
def test_the_files_that_a_page_links_to_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "name",
    ["resume.md", "distributed.md", "sweeps.md", "evaluation.md", "export.md", "security.md"],
)
def test_each_guarantee_names_its_test(name):
    text = (DOCS / name).read_text()
    guaranteed = text.split("## What is guaranteed")[1].split("\n## ")[0]
    notes = dict(re.findall(r"^\[\^(\w+)\]: (.+)", text, re.MULTILINE))
    items = re.split(r"\n- ", guaranteed)[1:]
    assert len(items) >= 5
    for item in items:
        said = [item, *(notes[name] for name in re.findall(r"\[\^(\w+)\]", item))]
        assert any(re.search(r"`(tests|benchmarks)/", one) for one in said), item


@each_page
def test_each_footnote_is_there_and_referred_to(page):
    text = page.read_text()
    notes = re.findall(r"^\[\^(\w+)\]: ", text, re.MULTILINE)
    assert len(set(notes)) == len(notes)
    assert {*re.findall(r"\[\^(\w+)\](?!: )", text)} == {*notes}


@pytest.mark.parametrize("path", generate.pages(), ids=lambda path: path.name)
def test_a_page_that_is_made_is_what_is_made_now(path):
    assert path.read_text(encoding="utf-8") == generate.pages()[path], "run make docs"


def test_the_site_has_every_page_and_no_broken_link(tmp_path):
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert set(re.findall(r"[\w-]+\.md", str(settings["nav"]))) == {
        p.name for p in DOCS.glob("*.md")
    }
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "index.html").read_text()
    assert not re.search(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(?:https?:)?//""", page)


def templates():
    """The texts of the package, with `…` for what an f-string fills in."""
    for path in (ROOT / "mlvicx_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_errors_that_are_explained_are_those_of_the_code():
    text = (DOCS / "troubleshooting.md").read_text()
    sentences = [" ".join(block.split()) for block in re.findall(r"(?:^ {4}.*\n)+", text, re.M)]
    assert len(sentences) > 20
    known = list(templates())
    assert [s for s in sentences if not any(s in template for template in known)] == []


def commands(text):
    """The commands of a page as words: lines of code blocks, and code in sentences."""
    text = re.sub(r"\\\n\s*", "", text)
    block = r"^ {4}.*$"
    lines = [line.strip() for line in re.findall(block, text, re.M)]
    spans = re.findall(r"`([^`]+)`", re.sub(block, "", text, flags=re.M))
    for line in [*lines, *spans]:
        line = re.sub(r'eval "\$\((.*)\)"', r"\1", " ".join(line.split()))
        if not re.match(r"(mlvicx|python|ray|make|sbatch|cluster/laptop\.sh) ", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
        lexer.whitespace_split = True
        words = [[]]
        for word in lexer:
            if word in (";", "&&"):
                words.append([])
            elif word != "…":
                words[-1].append(word)
        yield from filter(None, words)


def check(words):
    """Fail where a command would not be understood.

    A word that is alone, as in `mlvicx verify`, names a command; in capitals it stands for one.
    """
    match words:
        case ["mlvicx", *rest] | ["python", "-m", "mlvicx_dist", *rest]:
            check_ours(rest)
        case ["sbatch", script, *rest]:
            assert (ROOT / script).is_file()
            check_ours(["pretrain", *rest])
        case ["python", script, *rest] if script.startswith("sharding/"):
            if rest:
                generate.script_parser(ROOT / script).parse_args(rest)
        case ["python", script, *rest]:
            text = (ROOT / script).read_text()
            assert all(f'"{flag}"' in text for flag in rest if flag.startswith("--"))
        case ["cluster/laptop.sh", verb, *_]:
            assert re.search(rf"^  {verb} ", (ROOT / "cluster" / "laptop.sh").read_text(), re.M)
        case ["make", target]:
            text = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{target}:|^READY := {target}$", text, re.M)
        case ["ray", *rest]:
            check_rays(rest)


def check_ours(words):
    name, *rest = words
    if name.isupper() or name == "--help":
        return
    parser = generate.command_parsers()[name]
    if not rest:
        return
    options = parser.parse_args(rest)
    path = getattr(options, "config", None)
    if path is None or "…" in path or path.isupper() or path.startswith(("runs/", "sweeps/")):
        return
    load_as(KINDS.get(name, PretrainConfig), ROOT / path, getattr(options, "overrides", []))


def check_rays(words):
    import click
    from ray.scripts.scripts import cli

    own, after = words, []
    if "--" in words:
        place = words.index("--")
        own, after = words[:place], words[place + 1 :]
    assert all((ROOT / word).is_file() for word in own if word.endswith(".yaml"))
    command = cli
    while isinstance(command, click.Group) and own:
        name, *own = own
        command = command.commands[name]
    if own:
        command.make_context(command.name, [*own, "--", *after])
    check(after)


# CHANGELOG.md tells of commands as they were.
@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "CHANGELOG"], ids=named)
def test_commands_are_understood(page):
    for words in commands(page.read_text()):
        try:
            check(words)
        except SystemExit:
            pytest.fail(shlex.join(words))
        except Exception as error:
            error.add_note(shlex.join(words))
            raise


@pytest.mark.slow
def test_every_plan_of_a_page_can_be_made(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    told = [words[1:] for page in PAGES for words in commands(page.read_text())]
    plans = {tuple(words) for words in told if words[:1] == ["plan"] and len(words) > 2}
    assert len(plans) > 3
    for words in sorted(plans):
        assert main(list(words)) == 0, shlex.join(words)
        assert "bottleneck" in capsys.readouterr().out
