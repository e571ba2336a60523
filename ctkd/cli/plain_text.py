r"""Docstrings as plain text: formulas without LaTeX, words without marks of reStructuredText."""

import re
import textwrap

__all__ = ["plain_formula", "plain_text"]

_WIDTH = 96
# Braces that stay, in place of those that LaTeX means.
_OPEN, _CLOSE = "\x01", "\x02"
_SIGNS = {
    "le": "<=", "leq": "<=", "ge": ">=", "geq": ">=", "ne": "!=", "cdot": "*", "times": "*",
    "infty": "inf", "top": "T", "overline": "not", "dots": "...", "to": "->", "pm": "+-",
}  # fmt: skip
_GROUP = r"\{([^{}]*)\}"


def plain_formula(latex: str) -> str:
    r"""A formula in characters of a keyboard, one line for each of its parts.

    Example:
        >>> plain_formula(r"\frac{1}{\sum_b S_b} \sum_{i \le S_b} \left| p_{(i)} - q_i \right|")
        '(1 / (sum_b S_b)) sum_{i <= S_b} | p_{(i)} - q_i |'
    """
    parts = re.split(r"\\q?quad(?![a-zA-Z])|\\\\", latex)
    return "\n".join(one for one in map(_plain_part, parts) if one)


def _plain_part(latex: str) -> str:
    text = re.sub(r"\\(left|right|[bB]ig+[lrm]?)(?![a-zA-Z])\.?|\\[,;:! ]|&", " ", latex)
    text = re.sub(r"\\langle\s*", "<", re.sub(r"\s*\\rangle", ">", text)).replace(r"\|", "||")
    # A fraction of two signs needs no braces in LaTeX.
    text = re.sub(r"\\frac\s*([^\s{\\])", r"\\frac{\1}", text)
    text = re.sub(rf"\\frac{_GROUP}\s*([^\s{{\\])", r"\\frac{\1}{\2}", text)
    before = None
    while before != text:
        before = text
        text = re.sub(rf"\\(mathrm|mathbf|mathcal|operatorname|text){_GROUP}", r"\2", text)
        text = re.sub(rf"([_^]){_GROUP}", _script, text)
        text = re.sub(rf"\\frac{_GROUP}\s*{_GROUP}", _fraction, text)
        text = re.sub(rf"\\(bar|hat|tilde|sqrt){_GROUP}", r"\1(\2)", text)
    text = re.sub(r"\\([a-zA-Z]+)(\s*\()?", _command, text)
    text = re.sub(r"([_^]) +", r"\1", re.sub(r"[{}\\]", "", text))
    text = text.replace(_OPEN, "{").replace(_CLOSE, "}")
    text = " ".join(text.split())
    # No space where a function or a script belongs to what stands beside it.
    text = re.sub(r"([(\[{]) (?=[^|])", r"\1", text)
    return re.sub(r"(?<=\w|[)\]}]) (?=[_^)\]},])", "", text)


def plain_text(doc: str) -> str:
    r"""A docstring without markup; its examples stay as they are.

    Example:
        >>> print(plain_text("Of ``p`` and :math:`\\beta`, see `ALM`:\n\n.. math:: \\beta = 1"))
        Of p and beta, see ALM:
        <BLANKLINE>
            beta = 1
    """
    lines: list[str] = []
    given = doc.splitlines()
    while given:
        line = given.pop(0)
        indent = line[: len(line) - len(line.lstrip())]
        if line.strip().startswith(".. math::"):
            formula = [line.strip().removeprefix(".. math::")]
            while given and (not given[0].strip() or given[0].startswith(indent + " ")):
                formula.append(given.pop(0))
            margin = indent + "    "
            for part in plain_formula(" ".join(formula)).splitlines():
                lines += textwrap.wrap(
                    part,
                    _WIDTH,
                    initial_indent=margin,
                    subsequent_indent=margin + "    ",
                    break_long_words=False,
                )
            lines.append("")
        elif line.strip().startswith(">>>"):
            # The example, and what it gives.
            lines.append(line)
            while given and given[0].strip():
                lines.append(given.pop(0))
        else:
            lines.append(_words(line))
    return "\n".join(lines).rstrip()


def _words(line: str) -> str:
    line = re.sub(r":math:`([^`]*)`", lambda one: plain_formula(one[1]), line)
    line = re.sub(r"(?::[a-z]+:)?(`+)~?([^`]+)\1", r"\2", line)
    return re.sub(r"\\(\W)", r"\1", line)


def _command(found: re.Match[str]) -> str:
    sign = _SIGNS.get(found[1], found[1])
    return f" {sign}(" if found[2] and sign.isalpha() else f" {sign} {found[2] or ''}"


def _script(found: re.Match[str]) -> str:
    sign, text = found[1], found[2].strip()
    return f"{sign}{text}" if re.fullmatch(r"\w+", text) else f"{sign}{_OPEN}{text}{_CLOSE}"


def _fraction(found: re.Match[str]) -> str:
    simple = rf"[\w.]+(_{_OPEN}[^{_CLOSE}]*{_CLOSE})?"
    parts = [part.strip() for part in found.groups()]
    above, below = (one if re.fullmatch(simple, one) else f"({one})" for one in parts)
    return f"({above} / {below})"
