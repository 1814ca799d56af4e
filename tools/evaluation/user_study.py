"""The page of a user study, and the table of its ratings; tools/evaluate.py's work."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.evaluation import study
from cat_diffusion.cat_core.evaluation.metrics import EvaluationError, Missing
from cat_diffusion.cat_core.evaluation.results import Results

from .comparison import sample_set, write


def command(arguments) -> int:
    """Make the page or the table; returns the exit code."""
    try:
        if arguments.ratings:
            show_ratings(arguments)
        else:
            make_study(arguments)
    except CatError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def make_study(arguments) -> None:
    """Write the page and its key beside it."""
    folders = [Results.open(folder) for folder in arguments.results]
    names = [results.name(folders) for results in folders]
    samples, notes = sample_set(arguments, folders).read().of_all(folders, arguments.common)
    key = study.make_key(samples, names, arguments.pictures, arguments.seed)
    page = arguments.study
    if page.suffix.lower() not in (".html", ".htm"):
        raise EvaluationError(f"--study is {page}, expected a name such as study.html.")
    write(key_of(page), key.text())
    write(page, study.study_page(key, samples, folders))
    print(*notes, f"Study {key.study}: {page}", sep="\n")
    print(f"Key, which raters must not see: {key_of(page)}")


def show_ratings(arguments) -> None:
    """Print the table of ratings, and write it where --json says."""
    if arguments.key is None:
        raise EvaluationError("--ratings needs --key, the file that --study wrote beside the page.")
    key = study.StudyKey.read(arguments.key)
    ratings = study.read_ratings(key, arguments.ratings)
    lines = study.study_lines(key, ratings, arguments.resamples, arguments.seed)
    alphas = {}
    try:
        alphas = study.agreement(ratings)
    except Missing as error:
        print(f"Agreement is left out: {error}")
    for question, alpha in alphas.items():
        if alpha is None:
            print(
                f"Agreement on {question} is left out: it needs two raters of one picture, and "
                "ratings that differ."
            )
    print(study.study_table(lines, alphas))
    if arguments.json:
        found = {"study": key.study, "lines": list(map(asdict, lines)), "alpha": alphas}
        write(arguments.json, json.dumps(found, indent=1) + "\n")


def key_of(page: Path) -> Path:
    """The key's file of a study's page."""
    return page.with_suffix(".key.json")
