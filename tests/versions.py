"""The suite over versions of torch and Python, each in a fresh environment that `uv` makes.

    python tests/versions.py 2.13.0:3.11 2.13.0:3.13 2.14.1:3.11 --write -- -n 2

Each argument is TORCH:PYTHON, a version or a path for the latter; what follows `--` goes to pytest
after what it is given anyway. `--write` brings the README's table up to date, a row for each
environment, and is meant for whole runs.
The tests that train examples and open a browser are left out: no torch decides about them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LEFT_OUT = ("tests/examples", "tests/report/test_report_browser.py")
PRINT = "import platform, torch; print(torch.__version__, platform.python_version())"
_TABLE = re.compile(r"(<!-- versions: [^\n]*-->\n)(.*?)(<!-- /versions -->)", re.DOTALL)
_HEADER = "| torch | Python | passed | failed | skipped | on |\n|---|---|---|---|---|---|\n"

Row = tuple[str, str, int, int, int, str]
"""torch, Python, tests that passed, failed and were skipped, the day."""


def environment(torch: str, python: str) -> list[str]:
    """The command that runs what follows it in the environment."""
    return [
        *("uv", "run", "--quiet", "--isolated", "--no-project", "--python", python),
        *("--with", f"torch=={torch}", "--with", "pytest-xdist"),
        *("--with-editable", f"{ROOT}[test]", "--", "python"),
    ]


def run(torch: str, python: str, arguments: list[str]) -> Row:
    """Run the suite in one environment."""
    python_of = environment(torch, python)
    versions = subprocess.run([*python_of, "-c", PRINT], check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        ignored = [f"--ignore={path}" for path in LEFT_OUT]
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([*python_of, *pytest, *ignored, *arguments], cwd=ROOT, check=False)
        return row(*versions.stdout.split(), report.read_text())


def row(torch: str, python: str, junit: str) -> Row:
    """What a report of pytest's comes to."""
    suite = ElementTree.fromstring(junit).find("testsuite")
    assert suite is not None
    total, bad, skipped = (
        sum(int(suite.attrib[name]) for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    minor = ".".join(python.split(".")[:2])
    passed = total - bad - skipped
    return torch.partition("+")[0], minor, passed, bad, skipped, date.today().isoformat()


def updated(readme: str, rows: list[Row]) -> str:
    """The README with these rows in its table, in the place of older ones, the newest on top."""
    found = _TABLE.search(readme)
    assert found is not None
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in found[2].splitlines()[2:]]
    table = {(line[0], line[1]): line for line in lines}
    table |= {(r[0], r[1]): [str(cell) for cell in r] for r in rows}
    ordered = sorted(table, key=lambda key: [_numbers(part) for part in key], reverse=True)
    body = "".join(f"| {' | '.join(table[key])} |\n" for key in ordered)
    return readme[: found.end(1)] + _HEADER + body + readme[found.start(3) :]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def main() -> bool:
    """Run what the command line asks for; something failed."""
    parser = argparse.ArgumentParser(description="The suite over versions of torch and Python.")
    parser.add_argument("environments", nargs="+", metavar="TORCH:PYTHON")
    parser.add_argument("--write", action="store_true", help="the rows into the README's table")
    own, arguments = sys.argv[1:], []
    if "--" in own:
        own, arguments = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    rows = []
    for text in options.environments:
        torch, _, python = text.partition(":")
        rows.append(run(torch, python, arguments))
        print(*rows[-1], flush=True)
    if options.write:
        README.write_text(updated(README.read_text(), rows))
    return any(row[3] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
