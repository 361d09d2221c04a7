"""How the house is built: who imports whom, and what a reader is promised of every function."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD = ("data", "model", "parallel", "ppo", "qrm", "reinforce", "train")
SUPPORT = (
    "chats",
    "checkpoints",
    "claims",
    "compare",
    "evaluate",
    "expressions",
    "files",
    "graders",
    "judge",
    "loading",
    "meanings",
    "rewards",
    "row",
    "row_keys",
    "row_labels",
    "row_messages",
    "row_notes",
    "rows",
    "sampling",
    "settings",
    "steps",
    "surroundings",
    "tokenizers",
    "unread",
)
ARROWS = {  # a file -> what of ours it may import
    "support.files": (),
    "support.chats": (),
    "support.tokenizers": ("support.chats", "support.files"),
    "support.expressions": ("support.files",),
    "support.meanings": ("support.expressions",),
    "support.surroundings": ("support.meanings",),
    "support.claims": ("support.surroundings", "support.meanings", "support.expressions"),
    "support.graders": ("support.surroundings", "support.meanings", "support.claims", "support.files"),
    "parallel": ("support.files",),
    "model": ("parallel", "support.files"),
    "support.row_keys": ("support.files",),
    "support.row_labels": (
        "support.files",
        "support.row_keys",
        "support.surroundings",
        "support.meanings",
        "support.claims",
        "support.graders",
    ),
    "support.row_messages": ("support.files", "support.row_keys", "support.tokenizers"),
    "support.row": (
        "support.files",
        "support.graders",
        "support.row_keys",
        "support.row_labels",
        "support.row_messages",
    ),
    "support.row_notes": (
        "support.claims",
        "support.meanings",
        "support.row_keys",
        "support.row_labels",
        "support.row_messages",
        "support.tokenizers",
    ),
    "support.rows": (
        "support.files",
        "support.row",
        "support.row_keys",
        "support.row_messages",
        "support.row_notes",
    ),
    "data": (
        "support.files",
        "support.tokenizers",
        "support.row_labels",
        "support.row_messages",
        "support.rows",
    ),
    "qrm": ("model",),
    "support.sampling": ("model", "parallel", "support.files"),
    "reinforce": ("data", "model", "parallel", "support.sampling", "support.files"),
    "ppo": ("model", "parallel", "reinforce"),
}
FILES = [*(ROOT / f"{name}.py" for name in METHOD), *(ROOT / "support" / f"{name}.py" for name in SUPPORT)]


def imports(path):
    """Names of our modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "support":
            found |= {f"support.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in (*METHOD, "support", "classroom")}


def depth(node):
    """Nesting of blocks within a function: 1 for a loop in its body, 2 for a branch in that loop."""
    deepest = 0
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            continue
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, depth(child) + (isinstance(child, blocks) and not chained))
    return deepest


def functions(path):
    """Every function of a file, with those of its classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_the_top_level_holds_the_seven_files():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(METHOD)
    assert sorted(path.stem for path in (ROOT / "support").glob("*.py")) == sorted(SUPPORT)


@pytest.mark.parametrize("name", ARROWS)
def test_imports_follow_the_arrows(name):
    path = ROOT / (name.replace(".", "/") + ".py")
    assert imports(path) <= set(ARROWS[name])


def test_nothing_imports_the_course_or_train():
    for path in FILES:
        assert not [name for name in imports(path) if name.startswith("classroom") or name == "train"], path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_functions_fit_a_screen(path):
    for node in functions(path):
        arguments = [a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls", "ctx")]
        about = f"{path.name}: {node.name}"
        assert node.end_lineno - node.lineno < 60, about
        assert len(arguments) <= 9, about
        assert depth(node) <= 4, about


def test_the_loop_is_in_plain_sight():
    """A stranger finds the loop of stage_rm within the first 150 lines of train.py."""
    stage = next(node for node in functions(ROOT / "train.py") if node.name == "stage_rm")
    loops = [node for node in ast.walk(stage) if isinstance(node, ast.For)]
    assert stage.end_lineno <= 150 and len(loops) == 2
    assert not [
        node
        for node in ast.walk(stage)
        if isinstance(node, (ast.Lambda, ast.FunctionDef)) and node is not stage
    ]
