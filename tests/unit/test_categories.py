"""The task of dev.evidence.categories: what is asked, what is right, what is held out."""

import json
import re
from itertools import islice

from dev.evidence.categories import SORTED_AT_A_TIME, WORDS, sortings
from dev.quickstart.task import HELD_OUT_SHARE

CATEGORY = {word: name for name, words in WORDS.items() for word in words.split()}


def test_no_word_has_two_categories() -> None:
    assert len(CATEGORY) == sum(len(words.split()) for words in WORDS.values()) == 8 * 24


def test_prompts_and_answers_fit_together() -> None:
    for one in islice(sortings(0), 500):
        found = re.fullmatch(r"Sort into (.*) and (\w+): (.*)\.", one.prompt)
        assert found is not None
        answer = json.loads(one.answer)
        assert list(answer) == [*found[1].split(", "), found[2]] and len(answer) == SORTED_AT_A_TIME
        assert sorted(answer.values()) == sorted(found[3].split(", ")) == list(one.words)
        assert all(CATEGORY[word] == name for name, word in answer.items())


def test_the_split_depends_on_the_words_alone() -> None:
    first, again, other = (list(islice(sortings(seed), 3000)) for seed in (0, 0, 1))
    assert first == again and first != other
    assert len({one.words for one in first}) == 3000
    share = sum(one.held_out for one in first) / 3000
    assert abs(share - 1 / HELD_OUT_SHARE) < 0.03
    trained = {one.words for one in first if not one.held_out}
    assert not trained & {one.words for one in other if one.held_out}
