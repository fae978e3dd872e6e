"""The embedded text and its multiple-choice task: honest splits, and the same questions on every machine."""

import json
from collections import Counter
from hashlib import sha256

import pytest

from benchmarks.assets import AssetMissing
from benchmarks.embedded import wikileads
from benchmarks.task_definitions.wikileads_mc import CHOICES, dataset, questions

try:
    next(wikileads.articles("test"))
except AssetMissing as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def asked():
    return questions("test")


def test_no_article_is_in_two_splits():
    titles = [article.title for split in wikileads.SPLITS for article in wikileads.articles(split)]
    assert len(titles) == len(set(titles)) == 10_033


def test_questions_come_from_the_test_split(asked):
    titles = {article.title for article in wikileads.articles("test")}
    assert {question["title"] for question in asked} <= titles
    assert len(asked) == 489


def test_choices_are_four_different_descriptions_of_one_topic(asked):
    articles = {article.title: article for article in wikileads.articles("test")}
    topics = {(article.description, article.topic) for article in articles.values()}
    for question in asked:
        article = articles[question["title"]]
        assert question["choices"][question["gold"]] == article.description
        assert len(set(question["choices"])) == CHOICES
        assert all((choice, article.topic) in topics for choice in question["choices"])


def test_the_title_is_masked(asked):
    assert not [q["title"] for q in asked if q["title"].lower() in q["lead"].lower()]


def test_the_right_answer_is_as_often_in_every_place(asked):
    places = Counter(question["gold"] for question in asked)
    assert set(places) == set(range(CHOICES))
    assert min(places.values()) > 0.8 * len(asked) / CHOICES


def test_questions_are_the_same_on_every_machine(asked):
    assert sha256(json.dumps(asked).encode()).hexdigest()[:16] == "6c7fd31cbf970a20"


def test_the_data_set_knows_its_version():
    rows = dataset(version=1.0)["test"]
    assert str(rows.info.version) == "0.0.7"
    assert rows.column_names == ["title", "lead", "choices", "gold"]


def test_solved_examples_are_short_and_from_the_validation_articles(asked):
    found = questions("validation")
    titles = {article.title for article in wikileads.articles("validation")}
    assert {question["title"] for question in found} <= titles and len(found) >= 15
    assert max(len(question["lead"]) for question in found) <= 160
    assert not {question["title"] for question in found} & {question["title"] for question in asked}
