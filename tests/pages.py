"""Reading the pages of reports, as text and in a browser."""

import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "br", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parts: list["Element | str"] = field(default_factory=list)

    @property
    def children(self) -> list["Element"]:
        return [part for part in self.parts if isinstance(part, Element)]

    @property
    def text(self) -> str:
        """All of it, in order."""
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    def walk(self) -> Iterator["Element"]:
        yield self
        for child in self.children:
            yield from child.walk()

    def all(self, attribute: str, value: str | None = None) -> list["Element"]:
        """The descendants with that attribute, or with that word in it."""
        return [
            element
            for element in self.walk()
            if attribute in element.attributes
            and (value is None or value in element.attributes[attribute].split())
        ]

    def words(self) -> str:
        return " ".join(self.text.split())


class Page(HTMLParser):
    """The elements of a page; every one of them must be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].parts.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


def facts(part: Element) -> dict[str, dict[str, str]]:
    """What every square or point of a figure tells, by the activation's name."""
    told = {}
    for figure in part.all("data-fields"):
        fields = figure.attributes["data-fields"].split("|")
        for element in figure.all("data-facts"):
            values = element.attributes["data-facts"].split("|")
            told[values[0]] = dict(zip(fields, values, strict=True))
    return told


def same_number(shown: str, value: float | str, digits: int = 4) -> bool:
    value = float(value)
    words = {"∞": math.inf, "−∞": -math.inf, "not a number": math.nan}
    read = words[shown] if shown in words else float(shown)
    return read == pytest.approx(value, rel=0.5 * 10 ** (1 - digits), abs=0, nan_ok=True)


def assert_self_contained(text: str) -> None:
    """Nothing in the page asks for anything from outside of it."""
    assert not re.search(r"://|url\(|@import|\bimport\b|fetch\(|XMLHttpRequest", text)
    links = ("src", "srcset", "href", "action", "data", "poster", "background")
    for element in Page(text).root.walk():
        assert element.tag not in ("link", "img", "iframe", "object", "base")
        for name in set(links) & set(element.attributes):
            assert element.attributes[name].startswith("#"), element


def browse(file: Path, profile: Path, fragment: str = "") -> tuple[str, list[str]]:
    """The page as the browser has it once its scripts have run, and what its console says."""
    assert CHROMIUM
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync"]
    options = ["--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [
            CHROMIUM,
            *options,
            *(f"--disable-{part}" for part in quiet),
            f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--virtual-time-budget=2000",
            "--dump-dom",
            f"{file.as_uri()}{fragment}",
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def unpack(text: str, n_tokens: int) -> list[int]:
    """The attention weights of a packed head, divided by the step, as the triangle of its pairs."""
    digits = iter(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_".index(letter)
        for letter in text
    )

    def numbers() -> Iterator[int]:
        value = shift = 0
        for digit in digits:
            value, shift = value + ((digit & 31) << shift), shift + 5
            if digit < 32:
                yield value
                value = shift = 0

    found = [0] * (n_tokens * (n_tokens + 1) // 2)
    place, each = 0, numbers()
    for zeros, weight in zip(each, each, strict=True):
        found[place + zeros] = weight
        place += zeros + 1
    return found
