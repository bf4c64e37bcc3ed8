"""Task "words to categories": prompts, answers and the held-out split."""

import json
import re
from itertools import islice

from dev.evidence.experiment import SORTED_AT_A_TIME, WORDS, sortings
from dev.quickstart.task import HELD_OUT_SHARE

CATEGORY = {word: name for name, words in WORDS.items() for word in words.split()}


def test_each_word_has_one_category() -> None:
    assert len(CATEGORY) == sum(len(words.split()) for words in WORDS.values()) == 8 * 24


def test_answers_match_prompts() -> None:
    for example in islice(sortings(0), 500):
        match = re.fullmatch(r"Sort into (.*) and (\w+): (.*)\.", example.prompt)
        assert match is not None
        answer = json.loads(example.answer)
        assert list(answer) == [*match[1].split(", "), match[2]] and len(answer) == SORTED_AT_A_TIME
        assert sorted(answer.values()) == sorted(match[3].split(", ")) == example.key.split()
        assert all(CATEGORY[word] == name for name, word in answer.items())


def test_split_depends_only_on_the_words() -> None:
    first, again, other = (list(islice(sortings(seed), 3000)) for seed in (0, 0, 1))
    assert first == again and first != other
    assert len({example.key for example in first}) == 3000
    share = sum(example.held_out for example in first) / 3000
    assert abs(share - 1 / HELD_OUT_SHARE) < 0.03
    trained = {example.key for example in first if not example.held_out}
    assert not trained & {example.key for example in other if example.held_out}
