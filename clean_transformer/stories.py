"""Little stories without end: a grammar that writes them, and that recognises what it could have
written.

They are made for looking into a small model. Names are invented, so that no frequency tells how
one goes on; and who the hero is, what was lost and how the song goes is told once, and then needed
again: the model has to look it up in what it has read.
"""

import random
import re
from collections.abc import Iterator

WORDS = {
    "Start": "B D F G H J K L M N P R S T V W Z",
    "start": "b d f g h j k l m n p r s t v w z",
    "vowel": "a e i o u ai oo",
    "animal": "bear cat dog fox goat hare wolf",
    "small_animal": "bird duck frog hen mole mouse pig",
    "trade": "baker dwarf fairy farmer giant king miller queen sailor tailor witch",
    "temper": "brave clever gentle happy kind lazy little poor proud quiet shy young",
    "colour_word": "black blue brown golden green grey pink purple red silver white yellow",
    "thing_word": (
        "ball bell boat book box button cap coat cup drum flute hat key kite lamp ring shoe spoon"
    ),
    "food_word": "bread cake cheese corn honey jam milk nuts pie plums rice soup",
    "quality": "big cold dark deep green high little old quiet wild",
    "house": "castle cottage farm house mill town village",
    "spot": "barn cave forest garden harbour tower valley",
    "day": "day evening morning night",
    "number": "one two three four five six seven eight nine ten",
}

# What stands for a symbol, at random; `{symbol}` stands for one of its own lines.
RULES = {
    "story": ["{opening} {friendship} {lost}", "{opening} {friendship} {found}"],
    "opening": [
        "Once upon a time, a {temper} {kind} called {hero} lived in {home}.",
        "Once upon a time, there was a {temper} {kind} called {hero}. {hero} lived in {home}.",
        "Once upon a time, in {home}, there lived a {temper} {kind} whose name was {hero}.",
    ],
    "friendship": [
        "{hero}'s best friend was a {friend_kind} called {friend}. {singing}",
        "Every day {hero} played with {friend}, the {friend_kind} from next door. {singing}",
        "In {home} there also lived a {friend_kind} called {friend}. {singing}",
    ],
    "singing": [
        'Together they sang a song: "Oh {song}!"',
        '{friend} had taught {hero} a song: "Oh {song}!"',
        'When {hero} and {friend} were happy, they sang: "Oh {song}!"',
    ],
    "lost": ["{loss} {advice} {journey} {price} {payment} {ending}"],
    "loss": [
        "{hero} had a {colour} {thing}. One {day} the {colour} {thing} was gone.",
        "One {day} {hero} could not find the {colour} {thing} that {friend} had made.",
        "{friend} once gave {hero} a {colour} {thing}, but one {day} {hero} lost it.",
    ],
    "advice": [
        '"Where is my {colour} {thing}?" cried {hero}. "Let us ask {helper}," said {friend}.',
        '"Do not cry, {hero}," said {friend}. "We will ask {helper} about the {colour} {thing}."',
        '"Oh {friend}, help me!" cried {hero}. "I know who can help," said {friend}. '
        '"We must go to {helper}."',
    ],
    "journey": [
        "{helper} was a {temper} {helper_kind} in {far}. So {hero} and {friend} went to {far}.",
        "So {hero} and {friend} walked to {far}, where {helper} the {helper_kind} lived.",
        "They {went} until they came to {far}. There sat {helper}, a {temper} {helper_kind}.",
    ],
    "price": [
        '"I have your {colour} {thing}," said {helper}, "but I am hungry. Bring me some {food}."',
        '"Give me some {food}," said {helper}, "and I will look for the {colour} {thing}."',
        '"I saw a {colour} {thing}," said {helper}. "If you bring me {food}, I will tell you '
        'where."',
    ],
    "payment": [
        "{friend} had some {food} in a bag. {helper} ate the {food} and gave {hero} the {colour} "
        "{thing}.",
        "So they gave {helper} some {food}. The {colour} {thing} had been in {far} all the time.",
        'So {hero} ran home and came back with {food}. "Thank you, {hero}," said {helper}, '
        '"here is your {colour} {thing}."',
    ],
    "found": ["{finding} {question} {owner} {return} {reward} {ending}"],
    "finding": [
        "One {day} {friend} found a {colour} {thing} in {far}.",
        "One {day} they {went} until they came to {far}. There lay a {colour} {thing}.",
        "One {day} {hero} and {friend} went to {far} and saw a {colour} {thing} there.",
    ],
    "question": [
        '"Who has lost a {colour} {thing}?" asked {hero}.',
        '"Look, {friend}, a {colour} {thing}!" cried {hero}. "Whose is it?"',
        '"Look, {hero}, a {colour} {thing}!" cried {friend}. "Shall we keep it?"',
    ],
    "owner": [
        "Then they heard {helper}, a {temper} {helper_kind}, who was crying.",
        "Then a {temper} {helper_kind} called {helper} came along the path.",
        "Near {far} they met {helper}, who was a {temper} {helper_kind}.",
    ],
    "return": [
        '"My {colour} {thing}!" cried {helper}. "Thank you, {hero}! Thank you, {friend}!"',
        '"Is this your {colour} {thing}?" asked {friend}. "Yes, it is," said {helper}.',
        '{hero} gave {helper} the {colour} {thing}. "You are kind, {hero}," said {helper}.',
    ],
    "reward": [
        '"Come and eat {food} with me," said {helper}. So {hero} and {friend} ate {food}.',
        '{helper} had nothing but {food}. "I love {food}," said {friend}, and they ate the '
        "{food} together.",
        '"What do you like best?" asked {helper}. "I like {food}," said {hero}. So {helper} '
        "gave them {food}.",
    ],
    "ending": ["{way_home} {last_song} {moral}"],
    "way_home": [
        "In the evening {hero} and {friend} went back to {home}.",
        "Then {hero} took {friend} and {helper} along to {home}.",
        "It was a long way from {far} to {home}, and {friend} was tired.",
    ],
    "last_song": [
        'On the way they sang: "Oh {song}!"',
        '{friend} sang the old song again: "Oh {song}!"',
        'All the birds heard {hero} sing: "Oh {song}!"',
    ],
    "moral": [
        "And {hero} never lost the {colour} {thing} again.",
        "From then on, {hero}, {friend} and {helper} ate {food} every {day}.",
        "And if {helper} is still in {far}, there is still {food} to eat.",
        "And {hero} and {friend} stayed friends and lived happily in {home}.",
    ],
    "name": ["{Start}{vowel}{start}{vowel}{end}", "{Start}{vowel}{start}{vowel}{start}{vowel}"],
    "word": [
        "{start}{vowel}{end}",
        "{start}{vowel}{start}{vowel}",
        *("{animal}", "{small_animal}", "{trade}", "{temper}", "{number}"),
        *("{colour_word}", "{thing_word}", "{food_word}", "{house}", "{spot}"),
    ],
    "song_words": [" ".join(["{word}"] * length) for length in (5, 6, 7, 8)],
    "near_place": ["the {quality} {house}"],
    "far_place": ["the {quality} {spot}"],
    "end": ["", "", "n", "l", "m", "x", "p", "t"],
    "went": ["climbed", "sailed", "walked", "walked and walked"],
    **{symbol: words.split() for symbol, words in WORDS.items()},
}

# What a story settles once: from then on the symbol stands for the same text. No two are equal.
FACTS = {
    **dict.fromkeys(("hero", "friend", "helper"), "name"),
    **{"kind": "animal", "friend_kind": "small_animal", "helper_kind": "trade"},
    **{"home": "near_place", "far": "far_place"},
    **{"colour": "colour_word", "thing": "thing_word", "food": "food_word", "song": "song_words"},
}

SYMBOL = re.compile(r"\{(\w+)\}")


def generate(seed: int, count: int) -> list[str]:
    """That many stories; the same ones for the same seed."""
    draw = random.Random(seed)
    return [_write("story", {}, draw) for _ in range(count)]


def parse(text: str) -> dict[str, str] | None:
    """The facts of a story that the grammar can write, or None for any other text."""
    return next((facts for rest, facts in _read("{story}", text, {}) if not rest), None)


def _write(symbol: str, facts: dict[str, str], draw: random.Random) -> str:
    """One text for the symbol; facts that it settles are added to `facts`."""
    if symbol in facts:
        return facts[symbol]
    line = draw.choice(RULES[FACTS.get(symbol, symbol)])
    text = SYMBOL.sub(lambda found: _write(found[1], facts, draw), line)
    if symbol in FACTS:
        if text in facts.values():
            return _write(symbol, facts, draw)
        facts[symbol] = text
    return text


def _read(line: str, text: str, facts: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Every way in which `text` begins with `line`: what is left of it, and the facts by then."""
    found = SYMBOL.search(line)
    literal = line[: found.start()] if found else line
    if not text.startswith(literal):
        return
    text = text[len(literal) :]
    if found is None:
        yield text, facts
        return
    symbol = found[1]
    lines = [facts[symbol]] if symbol in facts else RULES[FACTS.get(symbol, symbol)]
    for choice in lines:
        for rest, known in _read(choice, text, facts):
            if symbol in FACTS and symbol not in facts:
                told = text[: len(text) - len(rest)]
                if told in known.values():
                    continue
                known = known | {symbol: told}
            yield from _read(line[found.end() :], rest, known)
