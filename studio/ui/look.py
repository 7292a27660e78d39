"""How the page looks: theme, style sheet, script. System fonts only; nothing is fetched."""

from pathlib import Path

import gradio as gr

ASSETS = Path(__file__).parent / "assets"
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Return the theme."""
    return gr.themes.Default(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=FONTS,
        font_mono=MONO_FONTS,
    )


def css() -> str:
    """Return the style sheet."""
    return (ASSETS / "page.css").read_text(encoding="utf-8")


def head() -> str:
    """Return what is added to the page's head."""
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    return f"<script>{script}</script>"
