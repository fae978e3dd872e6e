"""The questions of `wikileads_mc`, built from the test articles of wikileads; no network, the same on every machine.

    python run_all.py --models tiny-llama --tasks wikileads_mc

lm-eval calls `dataset` as it reads the YAML file beside this one.
"""

from typing import TYPE_CHECKING, TypedDict

from benchmarks import data
from benchmarks.embedded import wikileads
from benchmarks.embedded.wikileads import Article, title_hash

if TYPE_CHECKING:
    from datasets import Dataset

CHOICES = 4
LONGEST = 1200
"""Characters of a lead: with them a question fits the 512 tokens of the embedded models. One article is longer."""


class Question(TypedDict):
    """One document as lm-eval sees it."""

    title: str
    lead: str
    choices: list[str]
    gold: int
    """Which choice is right."""


def dataset(**metadata: object) -> "dict[str, Dataset]":
    """What the YAML file's `custom_dataset` asks for; `metadata` (its version) is not needed."""
    from datasets import Dataset, DatasetInfo

    info = DatasetInfo(version=data.load("wikileads", "test").revision)
    return {"test": Dataset.from_list([dict(question) for question in questions()], info=info)}


def questions() -> list[Question]:
    """A question per test article that has a description, enough company in its topic and no overlong lead."""
    articles = [article for article in wikileads.articles("test") if article.description]
    return [question for article in articles if (question := _question(article, articles))]


def _question(article: Article, articles: list[Article]) -> Question | None:
    others = {other.description for other in articles if other.topic == article.topic} - {article.description}
    if len(others) < CHOICES - 1 or len(article.masked_extract) > LONGEST:
        return None
    # Hashes of both titles stand in for random numbers, so that one article more or less moves few questions.
    choices = sorted(others, key=lambda other: title_hash(f"{article.title}|{other}"))[: CHOICES - 1]
    gold = title_hash(f"gold|{article.title}") % CHOICES
    choices.insert(gold, article.description)
    return Question(title=article.title, lead=article.masked_extract, choices=choices, gold=gold)
