"""Files: the one error type for bad input, JSON and JSON lines with line numbers, atomic writes."""

import contextlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file


class BadInput(ValueError):
    """A file, row or flag that cannot be used; the message is one line that names it."""


def require(ok, message):
    """Raises BadInput with `message` unless `ok`."""
    if not ok:
        raise BadInput(message)


def read_json(path, raw):
    """The JSON object in `raw` (text or bytes) of the file `path`; BadInput if it is none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, found {str(value)[:40]!r}")
    return value


def read_jsonl(path):
    """Yields (line number from 1, object) of a UTF-8 file, one object a line.

    Lines end at a newline only: real data holds U+2028, at which str.splitlines() would cut. Blank lines are
    skipped.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise BadInput(f"{path}: is a directory or a device; --data names a JSON lines file")
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                with at_line(path, number):
                    row = read_line(line)
                yield number, row
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror}); --data names a JSON lines file") from None


def read_line(line):
    """The JSON object in one line (bytes); BadInput if it is none."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=without_doubles)
    except BadInput:
        raise
    except json.JSONDecodeError as e:
        array = "; the beginning of an array?" if line.lstrip().startswith(b"[") else ""
        says = f"not valid JSON in UTF-8 ({e.msg}, column {e.colno}){array}"
        raise BadInput(f"{says}; expected one object a line") from None
    except (ValueError, RecursionError) as e:
        raise BadInput(f"not valid JSON in UTF-8 ({e})") from None
    require(isinstance(row, dict), f"found {type(row).__name__}, expected a JSON object")
    return row


def without_doubles(pairs):
    """The dict of a JSON object's pairs; BadInput for a duplicate key, whose first value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise BadInput(f"the key {double!r} is there twice; expected each key once")
    return found


@contextlib.contextmanager
def at_line(source, number):
    """Prefixes a BadInput raised inside with the name of its file and its line; too deep a row is one."""
    try:
        yield
    except BadInput as e:
        raise BadInput(f"{source}, line {number}: {e}") from None
    except RecursionError:
        nested = "lists or objects in hundreds of others, which cannot be read; expected fewer"
        raise BadInput(f"{source}, line {number}: {nested}") from None


def flush(path):
    """Flushes a file, or the names in a directory, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_atomically(path, content):
    """Writes a file under a temporary name, flushes it to disk and renames it: a file that exists is whole.

    content   text, or {name: tensor} for a safetensors file; half an emoji, which is no UTF-8, is written as
              JSON's escape of it
    Raises OSError, and leaves the previous file in place, when the disk is full or cannot be written to.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
        else:
            save_file(content, temporary, metadata={"format": "pt"})
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, SafetensorError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"{path}: {getattr(e, 'strerror', None) or e}") from None
