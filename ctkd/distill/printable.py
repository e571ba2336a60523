"""Text from data, made safe to print, and time spans for people."""

__all__ = ["NO_TEXT", "duration", "is_text", "printable", "say_nothing", "visible"]

NO_TEXT = (
    "its name is not in the encoding of this locale, and tokenizers cannot open it; set the "
    "environment variable PYTHONUTF8=1 if the name is UTF-8, else rename it"
)
"""What is wrong with a name of which `is_text` is False."""

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}


def printable(text: str) -> str:
    """Escape whatever does not print, so that no data can steer the terminal."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def is_text(name: str) -> bool:
    r"""False if a file's name holds bytes that are no characters in this locale.

    Example:
        >>> is_text("données"), is_text("donn\udce9es")
        (True, False)
    """
    return all(not "\ud800" <= sign <= "\udfff" for sign in name)


def visible(text: str) -> str:
    r"""Show white space as signs, and escape whatever does not print.

    Example:
        >>> visible(" two\nlines\x1b[0m")
        '␣two⏎lines\\x1b[0m'
    """
    return "".join(_MARKS.get(sign) or printable(sign) for sign in text)


def duration(seconds: float) -> str:
    """Write a time span for a person.

    Example:
        >>> duration(7.4), duration(100), duration(7500)
        ('7 s', '2 min', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def say_nothing(line: str) -> None:
    """Take a line of progress that is not to be printed."""
