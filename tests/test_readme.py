"""What README.md and the chapters say of the code is there: files, functions, flags, commands, tests."""

import argparse
import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from qrm import REWARD_MODELS
from support import settings
from support.files import BadInput
from support.unread import unread_flags

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "classroom").glob("*.md"))]
LINK = re.compile(r"\[([^\]]+)\]\(((?!https?:)[^)\s]+)\)")
FUNCTION = re.compile(r"`((?:\w+\.)*\w+\.\w+)`")  # `qrm.qrm_loss`, `support.graders.same_answer`
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"(python|torchrun|make|\$\w+) |\w+=|for |done$|    ")
OTHERS = {"help", "slow", "nproc_per_node", "standalone", "local"}  # pytest's, torchrun's, --local-dir of hf
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def defined(path):
    """Names that a source file defines: functions, classes, "Class.method", constants."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def prose(page):
    """A page's text without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def shell_blocks(page):
    """The code blocks of a page that hold nothing but commands."""
    blocks = [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if not language]
    return [body for body in blocks if all(COMMAND.match(line) for line in body.splitlines())]


def expanded(block):
    """The commands of a block as bash would run them, one list of words each; none is run.

    python, torchrun and make are replaced by functions that print their words.
    """
    stubs = [f"{name}() {{ printf '%q ' {name} \"$@\"; echo; }}" for name in ("python", "torchrun", "make")]
    done = subprocess.run(
        ["bash", "-euc", "\n".join([*stubs, block])], capture_output=True, text=True, cwd=ROOT / "tests"
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def words_after_script(words):
    """script, arguments of an expanded python or torchrun command."""
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[place], words[place + 1 :]


@EACH_PAGE
def test_links_point_at_files_and_functions_that_exist(page):
    for text, target in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target.partition("#")[0]).resolve()
        assert path.exists(), f"{target}: no such file"
        assert "#L" not in target, f"{target}: names a line, which moves"
        named = FUNCTION.fullmatch(text)
        if named and path.suffix == ".py":
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            assert named[1].startswith(f"{module}."), f"{text} is linked to {target}"
            assert named[1].removeprefix(f"{module}.") in defined(path), f"{text} is not in {target}"


def test_the_readme_links_to_the_code_and_to_every_chapter():
    text = README.read_text(encoding="utf-8")
    assert len([name for name, _ in LINK.findall(text) if FUNCTION.fullmatch(name)]) >= 25
    linked = text + (ROOT / "classroom" / "teaching.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        if page.name != "answers.md":  # for teachers: a student's copy lacks it
            assert f"({page.name})" in linked.replace("(classroom/", "("), page.name


def test_the_readme_is_two_screens():
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) < 15_000 and text.count("\n") <= 205


@EACH_PAGE
def test_no_line_is_wider_than_the_code(page):
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
        assert len(line) <= 110 or line.startswith("|"), f"line {number}: {len(line)} columns"


@EACH_PAGE
def test_flags_exist(page):
    known = {*settings.FIELDS, *OTHERS}
    for script in (ROOT / "classroom").glob("*.py"):
        known |= set(re.findall(r'"--([\w-]+)"', script.read_text(encoding="utf-8")))
    assert not set(re.findall(r"(?<![\w-])--(\w+)", page.read_text(encoding="utf-8"))) - known


@EACH_PAGE
def test_commands_parse(page):
    """Every command of train.py is one that train.py takes; other scripts exist, make's targets do, too."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for block in shell_blocks(page):
        for words in expanded(block):
            if words[0] == "make":
                assert set(words[1:]) <= targets, words
                continue
            script, arguments = words_after_script(words)
            assert (ROOT / script).exists(), script
            if script == "train.py":
                try:
                    settings.parse(arguments)
                except BadInput as error:
                    raise AssertionError(f"{shlex.join(words)}: {error}") from None


def test_the_commands_are_found():
    """The tests above look at something: README's recipe is expanded to the commands that it means."""
    found = [words for page in PAGES for block in shell_blocks(page) for words in expanded(block)]
    stages = [words[words.index("--stage") + 1] for words in found if "--stage" in words]
    assert {"sft", "pairs", "rm", "reinforce", "ppo", "eval"} <= set(stages) and len(found) > 30
    recipe = next(words for words in found if "runs/own/rm" in words)
    assert recipe[:4] == ["python", "train.py", "--stage", "rm"] and "runs/own/sft" in recipe


@EACH_PAGE
def test_inline_commands_and_paths_exist(page):
    """`python classroom/x.py`, `tests/x.py`, `make x` in the text."""
    text = prose(page)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for path in re.findall(r"`(?:python )?((?:classroom|tests|support)/\w+\.\w+)", text):
        assert (ROOT / path).exists(), path
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets


def test_stages_and_reward_models_named_in_the_readme_exist():
    """The first cells of the table of stages; every reward model has its row in the chapter of the method."""
    table = README.read_text(encoding="utf-8").partition("## Stages")[2].partition("\n\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in rows[1:] for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(settings.STAGES) - {"demo"}
    listed = re.findall(
        r"^\| `(\w+)` \|", (ROOT / "classroom" / "method.md").read_text(encoding="utf-8"), re.M
    )
    assert set(listed) == set(REWARD_MODELS) - {"plain"}  # plain: Q-RM without the fused head
    rewards = re.search(r"`--reward ([^|]*) \|", table)[1]
    assert set(re.findall(r"\w+", rewards)) == set(listed)


@EACH_PAGE
def test_tests_named_in_a_page_exist(page):
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")]
    tests = set(re.findall(r"^ *def (test_\w+)\(", "\n".join(sources), re.M))
    files = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert not set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))) - tests - files


def test_make_quick_names_test_files_that_exist():
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    files = re.search(r"^METHOD = (.*)$", text, re.M)[1].split()
    assert len(files) > 5 and all((ROOT / name).exists() for name in files)


class Parsed(Exception):
    """A script has read its command line."""


def test_commands_of_make_results_are_taken(monkeypatch):
    """`make results` takes hours: every flag of its commands must be known, and read, before that."""
    listed = subprocess.run(["make", "-n", "results"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [shlex.split(line) for line in re.sub(r"\\\n\s*", " ", listed.stdout).splitlines()]
    commands = [words for words in commands if words[:1] == [".venv/bin/python"] and words[1].endswith(".py")]
    scripts = {words[1] for words in commands}
    assert {"train.py", "classroom/granularity.py", "classroom/study.py", "classroom/bench.py"} <= scripts

    def parse_args(self, argv=None, namespace=None, parse=argparse.ArgumentParser.parse_args):
        parse(self, argv, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.syspath_prepend(str(ROOT / "classroom"))
    for _, script, *words in commands:
        words = words[: words.index(">")] if ">" in words else words
        words = words[: words.index(">>")] if ">>" in words else words
        if script == "train.py":
            assert not unread_flags(words), words
        elif script not in ("classroom/pictures.py", "classroom/theory.py"):  # they take none
            with pytest.raises(Parsed):
                importlib.import_module(Path(script).stem).main(words)
