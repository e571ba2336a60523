"""Text from data, made safe to print."""

__all__ = ["printable", "visible"]

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}


def printable(text: str) -> str:
    """Escape whatever does not print, so that no data can steer the terminal."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def visible(text: str) -> str:
    r"""Show white space as signs, and escape whatever does not print.

    Example:
        >>> visible(" two\nlines\x1b[0m")
        '␣two⏎lines\\x1b[0m'
    """
    return "".join(_MARKS.get(sign) or printable(sign) for sign in text)
