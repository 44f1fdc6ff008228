"""Shows invisible characters as symbols, and parts of characters as bytes."""

# The symbols that `visible` shows instead of invisible characters. The keys are the codes of these
# characters. For the control characters 0 to 31, Unicode has the symbols U+2400 to U+241F.
_PICTURES = {code: 0x2400 + code for code in range(32)} | {127: "␡", ord(" "): "·", ord("\n"): "↵"}


def visible(token: str) -> str:
    """Return `token` with symbols for spaces ("·"), line breaks ("↵") and control characters."""
    return token.translate(_PICTURES)


# Byte-level BPE writes each byte as one letter (Radford et al. 2019): printable Latin-1 characters
# stand for themselves, and the other bytes have the letters from U+0100 on, in ascending order.
_PRINTABLE = {*range(ord("!"), 127), *range(ord("¡"), 0xAD), *range(ord("®"), 256)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + number): byte for number, byte in enumerate(_OTHERS)
}


def visible_bytes(piece: str) -> str:
    r"""Return the bytes of a token that is a part of a character, such as "\xf0\x9f".

    `piece` is the token as the vocabulary of byte-level BPE writes it.
    """
    values = [_BYTES[letter] for letter in piece]
    return "".join(f"\\x{byte:02x}" if byte > 127 else visible(chr(byte)) for byte in values)
