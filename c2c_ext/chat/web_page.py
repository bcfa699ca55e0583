"""The page of `c2c web`, laid out in gradio, and its server."""

from __future__ import annotations

from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from .heat_map import VIEWS, usual_view
from .models import ChatModels
from .session import MODES, Settings
from .text import printable
from .web_answers import MAX_QUESTION, Answers
from .web_guard import Guard
from .web_html import CSS, panel
from .words import LABELS

MAX_WAITING = 32  # questions that wait for their turn
FONTS = ("system-ui", "sans-serif")  # the browser's own: nothing is fetched
# No event can be called by name from elsewhere.
UNNAMED = {"api_visibility": "private", "show_progress": "hidden"}
ONE_AT_A_TIME = {**UNNAMED, "concurrency_limit": 1, "concurrency_id": "models"}
AT_ONCE = {**UNNAMED, "concurrency_limit": None}  # beside an answer that is being generated


def launch(models: ChatModels, settings: Settings, host: str, port: int, loopback: bool) -> Any:
    """Starts the server in threads of its own; returns gradio's `Blocks`, which has a `close`."""
    blocks = page(models, settings)
    guard = Middleware(Guard, loopback=loopback)
    blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        allowed_paths=[],
        max_file_size=1,
        enable_monitoring=False,
        strict_cors=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None},
        theme=gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
        css=CSS,
    )
    return blocks


def page(models: ChatModels, settings: Settings) -> gr.Blocks:
    """What is where on the page, and which event does what."""
    answers = Answers(models, settings)
    names = models.names
    with gr.Blocks(title="c2c", analytics_enabled=False) as blocks:
        gr.Textbox(
            f"receiver: {printable(names['receiver'])}   sharer: {printable(names['sharer'])}   "
            f"fuser: {printable(names['fuser'])}",
            label="Two models talk through their KV-caches",
            lines=1,
            max_lines=1,
            interactive=False,
        )
        shown = gr.HTML(panel([]), elem_id="panel")
        state, asked = gr.State([]), gr.State([])  # the conversation; what was fused last
        mode = gr.Radio(
            [(LABELS[name], name) for name in MODES],
            value="c2c",
            label="Who answers",
            elem_id="mode",
        )
        question = gr.Textbox(
            label="Question",
            placeholder="Type a question and press Enter",
            max_length=MAX_QUESTION,
            elem_id="question",
            autofocus=True,
        )
        if models.prompts.examples:
            with gr.Row():
                for example in models.prompts.examples:
                    button = gr.Button(example, size="sm")
                    button.click(lambda text=example: text, None, question, **AT_ONCE)
        with gr.Row():
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
            compare = gr.Button("Compare all four", elem_id="compare")
            stop = gr.Button("Stop", variant="stop", elem_id="stop")
            reset = gr.Button("New conversation", elem_id="reset")
        with gr.Group(visible=False) as weights:
            view = gr.Radio(
                VIEWS,
                value=usual_view(models.fuser.config),
                label="Dynamic weights of the last fused prompt: rows",
                elem_id="view",
            )
            heat = gr.HTML(elem_id="heat")
        if models.prompts.help:
            with gr.Accordion("The language of this pair", open=False):
                gr.Textbox(models.prompts.help, lines=11, interactive=False, show_label=False)

        given, outputs = [question, mode, state], [shown, state, question, asked]
        events = [
            question.submit(answers.ask, given, outputs, **ONE_AT_A_TIME),
            ask.click(answers.ask, given, outputs, **ONE_AT_A_TIME),
            compare.click(answers.compare, given, outputs, **ONE_AT_A_TIME),
        ]
        for event in events:
            event.success(answers.draw, [asked, view], [heat, weights], **ONE_AT_A_TIME)
        view.input(answers.draw, [asked, view], [heat, weights], **ONE_AT_A_TIME)
        stop.click(answers.stop, None, None, **AT_ONCE)
        reset.click(answers.reset, None, [*outputs, weights], cancels=events, **AT_ONCE)
        blocks.unload(answers.stop)  # the tab was closed
    return blocks
