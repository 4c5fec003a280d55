"""One HTML file that loads nothing from elsewhere: escaping, tables, pictures as data URIs, and the style sheet.

The page's own security policy forbids every request, and scripts but for one that is named by its hash, so that text
which slipped through could do nothing.
"""

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ldmcli.core.console import clean, redact

EMBED_BYTES = 1_500_000  # a larger picture is embedded smaller, as JPEG
EMBED_WIDTH = 1600
PAGE_WIDTH = 1080
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def safe(text: object) -> str:
    """Text from anywhere as HTML text or attribute: no markup, no control characters, no secrets."""
    return escape(redact(clean(text)), quote=True)


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """The whole document. style: rules beside the house's; script: JavaScript of ours, run when the body stands."""
    policy, code = _POLICY, ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
        policy, code = f"{_POLICY}; script-src 'sha256-{digest}'", f"<script>{script}</script>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{safe(title)}</title><style>{_STYLE}{style}</style></head>\n"
        f"<body><main>\n{body}\n</main>{code}</body></html>\n"
    )


def section(title: str, content: str, lead: str = "") -> str:
    """A part of the page with its heading; '' where it has no content. `content` and `lead` are HTML."""
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{safe(title)}</h2>{lead}{content}</section>\n" if content else ""


def tiles(entries: Iterable[tuple[str, str, str]], css_class: str = "") -> str:
    """Key figures: (name, value, remark)."""
    cells = "".join(
        f'<div class="tile"><div class="name">{safe(name)}</div><div class="value">{_value(value)}</div>'
        f'<div class="remark">{safe(remark)}</div></div>'
        for name, value, remark in entries
    )
    return f'<div class="tiles {css_class}">{cells}</div>' if cells else ""


def _value(text: str) -> str:
    """The number large, its unit small."""
    number, _, unit = text.partition(" ")
    return f"{safe(number)}<small> {safe(unit)}</small>" if unit else safe(number)


def definition_list(entries: Iterable[tuple[str, object]]) -> str:
    """Names and values that a reader looks up, values that wrap anywhere."""
    rows = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>" for name, value in entries if value not in ("", None))
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def table(rows: Sequence[Sequence[object]], headers: Sequence[str], css_class: str = "") -> str:
    """A table that scrolls in its own frame where the screen is narrow."""
    if not rows:
        return ""
    head = "".join(f"<th>{safe(name)}</th>" for name in headers)
    body = "".join("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{css_class}">{content}</table></div>'


def folded(title: str, content: str) -> str:
    """Content that a click opens."""
    return f"<details><summary>{safe(title)}</summary>{content}</details>" if content else ""


# ---------------------------------------------------------------- pictures


def read_picture(path: Path):
    """A Pillow picture in RGB, or None where the file is missing, damaged or no picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return None


def data_uri(image) -> str:
    """A Pillow picture as it stands in the page: PNG, or a smaller JPEG where that would weigh too much."""
    content = _encoded(image, "PNG", optimize=True)
    image_format = "png"
    if len(content) > EMBED_BYTES:
        image = image.copy()
        image.thumbnail((EMBED_WIDTH, 4 * EMBED_WIDTH))
        content, image_format = _encoded(image, "JPEG", quality=88), "jpeg"
    return f"data:image/{image_format};base64,{base64.b64encode(content).decode('ascii')}"


def _encoded(image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def picture(image, alt: str, caption: str = "", width: int = PAGE_WIDTH) -> str:
    """A <figure>, enlarged by a whole factor as far as `width` allows, never wider than the screen."""
    factor = max(1, width // image.width)
    shown = min(image.width * factor, width)
    caption = f"<figcaption>{safe(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="picture" style="max-width:{shown}px"><img class="{"pixels" if factor > 1 else ""}" '
        f'src="{data_uri(image)}" width="{image.width}" height="{image.height}" alt="{safe(alt)}">{caption}</figure>'
    )


def cards(pictures: Sequence, captions: Sequence[str], marks: Sequence[str] = ()) -> str:
    """Pictures with a line of text under each. marks: "right", "wrong" or "" for each."""
    marks = [*marks, *[""] * (len(pictures) - len(marks))]
    items = "".join(
        f'<figure class="card {mark}"><img class="pixels" src="{data_uri(one)}" width="{one.width}" '
        f'height="{one.height}" alt="{safe(text)}"><figcaption>{safe(text)}</figcaption></figure>'
        for one, text, mark in zip(pictures, captions, marks)
    )
    return f'<div class="cards">{items}</div>'


def mosaic(pictures: Sequence, titles: Sequence[str] = (), marks: Sequence[str] = ()) -> str:
    """Many pictures close together; their text shows on hover. marks as for `cards`."""
    titles, marks = [*titles, *[""] * len(pictures)], [*marks, *[""] * len(pictures)]
    items = "".join(
        f'<img class="pixels {mark}" src="{data_uri(one)}" width="{one.width}" height="{one.height}" '
        f'alt="{safe(text)}" title="{safe(text)}">'
        for one, text, mark in zip(pictures, titles, marks)
    )
    return f'<div class="mosaic">{items}</div>'


def cut(sheet, size: Sequence[int], gap: int = 2) -> list:
    """The cells of a contact sheet (`contact_sheets`) of pictures of `size` = (height, width), in reading order; []
    where it is no such sheet."""
    height, width = size
    columns, over_x = divmod(sheet.width - gap, width + gap)
    rows, over_y = divmod(sheet.height - gap, height + gap)
    if over_x or over_y:
        return []
    corners = [(gap + x * (width + gap), gap + y * (height + gap)) for y in range(rows) for x in range(columns)]
    return [sheet.crop((x, y, x + width, y + height)) for x, y in corners]


_STYLE = """
:root{--bg:#fbfaf8;--panel:#fff;--ink:#1d1f23;--soft:#62666f;--line:#e3e1dc;--accent:#2456a6;
--c0:#2456a6;--c1:#c2571a;--c2:#2f7d4f;--c3:#8a3f8f;--c4:#8c6d1f;--c5:#b3374b;
--good:#2f7d4f;--busy:#2456a6;--warn:#97650a;--bad:#b3374b}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--panel:#1d2024;--ink:#e8e6e1;--soft:#9fa3ab;--line:#33373d;
--accent:#8ab4f0;--c0:#7fb0f5;--c1:#f0975c;--c2:#74c795;--c3:#cf8fd4;--c4:#d3b45c;--c5:#ef8795;
--good:#74c795;--busy:#7fb0f5;--warn:#dfb155;--bad:#ef8795}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1128px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:2rem;line-height:1.2;margin:0 0 8px;letter-spacing:-.015em;overflow-wrap:anywhere;text-wrap:balance}
h2{font-size:1.2rem;margin:0 0 12px;letter-spacing:-.005em}
h3{font-size:1rem;margin:20px 0 8px}
section{margin-top:44px}
.part{border-top:1px solid var(--line);padding-top:28px}.part>h2{font-size:1.5rem}.part section{margin-top:28px}
.part section h2{font-size:1.05rem}
.lead{max-width:46em;margin:-4px 0 16px;color:var(--soft)}
.note{margin:14px 0 0;font-size:.88rem}
header .lead{margin:0 0 20px;font-size:1.06rem}
.state{display:inline-block;vertical-align:middle;margin-left:10px;padding:2px 10px;border:1px solid;border-radius:99px;
font-size:.8rem;font-weight:600;letter-spacing:0}
.finished{color:var(--good)}.running{color:var(--busy)}.interrupted{color:var(--warn)}
.failed,.diverged,.unknown{color:var(--bad)}
.reason{margin:8px 0 0;padding:8px 12px;border-left:3px solid var(--bad);background:var(--panel);overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;background:var(--line);
border:1px solid var(--line);border-radius:10px;overflow:hidden;margin:20px 0}
.tile{background:var(--panel);padding:14px 16px}
.name,.remark{font-size:.82rem;color:var(--soft);overflow-wrap:anywhere}
.value{font-size:1.6rem;font-weight:600;line-height:1.25;font-variant-numeric:tabular-nums;letter-spacing:-.02em}
.value small{font-size:.85rem;font-weight:400;letter-spacing:0;color:var(--soft)}
.big .value{font-size:2.5rem}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:4px 20px;margin:16px 0 0;font-size:.92rem}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:16px}
figure{margin:0}
.chart{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:12px 12px 6px;min-width:0}
.chart figcaption{font-size:.88rem;margin-bottom:6px}
.chart p{margin:2px 0 6px;font-size:.8rem;color:var(--soft)}
.now{color:var(--soft);font-variant-numeric:tabular-nums}
figcaption b{font-weight:600}
.key{display:inline-block;margin-left:10px}
.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:5px;
vertical-align:middle;background:var(--c)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
svg{display:block;width:100%;height:auto}
svg text{font-size:11.5px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .g{stroke:var(--line)}
svg .l{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
svg .b{fill:var(--c);opacity:.14;stroke:none}
svg .raw{opacity:.28;stroke-width:1}
svg .e{fill:var(--c)}svg .h{fill:var(--c);opacity:0}svg .h:hover{opacity:.7}
.picture{margin:0 0 20px}.picture img{display:block;width:100%;height:auto;border-radius:4px}
.picture figcaption{margin-top:6px;font-size:.85rem;color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(112px,1fr));gap:16px 12px}
.card img{display:block;width:100%;height:auto;border-radius:4px;border:1px solid var(--line)}
.card figcaption{margin-top:5px;font-size:.78rem;line-height:1.35;color:var(--soft);overflow-wrap:anywhere}
.card.wrong figcaption::before{content:"\\2717";margin-right:5px;color:var(--bad)}
.card.right figcaption::before{content:"\\2713";margin-right:5px;color:var(--good)}
.mosaic{display:grid;grid-template-columns:repeat(16,1fr);gap:3px}
.mosaic img{display:block;width:100%;height:auto;border-radius:2px}.mosaic .wrong{outline:3px solid var(--bad)}
.pixels{image-rendering:pixelated}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:20px 16px}
.strip .picture{margin:0}.strip .pixels{image-rendering:auto}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;min-width:60%}
th,td{text-align:left;padding:6px 18px 6px 0;border-bottom:1px solid var(--line);vertical-align:top;
font-variant-numeric:tabular-nums}
td{overflow-wrap:anywhere}
th{font-weight:600;color:var(--soft)}
.compare td+td,.compare th+th{text-align:right;padding-right:0;padding-left:18px}
.compare{max-width:640px;width:100%}.compare td{overflow-wrap:normal}
details{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:10px 16px;margin:12px 0}
summary{cursor:pointer;font-weight:600}
details[open] summary{margin-bottom:10px}
code{font:.88em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.changed td:nth-child(2){font-weight:600;color:var(--accent)}
footer{margin-top:56px;padding-top:14px;border-top:1px solid var(--line);font-size:.85rem;color:var(--soft)}
@media (min-width:900px){.facts{grid-template-columns:max-content minmax(0,1fr) max-content minmax(0,1fr)}}
@media (max-width:800px){.mosaic{grid-template-columns:repeat(8,1fr)}}
@media (max-width:600px){main{padding:20px 16px 48px}h1{font-size:1.55rem}section{margin-top:34px}
.tiles{grid-template-columns:repeat(2,1fr)}.tile{padding:11px 12px}.value{font-size:1.35rem}
.big .value{font-size:1.75rem}
.compare td+td,.compare th+th{padding-left:10px}.compare{font-size:.82rem}
.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:8px}
.cards{grid-template-columns:repeat(3,1fr)}.picture .pixels{image-rendering:auto}}
@media print{body{background:#fff}.chart,.card{break-inside:avoid}}
"""
