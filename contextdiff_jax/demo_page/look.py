"""How the page looks: theme, style sheet, and the figures of pictures and clips.

Everything is in the page itself: no fonts, scripts or pictures from other hosts.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from contextdiff_jax.demo_page.studio import Shown

if TYPE_CHECKING:
    import gradio as gr

FONT = ("ui-sans-serif", "system-ui", "Segoe UI", "Helvetica Neue", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "DejaVu Sans Mono", "monospace")

CSS = """
.gradio-container {max-width: 1120px !important; margin: 0 auto !important; padding-top: 8px}
#top {padding: 20px 4px 4px}
#top h1 {font-size: 26px; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 4px}
#top p {margin: 0; color: var(--body-text-color-subdued); font-size: 15px; line-height: 1.5}
#top .facts {font-size: 13px; margin-top: 6px}
.stage {display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 16px}
.stage figure {margin: 0; min-width: 0}
.stage .frame {position: relative; aspect-ratio: var(--ratio, 1); border-radius: 12px;
  overflow: hidden; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); display: grid; place-items: center}
.stage img {width: 100%; height: 100%; object-fit: contain; display: block; margin: 0}
.stage img.small {image-rendering: pixelated}
.stage .empty {color: var(--body-text-color-subdued); font-size: 14px; padding: 24px;
  text-align: center; line-height: 1.5}
.stage .bar {position: absolute; left: 0; bottom: 0; height: 4px; background: var(--color-accent);
  transition: width .2s}
.stage figcaption {font-size: 13px; line-height: 1.45; padding: 8px 2px 0;
  color: var(--body-text-color-subdued); display: flex; flex-wrap: wrap; gap: 2px 10px;
  justify-content: space-between}
.stage figcaption b {color: var(--body-text-color); font-weight: 600}
.stage a {color: var(--link-text-color); text-decoration: none}
.stage a:hover {text-decoration: underline}
.status {font-size: 14px; min-height: 24px; padding: 6px 2px; line-height: 1.5;
  color: var(--body-text-color-subdued); overflow-wrap: anywhere}
.status.error {color: var(--error-text-color); background: var(--error-background-fill);
  border: 1px solid var(--error-border-color); border-radius: 8px; padding: 8px 12px}
.html-container {padding: 0 !important}
.note {font-size: 13px; color: var(--body-text-color-subdued); line-height: 1.5; padding: 0 2px}
#gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)) !important;
  grid-auto-rows: auto !important; padding-top: 34px}
#gallery img {image-rendering: pixelated}
#gallery .caption-label {display: none}
#gallery .grid-wrap {min-height: 0 !important; height: auto !important}
#gallery .empty {min-height: 110px}
footer {display: none !important}
"""


def make_theme() -> gr.themes.Base:
    """Return the theme: quiet greys, one accent, the system's own fonts."""
    import gradio as gr

    fonts = {"font": list(FONT), "font_mono": list(MONO)}
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="stone", radius_size="md", **fonts)
    return theme.set(
        body_background_fill="#fbfaf8",
        block_background_fill="#ffffff",
        block_border_width="1px",
        block_border_color="#e9e5df",
        block_shadow="none",
        body_text_color="#292524",
        body_text_color_subdued="#6b645d",
        block_label_text_color="#57514b",
        block_title_text_color="#292524",
        block_info_text_color="#6b645d",
        input_border_width="1px",
        input_placeholder_color="#8f877f",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#f3f0eb",
        button_secondary_border_color="#ddd8d0",
        button_border_width="1px",
        block_label_text_size="*text_sm",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="white",
        input_background_fill="#ffffff",
        input_border_color="#ddd8d0",
        slider_color="*primary_600",
        color_accent="*primary_600",
        link_text_color="*primary_700",
    )


def top(source: str, facts: str) -> str:
    """Return the page's head: what it is, and which model it shows."""
    return (
        "<div id='top'><h1>ContextDiff</h1><p>Pictures from words. Ordinary diffusion sees the "
        "words only while it removes noise; here a learned context of words and picture also "
        "shifts the noising, and both can be seen side by side.</p>"
        f"<p class='facts'>{html.escape(source)} · {html.escape(facts)}</p></div>"
    )


def status(text: str = "", error: bool = False) -> str:
    """Return the line that says what happens, or what is wrong."""
    kind, role = ("status error", "alert") if error else ("status", "status")
    return f"<div class='{kind}' role='{role}' aria-live='polite'>{html.escape(text)}</div>"


def embedded(data: bytes, kind: str) -> str:
    """Return a file as a URL that holds it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def figure(
    title: str,
    inside: str = "",
    files: Sequence[tuple[str, str, str]] = (),
    ratio: float = 1.0,
    progress: float | None = None,
) -> str:
    """Return a framed picture (HTML) with its title; `files`: (label, name, URL) to download."""
    links = " ".join(
        f"<a href='{url}' download='{html.escape(name)}'>{html.escape(label)}</a>"
        for label, name, url in files
    )
    bar = "" if progress is None else f"<div class='bar' style='width:{100 * progress:.0f}%'></div>"
    return (
        f"<figure style='--ratio:{ratio:g}'><div class='frame'>{inside}{bar}</div>"
        f"<figcaption><b>{html.escape(title)}</b><span>{links}</span></figcaption></figure>"
    )


def image(url: str, description: str, side: int) -> str:
    """Return a picture of that many pixels a side; those of small ones are shown as squares."""
    kind = " class='small'" if side < 256 else ""
    return f"<img{kind} src='{url}' alt='{html.escape(description, quote=True)}'>"


def stage(figures: Sequence[str], columns: int = 0) -> str:
    """Return the figures side by side, in columns as many as they are, or as many as are given."""
    columns = columns or len(figures)
    return f"<div class='stage' style='--columns:{columns}'>{''.join(figures)}</div>"


def empty_stage(text: str) -> str:
    """Return the stage before the first click."""
    return stage([figure("", f"<div class='empty'>{html.escape(text)}</div>", ratio=2)])


def title_of(shown: Shown, has_context: bool) -> str:
    """Return what a picture is, beside the other one."""
    if not has_context:
        return f"seed {shown.wish.seed}"
    if not shown.wish.gain:
        return "plain diffusion"
    return "with context" + ("" if shown.wish.gain == 1 else f", gain {shown.wish.gain:g}")


def show(shown: Sequence[Shown], has_context: bool, size: tuple[int, int]) -> str:
    """Return the stage of pictures on their way, or done with their files."""
    figures, ratio = [], size[1] / size[0]
    for each in shown:
        wish = each.wish
        if each.png is None:
            inside = "<div class='empty'>waiting</div>"
        else:
            inside = image(embedded(each.png, "image/png"), wish.prompt, min(size))
        files, progress = [], None if each.done or not each.step else each.step / each.steps
        if each.done:
            gain = f"-gain{wish.gain:g}" if has_context else ""
            name = f"contextdiff-seed{wish.seed}{gain}.png"
            files = [("Download PNG", name, embedded(each.png, "image/png"))]
        figures.append(figure(title_of(each, has_context), inside, files, ratio, progress))
    return stage(figures, 2)
