"""What the README says of the code is there: links to functions, files and figures, flags, tests.

python tests/test_readme.py        moves every link to the line where its function stands now
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LINK = re.compile(r"\[`(\w+)\.([\w.]+)`\]\((\w+)\.py#L(\d+)\)")


def places(file):
    """{"name" or "Class.name": line of its def or class} of a source file"""
    found = {}
    for node in ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno
            found |= {
                f"{node.name}.{m.name}": m.lineno
                for m in getattr(node, "body", [])
                if isinstance(m, ast.FunctionDef)
            }
    return found


def test_every_link_points_at_the_function_it_names():
    links = LINK.findall(README.read_text(encoding="utf-8"))
    assert len(links) > 40 and all(file == target for file, _, target, _ in links)
    wrong = [
        f"{file}.{name}: L{line}, is at L{places(file).get(name)}"
        for file, name, _, line in links
        if places(file).get(name) != int(line)
    ]
    assert not wrong, f"python {Path(__file__).name} moves them: {wrong}"


def test_no_link_is_left_out():
    """Every link to a source line names its function; every other link in the repository points at a file."""
    text = README.read_text(encoding="utf-8")
    assert text.count(".py#L") == len(LINK.findall(text))
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_flags_named_in_the_readme_exist():
    sys.path.insert(0, str(ROOT))
    from support import settings

    text = README.read_text(encoding="utf-8")
    known = {*settings.FIELDS, "help"}
    for script in (ROOT / "classroom").glob("*.py"):
        known |= set(re.findall(r'"--([\w-]+)"', script.read_text(encoding="utf-8")))
    known |= {"nproc_per_node", "standalone", "slow", "local"}  # torchrun's, pytest's, --local-dir of hf
    assert not set(re.findall(r"(?<![\w-])--(\w+)", text)) - known


def test_tests_named_in_the_readme_exist():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    missing = [
        name
        for name in re.findall(r"`(test_\w+)`", README.read_text(encoding="utf-8"))
        if f"def {name}(" not in tests and not (ROOT / "tests" / f"{name}.py").exists()
    ]
    assert not missing


def test_the_file_table_counts_lines():
    for name, lines in re.findall(
        r"^\| `(\w+\.py)` \| .* \| (\d+) \|$", README.read_text(encoding="utf-8"), re.M
    ):
        assert len((ROOT / name).read_text(encoding="utf-8").split("\n")) - 1 == int(lines), name


def move_links():
    text = README.read_text(encoding="utf-8")
    text = LINK.sub(lambda m: f"[`{m[1]}.{m[2]}`]({m[3]}.py#L{places(m[3])[m[2]]})", text)
    count = lambda m: (
        f"| `{m[1]}` | {m[2]} | {len((ROOT / m[1]).read_text(encoding='utf-8').split(chr(10))) - 1} |"
    )
    README.write_text(
        re.sub(r"^\| `(\w+\.py)` \| (.*) \| \d+ \|$", count, text, flags=re.M), encoding="utf-8"
    )


if __name__ == "__main__":
    move_links()
