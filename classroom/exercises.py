"""Exercises that grade themselves: function bodies of the seven files, to be written again.

    python classroom/exercises.py list                      the ladder
    python classroom/exercises.py blank DIR                 a student's copy of the project, without those bodies
    python classroom/exercises.py grade DIR [ID ...]        PASS or FAIL for each exercise [--json FILE] [--timeout SECONDS]
    python classroom/exercises.py hint ID                   one or two sentences

An exercise is a function or method, or a class with all its methods, below a line such as "# exercise 4.3 (3
lines): ...". Its checks are in classroom/checks.py, and their docstrings are the hints. An ID may be a whole
chapter, such as 4.
"""

import argparse
import ast
import json
import multiprocessing
import os
import re
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "classroom")]
COPIED = (
    "*.py",
    "*.md",
    "LICENSE",
    "Makefile",
    "requirements*.txt",
    ".gitignore",
    "tests/**/*",
    "classroom/**/*",
)
MARKER = re.compile(r" *# exercise (\d+\.\d+) \((\d+) lines?\): (.+)")


class Exercise(NamedTuple):
    id: str
    points: int  # one a line of the solution
    file: str
    function: str  # "gae", "RMSNorm.forward", or a class
    title: str


# -------------------------------------------------------------------------------- cutting


def functions(source):
    """{name: (first line, node)} of a file's functions and classes, and "Class.method"; decorators belong to
    a function.
    """
    nodes = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            nodes[node.name] = node
            nodes |= {
                f"{node.name}.{part.name}": part for part in node.body if isinstance(part, ast.FunctionDef)
            }
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
        if markers := {i: m for i, line in enumerate(source.split("\n"), 1) if (m := MARKER.fullmatch(line))}:
            names = {first: name for name, (first, _) in functions(source).items()}
            for i, (id, points, title) in ((i, m.groups()) for i, m in markers.items()):
                if i + 1 not in names:
                    raise ValueError(f"{path}, line {i}: exercise {id} stands above no function")
                found.append(Exercise(id, int(points), path.name, names[i + 1], title))
    return sorted(found, key=lambda e: [int(n) for n in e.id.split(".")])


def bodies(node):
    """[(first line, last line, column)] of what an exercise cuts out: each body without its docstring."""
    if isinstance(node, ast.ClassDef):
        return [span for part in node.body if isinstance(part, ast.FunctionDef) for span in bodies(part)]
    first = node.body[0].lineno if ast.get_docstring(node) is None else node.body[0].end_lineno + 1
    return [(first, node.end_lineno, node.body[0].col_offset)]


def blanked(source, exercises):
    """A file's text with the bodies of these exercises replaced by NotImplementedError."""
    lines, nodes = source.split("\n"), functions(source)
    cuts = [(*span, e) for e in exercises for span in bodies(nodes[e.function][1])]
    for first, last, column, e in sorted(
        cuts, reverse=True
    ):  # from the end, so that the line numbers above stay right
        lines[first - 1 : last] = [" " * column + f'raise NotImplementedError("exercise {e.id}: {e.title}")']
    return "\n".join(lines)


def blank(directory):
    """Writes a student's copy of the project, outside of it (or the next copy, and the tests, would find this
    one).
    """
    if ROOT in directory.resolve().parents:
        raise ValueError(f"{directory}: lies inside the project; expected another place, such as ../student")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: exists and is not empty; expected a new directory")
    exercises = ladder()
    files = [
        path
        for pattern in COPIED
        for path in sorted(ROOT.glob(pattern))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    for path in files:
        if path.name != "test_exercises.py":  # it quotes the solutions
            copy = directory / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            mine = [e for e in exercises if path == ROOT / e.file]
            copy.write_bytes(
                blanked(path.read_text(encoding="utf-8"), mine).encode() if mine else path.read_bytes()
            )
    print(
        f"{directory}: {len(exercises)} exercises, {sum(e.points for e in exercises)} points; "
        f"grade them with: {shlex.join(['python', str(Path(__file__).resolve()), 'grade', str(directory)])}"
    )


# -------------------------------------------------------------------------------- one function of a student's


def cut_out(source, function, file):
    """The text of one function. Where the file does not parse: from its def to the next line that is not
    indented deeper.
    """
    lines = source.split("\n")
    try:
        if function not in (found := functions(source)):
            raise AssertionError(f"{file} has no {function}")
        first, node = found[function]
        return "\n".join(lines[first - 1 : node.end_lineno])
    except SyntaxError:
        first = -1
        for name in function.split("."):
            first = next(
                (i for i in range(first + 1, len(lines)) if re.match(rf" *(def|class) {name}\b", lines[i])),
                None,
            )
            if first is None:
                raise AssertionError(f"{file} has no {function}") from None
        column = len(lines[first]) - len(lines[first].lstrip())
        last = next(
            (i for i in range(first + 1, len(lines)) if re.match(rf" {{0,{column}}}[^\s)#]", lines[i])),
            len(lines),
        )
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
    """Source as a module of its own; what it imports from the project are the given files. alone: to import
    itself finds itself, no solution.
    """
    module = ModuleType(file.removesuffix(".py"))
    if alone:
        sys.modules[module.__name__] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def check(exercise, source, alone=False):
    """Runs an exercise's checks on a module's source; AssertionError, or whatever the student's code raises,
    if it fails.
    """
    import checks

    checks.CHECKS[exercise.id](as_module(exercise.file, source, alone))


# -------------------------------------------------------------------------------- grading


def worker(directory, exercise, result):
    """In a process of its own: sends "" for a pass, else the reason in one line."""
    import torch

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a student's prints
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    try:
        theirs = (directory / exercise.file).read_text(encoding="utf-8")
        ours = (ROOT / exercise.file).read_text(encoding="utf-8")
        check(
            exercise,
            with_function(ours, exercise.function, cut_out(theirs, exercise.function, exercise.file)),
            alone=True,
        )
        reason = ""
    except AssertionError as error:
        reason = str(error).strip().split("\n")[-1] or "AssertionError"
    except BaseException as error:  # SystemExit too
        blank = isinstance(error, NotImplementedError) and str(error).startswith("exercise ")
        reason = "blank" if blank else f"{type(error).__name__}: {error}".strip().split("\n")[0]
    result.send(reason)


def grade_one(directory, exercise, timeout, context):
    """-> (reason, "" for a pass; seconds)"""
    began, (ours, theirs) = time.perf_counter(), context.Pipe(duplex=False)
    process = context.Process(target=worker, args=(directory, exercise, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the worker's end is the only one, and its death is noticed
    try:
        reason = ours.recv() if ours.poll(timeout) else f"no result after {timeout:g} s: an endless loop?"
    except EOFError:
        process.join()
        reason = f"the process ended by itself (exit code {process.exitcode})"
    process.kill()
    process.join()
    return reason, time.perf_counter() - began


def grade(directory, ids, json_file, timeout):
    """Grades each exercise alone: the given project with one function from `directory` in it. -> whether all
    passed
    """
    exercises = ladder()
    unknown = [id for id in ids if not any(matches(e, id) for e in exercises)]
    if unknown:
        raise ValueError(f"no exercise {unknown[0]}; expected some of {', '.join(e.id for e in exercises)}")
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; expected a student's copy")
    for path in {ROOT / e.file for e in exercises}:
        if 'raise NotImplementedError("exercise ' in path.read_text(encoding="utf-8"):
            raise ValueError(
                f"{path} is a student's; grade with the exercises.py of the project that the copy was made from"
            )
    # A forked worker finds torch and the given files imported already; a spawned one (Windows) imports them
    # again.
    context = multiprocessing.get_context(
        "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    )
    import checks  # noqa: F401

    rows, (green, red, plain) = (
        [],
        ("\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("", "", ""),
    )
    for e in exercises:
        if not ids or any(matches(e, id) for id in ids):
            reason, seconds = grade_one(directory, e, timeout, context)
            points, verdict = (0, f"{red}FAIL{plain}") if reason else (e.points, f"{green}PASS{plain}")
            rows.append(
                {
                    **e._asdict(),
                    "passed": not reason,
                    "points": points,
                    "max_points": e.points,
                    "seconds": round(seconds, 3),
                    "reason": reason,
                }
            )
            print(
                f"{verdict}  {e.id:<5}{points:>2}/{e.points:<2} {seconds:6.2f} s  {e.file} {e.function}"
                + f": {reason}" * bool(reason),
                flush=True,
            )
    total = {
        "exercises": len(rows),
        **{
            key: round(sum(row[key] for row in rows), 3)
            for key in ("passed", "points", "max_points", "seconds")
        },
    }
    print(
        f"{total['passed']} of {total['exercises']} exercises, {total['points']} of {total['max_points']} points, {total['seconds']:.1f} s"
    )
    if json_file:
        from support.files import write_atomically

        write_atomically(
            json_file, json.dumps({"directory": str(directory), "total": total, "exercises": rows}, indent=1)
        )
    return total["passed"] == total["exercises"]


def matches(exercise, id):
    return exercise.id == id or exercise.id.startswith(id + ".")


def hint(id):
    """Of the check's docstring; read as text, for importing torch takes seconds."""
    found = functions((ROOT / "classroom" / "checks.py").read_text(encoding="utf-8")).get(
        "check_" + id.replace(".", "_")
    )
    if found is None:
        raise ValueError(f"no exercise {id}; expected one of {', '.join(e.id for e in ladder())}")
    print(" ".join(ast.get_docstring(found[1]).split()))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"exercises.py: {message}; expected list, blank DIR, grade DIR [ID ...] or hint ID")


def main(argv=None):
    """-> exit status: 0, 1 when an exercise failed, 2 for bad input (one line on stderr)"""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    commands.add_parser("blank").add_argument("directory", metavar="DIR", type=Path)
    grader = commands.add_parser("grade")
    grader.add_argument("directory", metavar="DIR", type=Path)
    grader.add_argument(
        "ids", metavar="ID", nargs="*", help="exercises or chapters; all of them if none is named"
    )
    grader.add_argument("--json", metavar="FILE", type=Path, help="the same results for a gradebook")
    grader.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=20.0, help="for each exercise (default: 20)"
    )
    commands.add_parser("hint").add_argument("id", metavar="ID")
    try:
        args = parser.parse_args(argv)
        if args.command == "list":
            print(f"{'id':<6}{'points':<8}{'file':<15}{'function':<26}title")
            for e in ladder():
                print(f"{e.id:<6}{e.points:<8}{e.file:<15}{e.function:<26}{e.title}")
        elif args.command == "blank":
            blank(args.directory)
        elif args.command == "hint":
            hint(args.id)
        elif not grade(args.directory, args.ids, args.json, args.timeout):
            return 1
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
