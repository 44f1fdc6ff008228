"""A grammar that generates short stories for a small model, and parses these stories.

The facts of each story are drawn at random: for example, the names of two friends (two syllables
each), their song, the thing that they lose or find, and the place. A story states each fact, and
later repeats many of its facts. To predict a repeated fact, the model has to find it earlier in the
same story. Statistics of the training text do not help, because the facts are random.
"""

import random
import re
from collections.abc import Iterator

ENDS = "ba bo da do fi go ka ki la lo mi mo na ni ra ro ta vo"


# The possible words for each fact. The keys are symbols of the grammar (see `RULES`). For each
# story and each symbol, one word is drawn at random, and used wherever the symbol occurs.
FACT_WORDS = {
    "hero_start": "Ba Do Fi Ka Li Lo Ma Ni Pe Ro Sa Ti Vo Zu",
    "hero_end": ENDS,
    "friend_start": "Bo Da Fa Jo Ki La Lu Mi No Pa Ri So Ta Vi",
    "friend_end": ENDS,
    "kind": "bear cat dog fox goat hare wolf",
    "friend_kind": "bird duck frog hen mole mouse pig",
    "stranger": "baker dwarf fairy farmer giant king miller queen sailor witch",
    "far": "barn cave field forest garden harbour valley",
    "color": "black blue brown golden green grey pink purple red silver white yellow",
    "thing": "ball bell boat book button cap coat cup drum flute hat key kite lamp ring shoe",
    "food": "bread butter cake cheese corn fish honey jam milk pie rice soup",
}


# The possible words for other symbols. A new word is drawn at random each time the symbol occurs.
# The four notes are not facts, but together they form the fact "song" (see `FACTS`).
OTHER_WORDS = {
    "temper": "brave clever gentle happy kind lazy little poor proud quiet shy young",
    "house": "castle cottage farm house mill",
    "day": "day evening morning night",
    "note_1": "bim bo fa hey hum la ra tra",
    "note_2": "bam dee fo hi ma pam ta tree",
    "note_3": "bom da ding ho lee pim ti tum",
    "note_4": "boo do dong dum hop so tim zum",
}


# The possible words and the parts of names for the songs of a songbook. The words are all words in
# FACT_WORDS and OTHER_WORDS. A name is one entry of "start", followed by one entry of "end".
ANYTHING = {
    "word": " ".join(
        words
        for symbol, words in (FACT_WORDS | OTHER_WORDS).items()
        if not symbol.endswith(("start", "end"))
    ),
    "start": f"{FACT_WORDS['hero_start']} {FACT_WORDS['friend_start']}",
    "end": ENDS,
}


# The grammar. It maps each symbol to the lines that can replace this symbol. To write a symbol, we
# draw one of its lines at random, and then write each `{symbol}` in this line in the same way.
RULES = {
    "story": ["{opening} {singing} {lost} {ending}", "{opening} {singing} {found} {ending}"],
    "opening": [
        "Once upon a time, a {temper} {kind} called {hero} lived in a {house}. {friendship}",
        "Once upon a time, there was a {temper} {kind} called {hero}. {friendship}",
        "Once upon a time, in a {house}, there was a {temper} {kind} called {hero}. {friendship}",
    ],
    "friendship": [
        "{hero}'s best friend was a {friend_kind} called {friend}.",
        "Every day {hero} played with a {friend_kind} called {friend}.",
        "There was also a {friend_kind} called {friend}.",
    ],
    "singing": [
        'Together they sang: "Oh {song}!"',
        '{friend} taught {hero} a song: "Oh {song}!"',
        'When {hero} and {friend} were happy, they sang: "Oh {song}!"',
    ],
    "lost": ["{loss} {search} {price} {payment}"],
    "loss": [
        "{hero} had a {color} {thing}, but one {day} it was gone.",
        "One {day} {hero} lost a {color} {thing}.",
        "{friend} gave {hero} a {color} {thing}, but one {day} {hero} lost it.",
    ],
    "search": [
        "{friend} and {hero} looked for it in the {far}, where they met a {stranger}.",
        '"Help me, {friend}!" cried {hero}. They walked to the {far}. There sat a {stranger}.',
        '"Do not cry, {hero}," said {friend}. "A {stranger} in the {far} may have it."',
    ],
    "price": [
        '"I have your {color} {thing}," said the {stranger}, "but I want some {food}."',
        '"Give me {food}," said the {stranger}, "and I will give you the {color} {thing}."',
        "The {stranger} had the {color} {thing} and asked {hero} for {food}.",
    ],
    "payment": [
        "{friend} had some {food}, and {hero} got the {color} {thing} back.",
        "So {hero} gave the {stranger} some {food}, and got the {color} {thing} back.",
        'They shared their {food}. "Here is your {thing}, {hero}," said the {stranger}.',
    ],
    "found": ["{finding} {owner} {return} {reward}"],
    "finding": [
        "One {day} {friend} found a {color} {thing} in the {far}.",
        "One {day} {hero} and {friend} went to the {far} and saw a {color} {thing}.",
        "One {day} {hero} walked to the {far} with {friend}. There lay a {color} {thing}.",
    ],
    "owner": [
        '"Look, {friend}, a {color} {thing}!" cried {hero}. Then they heard a {stranger}.',
        '"Look, {hero}, a {color} {thing}!" cried {friend}. Then a {stranger} came.',
        "They took it along, and near the {far} {hero} met a {stranger}.",
    ],
    "return": [
        '"My {color} {thing}!" cried the {stranger}. "Thank you, {hero}! Thank you, {friend}!"',
        '"Is this your {color} {thing}?" asked {friend}. "Yes, it is," said the {stranger}.',
        '{hero} gave the {stranger} the {color} {thing}. "You are kind, {hero}!"',
    ],
    "reward": [
        "So the {stranger} gave them some {food}, and {hero} and {friend} ate the {food}.",
        '"Do you like {food}?" asked the {stranger}. "I love {food}," said {friend}.',
        "The {stranger} had some {food}, and they ate the {food} together.",
    ],
    "ending": [
        'All the way home they sang: "Oh {song}!" {moral}',
        'Then {friend} sang the old song: "Oh {song}!" {moral}',
        'All the birds heard {hero} sing: "Oh {song}!" {moral}',
    ],
    "moral": [
        "And {hero} never forgot the {color} {thing}.",
        "And {hero} and {friend} stayed friends for ever.",
        "And if the {stranger} is still in the {far}, there is still {food} to eat.",
    ],
    "hero": ["{hero_start}{hero_end}"],
    "friend": ["{friend_start}{friend_end}"],
    "song": ["{note_1} {note_2} {note_3} {note_4}"],
    "song_of_anything": [" ".join(["{anything}"] * notes) for notes in range(2, 7)],
    "anything": ["{word}", "{start}{end}"],
    **{symbol: words.split() for symbol, words in (FACT_WORDS | OTHER_WORDS | ANYTHING).items()},
}


# The symbols that become the same text wherever they occur in a story.
FACTS = {*FACT_WORDS, "song"}


SYMBOL = re.compile(r"\{(\w+)\}")


def generate(seed: int, count: int) -> list[str]:
    """Return `count` stories. The same seed gives the same stories."""
    draw = random.Random(seed)
    return [_write("story", {}, draw) for _ in range(count)]


def songbooks(seed: int, count: int) -> list[str]:
    """Return `count` texts. Each text has three random songs, and repeats them in random order.

    The only way to predict the next word of a song is to find an earlier copy of the song in the
    same text. The same seed gives the same texts.
    """
    draw = random.Random(seed)
    books = ([_write("song_of_anything", {}, draw) for _ in range(3)] for _ in range(count))
    return ["Sing: " + ", ".join(draw.choices(songs, k=20)) for songs in books]


def parse(text: str) -> dict[str, str] | None:
    """Return the facts of the story `text`, such as {"color": "silver", "thing": "coat", …}.

    If the grammar cannot generate `text`, the result is None.
    """
    return next((facts for rest, facts in _read("{story}", text, {}) if not rest), None)


def _write(symbol: str, facts: dict[str, str], draw: random.Random) -> str:
    """Return a random text for a symbol of the grammar, or `facts[symbol]` if it exists.

    `facts` has the texts that were drawn before, by symbol. This function adds the facts that it
    draws to `facts`.
    """
    if symbol in facts:
        return facts[symbol]
    line = draw.choice(RULES[symbol])
    text = SYMBOL.sub(lambda found: _write(found[1], facts, draw), line)
    if symbol in FACTS:
        facts[symbol] = text
    return text


def _read(line: str, text: str, facts: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Find the ways in which `line`, a line of the grammar, can generate the beginning of `text`.

    `facts` has the facts that are already known; the generated beginning must agree with them. For
    each way, this function yields a pair. The first element is the rest of `text`, after the
    generated beginning. The second element has the known facts and the facts in the generated
    beginning.
    """
    found = SYMBOL.search(line)
    literal = line[: found.start()] if found else line
    if not text.startswith(literal):
        return
    text = text[len(literal) :]
    if found is None:
        yield text, facts
        return
    for choice in [facts[found[1]]] if found[1] in facts else RULES[found[1]]:
        for rest, known in _read(choice, text, facts):
            if found[1] in FACTS:
                known = known | {found[1]: text[: len(text) - len(rest)]}
            yield from _read(line[found.end() :], rest, known)
