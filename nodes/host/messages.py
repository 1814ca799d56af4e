"""What the user reads on a node: sentences, errors and progress."""

import json
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...cat_core.errors import CatError
from . import symbols

log = logging.getLogger(__name__)

LOCALES = Path(__file__).resolve().parents[2] / "locales"


@dataclass(frozen=True)
class Sentence:
    """A sentence in English, and what is filled in: {name} in the template is values["name"]."""

    template: str
    values: Mapping[str, object]

    def in_language(self, locale: str) -> str:
        """In that language, where locales/LANGUAGE/sentences.json has it."""
        template = _translations(locale.partition("-")[0]).get(self.template, self.template)
        return template.format_map(self.values)


def sentence(template: str, **values: object) -> Sentence:
    """A sentence to say; the template is looked up in the translations."""
    return Sentence(template, values)


def say(*sentences: Sentence) -> None:
    """Show sentences on the node that is running, together, and in the log in English.

    On the node each call takes the place of the one before.
    """
    if not sentences:
        return
    log.info("CAT-Diffusion: %s", " ".join(each.in_language("en") for each in sentences))
    locale = symbols.locale_of_user()
    gap = "" if locale.startswith("zh") else " "
    symbols.show_on_node(gap.join(each.in_language(locale) for each in sentences))


def language() -> str:
    """The language of the user's canvas, such as "en" or "zh"."""
    return symbols.locale_of_user().partition("-")[0]


@lru_cache
def _translations(language: str) -> dict[str, str]:
    """English template -> the same in another language; empty where there are none."""
    if not language.isalpha():  # it names a folder
        return {}
    path = LOCALES / language / "sentences.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


@contextmanager
def plain_errors():
    """Raise the core's errors as ValueError.

    The host puts the module path of other classes before the sentence: execution.py:630
    (full_type_name).
    """
    try:
        yield
    except CatError as error:
        raise ValueError(str(error)) from error


def progress_bar(total: int):
    """The bar on the node that is running."""
    return symbols.progress_bar(total)
