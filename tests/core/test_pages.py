"""README and docs lead where they say, and their commands take what is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")])
CHINESE = [page for page in PAGES if page.name.endswith(".zh.md")]
ISSUES = ("../../issues", "../../../issues")  # of the repository, as GitHub resolves it


def name_of(path) -> str:
    return str(path.relative_to(ROOT))


def links(page: Path) -> list[str]:
    """Addresses of its links and pictures that are no URLs."""
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", page.read_text("utf-8"))
    return [address for address in found if not address.startswith("https://")]


def anchors(page: Path) -> set[str]:
    """What its headings are called in an address, by GitHub's rule."""
    names = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        names.add(words.replace(" ", "-"))
    return names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for address in links(page):
        if address in ISSUES:
            continue
        file, _, anchor = address.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), address
        if anchor:
            assert anchor in anchors(target), address


def commands(page: Path) -> list[str]:
    """Its lines that start a tool, each in one piece."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", "").splitlines()
    return [line.partition(" # ")[0] for line in lines if re.search(r"tools[/\\]\w+\.py", line)]


WRITTEN = sorted({command.rstrip() for page in PAGES for command in commands(page)})


def test_pages_name_commands():
    assert len(WRITTEN) > 15


@pytest.mark.parametrize("command", WRITTEN)
def test_a_written_command_has_its_options(command):
    """Of those that `tools/run.py` starts, the options before the name."""
    program, words = re.search(r"tools[/\\](\w+\.py)(.*)", command).groups()
    options = re.findall(r" (--[\w-]+)", words)
    subcommand = re.match(r" ([a-z]\w+) ", words) if program == "prepare_data.py" else None
    if program == "run.py":
        options = []
    chosen = [subcommand[1]] if subcommand else []
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / program, *chosen, "--help"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for option in options:
        if program == "test.py" and option == "--lf":
            continue  # pytest's
        assert re.search(rf"{option}\b", run.stdout), f"{program} has no {option}"


def test_who_publishes_is_left_open_in_one_place_of_each_readme():
    for page in PAGES:
        text = page.read_text("utf-8")
        if page.name.startswith("README"):
            assert re.findall(r"`[^`]*OWNER[^`]*`", text) == [
                "`git clone https://github.com/OWNER/cat-diffusion`"
            ]
        if page.name != "publishing.md":
            assert text.count("OWNER") == page.name.startswith("README"), page


# In Chinese ---------------------------------------------------------------------------------------


def blocks(page: Path) -> list[str]:
    """What one copies from it, without the comments."""
    text = page.read_text("utf-8")
    lines = "".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S)).splitlines()
    return [line.partition(" # ")[0].rstrip() for line in lines]


def quoted(page: Path) -> list[str]:
    """Its commands, messages and names of files within sentences, in order of the alphabet."""
    text = re.sub(r"^```\n.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    return sorted(" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text))


def depths(page: Path) -> list[int]:
    """How deep each heading is."""
    return [len(marks) for marks in re.findall(r"^(#+) ", page.read_text("utf-8"), re.M)]


def rows(page: Path) -> list[int]:
    """The cells of each row of its tables."""
    return [line.count("|") for line in page.read_text("utf-8").splitlines() if line[:1] == "|"]


def test_pages_exist_in_chinese():
    assert {page.name for page in CHINESE} >= {"README.zh.md", "how-it-works.zh.md"}


@pytest.mark.parametrize("page", CHINESE, ids=name_of)
def test_a_chinese_page_is_in_step_with_the_english_one(page):
    english = page.with_name(page.name.replace(".zh.md", ".md"))
    assert depths(page) == depths(english)
    assert rows(page) == rows(english)
    assert blocks(page) == blocks(english)
    assert quoted(page) == quoted(english)

    def targets(of: Path) -> list[str]:
        # Each leads to the other, and to pages in its own language where there are any.
        files = [address.partition("#")[0].replace(".zh.", ".") for address in links(of)]
        return sorted(files)

    assert targets(page) == targets(english)


@pytest.mark.parametrize("parameters, row", [(324_872_192, "325 M"), (50_377_280, "50 M")])
def test_sizes_are_those_of_the_parameters(parameters, row):
    page = (ROOT / "docs/using.md").read_text("utf-8")
    (line,) = re.findall(rf"^.*{row} parameters.*$", page, re.M)
    sizes = re.findall(r"([\d.]+) GB", line)
    assert float(sizes[0]) == pytest.approx(parameters * 4 / 1e9, abs=0.05)
    assert float(sizes[1]) == pytest.approx(parameters * 2 / 1e9, abs=0.05)
