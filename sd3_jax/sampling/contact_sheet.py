"""The contact sheet of a sampling job: samples.html, beside the pictures it shows."""

from urllib.parse import quote

from sd3_jax.reports import html_page

STYLE = """
main { max-width: none }
.sheet { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)) }
.sheet figure { margin: 0 }
.sheet img { width: 100%; height: auto; border-radius: 4px; image-rendering: auto }
.sheet figcaption { font-size: .8rem; overflow-wrap: anywhere }
.sheet small { opacity: .7 }
"""


def html(lines: list[dict]) -> str:
    """An HTML page of all pictures with their prompts and settings."""
    weights = sorted({str(line["weights"]) for line in lines})
    # The page may be opened from disk or from a server, hence 'self' and file: below.
    shared = html_page.note(f"{len(lines)} pictures · weights {', '.join(weights)}")
    figures = html_page.join(map(figure, lines))
    return html_page.document(
        "Samples",
        html_page.Html(f"<style>{STYLE}</style>"),
        html_page.element("h1", "Samples"),
        shared,
        html_page.element("div", figures, class_="sheet"),
        images="'self' file:",
    )


def figure(line: dict) -> html_page.Html:
    settings = line["settings"]
    prompt = line["prompt"]
    # A task may have a text for each encoder.
    prompt = prompt if isinstance(prompt, str) else " | ".join(prompt)
    description = (
        f"seed {line['seed']} · {settings['steps']} steps of {settings['solver']} ·"
        f" cfg {settings['cfg']:g} · {settings['width']} × {settings['height']}"
    )
    description += f" · filtered: {line['filtered']}" if "filtered" in line else ""
    # File names may hold characters that a URL has to escape.
    file = quote(line["file"])
    # A job may have a million pictures; the browser loads those in sight.
    picture = html_page.element("img", src=file, alt=prompt, loading="lazy")
    small = html_page.element("small", description)
    caption = html_page.element("figcaption", prompt, html_page.Html("<br>"), small)
    return html_page.element(
        "figure", html_page.element("a", picture, href=file), caption
    )
