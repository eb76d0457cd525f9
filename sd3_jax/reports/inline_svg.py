"""Figures of matplotlib as SVG in a page, whose CSS variables give the colours."""

import hashlib
import io
import re

from matplotlib.figure import Figure

# Stand-ins that matplotlib can draw with; `inline` puts the CSS in their place.
SOFT, RULE, ACCENT = "#010203", "#010204", "#010205"
CSS = {SOFT: "var(--soft)", RULE: "var(--rule)", ACCENT: "var(--accent)"}
METADATA = ("Creator", "Date", "Format", "Type")  # left out, with their links


def inline(figure: Figure) -> str:
    """Only the <svg> element: short, and with ids that are unique on the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(METADATA))
    svg = buffer.getvalue()
    # Inline SVG has no XML declaration or doctype.
    svg = svg[svg.index("<svg") :]
    # Smaller files: a page has a dozen plots, and must stay below 3 MB.
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]+; ", "", svg)  # the page's own
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)  # viewBox stays
    # Clip paths of all plots would share ids on one page, and the first would win.
    digest = hashlib.sha256(svg.encode()).hexdigest()[:8]
    used = set(re.findall(r"#([\w.-]+)", svg))
    name = lambda match: f' id="{digest}-{match[1]}"' if match[1] in used else ""
    svg = re.sub(r' id="([^"]+)"', name, svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{digest}-", svg)
    for stand_in, css in CSS.items():
        svg = svg.replace(stand_in, css)
    return svg


def standalone(svg: str) -> str:
    """A plot as a file of its own, in the page's light colours and its dark ones."""
    light = "--soft:#57606a;--rule:#d8dee4;--accent:#0969da;background:#fff"
    dark = "--soft:#9aa4af;--rule:#3a424c;--accent:#58a6ff;background:#0d1117"
    style = (
        f"<style>svg{{{light};font-family:system-ui,sans-serif}}"
        f"@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    )
    end = svg.index(">") + 1
    return f"{svg[:end]}{style}{svg[end:]}"
