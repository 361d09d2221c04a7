"""Exercises that grade themselves: function bodies of the seven files, to be written again.

    python classroom/exercises.py list [CHAPTER ...]      the ladder, goals, times, a run for each chapter
    python classroom/exercises.py blank DIR [ID ...]      a student's copy without all or the chosen bodies
    python classroom/exercises.py grade DIR [ID ...]      PASS or FAIL for each; in a student's copy: grade .
    python classroom/exercises.py hint ID [--more]        a nudge; with --more (or 2) the idea
    python classroom/exercises.py notebooks DIR           the walk-through and each chapter as .ipynb
    python classroom/exercises.py autograder DIR [ID ...] a folder for Gradescope, without solutions

An exercise is a function or method, or a class with all its methods, below a line such as "# exercise 4.3 (2
points): ...". An ID may be a whole chapter, such as 4. The checks are in checks.py, the hints in course.py. A
student's copy has classroom/given/: the files as handed out, in which each function is graded alone.
"""

import argparse
import ast
import inspect
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "classroom")]
from course import CHAPTERS, HINTS

GIVEN = ROOT / "classroom" / "given"  # only in a student's copy
COPIED = (
    "*.py",
    "*.md",
    "LICENSE",
    "Makefile",
    "pyproject.toml",
    "requirements*.txt",
    ".gitignore",
    "support/**/*",
    "tests/**/*",
    "classroom/**/*",
)
LEFT_OUT = ("tests/test_exercises.py", "classroom/answers.md")  # they tell the solutions
MARKER = re.compile(r" *# exercise (\d+\.\d+) \((\d+) points?\): (.+)")


class Exercise(NamedTuple):
    id: str
    points: int  # by difficulty, 1 to 5
    file: str
    function: str  # "gae", "RMSNorm.forward", or a class
    title: str

    @property
    def chapter(self):
        return self.id.split(".")[0]


# -------------------------------------------------------------------------------- cutting


def functions(source):
    """{name: (first line, node)} of a file's functions, classes and methods ("Class.method"), decorators
    included.
    """
    nodes = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    nodes[f"{node.name}.{part.name}"] = part
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            nodes[node.name] = node
    return {
        name: (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node)
        for name, node in nodes.items()
    }


def ladder(root=ROOT):
    """All exercises of a project, in the order of their ids; ValueError for a marker with no function right
    below it.
    """
    found = []
    for path in sorted(root.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if not MARKER.search(source):
            continue
        names = {first: name for name, (first, _) in functions(source).items()}
        for number, line in enumerate(source.split("\n"), 1):
            marker = MARKER.fullmatch(line)
            if not marker:
                continue
            id, points, title = marker.groups()
            if number + 1 not in names:
                raise ValueError(f"{path}, line {number}: exercise {id} stands above no function")
            found.append(Exercise(id, int(points), path.name, names[number + 1], title))
    return sorted(found, key=lambda e: [int(n) for n in e.id.split(".")])


def matches(exercise, id):
    return exercise.id == id or exercise.chapter == id


def choose(exercises, ids):
    """Those that the ids name, all without ids; ValueError for an id of none."""
    for id in ids:
        if not any(matches(e, id) for e in exercises):
            known = ", ".join(e.id for e in exercises)
            raise ValueError(f"no exercise {id}; expected some of {known}, or a chapter")
    return [e for e in exercises if not ids or any(matches(e, id) for id in ids)]


def bodies(node):
    """[(first line, last line, column)] of what an exercise cuts out: each body without its docstring."""
    if isinstance(node, ast.ClassDef):
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        return [span for method in methods for span in bodies(method)]
    first = node.body[0].lineno if ast.get_docstring(node) is None else node.body[0].end_lineno + 1
    return [(first, node.end_lineno, node.body[0].col_offset)]


def blanked(source, exercises):
    """A file's text with the bodies of these exercises replaced by NotImplementedError."""
    lines, nodes = source.split("\n"), functions(source)
    cuts = [(*span, e) for e in exercises for span in bodies(nodes[e.function][1])]
    for first, last, column, e in sorted(cuts, reverse=True):  # from the end: line numbers above stay right
        lines[first - 1 : last] = [" " * column + f'raise NotImplementedError("exercise {e.id}: {e.title}")']
    return "\n".join(lines)


def without_markers(source, ids):
    """A file's text without the marker lines of exercises other than these."""
    kept = []
    for line in source.split("\n"):
        marker = MARKER.fullmatch(line)
        if not marker or marker[1] in ids:
            kept.append(line)
    return "\n".join(kept)


# -------------------------------------------------------------------------------- a student's copy


def write_given(directory, exercises, chosen):
    """Writes the files that hold exercises, with no solution of any and the markers of the chosen ones."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in dict.fromkeys(e.file for e in exercises):
        source = (ROOT / file).read_text(encoding="utf-8")
        text = blanked(source, [e for e in exercises if e.file == file])
        text = without_markers(text, {e.id for e in chosen})
        (directory / file).write_text(text, encoding="utf-8")


def copied_files():
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in path.parts and name not in LEFT_OUT:
                yield path, name


def copy_project(directory, ids):
    """Writes a student's copy without the chosen bodies, and its classroom/given. -> the chosen exercises"""
    exercises = ladder()
    chosen = choose(exercises, ids)
    wanted = {e.id for e in chosen}
    files = {e.file for e in exercises}
    for path, name in copied_files():
        copy = directory / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if name in files:
            source = path.read_text(encoding="utf-8")
            text = blanked(source, [e for e in chosen if e.file == name])
            copy.write_text(without_markers(text, wanted), encoding="utf-8")
        else:
            copy.write_bytes(path.read_bytes())
    write_given(directory / "classroom" / "given", exercises, chosen)
    return chosen


def check_new(directory):
    """ValueError unless a copy can go there: outside the project, or the tests and the next copy would find
    it.
    """
    if GIVEN.exists():
        raise ValueError(f"{ROOT} is a student's copy; make copies from the project that it was made from")
    if ROOT in directory.resolve().parents:
        raise ValueError(f"{directory}: lies inside the project; expected another place, such as ../student")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: exists and is not empty; expected a new directory")


def blank(directory, ids=()):
    check_new(directory)
    chosen = copy_project(directory, ids)
    points = sum(e.points for e in chosen)
    there = shlex.join(["cd", str(directory)])
    print(f"{directory}: {len(chosen)} exercises, {points} points")
    print(f"grade them there: {there} && python classroom/exercises.py grade .")


def autograder(directory, ids=()):
    """A folder to zip and upload to Gradescope: a copy without solutions, setup.sh and run_autograder."""
    check_new(directory)
    copy_project(directory, ids)
    setup = "#!/usr/bin/env bash\nset -e\npython3 -m pip install -q -r /autograder/source/requirements.txt\n"
    command = ["python3", "classroom/exercises.py", "grade", "/autograder/submission", *ids]
    command += ["--gradescope", "--json", "/autograder/results/results.json"]
    run = f"#!/usr/bin/env bash\ncd /autograder/source\n{shlex.join(command)} || true\n"
    for name, text in (("setup.sh", setup), ("run_autograder", run)):
        (directory / name).write_text(text, encoding="utf-8")
        (directory / name).chmod(0o755)
    archive = shutil.make_archive(str(directory), "zip", directory)
    print(f"{archive}: upload it to Gradescope; students hand in their *.py files")


# -------------------------------------------------------------------------------- one function of a student's


def cut_out(source, function, file):
    """The text of one function. If the file does not parse: from its def to the next line not indented
    deeper.
    """
    lines = source.split("\n")
    try:
        found = functions(source)
    except SyntaxError:
        return cut_by_indentation(lines, function, file)
    if function not in found:
        raise AssertionError(f"{file} has no {function}")
    first, node = found[function]
    return "\n".join(lines[first - 1 : node.end_lineno])


def cut_by_indentation(lines, function, file):
    def find(pattern, start):
        return next((i for i in range(start, len(lines)) if re.match(pattern, lines[i])), None)

    first = -1
    for name in function.split("."):
        first = find(rf" *(def|class) {name}\b", first + 1)
        if first is None:
            raise AssertionError(f"{file} has no {function}")
    column = len(lines[first]) - len(lines[first].lstrip())
    last = find(rf" {{0,{column}}}[^\s)#]", first + 1)
    while lines[first - 1].strip().startswith("@"):
        first -= 1
    text = "\n".join(lines[first:last])
    ast.parse(
        "\n" * (first - 1) + "class _:\n" * bool(column) + text, file
    )  # or this function holds the error
    return text


def with_function(source, function, text):
    """A file's source with `text` in the place of one function."""
    lines = source.split("\n")
    first, node = functions(source)[function]
    return "\n".join([*lines[: first - 1], text, *lines[node.end_lineno :]])


def as_module(file, source, alone=False):
    """Source as a module of its own. alone: whoever imports it by its name gets this one, not a solution."""
    module = ModuleType(file.removesuffix(".py"))
    if alone:
        sys.modules[module.__name__] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module


# -------------------------------------------------------------------------------- grading


@contextmanager
def given_files():
    """The directory of files without solutions in which functions are graded; temporary unless handed out."""
    if GIVEN.exists():
        yield GIVEN
        return
    exercises = ladder()
    with tempfile.TemporaryDirectory() as directory:
        write_given(Path(directory), exercises, exercises)
        yield Path(directory)


def reason_of(error):
    """Why a check failed, in one line; "blank" for a body that nobody has written."""
    if isinstance(error, AssertionError):
        return str(error).strip().split("\n")[-1] or "AssertionError"
    if isinstance(error, NotImplementedError) and str(error).startswith("exercise "):
        return "blank"
    text = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    if isinstance(error, NameError):
        text += " (helpers of your own must be inside the function)"
    return text


def worker(directory, given, exercise, result):
    """In a process of its own: sends "" for a pass, else the reason in one line."""
    import torch

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a student's prints
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    if str(given) not in sys.path:  # in a process that was not forked
        sys.path.insert(0, str(given))
    try:
        import checks

        theirs = (directory / exercise.file).read_text(encoding="utf-8")
        ours = (given / exercise.file).read_text(encoding="utf-8")
        text = cut_out(theirs, exercise.function, exercise.file)
        module = as_module(exercise.file, with_function(ours, exercise.function, text), alone=True)
        checks.CHECKS[exercise.id](module)
        reason = ""
    except BaseException as error:  # SystemExit too
        reason = reason_of(error)
    result.send(reason)


def grade_one(directory, given, exercise, timeout, context):
    """-> (reason, "" for a pass; seconds)"""
    began = time.perf_counter()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=worker, args=(directory, given, exercise, theirs), daemon=True)
    process.start()
    theirs.close()  # the worker's end is the only one now, so that its death is noticed
    try:
        reason = ours.recv() if ours.poll(timeout) else f"no result after {timeout:g} s: an endless loop?"
    except EOFError:
        process.join()
        reason = f"the process ended by itself (exit code {process.exitcode})"
    process.kill()
    process.join()
    return reason, time.perf_counter() - began


def grade(directory, ids, timeout):
    """Grades each exercise alone: the given files with one function from `directory`. -> [row of the
    gradebook]
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; expected a student's copy")
    handed_out = directory / "classroom" / "given"
    exercises = choose(ladder(GIVEN if GIVEN.exists() else ROOT), ids)
    if not ids and handed_out.is_dir():
        taken_out = {e.id for e in ladder(handed_out)}
        exercises = [e for e in exercises if e.id in taken_out]
    # A forked worker finds torch and the given files imported already; a spawned one (Windows) imports them
    # again.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    rows = []
    with given_files() as given:
        sys.path.insert(0, str(given))
        import checks  # noqa: F401

        for e in exercises:
            reason, seconds = grade_one(directory, given, e, timeout, context)
            row = {**e._asdict(), "passed": not reason, "points": 0 if reason else e.points}
            rows.append(row | {"max_points": e.points, "seconds": round(seconds, 3), "reason": reason})
            print_row(rows[-1])
        sys.path.remove(str(given))
    return rows


def print_row(row):
    colours = ("\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
    verdict = f"{colours[0]}PASS" if row["passed"] else f"{colours[1]}FAIL"
    points = f"{row['points']}/{row['max_points']}"
    where = f"{row['file']} {row['function']}"
    line = f"{verdict}{colours[2]}  {row['id']:<5} {points:<4} {row['seconds']:6.2f} s  {where}"
    print(line if row["passed"] else f"{line}: {row['reason']}", flush=True)


def totals(rows):
    sums = {
        key: round(sum(row[key] for row in rows), 3) for key in ("passed", "points", "max_points", "seconds")
    }
    return {"exercises": len(rows), **sums}


def print_results(rows):
    """The sums, and for each chapter that is done the run with one's own code."""
    total = totals(rows)
    count = f"{total['passed']} of {total['exercises']} exercises"
    print(f"{count}, {total['points']} of {total['max_points']} points, {total['seconds']:.1f} s")
    for number, chapter in CHAPTERS.items():
        mine = [row["passed"] for row in rows if row["id"].split(".")[0] == number]
        if mine and all(mine):
            print(f"chapter {number}: now run it with your code: {chapter.run}")
            print(f"           it should show: {chapter.shows}")


def gradebook(directory, rows):
    return {"directory": str(directory), "total": totals(rows), "exercises": rows}


def gradescope(rows):
    """The same in the form of Gradescope's results.json."""
    tests = []
    for row in rows:
        test = {"number": row["id"], "name": f"{row['file']} {row['function']}: {row['title']}"}
        test |= {"score": row["points"], "max_score": row["max_points"]}
        test |= {"status": "passed" if row["passed"] else "failed", "output": row["reason"] or "passed"}
        tests.append(test)
    seconds = totals(rows)["seconds"]
    return {"execution_time": round(seconds), "visibility": "visible", "tests": tests}


# -------------------------------------------------------------------------------- notebooks


FIND_PROJECT = """import sys
from pathlib import Path

places = [Path.cwd(), *Path.cwd().parents]
PROJECT = next(place for place in places if (place / "classroom" / "exercises.py").exists())
sys.path[:0] = [str(PROJECT), str(PROJECT / "classroom")]
"""


def cell(kind, text):
    """A cell of a notebook: kind is "markdown" or "code"."""
    lines = text.strip("\n").splitlines(keepends=True)
    more = {} if kind == "markdown" else {"execution_count": None, "outputs": []}
    return {"cell_type": kind, "metadata": {}, "source": lines, **more}


def write_notebook(path, cells):
    numbered = [{"id": f"cell-{i}", **one} for i, one in enumerate(cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = {"cells": numbered, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(book, indent=1) + "\n", encoding="utf-8")


def walkthrough_cells():
    """walkthrough.py cell by cell; a section's title and first comment become text."""
    source = (ROOT / "classroom" / "walkthrough.py").read_text(encoding="utf-8")
    head, *parts = re.split(r"^# %%\n", source, flags=re.M)
    cells = [cell("markdown", ast.get_docstring(ast.parse(head))), cell("code", FIND_PROJECT)]
    for part in parts:
        opening = re.match(r'section\("(.+)"\)\n((?:# .*\n)*)', part)
        if opening:
            comment = re.sub(r"^# ", "", opening[2], flags=re.M)
            cells.append(cell("markdown", f"## {opening[1]}\n\n{comment}"))
            part = part[opening.end() :]
        cells.append(cell("code", part))
    return cells


def chapter_cells(number, exercises):
    """For each exercise its title and nudge, its blank function to write in, and a line that checks it."""
    chapter = CHAPTERS[number]
    goals = "\n".join(f"- {goal}" for goal in chapter.goals)
    intro = (
        f"# {number}. {chapter.title}\n\nAbout {chapter.minutes} minutes. Needs: {chapter.needs}.\n\n{goals}"
    )
    cells = [
        cell("markdown", intro),
        cell("code", f"{FIND_PROJECT}\nimport torch\nfrom exercises import check"),
    ]
    for e in exercises:
        nudge, idea = HINTS[e.id]
        more = f"<details><summary>The idea</summary>{idea}</details>"
        text = f"## {e.id} {e.title} ({e.points} of 5)\n\n`{e.file}`, `{e.function}`. {nudge}\n\n{more}"
        source = blanked((ROOT / e.file).read_text(encoding="utf-8"), [e])
        code = textwrap.dedent(cut_out(source, e.function, e.file))
        if e.function.count("."):  # a method is written without its class
            code = code.replace("@staticmethod\n", "")
        name = e.function.split(".")[-1]
        cells += [
            cell("markdown", text),
            cell("code", without_decorators(code)),
            cell("code", f'check("{e.id}", {name})'),
        ]
    run = f"## Run it with your code\n\nCopy your functions into the files, then: `{chapter.run}`\n\n"
    return [*cells, cell("markdown", f"{run}It should show: {chapter.shows}.")]


def without_decorators(code):
    """A notebook knows neither torch nor lru_cache; what is above a def is put back when it is checked."""
    return re.sub(r"\A(?:@.*\n)+", "", code)


def notebooks(directory):
    directory.mkdir(parents=True, exist_ok=True)
    write_notebook(directory / "walkthrough.ipynb", walkthrough_cells())
    exercises = ladder(GIVEN if GIVEN.exists() else ROOT)
    for number in dict.fromkeys(e.chapter for e in exercises):
        mine = [e for e in exercises if e.chapter == number]
        write_notebook(directory / f"chapter-{number}.ipynb", chapter_cells(number, mine))
    print(f"{directory}: {', '.join(sorted(path.name for path in directory.glob('*.ipynb')))}")


def written_in_a_cell(function, given, exercise):
    """The text of a function or class that was defined in a notebook, as it would be in the file."""
    first, node = functions(given)[exercise.function]
    lines = given.split("\n")
    head = lines[first - 1 : node.lineno - 1]  # decorators
    column = " " * node.col_offset
    if inspect.isclass(function):
        head += [lines[node.lineno - 1]]
        methods = [f.__func__ if isinstance(f, staticmethod) else f for f in vars(function).values()]
        sources = [textwrap.dedent(inspect.getsource(f)) for f in methods if inspect.isfunction(f)]
        return "\n".join(head + [textwrap.indent(source, "    ") for source in sources])
    source = textwrap.dedent(inspect.getsource(function))
    return "\n".join([*head, textwrap.indent(without_decorators(source), column)])


def check(id, function):
    """In a notebook: grades one function, and prints what `grade` would print."""
    (exercise,) = choose(ladder(GIVEN if GIVEN.exists() else ROOT), [id])
    with given_files() as given, tempfile.TemporaryDirectory() as directory:
        source = (given / exercise.file).read_text(encoding="utf-8")
        text = with_function(source, exercise.function, written_in_a_cell(function, source, exercise))
        Path(directory, exercise.file).write_text(text, encoding="utf-8")
        command = [sys.executable, __file__, "grade", directory, id]
        ran = subprocess.run(command, capture_output=True, text=True)
    print((ran.stdout or ran.stderr).split("\n")[0])


# -------------------------------------------------------------------------------- the command


def print_ladder(chapters):
    exercises = choose(ladder(GIVEN if GIVEN.exists() else ROOT), chapters)
    for number in dict.fromkeys(e.chapter for e in exercises):
        chapter = CHAPTERS[number]
        mine = [e for e in exercises if e.chapter == number]
        points = sum(e.points for e in mine)
        print(f"{number}. {chapter.title}: {points} points, about {chapter.minutes} minutes")
        print(f"   needs: {chapter.needs}")
        for goal in chapter.goals:
            print(f"   you will be able to {goal}")
        for e in mine:
            print(f"   {e.id:<6}{e.points} of 5  {e.file:<14}{e.function:<26}{e.title}")
        print(f"   then run it with your code: {chapter.run}")
        print(f"   it should show: {chapter.shows}\n")
    print(f"{len(exercises)} exercises, {sum(e.points for e in exercises)} points")


def hint(id, more):
    if id not in HINTS:
        raise ValueError(f"no exercise {id}; expected one of {', '.join(HINTS)}")
    nudge, idea = HINTS[id]
    print(idea if more else nudge)
    if not more:
        print(f"(the idea: python classroom/exercises.py hint {id} --more)")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        commands = "list, blank DIR [ID ...], grade DIR [ID ...], hint ID, notebooks DIR or autograder DIR"
        raise ValueError(f"exercises.py: {message}; expected {commands}")


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list").add_argument("ids", metavar="CHAPTER", nargs="*")
    for name in ("blank", "grade", "autograder", "notebooks"):
        command = commands.add_parser(name)
        command.add_argument("directory", metavar="DIR", type=Path)
        if name != "notebooks":
            command.add_argument(
                "ids", metavar="ID", nargs="*", help="exercises or chapters; without one, all"
            )
        if name == "grade":
            command.add_argument("--json", metavar="FILE", type=Path, help="the same results for a gradebook")
            command.add_argument("--gradescope", action="store_true", help="--json in Gradescope's form")
            command.add_argument(
                "--timeout", metavar="SECONDS", type=float, default=20.0, help="for each (20)"
            )
    command = commands.add_parser("hint")
    command.add_argument("id", metavar="ID")
    command.add_argument("level", nargs="?", choices=("1", "2"), default="1")
    command.add_argument("--more", action="store_true", help="the idea, not only a nudge")
    return parser.parse_args(argv)


def run_grade(args):
    rows = grade(args.directory, args.ids, args.timeout)
    print_results(rows)
    if args.json:
        book = gradescope(rows) if args.gradescope else gradebook(args.directory, rows)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(book, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["passed"] for row in rows) else 1


def main(argv=None):
    """-> exit status: 0, 1 when an exercise failed, 2 for bad input (one line on stderr)"""
    try:
        args = parse(argv)
        if args.command == "list":
            print_ladder(args.ids)
        elif args.command == "blank":
            blank(args.directory, args.ids)
        elif args.command == "hint":
            hint(args.id, args.more or args.level == "2")
        elif args.command == "notebooks":
            notebooks(args.directory)
        elif args.command == "autograder":
            autograder(args.directory, args.ids)
        else:
            return run_grade(args)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
