"""`printable`: makes text from files safe to print in a terminal."""

import unicodedata


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with escapes, such as "\x1b", in place of characters that control a terminal.

    The replaced characters are control characters and characters that change the direction of text.
    Characters in `keep`, such as a line break, are not replaced.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if char not in keep and (unicodedata.category(char) in ("Cc", "Zl", "Zp") or char in BIDI)
        else char
        for char in text
    )


# What `in_ascii` writes in place of a character.
ASCII = {
    **{"≤": "<=", "≥": ">=", "×": "x", "±": "+-", "≈": "~", "−": "-", "∞": "inf", "√": "sqrt "},
    **{"½": "1/2", "²": "^2", "³": "^3", "Σ": "sum ", "σ": "sigma", "‖": "||", "•": "*"},
    **{
        "→": "->",
        "←": "<-",
        "…": "...",
        "–": "-",
        "—": "-",
        "·": ".",
        "↵": "\\n",
        "“": '"',
        "”": '"',
    },
    **dict(zip("▁▂▃▄▅▆▇█", "_:-=+*#@", strict=True)),
}


def in_ascii(text: str) -> str:
    r"""Return `text` with ASCII in place of other characters, such as "<=" for "≤".

    A character without such a replacement becomes its escape, such as "\u65e5".
    """
    return "".join(
        char if char.isascii() else ASCII.get(char) or char.encode("unicode_escape").decode()
        for char in text
    )


BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
