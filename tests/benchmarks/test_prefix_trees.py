"""What prompts share: every prompt can be read off the trees, and no token stands there twice without need."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import prefix_trees
from benchmarks.prefix_trees import Group, Prompt, Row, common, groups

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
"""Few different tokens, so that much is shared."""


@st.composite
def some_prompts(draw):
    heads = draw(st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=30), min_size=1, max_size=3))
    found = {
        tuple([*draw(st.sampled_from(heads)), *tail]): draw(st.integers(0, len(tail) + 4))
        for tail in draw(st.lists(TOKENS, min_size=1, max_size=12))
    }
    return [Prompt(np.array(tokens), min(scored, len(tokens) - 1)) for tokens, scored in found.items()]


def prompt(tokens, scored):
    return Prompt(np.array(tokens), scored)


def sequence(group: Group, row: Row, node: int) -> list[int]:
    """The tokens from the start to a node, read off by parents alone."""
    tokens = []
    while node >= 0:
        tokens.append(int(row.tokens[node]))
        node = int(row.parents[node])
    return [*group.prefix.tolist(), *reversed(tokens)]


@given(some_prompts(), st.sampled_from([1, 4, 10, 256]))
def test_every_prompt_is_read_off_exactly_one_row(prompts, room):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_trees, "ROW", room)
        found = groups(prompts)
    seen = []
    for group in found:
        for row in group.rows:
            for number, path in row.paths.items():
                tokens, first = prompts[number].tokens.tolist(), prompts[number].scored
                assert [sequence(group, row, node) for node in path] == [
                    tokens[: position + 1] for position in range(first, len(tokens))
                ]
                assert first >= len(group.prefix)
                seen.append(number)
    assert sorted(seen) == list(range(len(prompts)))


@given(some_prompts(), st.sampled_from([1, 10, 256]))
def test_depths_and_ancestors_are_those_of_the_tree(prompts, room):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_trees, "ROW", room)
        found = groups(prompts)
    for group in found:
        for row in group.rows:
            paths = [sequence(group, row, node) for node in range(row.size)]
            assert [len(path) - len(group.prefix) - 1 for path in paths] == row.depths.tolist()
            follows = [[one[: len(other)] == other for other in paths] for one in paths]
            assert row.ancestors().tolist() == follows
            chain = all(len(path) == len(group.prefix) + 1 + node for node, path in enumerate(paths))
            assert row.branches != chain


@given(some_prompts(), st.sampled_from([1, 10, 256]))
def test_no_token_of_a_row_stands_there_twice(prompts, room):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_trees, "ROW", room)
        found = groups(prompts)
    for group in found:
        for row in group.rows:
            paths = {tuple(sequence(group, row, node)) for node in range(row.size)}
            assert len(paths) == row.size


@given(TOKENS, TOKENS)
def test_common_is_counted_token_by_token(a, b):
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common(np.array(a), np.array(b)) == expected


def test_choices_of_one_question_are_one_small_tree():
    (group,) = groups([prompt([5, 6, 7, 1, 2], 2), prompt([5, 6, 7, 1, 3], 2), prompt([5, 6, 7, 4], 2)])
    assert not len(group.prefix)
    assert [row.tokens.tolist() for row in group.rows] == [[5, 6, 7, 1, 2, 3, 4]]


def test_a_long_context_is_read_once_for_all_its_choices():
    context = list(range(1000))
    (group,) = groups([prompt([*context, choice, choice], 999) for choice in range(4)])
    assert group.prefix.tolist() == context[:-1]  # its last token is scored
    assert [row.tokens.tolist() for row in group.rows] == [[999, 0, 0, 1, 1, 2, 2, 3, 3]]


def test_questions_after_the_same_examples_share_them_and_fill_rows():
    examples = list(range(700))
    prompts = [prompt([*examples, *[1000 + number] * 100], 799) for number in range(10)]
    (group,) = groups(prompts)
    assert group.prefix.tolist() == examples
    assert [row.size for row in group.rows] == [200] * 5


def test_choices_stay_together_when_a_row_is_full():
    examples = list(range(300))
    asked = [[*examples, *[1000 + number] * 30] for number in range(6)]
    prompts = [prompt([*question, choice, choice], 329) for question in asked for choice in range(4)]
    (group,) = groups(prompts)
    assert [sorted({number // 4 for number in row.paths}) for row in group.rows] == [[0, 1, 2, 3, 4, 5]]
    assert [row.size for row in group.rows] == [6 * (30 + 8)]


def test_what_shares_little_is_left_apart():
    found = groups([prompt([1, 2, *range(10, 40)], 20), prompt([1, 2, *range(50, 80)], 20)])
    assert [row.size for group in found for row in group.rows] == [32, 32]


def test_what_goes_on_for_long_is_read_alone(monkeypatch):
    monkeypatch.setattr(prefix_trees, "LONG", 300)
    context = list(range(1000))
    found = groups([prompt([*context, *[2000 + length] * length], 999) for length in (10, 299, 300)])
    assert sorted((len(group.prefix), [row.size for row in group.rows]) for group in found) == [
        (0, [1300]),
        (999, [11, 300]),
    ]
    found = groups([prompt([*context, *[2000 + length] * length], 999) for length in (300, 301)])
    assert [len(group.prefix) for group in found] == [0, 0]
