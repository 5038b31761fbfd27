"""README, `docs/` and the other texts: links, paths, fields, commands and configurations exist."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from markdown.extensions.toc import slugify
from typer.main import get_command

from vllm_proxy.cli import app
from vllm_proxy.config.request import FIELDS
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.replacements import REPLACEMENTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks/demo/README.md",
    *sorted(DOCS.glob("*.md")),
]
MOST_README_LINES = 200
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^(?: {4}.*\n?)+", re.MULTILINE)
"""A block of commands or output: indented."""
COMMAND_PAGES = {
    "batch.md": "generate",
    "evaluate.md": "evaluate",
    "inspect.md": "inspect",
    "plan.md": "plan",
}
"""Pages whose tables list options of a command."""


@cache
def read(path: Path) -> str:
    """Return a text, with the files that it includes."""
    return re.sub(
        r'^--8<-- "(.+)"$',
        lambda match: (ROOT / match[1]).read_text(),
        path.read_text(),
        flags=re.MULTILINE,
    )


def prose(path: Path) -> str:
    """Return a text without its blocks of code."""
    return SHOWN.sub("", FENCED.sub("", read(path)))


def anchors(path: Path) -> set[str]:
    """Return the names of a text's headings, as GitHub and mkdocs make them."""
    return {slugify(title, "-") for title in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", link):
            continue  # another site's
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    named = re.findall(
        r"(?:`|\s)((?:benchmarks|configs|examples|tests|vllm_proxy)/[\w./-]*\w)", read(path)
    )
    if path.name == "architecture.md":  # relative to the package
        named += [f"vllm_proxy/{name}" for name in re.findall(r"`(\w[\w/]*\.py)`", prose(path))]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= MOST_README_LINES


def test_the_readme_leads_to_adding_a_schedule():
    """From the README to the files of a new strength schedule it is one link."""
    assert "](CONTRIBUTING.md)" in prose(ROOT / "README.md")
    section = read(ROOT / "CONTRIBUTING.md").partition("## Add a strength schedule")[2]
    section = section.partition("\n## ")[0]
    for file in ("strength.py", "controls.py", "fusion.py", "test_fusion.py"):
        assert file in section


def test_every_replacement_in_vllm_is_listed():
    section = read(DOCS / "architecture.md").partition("## What we replace in vLLM")[2]
    for replacement in REPLACEMENTS:
        assert f"`{replacement.file}`" in section, replacement


def test_the_site_builds_without_a_warning(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "WARNING" not in process.stderr
    for page in DOCS.glob("*.md"):
        name = "" if page.stem == "index" else page.stem
        assert (tmp_path / name / "index.html").exists()


def test_every_field_is_in_the_table():
    """The schema that pydantic makes of `ProxyConfig`: its fields and those of nested mappings."""
    schema = ProxyConfig.model_json_schema()
    nested = schema["$defs"].values()
    fields = {*schema["properties"]}.union(*(part.get("properties", ()) for part in nested))
    rows = re.findall(r"^\| (.+?) \|", read(DOCS / "configuration.md"), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == fields


@cache
def options() -> dict[str, set[str]]:
    """Return the options of each command of `vllm-proxy`."""
    commands = get_command(app).commands
    return {
        name: {"--help", *(word for parameter in command.params for word in parameter.opts)}
        for name, command in commands.items()
    }


@cache
def served() -> set[str]:
    """Return the options of `vllm serve`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return {*make_arg_parser(FlexibleArgumentParser())._option_string_actions}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path):
    text = read(path).replace("\\\n", " ")
    for name, words in re.findall(r"vllm-proxy (\w+)( [^\n`]*)?", text):
        assert name in options(), name
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", words or ""):
            others = served() if name == "serve" and option not in options()[name] else set()
            assert option in options()[name] | others, f"vllm-proxy {name} {option}"


def test_targets_of_make_exist():
    named = {
        name
        for path in TEXTS
        for name in re.findall(r"^ {4}make ([\w-]+)|`make ([\w-]+)", read(path), re.MULTILINE)
    }
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {first or second for first, second in named} <= {*targets}


@pytest.mark.parametrize("page", COMMAND_PAGES)
def test_options_in_tables_exist(page):
    cells = re.findall(r"^\| (`--.*?) \|", read(DOCS / page), re.MULTILINE)
    listed = {option for cell in cells for option in re.findall(r"--[a-z][\w-]*", cell)}
    assert listed <= options()[COMMAND_PAGES[page]]


def blocks(language: str) -> list:
    return [
        pytest.param(code, id=f"{path.name}:{number}")
        for path in TEXTS
        for number, (kind, code) in enumerate(FENCED.findall(path.read_text()))
        if kind == language
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_is_python(code):
    ast.parse(code)


def test_request_fields_exist():
    """As keys of JSON, and in tables."""
    named = {
        name
        for path in {*TEXTS} - {DOCS / "architecture.md"}  # names of Python's
        for name in re.findall(r"""['"`]{1,2}(proxy_[a-z_]+)['"`]""", read(path))
    }
    assert named == {*FIELDS}


@pytest.mark.parametrize("code", blocks("yaml"))
def test_configurations_are_valid(code):
    """Also pieces of one."""
    piece = yaml.safe_load(code)
    members = {"base": "base", "antiexpert": "antiexpert"}
    if "experts" not in piece:  # those are the antiexpert's
        members["expert"] = "expert"
    ProxyConfig.parse({**members, **piece}, "documentation")
