"""`visible`: shows invisible characters as symbols."""

# The symbols that `visible` shows instead of invisible characters. The keys are the codes of these
# characters. For the control characters 0 to 31, Unicode has the symbols U+2400 to U+241F.
_PICTURES = {code: 0x2400 + code for code in range(32)} | {127: "␡", ord(" "): "·", ord("\n"): "↵"}


def visible(token: str) -> str:
    """Return `token` with symbols for spaces ("·"), line breaks ("↵") and control characters."""
    return token.translate(_PICTURES)
