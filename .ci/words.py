"""Prints where the project says what .ci/words.txt replaces, and exits with 1 if it does anywhere.

    python .ci/words.py [FILE ...]

Without arguments it reads all tracked text files.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUFFIXES = {".c", ".h", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ""}
EXCLUDED = (".ci/words", "tests/test_suite.py", "LICENSE", "constraints.txt", "tests/golden/", "tests/reference/")


def patterns() -> dict[re.Pattern[str], str]:
    """The replacement by pattern; letters delimit a pattern, so that it also matches inside ``snake_case``."""
    lines = (ROOT / ".ci" / "words.txt").read_text().splitlines()
    entries = [line.split(" -> ") for line in lines if line and not line.startswith("#")]
    return {
        re.compile(rf"(?<![A-Za-z])(?:{word})(?![A-Za-z])", 0 if re.search("[A-Z]", word) else re.IGNORECASE): use
        for word, use in entries
    }


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listing.stdout.splitlines() if not name.startswith(EXCLUDED)]
    return [ROOT / name for name in names if Path(name).suffix in SUFFIXES and (ROOT / name).is_file()]


def findings(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{number}: {match[0]!r}; use: {use}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for pattern, use in PATTERNS.items()
        for match in pattern.finditer(line)
    ]


PATTERNS = patterns()
if __name__ == "__main__":
    problems = [finding for path in map(Path, sys.argv[1:] or tracked_files()) for finding in findings(path)]
    print(*problems, sep="\n")
    sys.exit(1 if problems else 0)
