import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clean_transformer.demo import stories
from clean_transformer.demo.stories import FACTS, RULES, SYMBOL, generate, parse, songbooks

from .surprise import surprise

seeds = st.integers(0, 2**32)


def test_every_symbol_has_a_rule_and_is_used():
    used = {symbol for lines in RULES.values() for line in lines for symbol in SYMBOL.findall(line)}
    assert used | {"story", "song_of_anything"} == RULES.keys()
    assert used >= FACTS


@given(seeds)
def test_a_seed_gives_the_same_stories_each_time(seed):
    assert generate(seed, 3) == generate(seed, 3)
    assert generate(seed, 2) == generate(seed, 3)[:2]
    assert generate(seed, 1) != generate(seed + 1, 1)


@given(seeds)
def test_a_songbook_is_three_songs_again_and_again(seed):
    books = songbooks(seed, 2)

    assert books == songbooks(seed, 2) != songbooks(seed + 1, 2)
    for book in books:
        begin, _, sung = book.partition(" ")
        assert begin == "Sing:"
        songs = sung.split(", ")
        assert len(songs) == 20
        assert 1 <= len(set(songs)) <= 3
        names = {start + end for start in RULES["start"] for end in RULES["end"]}
        assert all({*song.split()} <= {*RULES["word"]} | names for song in songs)
        assert all(2 <= len(song.split()) <= 6 for song in songs)


@given(seeds)
def test_the_grammar_recognizes_what_it_writes(seed):
    [story] = generate(seed, 1)

    facts = parse(story)

    assert facts is not None
    assert facts.keys() == FACTS
    assert all(fact in story for fact in facts.values())
    assert story.startswith("Once upon a time")


@given(seeds, st.data())
def test_a_fact_that_changes_in_the_course_of_a_story_is_noticed(seed, data):
    [story] = generate(seed, 1)
    facts = parse(story)
    names = [facts[f"{who}_start"] + facts[f"{who}_end"] for who in ("hero", "friend")]
    told = [*names, facts["thing"], facts["food"], facts["song"]]
    fact = data.draw(st.sampled_from(told))
    mentions = [found.span() for found in re.finditer(rf"\b{fact}\b", story)]
    assert len(mentions) > 1
    start, end = data.draw(st.sampled_from(mentions))
    assert parse(story[:start] + "Zabazaba" + story[end:]) is None


@pytest.mark.parametrize("change", [str.upper, lambda text: text[:-1], lambda text: text + " "])
def test_other_texts_are_not_stories(change):
    [story] = generate(0, 1)

    assert parse(change(story)) is None
    assert surprise(change(story)) == math.inf
    assert parse("") is None


def test_a_name_made_of_two_others_is_noticed():
    [story] = generate(0, 1)
    facts = parse(story)
    before, _, after = story.rpartition(facts["hero_start"] + facts["hero_end"])

    assert facts["hero_end"] != facts["friend_end"]
    assert parse(before + facts["hero_start"] + facts["friend_end"] + after) is None


def test_the_surprise_is_that_of_the_draws(monkeypatch):
    rules = {"story": ["{one} and {two}.", "{one}, {one}."], "one": [*"xyz"], "two": [*"xyz"]}
    monkeypatch.setattr(stories, "RULES", rules)
    monkeypatch.setattr(stories, "FACTS", {"one"})

    assert surprise("x and x.") == surprise("x and y.") == pytest.approx(math.log(2 * 3 * 3))
    assert surprise("x, x.") == pytest.approx(math.log(2 * 3))
    assert surprise("x, y.") == surprise("x and w.") == math.inf

    rules["story"].append("{one}, x.")  # a second way to the same text
    assert surprise("x, x.") == pytest.approx(-math.log(2 / 3 / 3))


@given(seeds)
def test_the_surprise_of_a_story_is_that_of_its_choices(seed):
    [story] = generate(seed, 1)
    lines = {"loss", "search", "price", "payment"}  # or as many where something is found
    lines |= {"story", "opening", "friendship", "singing", "ending", "moral"}
    words = FACTS - {"song"} | {"temper", "day", "note_1", "note_2", "note_3", "note_4"}
    if any(f" in a {house}" in story for house in RULES["house"]):
        words |= {"house"}

    choices = [len(RULES[symbol]) for symbol in lines | words]

    assert surprise(story) == pytest.approx(sum(map(math.log, choices)))
