"""A report as a list of blocks, written as one HTML page or as Markdown.

Every text is escaped on its way out. The page has no script and asks the network for nothing.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ctkd.compare.report.drawing import DARK, for_page
from ctkd.compare.report.tables import Table, markdown_text
from ctkd.distill.printable import printable

__all__ = ["Block", "Bullets", "Folded", "Heading", "Picture", "Text", "html_page", "markdown"]


@dataclass(frozen=True, slots=True)
class Heading:
    """A title of a section (level 2) or of a part of one (level 3)."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; "lead" for the first one, "loud" for what nobody may miss."""

    text: str
    kind: Literal["", "lead", "loud"] = ""


@dataclass(frozen=True, slots=True)
class Bullets:
    """Sentences, one below the other."""

    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Folded:
    """A long text that opens when asked for."""

    summary: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture and its words.

    Args:
        name: Of its file, without the ending.
        title: What it shows.
        caption: How to read it.
        svg: The file's text.
    """

    name: str
    title: str
    caption: str
    svg: str


Block = Heading | Text | Bullets | Folded | Picture | Table


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """Write one file that holds everything, pictures too."""
    head = html.escape(printable(title))
    body = "\n".join(map(_html, blocks))
    return _PAGE.format(title=head, style=_style(), body=body)


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """Write Markdown; pictures are taken from the folder ``pictures`` beside it."""
    return "\n\n".join([f"# {markdown_text(title)}", *map(_markdown, blocks)]) + "\n"


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_escaped(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        kind = f' class="{block.kind}"' if block.kind else ""
        return f"<p{kind}>{_escaped(block.text)}</p>"
    if isinstance(block, Bullets):
        return f"<ul>{''.join(f'<li>{_escaped(text)}</li>' for text in block.texts)}</ul>"
    if isinstance(block, Folded):
        text = html.escape(_printable_lines(block.text))
        return f"<details><summary>{_escaped(block.summary)}</summary><pre>{text}</pre></details>"
    if isinstance(block, Picture):
        label = f"{block.title}. {block.caption}"
        return (
            f'<figure id="picture-{html.escape(block.name)}">'
            f'<h2>{_escaped(block.title)}</h2><div class="wide">{for_page(block.svg, label)}</div>'
            f"<figcaption>{_escaped(block.caption)}</figcaption></figure>"
        )
    note = f"<p class='note'>{_escaped(block.note)}</p>" if block.note else ""
    return f'<div class="wide">{block.html()}</div>{note}'


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {markdown_text(block.text)}"
    if isinstance(block, Text):
        text = markdown_text(block.text)
        return f"**{text}**" if block.kind else text
    if isinstance(block, Bullets):
        return "\n".join(f"- {markdown_text(text)}" for text in block.texts)
    if isinstance(block, Folded):
        text = html.escape(_printable_lines(block.text))
        summary = _escaped(block.summary)
        return f"<details>\n<summary>{summary}</summary>\n\n<pre>\n{text}\n</pre>\n\n</details>"
    if isinstance(block, Picture):
        title, caption = markdown_text(block.title), markdown_text(block.caption)
        return f"## {title}\n\n![{title}](pictures/{block.name}.svg)\n\n{caption}"
    note = f"\n\n{markdown_text(block.note)}" if block.note else ""
    return block.markdown() + note


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _style() -> str:
    dark = "".join(f"--c{light[1:]}:{color};" for light, color in DARK.items())
    return _STYLE.replace("DARK", dark)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

# Names of colors are those that the pictures are drawn in.
_STYLE = """
:root{color-scheme:light dark;--ink:var(--c1f2430,#1f2430);--faint:var(--c667085,#667085);
--line:var(--ce5e7eb,#e5e7eb);--paper:var(--cffffff,#ffffff);--alarm:var(--cb42318,#b42318)}
@media screen and (prefers-color-scheme:dark){:root{DARK}}
@media print{:root{color-scheme:light}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.2rem}
h1{font-size:1.6rem;line-height:1.25;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.6rem 0 .3rem;overflow-wrap:anywhere}
p,li{max-width:46rem;overflow-wrap:anywhere}
.lead,.loud{font-size:1.15rem;font-weight:700}
.loud{border:2px solid var(--alarm);border-radius:6px;padding:.5rem .9rem;color:var(--alarm)}
.note,figcaption{color:var(--faint);font-size:.9rem;max-width:46rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .7rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{vertical-align:bottom;border-bottom:2px solid var(--faint)}
tbody th,.words,th:first-child{text-align:left}
tbody th{font-weight:600;min-width:7rem}
thead th:first-child,tbody th{position:sticky;left:0;background:var(--paper)}
td{white-space:nowrap}
td.words{white-space:normal;min-width:7rem;max-width:30rem;overflow-wrap:anywhere}
figure{margin:0}
figure svg{display:block;width:100%;min-width:34rem;max-width:46rem;height:auto}
svg text{font-family:'DejaVu Sans',Verdana,sans-serif!important}
details{margin:.3rem 0}
summary{cursor:pointer;color:var(--faint)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid var(--line);
padding:.2rem .8rem;margin:.4rem 0;font-size:.85rem}
@media print{main{max-width:none;padding:0}body{font-size:10pt}table{font-size:8pt}
th,td{padding:2pt 4pt}td{white-space:normal}.wide{overflow:visible}
figure,tr{break-inside:avoid}h2,h3{break-after:avoid}figure svg{min-width:0;max-width:100%}}
"""
