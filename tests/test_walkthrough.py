"""The walk-through runs from top to bottom in less than a minute, and its comments agree with its output."""

import re
import resource
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parent.parent / "classroom" / "walkthrough.py"


def numbers(pattern, text):
    return [float(x) for x in re.search(pattern, text).groups()]


def test_walkthrough():
    cells = re.findall(r"^# %%", FILE.read_text(encoding="utf-8"), re.M)
    assert 20 <= len(cells) <= 30
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ran = subprocess.run([sys.executable, FILE], capture_output=True, text=True)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    out = ran.stdout
    assert re.findall(r"^(\d+)\. ", out, re.M) == [str(i) for i in range(1, len(cells))]
    assert "means (4,) -> loss 2.1269" in out  # log(1 + e^2)
    largest, difference = numbers(r"largest gradient (\S+), largest difference (\S+)", out)
    assert difference < 1e-5 * largest
    accuracy, auc = numbers(r"pair accuracy (\S+), AUC of the first wrong token (\S+)", out)
    assert accuracy > 0.75 and auc > 0.6
    assert re.search(r"Z_std  mean [+-]0\.000  std 1\.000 .* all 0$", out, re.M)
    up, down = numbers(r"where A > 0: (\S+), where A < 0: (\S+)", out)
    assert up > 0 > down
    v, w = numbers(r"read at s_t (\S+) with .*, (\S+) with", out)
    z, y = numbers(r"Z\(s_t, a_t\) +(\S+) with .*, (\S+) with", out)
    assert v == w and z != y
    assert numbers(r"ratio of \d+ tokens: from (\S+) to (\S+);", out) == [1.0, 1.0]
    difference, largest = numbers(r"two gradients: (\S+) \(their largest entry: (\S+)\)", out)
    assert difference < 1e-5 * largest
    low, high = numbers(r"ratio now: from (\S+) to (\S+),", out)
    assert low < 0.8 and high > 1.2
