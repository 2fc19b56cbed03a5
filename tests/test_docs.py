"""README.md and docs/: each block of code runs or has a reason why not, links lead somewhere, and names exist.

Blocks, by the word after the fence:

- ``bash``: commands of this project, which are called in this process, and ``make``, which is called with --dry-run.
- ``python``: executed; the blocks of a page share their names.
- ``toml``: validated as a configuration. ``json``: parsed.
- ``text``: output, or a listing; not run.

A block that begins with the comment ``# NAME.py`` or ``# NAME.toml`` becomes that file. A block that cannot run has
``<!-- not run: REASON -->`` in the line above it.

A page's blocks run in order in a folder with the repository's configurations and two small texts. There is no network
and no cluster, and training is short: SMALL is appended to commands that train, and ``--corpus.source my-text.txt`` if
they name no text. Pages with a search run among the long tests.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, job

from job.__main__ import VERBS
from job.config.config_file import load_search_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LANGUAGES = {"bash", "python", "toml", "json", "text"}
SMALL = ["--scale.workers", "0", "--train.epochs", "1"]
SMALL_SEARCH = [*SMALL, "--search.trials", "2", "--search.scheduler", "none"]
SETTINGS = {"train": SMALL, "doctor": SMALL, "tune": SMALL_SEARCH}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    code: str
    reason: str  # why it does not run; empty if it does

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str:
        """The file that the block is the content of, or an empty string."""
        match = re.match(r"# (\S+\.(?:py|toml))\n", self.code)
        return match[1] if match else ""


def blocks_of(page: str, text: str) -> list[Block]:
    found, lines = [], text.splitlines()
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        reason = re.fullmatch(r"<!-- not run: (.+) -->", lines[start - 1].strip() if start else "")
        code = "\n".join(lines[start + 1 : end]) + "\n"
        found.append(Block(page, start + 1, lines[start].strip(" `"), code, reason[1] if reason else ""))
    return found


BLOCKS = {name: blocks_of(name, page.read_text()) for name, page in zip(NAMES, PAGES, strict=True)}


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell block: words, without comments, over continued lines."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def job_words(words: list[str]) -> list[str] | None:
    """The arguments of a command of this project, or None for another one."""
    if words[0] == "lanes":
        return words[1:]
    return words[3:] if words[0] in (".venv/bin/python", "python") and words[1:3] == ["-m", "job"] else None


def is_search(block: Block) -> bool:
    return block.language == "bash" and not block.reason and " tune " in block.code


# --- which blocks run -------------------------------------------------------------------------------------------------


def test_blocks_of_text_are_found_with_language_and_reason() -> None:
    text = "a\n```bash\nmake x\n```\n<!-- not run: needs a moon -->\n```bash\nfly\n```\n"
    assert blocks_of("p", text) == [
        Block("p", 2, "bash", "make x\n", ""),
        Block("p", 6, "bash", "fly\n", "needs a moon"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_run_or_have_a_reason(name: str) -> None:
    for block in BLOCKS[name]:
        assert block.language in LANGUAGES, f"{block.place}: the language must be one of {sorted(LANGUAGES)}"
        if block.language == "bash":
            subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
            runs = all(words[0] == "make" or job_words(words) is not None for words in commands(block.code))
            assert runs or block.reason, f"{block.place}: no test can run it, so it needs <!-- not run: REASON -->"


@pytest.mark.parametrize("name", NAMES)
def test_files_named_in_blocks_exist(name: str) -> None:
    for block in BLOCKS[name]:
        paths = re.findall(r"(?<![\w./])((?:clusters|configs|docker)/[\w./-]+|cluster\.yaml)", block.code)
        assert not [path for path in paths if not (ROOT / path).exists()], block.place


# --- they run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations, two texts, and the trained run that most pages use: ``runs/seed-1``."""
    folder = tmp_path_factory.mktemp("documentation")
    shutil.copytree(ROOT / "configs", folder / "configs")
    sentence = "the time traveller came back once upon a time with his machine of light and ivory "
    (folder / "my-text.txt").write_text(sentence * 60)
    (folder / "other-text.txt").write_text(sentence * 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = job("train", "configs/seed.toml", *small_settings(["train"]), "--run.name", "seed-1")
    assert ended.status == 0, ended.err
    return folder


def small_settings(words: list[str]) -> list[str]:
    """Flags that let a command run without a cluster and a network, and in a short time."""
    if words[0] not in SETTINGS:
        return []
    corpus = [] if "--corpus.source" in words else ["--corpus.source", "my-text.txt"]
    return [*SETTINGS[words[0]], *corpus]


def run_command(words: list[str], place: str) -> None:
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", "--directory", ROOT, *words[1:]], check=True, stdout=subprocess.DEVNULL)
        return
    arguments = job_words(words)
    assert arguments is not None
    if "--help" in arguments:
        arguments = arguments[: arguments.index("--help") + 1]
        settings = []
    else:
        settings = small_settings(arguments)
    ended = job(*arguments, *settings)
    assert ended.status == 0, f"{place}: {shlex.join(words)}\n{ended.out}{ended.err}"


def test_command_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=r"no-file\.toml"):
        run_command([".venv/bin/python", "-m", "job", "train", "no-file.toml"], "README.md:1")
    with pytest.raises(subprocess.CalledProcessError):
        run_command(["make", "no-target"], "README.md:1")


def run_block(block: Block, names: dict[str, object]) -> None:
    if block.file:
        Path(block.file).write_text(block.code)
    match block.language:
        case "bash":
            for words in commands(block.code):
                run_command(words, block.place)
        case "python":
            exec(compile(block.code, block.place, "exec"), names)  # of this repository, as a reader would run it
        case "toml":
            path = Path(block.file or "block.toml")
            path.write_text(block.code)
            load_search_config(str(path), {})
        case "json":
            json.loads(block.code)


def run_page(name: str, folder: Path, work: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, work, dirs_exist_ok=True)
    patch.chdir(work)
    patch.syspath_prepend(work)
    modules = set(sys.modules)
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        for block in BLOCKS[name]:
            if not block.reason:
                run_block(block, names)
    finally:
        for module in set(sys.modules) - modules:
            if (work / f"{module}.py").exists():
                del sys.modules[module]


def pages(*, with_search: bool) -> list[str]:
    """The pages that have blocks to run, with or without a search among them."""
    running = {name: [block for block in blocks if not block.reason] for name, blocks in BLOCKS.items()}
    return [name for name, blocks in running.items() if blocks and any(map(is_search, blocks)) == with_search]


@pytest.mark.slow
@pytest.mark.parametrize("name", pages(with_search=False))
def test_blocks_of_page_run(name: str, example_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(name, example_folder, tmp_path, monkeypatch)


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.usefixtures("on_cluster")
@pytest.mark.parametrize("name", pages(with_search=True))
def test_blocks_of_page_with_search_run(
    name: str, example_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(name, example_folder, tmp_path, monkeypatch)


# --- links and names --------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text() if path else text)):
            broken.append(link)
    return broken


def test_broken_link_is_found() -> None:
    text = "# One two\n[a](#one-two) [b](LICENSE) [c](#three) [d](no-file.md) [e](https://example.com)\n"
    assert broken_links(ROOT / "README.md", text) == ["#three", "no-file.md"]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_page_lead_to_files_and_headings(name: str) -> None:
    """mkdocs checks those of docs/."""
    assert not broken_links(ROOT / name, (ROOT / name).read_text())


def build_pages(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Builds the pages of the mkdocs.yml in a folder with the options of ``make docs``."""
    recipe = re.search(r"bin/mkdocs (build.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    command = [str(Path(sys.executable).parent / "mkdocs"), *shlex.split(recipe[1]), "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_make_docs_builds_all_pages(tmp_path: Path) -> None:
    ended = build_pages(ROOT, tmp_path)
    assert ended.returncode == 0, ended.stderr
    built = {path.relative_to(tmp_path).with_suffix(".md").as_posix() for path in tmp_path.rglob("*.html")}
    assert built - {"404.md"} == {name.removeprefix("docs/") for name in NAMES if name.startswith("docs/")}


@pytest.mark.slow
def test_make_docs_with_a_broken_link_fails(tmp_path: Path) -> None:
    (tmp_path / "mkdocs.yml").write_text("site_name: broken\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[a page](absent.md)\n")
    ended = build_pages(tmp_path, tmp_path / "site")
    assert ended.returncode and "absent.md" in ended.stderr


@pytest.mark.parametrize("name", ["README.md", "docs/command-line.md"])
def test_table_of_commands_has_every_verb(name: str) -> None:
    rows = re.findall(r"^\| `(?:python -m job )?(\w+)[ `]", (ROOT / name).read_text(), re.MULTILINE)
    assert set(VERBS) <= set(rows)


def documented_names() -> set[str]:
    texts = [page.read_text() for page in PAGES]
    return {name for text in texts for name in re.findall(r"`(job(?:\.\w+)+)(?:\(\))?`", text)}


def resolve(name: str) -> object:
    """The module, class or function of a dotted name; raises AttributeError if there is none."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            found: object = importlib.import_module(".".join(words[:length]))
        except ModuleNotFoundError:
            continue
        for word in words[length:]:
            found = getattr(found, word)
        return found
    raise AttributeError(name)


def test_names_in_documentation_exist() -> None:
    with pytest.raises(AttributeError):
        resolve("job.training.loop.no_such_function")
    names = documented_names()
    assert len(names) > 20
    for name in names:
        resolve(name)


def test_module_list_of_architecture_is_complete_with_docstrings() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = re.search(r"```text\njob/\n(.*?)```", text, re.DOTALL)
    assert tree
    listed, folder = {}, ""
    for line in tree[1].splitlines():
        if match := re.match(r"  (\w+)/ ", line):
            folder = f"{match[1]}/"
        elif match := re.match(r"( +)([\w.]+) +(.+)", line):
            listed[f"{folder if len(match[1]) == 4 else ''}{match[2]}"] = match[3]
    modules = {path.relative_to(ROOT / "job").as_posix(): path for path in (ROOT / "job").rglob("*.py")}
    for name, path in modules.items():
        if path.name != "__init__.py":
            docstring = re.match(r'"""(.+?)(?:"""|\n\n)', path.read_text(), re.DOTALL)
            first = " ".join(docstring[1].split()) if docstring else ""
            assert name in listed and re.match(re.escape(listed[name]) + r"(\.|$)", first), f"{name}: {first}"
    assert not [name for name in listed if not (ROOT / "job" / name).exists()]


def test_built_pages_need_no_network() -> None:
    """No page loads a font, a script or a picture from another host."""
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings and not re.search(r"https?://|mermaid|analytics", settings)
    for page in PAGES:
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(?:script|link|iframe|img)\b", page.read_text()), page
