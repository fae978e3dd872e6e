"""The questions of `wikileads_mc`, built from the articles of wikileads; no network, the same on every machine.

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
LONGEST = {"test": 1200, "validation": 160}
"""Characters of a lead: a question fits the 512 tokens of the embedded models (one article is longer), most of them
also after five solved examples, which are questions of the validation split."""


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
    return {split: Dataset.from_list([dict(each) for each in questions(split)], info=info) for split in LONGEST}


def questions(split: str) -> list[Question]:
    """A question per article that has a description, enough company in its topic and no overlong lead."""
    articles = [article for article in wikileads.articles(split) if article.description]
    return [question for article in articles if (question := _question(article, articles, LONGEST[split]))]


def _question(article: Article, articles: list[Article], longest: int) -> Question | None:
    others = {other.description for other in articles if other.topic == article.topic} - {article.description}
    if len(others) < CHOICES - 1 or len(article.masked_extract) > longest:
        return None
    # Hashes of both titles stand in for random numbers, so that one article more or less moves few questions.
    choices = sorted(others, key=lambda other: title_hash(f"{article.title}|{other}"))[: CHOICES - 1]
    gold = title_hash(f"gold|{article.title}") % CHOICES
    choices.insert(gold, article.description)
    return Question(title=article.title, lead=article.masked_extract, choices=choices, gold=gold)
