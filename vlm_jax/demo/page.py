"""The page of `cli.demo`, in Gradio."""

import html
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastapi  # type: ignore
import gradio as gr  # type: ignore

from vlm_jax.demo.answer import Answer, Progress
from vlm_jax.demo.comparison import comparison
from vlm_jax.demo.trial import Trial, TrialError

LOG = logging.getLogger(__name__)
CSS = Path(__file__).with_name("page.css")
FONTS, MONOSPACE = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # nothing is fetched from other sites
HEADS = ("", "At the budget", "Full budget", "Ratio")
WAITING = "Waiting: questions are answered one at a time"
STOPPED = "Stopped"
# A list that scrolls is a stop of the Tab key, which would close the menu and lose the keyboard's place.
LIST_WITHOUT_TAB = """() => {
  const skip = () => document.querySelectorAll('#reducer [role="listbox"]').forEach(list => { list.tabIndex = -1; });
  new MutationObserver(skip).observe(document.body, {childList: true, subtree: true});
}"""
FAILED = "The question was not answered; the log of the server has the cause."


def make_app(trial: Trial, *, token_budget: int | None = None, reducer: str | None = None) -> fastapi.FastAPI:
    """The application with the page.

    Args:
      trial: answers the questions.
      token_budget, reducer: what the slider and the menu show first; a ninth of the tokens, and the first of
        `choices.PREFERRED` that suits the release, when None.

    Raises:
      ConfigError: the reducer does not suit the release.
    """
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    theme = gr.themes.Default(primary_hue="indigo", font=FONTS, font_mono=MONOSPACE)
    return gr.mount_gradio_app(
        app,
        make_page(trial, token_budget=token_budget, reducer=reducer),
        "/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size=trial.service.settings.max_body_bytes,
        # Grey that can be read, with a contrast of at least 4.5.
        theme=theme.set(
            body_text_color_subdued="*neutral_600",
            body_text_color_subdued_dark="*neutral_300",
            button_primary_background_fill="*primary_600",
        ),
        css_paths=[CSS],
    )


def make_page(trial: Trial, *, token_budget: int | None = None, reducer: str | None = None) -> gr.Blocks:
    """The page; arguments as of `make_app`."""
    name, choices = trial.service.name, trial.choices
    kind = choices.initial_reducer(reducer)
    most = choices.most_tokens(kind)
    with gr.Blocks(title=f"{name} · vlm_jax", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(
            f"<h1>{html.escape(name)}</h1><p>Ask about a picture, and compare the answer at a budget of visual tokens "
            "with that at the full one.</p>",
            elem_id="head",
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=280,
                    elem_id="picture",
                )
                # Gradio would open the file itself; a file that is no picture, or a huge one, is told by `ask`.
                picture.preprocess = _path
                question = gr.Textbox(label="Question", placeholder="What does the sign say?", elem_id="question")
                budget = gr.Slider(
                    1,
                    most,
                    value=min(token_budget or max(1, most // 9), most),
                    step=1,
                    precision=0,
                    label="token_budget",
                    info=choices.unit(kind),
                    buttons=[],
                    elem_id="budget",
                )
                menu = gr.Dropdown(
                    list(choices.reducers), value=kind, label="Reducer", filterable=False, elem_id="reducer"
                )
                with gr.Row():
                    asks = gr.Button("Ask", variant="primary", min_width=100, elem_id="ask")
                    stops = gr.Button("Stop", min_width=100, elem_id="stop")
            with gr.Column(min_width=300):
                message = gr.HTML(elem_id="message")
                answer = gr.Textbox(label="Answer at the budget", lines=2, interactive=False, elem_id="answer")
                full = gr.Textbox(label="Answer at the full budget", lines=2, interactive=False, elem_id="full")
                table = gr.HTML(_table(Answer(), Answer()), elem_id="comparison")
                drawing = _drawing("What was kept, and boxes of the answer", "drawing")
                caption = gr.Markdown(visible=False, elem_id="caption")
                full_drawing = _drawing("Boxes of the answer at the full budget", "full_drawing")

        clock = gr.Number(visible=False)  # milliseconds since the page was opened, by the browser
        shown = [message, answer, full, table, drawing, caption, full_drawing]
        stopped: dict[str | None, float] = {}  # by page: when its user last pressed Stop

        def ask(
            source: str | None, text: str, tokens: int, chosen: str, asked: float, request: gr.Request
        ) -> Iterator[list[Any]]:
            def tells(message: str) -> list[Any]:
                return [message, *[gr.skip()] * (len(shown) - 1)]

            try:
                for progress in trial.ask(source, text, tokens, chosen):
                    if asked <= stopped.get(request.session_hash, -1.0):
                        yield tells(_stage(STOPPED))
                        return
                    yield _updates(progress)
            except TrialError as error:
                yield tells(_failed(str(error)))
            except Exception:  # XLA's errors, as for lack of memory; the next question may be answered
                LOG.exception("a question failed")
                yield tells(_failed(FAILED))

        def stop(now: float, request: gr.Request) -> None:
            stopped[request.session_hash] = now

        def closed(request: gr.Request) -> None:
            stopped.pop(request.session_hash, None)

        def chosen_reducer(chosen: str, tokens: int) -> Any:
            most = choices.most_tokens(chosen)
            return gr.Slider(maximum=most, value=min(tokens, most), info=choices.unit(chosen))

        options = {"show_progress": "hidden", "api_visibility": "private"}
        given = [picture, question, budget, menu, clock]
        triggers = [asks.click, question.submit]
        gr.on(triggers, None, None, message, js=_returns(_stage(WAITING)), **options)  # in the browser, at once
        timed = "(...given) => [...given.slice(0, -1), performance.now()]"
        gr.on(triggers, ask, given, shown, js=timed, trigger_mode="always_last", **options)
        stops.click(None, None, message, js=_returns(_stage(STOPPED)), **options)
        # A question ends by itself, without `cancels`: Gradio loses a question that is asked while it cancels one.
        stops.click(stop, clock, None, js=timed, queue=False, **options)
        page.unload(closed)
        page.load(None, None, None, js=LIST_WITHOUT_TAB, **options)
        menu.change(chosen_reducer, [menu, budget], budget, **options)
    page.queue(default_concurrency_limit=1, max_size=trial.service.settings.max_requests)  # times are of one question
    return page


def _path(payload: Any) -> str | None:
    """The path of an uploaded file."""
    return None if payload is None else payload.path


def _drawing(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label,
        alt_text=label,
        format="png",
        type="pil",
        interactive=False,
        visible=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
    )


def _updates(progress: Progress) -> list[Any]:
    """The values of the components that an answer changes."""
    return [
        _stage(progress.stage),
        progress.budget.text,
        progress.full.text,
        _table(progress.budget, progress.full),
        gr.Image(value=progress.drawing, visible=progress.drawing is not None),
        gr.Markdown(value=html.escape(progress.caption), visible=bool(progress.caption)),
        gr.Image(value=progress.full_drawing, visible=progress.full_drawing is not None),
    ]


def _stage(text: str) -> str:
    return f'<p class="stage" role="status">{html.escape(text)}</p>' if text else ""


def _failed(text: str) -> str:
    return f'<p class="failed" role="alert">{html.escape(text)}</p>'


def _returns(value: str) -> str:
    """A function in JavaScript that returns a value."""
    return f"() => {json.dumps(value)}"


def _table(budget: Answer, full: Answer) -> str:
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    rows = "".join(
        f'<tr><th scope="row">{what}</th>' + "".join(f"<td>{number}</td>" for number in numbers) + "</tr>"
        for what, *numbers in comparison(budget, full)
    )
    caption = "<caption>Times are without compilation</caption>"
    return f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
