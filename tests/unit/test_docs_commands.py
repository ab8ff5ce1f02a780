"""The commands, flags and make targets in README and docs exist, and so do the names in their Python code.

tests/stack/test_docs_run.py runs each fence with the language `sh`, unless a line `<!-- needs: WORD -->` above it says
that it needs more than files. In those and in indented code, commands of egm are parsed by the real command line;
make targets, files of the checkout and values of the chart must exist.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer._click.exceptions import UsageError

from grounding import library
from grounding.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "images").glob("*.md")])
NEEDS = ("cluster", "data", "gpu", "minutes", "model", "network", "server")
"""What a fence may need: a cluster, the reader's own files, GPUs, minutes, a trained model, the internet, a model server"""


WRITTEN = {"bench/gpu/proven-train.json"}
"""Files of the checkout that the commands of the pages write"""


@dataclass(frozen=True)
class Block:
    """A piece of code, with the language of its fence (None for indented lines) and the needs that the line above names."""

    line: int
    language: str | None
    text: str
    needs: str = ""


def blocks(page: str) -> Iterator[Block]:
    """Yield the code of a page."""
    fence: tuple[int, str, str, list[str]] | None = None
    needs, indented, start = "", [], 0
    for number, line in enumerate([*page.splitlines(), ""], 1):
        mark = re.match(r"\s*```(\w*)", line)
        if fence is not None:
            if mark:
                yield Block(fence[0], fence[1], "\n".join(fence[3]) + "\n", fence[2])
                fence = None
            else:
                fence[3].append(line)
            continue
        if line.startswith("    ") and not mark:
            start = start or number
            indented.append(line.strip())
            continue
        if indented:
            yield Block(start, None, "\n".join(indented) + "\n")
            indented, start = [], 0
        if mark:
            fence, needs = (number, mark.group(1), needs, []), ""
        elif found := re.fullmatch(r"\s*<!-- needs: (.+) -->", line):
            needs = found.group(1)
        elif line.strip():
            needs = ""


def words_of(text: str) -> Iterator[list[str]]:
    """Yield the words of each simple command of a shell text, without the brackets of a synopsis."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(re.sub(r"(?<!\S)\[|\](?!\S)", " ", line), posix=True, punctuation_chars="|&;")
        lexer.commenters, lexer.whitespace_split = "#", True
        command: list[str] = []
        try:
            for word in lexer:
                if set(word) <= set("|&;"):
                    yield command
                    command = []
                else:
                    command.append(word)
        except ValueError:  # the text has an apostrophe, so it is prose
            continue
        yield command


@cache
def _root() -> Any:
    return typer.main.get_command(app)


def problems_of_egm(words: list[str]) -> Iterator[str]:
    """Yield what is wrong with `egm WORDS`, as the command line itself would say it: names, values, what is missing."""
    found = list(problems_of_flags(words))
    yield from found
    if found or "…" in words:  # three dots stand for parts of a command that the page has shown before
        return
    command, name, rest, context = _root(), "egm", words, None
    try:
        while True:
            context = command.make_context(name, list(rest), parent=context)
            if not hasattr(command, "commands"):
                return
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    except UsageError as error:
        yield f"egm {' '.join(words)}: {error.format_message()}"
    except typer.Exit:  # --help
        return


def problems_of_flags(words: list[str]) -> Iterator[str]:
    """Yield the commands and flags of `egm WORDS` that do not exist."""
    command, values = _root(), 0
    for word in words:
        flags = {o: p for p in command.params for o in (*p.opts, *p.secondary_opts)}
        if values and not word.startswith("--"):
            values -= 1
        elif re.match(r"--?[a-zA-Z]", word):
            name = word.partition("=")[0]
            if name in ("--help", "-h"):
                continue
            if name not in flags:
                yield f"egm {' '.join(words)}: {command.name or 'egm'} has no {name}"
                continue
            option = flags[name]
            values = 0 if option.is_flag or "=" in word else 1
        elif hasattr(command, "commands"):
            if word not in command.commands:
                yield f"egm {' '.join(words)}: there is no command {word}"
                return
            command = command.commands[word]


@cache
def _values_of_the_chart() -> Any:
    return yaml.safe_load((ROOT / "charts" / "egm" / "values.yaml").read_text())


def problems_of_files(words: list[str]) -> Iterator[str]:
    """Yield the files of this checkout that a command names and that do not exist."""
    for word in words:
        if re.match(r"(jobs|charts|docs|images|hack|bench|tests|grounding|operator)/[\w./-]+$", word):
            path = ROOT / word
            if not path.exists() and word not in WRITTEN:
                yield f"{word}: no such file in the checkout"


def problems_of_values(words: list[str]) -> Iterator[str]:
    """Yield the values that `--set` gives to the chart and that it does not have."""
    for flag, word in pairwise(words):
        if flag != "--set":
            continue
        place: Any = _values_of_the_chart()
        for key in word.partition("=")[0].split("."):
            if isinstance(place, dict) and not place:  # an empty map takes any key, as labels do
                break
            if not isinstance(place, dict) or key not in place:
                yield f"--set {word}: the chart has no such value"
                break
            place = place[key]


def problems_of(text: str) -> Iterator[str]:
    """Yield what is wrong with the commands of a text."""
    heads = re.findall(r"^([a-z][a-z0-9 -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for head in heads for target in head.split()}
    for words in words_of(text):
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words and (words[0] == "egm" or words[0].endswith("/bin/egm")):
            yield from problems_of_egm(words[1:])
        yield from problems_of_files(words)
        if "helm" in words[:1] or "$HELM" in words[:1] or words[:1] == ["--set"]:
            yield from problems_of_values(words)
        if words and words[0] == "make":
            for word in words[1:]:
                if re.fullmatch(r"[a-z][a-z0-9-]*", word) and word not in targets:
                    yield f"make {word}: no such target"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_flags_and_targets_exist(page: Path) -> None:
    found = []
    for block in blocks(page.read_text()):
        assert block.needs in ("", *NEEDS), f"{page.name}:{block.line}: unknown need {block.needs!r}"
        if block.language in (None, "", "sh", "bash", "console"):
            found += [f"{page.name}:{block.line}: {problem}" for problem in problems_of(block.text)]
    assert found == []


PROGRAMS = {"egm", "kubectl", "helm", "make", "uv", "pip", "python", "python3", "curl"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_fence_of_commands_says_so(page: Path) -> None:
    """Such a fence either runs in a test or states what it needs; a fence without a language would do neither."""
    languages = {b.line: b.language for b in blocks(page.read_text()) if b.language is not None}
    assert set(languages.values()) <= {"", "sh", "python", "yaml"}
    plain = [b for b in blocks(page.read_text()) if b.language == ""]
    assert [f"{page.name}:{b.line}" for b in plain if PROGRAMS & {w[0] for w in words_of(b.text) if w}] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_yaml_of_the_docs_can_be_read(page: Path) -> None:
    for block in blocks(page.read_text()):
        if block.language == "yaml":
            assert yaml.safe_load(block.text), f"{page.name}:{block.line}"


def test_a_wrong_flag_command_and_target_are_found() -> None:
    text = "X=1 .venv/bin/egm run -f a.yaml --nope  # egm no\nls | egm fly\negm data lnt x\nmake test nothing\n"
    text += "egm eval … --top-k -1\negm serve\negm top extra\negm get -o yaml\nkubectl apply -f jobs/no.yaml\n"
    text += "helm install egm charts/egm --set settings.nothing=1 --set settings.runAsUser=0\n"
    assert [p.rpartition(": ")[2] for p in problems_of(text)] == [
        "run has no --nope", "there is no command fly", "there is no command lnt", "no such target",
        "Missing option '--file' / '-f'.", "Got unexpected extra argument(s) (extra)",
        "Value error, 'yaml' is not one of '', 'wide', 'json'.", "no such file in the checkout",
        "the chart has no such value",
    ]  # fmt: skip
    page = "<!-- needs: gpu -->\n```sh\negm x\n```\ntext\n```sh\negm \\\n  y\n```\n\n    egm z\n"
    assert [(b.line, b.language, b.needs) for b in blocks(page)] == [(2, "sh", "gpu"), (6, "sh", ""), (11, None, "")]
    assert list(words_of("egm \\\n  y 'a b' | head; x # c\n")) == [["egm", "y", "a b"], ["head"], ["x"]]


def test_the_python_of_the_docs_names_what_there_is() -> None:
    import inspect

    seen = set()
    for page in PAGES:
        for block in blocks(page.read_text()):
            if block.language != "python":
                continue
            tree = ast.parse(block.text)
            names: dict[str, Any] = {}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module == "grounding.library":
                    names |= {a.name: getattr(library, a.name) for a in node.names}
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                    keywords = {k.arg: None for k in node.keywords if k.arg}
                    inspect.signature(names[node.func.id]).bind(*node.args, **keywords)
                    seen.add(node.func.id)
    assert seen == {"ask", "serve", "evaluate", "load_results", "score", "train"}


# ---- help and completion ----
@pytest.mark.parametrize("words", [[], ["data"], ["role"], ["checkpoint"]])
def test_help_shows_whole_sentences_at_80_columns(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from grounding.cli import run as egm

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    assert egm([*words, "--help"]) == 0
    text = capsys.readouterr().out
    commands = text[text.index("Commands:") :]
    assert "..." not in commands and max(map(len, commands.splitlines())) <= 80
    rows = re.findall(r"^  (\S+)(.*(?:\n    .*)*)", commands, re.MULTILINE)
    assert len(rows) > 1 and all(row.rstrip().endswith(".") for _, row in rows)


def test_the_shell_completes_commands_and_flags() -> None:
    def completed(line: str) -> list[str]:
        words = line.split(" ")
        env = {**os.environ, "_EGM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        egm = Path(sys.executable).with_name("egm")
        return subprocess.run([egm], env=env, capture_output=True, text=True, timeout=60).stdout.split()

    assert completed("egm val") == ["validate"]
    assert completed("egm run --para") == ["--parallel"]
