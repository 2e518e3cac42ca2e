"""The page's layout: a tab for pictures, one for clips."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr

from contextdiff_jax.demo_page import look
from contextdiff_jax.demo_page.clips import ClipStudio
from contextdiff_jax.demo_page.components import File, MaskEditor, UploadButton
from contextdiff_jax.demo_page.handlers import (
    CONTROLS,
    NOISE,
    PICTURE,
    ClipHandlers,
    PictureHandlers,
    guarded,
)
from contextdiff_jax.demo_page.limits import MAX_GUIDANCE, MAX_STEPS, MAX_TEXT, MAX_TUNING
from contextdiff_jax.demo_page.studio import Studio
from contextdiff_jax.demo_page.worker import BEAT
from contextdiff_jax.diffusion.samplers import SAMPLERS

PLACEHOLDER = "What shall the picture show? For example: a large red circle"
# Answers that are quick run beside those that use the device, which wait for each other.
QUICK = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 4}
AT_ONCE = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
DEVICE = {
    "api_visibility": "private",
    "show_progress": "hidden",
    "concurrency_limit": 1,
    "concurrency_id": "device",
}
WAIT = look.status("Waiting for your turn.")


def build_page(
    studio: Studio, pictures: PictureHandlers, clips: ClipHandlers, source: str, facts: str
) -> gr.Blocks:
    """Return the page, to be launched."""
    with gr.Blocks(
        title="ContextDiff", analytics_enabled=False, delete_cache=(3600, 86400)
    ) as page:
        gr.HTML(look.top(source, facts), padding=False)
        with gr.Tabs():
            with gr.Tab("Pictures", id="pictures"):
                _pictures(studio, pictures)
            with gr.Tab("Clips", id="clips"):
                _clips(clips)
    return page


def _pictures(studio: Studio, handlers: PictureHandlers) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=330):
            controls, buttons = _words(studio)
            begin = gr.Radio(
                [NOISE, PICTURE],
                value=PICTURE if studio.pipeline.opened.only_inpaints else NOISE,
                label="Start from",
                elem_id="begin",
            )
            with gr.Column(visible=begin.value == PICTURE) as from_picture:
                file, editor = _picture(controls)
            beside = _settings(studio, controls, buttons)
        with gr.Column(scale=7, min_width=360):
            stage, status, gallery = _results()
            with gr.Row():
                buttons["use_last"] = gr.Button("Start from the newest picture", size="sm")
                restore = UploadButton("Restore settings from a PNG", size="sm", elem_id="restore")
    asked = [controls[name] for name in CONTROLS]
    begin.change(lambda way: gr.update(visible=way == PICTURE), begin, from_picture, **AT_ONCE)
    made, start = gr.State([]), gr.State(None)
    drawing = gr.on(
        [buttons["draw"].click, controls["prompt"].submit], lambda: WAIT, None, status, **AT_ONCE
    ).then(
        handlers.draw,
        [*asked, beside, begin, start, editor, made],
        [stage, gallery, made, status],
        **DEVICE,
    )
    buttons["stop"].click(_stopped, None, status, cancels=[drawing], **QUICK)
    buttons["new_seed"].click(handlers.new_seed, None, controls["seed"], **QUICK)
    canvas = [start, editor, begin, status]
    file.upload(guarded(4)(handlers.upload), file, canvas, **QUICK)
    file.clear(guarded(4)(handlers.upload), file, canvas, **QUICK)
    buttons["use_last"].click(guarded(4)(handlers.use_last), made, canvas, **QUICK)
    restored = [*asked, status]
    restore.upload(guarded(len(restored))(handlers.restore), restore, restored, **QUICK)

    def select(album: list, event: gr.SelectData) -> tuple:
        return guarded(len(restored))(handlers.select)(album, event)

    gallery.select(select, made, restored, **QUICK)


def _stopped() -> str:
    """What is said after Stop, when the last news of what was stopped have come."""
    time.sleep(BEAT)
    return look.status("Stopped.")


def _results() -> tuple[gr.HTML, gr.HTML, gr.Gallery]:
    """The pictures that are made, what is said of them, and those that were made before."""
    empty = "Your picture appears here."
    stage = gr.HTML(look.empty_stage(empty), padding=False, elem_id="stage")
    status = gr.HTML(look.status(), padding=False, elem_id="status")
    gallery = gr.Gallery(
        label="Gallery: click a picture to restore its settings",
        columns=6,
        height="auto",
        object_fit="contain",
        interactive=False,
        allow_preview=False,
        buttons=[],
        elem_id="gallery",
    )
    return stage, status, gallery


def _words(studio: Studio) -> tuple[dict[str, Any], dict[str, gr.Button]]:
    """The prompt, the buttons below it, and example prompts if the model has any."""
    wish, prompts = studio.default, studio.options.prompts
    prompt = gr.Textbox(
        wish.prompt,
        label="Prompt",
        placeholder=PLACEHOLDER,
        lines=2,
        max_lines=4,
        max_length=MAX_TEXT * 20,  # longer ones are told of, not cut
        elem_id="prompt",
        submit_btn=False,
    )
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", scale=3, elem_id="draw")
        stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
    if prompts:
        gr.Examples([[each] for each in prompts[:8]], prompt, label="Or one of these")
    return {"prompt": prompt}, {"draw": draw, "stop": stop}


def _picture(controls: dict[str, Any]) -> tuple[gr.File, gr.ImageEditor]:
    """The fields for a picture to start from."""
    file = File(
        label="A picture: PNG, JPEG or WebP, up to 10 MB", height=150, elem_id="picture-file"
    )
    editor = MaskEditor(
        sources=(),
        layers=False,
        transforms=(),
        label="Mask",
        brush=gr.Brush(colors=["#0f766ecc"], color_mode="fixed", default_size=48),
        canvas_size=(512, 512),
        height=420,
        buttons=[],
        elem_id="editor",
    )
    controls["strength"] = gr.Slider(
        0.05,
        1,
        0.8,
        step=0.05,
        label="Strength",
        info="The share of the steps that is made; 1 keeps nothing of what is painted anew.",
        elem_id="strength",
    )
    return file, editor


def _settings(
    studio: Studio, controls: dict[str, Any], buttons: dict[str, gr.Button]
) -> gr.Checkbox:
    """The settings, each at the model's own value; whether plain diffusion is beside."""
    wish, largest = studio.default, min(studio.largest_gain, 2.0)
    has = studio.has_context
    beside = gr.Checkbox(
        has,
        label="Plain diffusion beside it: the same seed, context gain 0",
        elem_id="beside",
        visible=has,
    )
    controls["gain"] = gr.Slider(
        0,
        max(int(20 * largest + 1e-6) / 20, 1),
        1,
        step=0.05,
        label="Context gain",
        info="1: as it was trained. 0: plain diffusion.",
        elem_id="gain",
        visible=has,
    )
    with gr.Accordion("Settings", open=True):
        controls["negative"] = gr.Textbox(
            label="Negative prompt",
            placeholder="What the picture shall not show",
            elem_id="negative",
        )
        controls["steps"] = gr.Slider(
            1, MAX_STEPS, wish.steps, step=1, label="Steps", elem_id="steps"
        )
        controls["guidance"] = gr.Slider(
            0, MAX_GUIDANCE, wish.guidance, step=0.1, label="Guidance", elem_id="guidance"
        )
        controls["sampler"] = gr.Dropdown(
            list(SAMPLERS), value=wish.sampler, label="Sampler", elem_id="sampler"
        )
        controls["seed"] = gr.Textbox("0", label="Seed", elem_id="seed")
        buttons["new_seed"] = gr.Button("New seed", size="sm", elem_id="new-seed")
    return beside


def _clips(handlers: ClipHandlers) -> None:
    studio: ClipStudio = handlers.studio
    if studio.why_not:
        gr.HTML(look.status(studio.why_not), padding=False)
        return
    clip = gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=330):
            file = File(
                label="A clip: GIF, WebP, MP4, WebM, up to 10 MB", height=150, elem_id="clip-file"
            )
            example = gr.Button(
                "Draw a moving shape instead",
                size="sm",
                visible=studio.draws_shapes,
                elem_id="example",
            )
            prompt = gr.Textbox(label="What the clip shows", elem_id="clip-prompt")
            edit = gr.Textbox(label="What it shall show", elem_id="clip-edit")
            with gr.Row():
                button = gr.Button("Edit", variant="primary", scale=3, elem_id="edit")
                stop = gr.Button("Stop", scale=1, min_width=80)
            keep = gr.Checkbox(False, label="Keep what the changed words don't name")
            strength, guidance, tuning = _clip_sliders()
        with gr.Column(scale=7, min_width=360):
            empty = "The clip and its edit appear here."
            stage = gr.HTML(look.empty_stage(empty), padding=False, elem_id="clip-stage")
            status = gr.HTML(look.status(), padding=False, elem_id="clip-status")
            gr.HTML(
                "<p class='note'>The model learns the clip for a few steps, finds the noise that "
                "gives the clip back, and samples it anew by the other words. The first 8 frames "
                "are read.</p>",
                padding=False,
            )
    file.upload(guarded(3)(handlers.upload), file, [clip, stage, status], **QUICK)
    example.click(guarded(5)(handlers.example), None, [clip, prompt, edit, stage, status], **QUICK)
    asked = [clip, prompt, edit, strength, guidance, tuning, keep]
    waiting = button.click(lambda: WAIT, None, status, **AT_ONCE)
    running = waiting.then(handlers.edit, asked, [stage, status], **DEVICE)
    stop.click(_stopped, None, status, cancels=[running], **QUICK)


def _clip_sliders() -> tuple[gr.Slider, gr.Slider, gr.Slider]:
    strength = gr.Slider(
        0.05,
        1,
        0.55,
        step=0.05,
        label="Strength",
        info="The share of the noise that is undone: more changes more.",
    )
    with gr.Row():
        guidance = gr.Slider(0, MAX_GUIDANCE, 3, step=0.1, label="Guidance")
        tuning = gr.Slider(1, MAX_TUNING, 20, step=1, label="Tuning steps")
    return strength, guidance, tuning
