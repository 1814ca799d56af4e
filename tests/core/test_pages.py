"""README and docs lead where they say, and their commands take what is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
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


WRITTEN = [command for page in PAGES for command in commands(page)]


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


def test_who_publishes_is_left_open_in_one_line_of_the_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.findall(r".*OWNER.*", readme) == [
        "- **git**: `git clone https://github.com/OWNER/cat-diffusion` in `ComfyUI/custom_nodes`, "
        "and restart."
    ]
    assert "github.com/OWNER" not in (ROOT / "docs/using.md").read_text("utf-8")


@pytest.mark.parametrize("parameters, row", [(324_872_192, "325 M"), (50_377_280, "50 M")])
def test_sizes_are_those_of_the_parameters(parameters, row):
    page = (ROOT / "docs/using.md").read_text("utf-8")
    (line,) = re.findall(rf"^.*{row} parameters.*$", page, re.M)
    sizes = re.findall(r"([\d.]+) GB", line)
    assert float(sizes[0]) == pytest.approx(parameters * 4 / 1e9, abs=0.05)
    assert float(sizes[1]) == pytest.approx(parameters * 2 / 1e9, abs=0.05)
