"""The page: six tabs over one installation, behind the guard."""

from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.types import ASGIApp

from studio import __version__
from studio.errors import NotFoundError
from studio.services.studio import Studio
from studio.services.workers import is_alive
from studio.ui import (
    artifacts_tab,
    chats_tab,
    datasets_tab,
    look,
    queue_tab,
    runs_tab,
    train_tab,
)
from studio.ui.artifacts_tab import ArtifactsTab
from studio.ui.chats_tab import ChatsTab
from studio.ui.datasets_tab import DatasetsTab
from studio.ui.edge import shown
from studio.ui.guard import Guard
from studio.ui.live import RAW
from studio.ui.queue_tab import QueueTab
from studio.ui.run_actions import chosen
from studio.ui.runs_tab import RunsTab
from studio.ui.train_tab import TrainTab
from studio.ui.upload_routes import mount_uploads

TABS = ("datasets", "train", "runs", "queue", "artifacts", "chat")
CACHE_SWEEP_SECONDS, CACHE_KEEP_SECONDS = 3600, 86_400
READ_ADDRESS = "() => window.studio.opened"


def build_app(studio: Studio) -> ASGIApp:
    """Return the ASGI application of the page.

    Args:
        studio: The installation.
    """
    blocks = build_page(studio)
    blocks.queue(default_concurrency_limit=16, max_size=256, api_open=False)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/healthz")
    def health() -> dict[str, object]:
        return {"version": __version__, "worker": is_alive(studio.home)}

    mount_uploads(app, studio)
    gr.mount_gradio_app(
        app,
        blocks,
        path="",
        footer_links=[],
        # Gradio would keep the inputs and outputs of every event in the browser's storage.
        run_history=False,
        show_error=False,
        max_file_size=studio.settings.max_upload_bytes,
        ssr_mode=False,
        pwa=False,
        theme=look.theme(),
        css=look.css(),
        head=look.head(),
    )
    return Guard(app)


def build_page(studio: Studio) -> Any:
    """Lay out the page and wire what goes from one tab to another."""
    with gr.Blocks(
        title="Delta Studio",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(CACHE_SWEEP_SECONDS, CACHE_KEEP_SECONDS),
    ) as blocks:
        gr.HTML(
            '<div class="brand"><b><span>Δ</span> Delta Studio</b>'
            '<span class="lead">Fine-tune Qwen3-Next and Qwen3.5, and see the proof that it '
            "happened.</span></div>"
        )
        address = [gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")]
        with gr.Tabs(selected="datasets", overflow_behavior="wrap") as tabs:
            with gr.Tab("Datasets", id="datasets") as datasets_page:
                datasets = datasets_tab.build(studio)
            with gr.Tab("Train", id="train") as train_page:
                train = train_tab.build(studio)
            with gr.Tab("Runs", id="runs") as runs_page:
                runs = runs_tab.build(studio)
            with gr.Tab("Queue", id="queue") as queue_page:
                queue = queue_tab.build(studio)
            with gr.Tab("Artifacts", id="artifacts") as artifacts_page:
                artifacts = artifacts_tab.build(studio)
            with gr.Tab("Chat", id="chat") as chat_page:
                chats = chats_tab.build(studio)
        pages = (datasets_page, train_page, runs_page, queue_page, artifacts_page, chat_page)
        for name, page in zip(TABS, pages, strict=True):
            page.select(None, None, None, js=f"() => window.studio.remember('tab', '{name}')")
        _wire_start(studio, blocks, address, tabs, datasets, train, runs)
        _wire_choices(studio, pages, datasets, train, artifacts, chats)
        _wire_steps(studio, tabs, train, runs, artifacts, chats)
        _wire_forks(studio, tabs, train, runs)
        _wire_queue(studio, tabs, queue, runs)
    return blocks


def _wire_start(
    studio: Studio,
    blocks: gr.Blocks,
    address: list[gr.Textbox],
    tabs: gr.Tabs,
    datasets: DatasetsTab,
    train: TrainTab,
    runs: RunsTab,
) -> None:
    """Show on opening what the address asks for."""

    def start(tab: str, run: str) -> list[Any]:
        found = datasets_tab.choices(studio)
        listed = runs_tab.choices(studio)
        known = [number for _, number in listed]
        wanted = int(run) if run.isdecimal() and len(run) < 12 else None
        chosen = wanted if wanted in known else next(iter(known), None)
        return [
            gr.Tabs(selected=tab if tab in TABS else "datasets"),
            gr.Dropdown(choices=found, value=found[0][1] if found else None),
            gr.Radio(choices=listed, value=chosen),
            *train_tab.start_values(studio),
        ]

    outputs = [tabs, datasets.pick, runs.pick, *train.fields, *train.derived]
    blocks.load(shown(start), address, outputs, js=READ_ADDRESS, show_progress="hidden").then(
        None, None, None, js="() => window.studio.start()"
    )


def _wire_choices(
    studio: Studio,
    pages: tuple[gr.Tab, ...],
    datasets: DatasetsTab,
    train: TrainTab,
    artifacts: ArtifactsTab,
    chats: ChatsTab,
) -> None:
    """Refresh the lists of a tab when it is opened."""
    datasets_page, train_page, _, _, artifacts_page, chat_page = pages

    def all_datasets(chosen: str | None) -> Any:
        return _kept(datasets_tab.choices(studio), chosen)

    def also_none(chosen: str | None) -> Any:
        return _kept([train_tab.NO_DATASET, *datasets_tab.choices(studio)], chosen)

    def adapters(chosen: int | None) -> Any:
        return _kept(artifacts_tab.choices(studio), chosen)

    def talkers(chosen: str | None) -> Any:
        return _kept(chats_tab.choices(studio), chosen)

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    datasets_page.select(shown(all_datasets), datasets.pick, datasets.pick, **quiet)
    train_page.select(shown(all_datasets), train.dataset, train.dataset, **quiet)
    train_page.select(shown(also_none), train.eval_dataset, train.eval_dataset, **quiet)
    artifacts_page.select(shown(adapters), artifacts.pick, artifacts.pick, **quiet)
    chat_page.select(shown(talkers), chats.pick, chats.pick, **quiet)
    datasets.added.change(
        shown(lambda sha: gr.Dropdown(choices=datasets_tab.choices(studio), value=sha)),
        datasets.added,
        train.dataset,
        **quiet,
    )


def _kept(choices: list[Any], chosen: Any) -> gr.Dropdown:
    known = [value for _, value in choices]
    return gr.Dropdown(
        choices=choices, value=chosen if chosen in known else next(iter(known), None)
    )


def _wire_steps(
    studio: Studio,
    tabs: gr.Tabs,
    train: TrainTab,
    runs: RunsTab,
    artifacts: ArtifactsTab,
    chats: ChatsTab,
) -> None:
    """Lead from launch to run, from run to merge, from run to chat."""

    def to_run(run_id: int) -> Any:
        return gr.Tabs(selected="runs"), gr.Radio(choices=runs_tab.choices(studio), value=run_id)

    def to_merge(run_id: int | None) -> Any:
        return gr.Tabs(selected="artifacts"), _kept(artifacts_tab.choices(studio), run_id)

    def to_chat(run_id: int | None) -> Any:
        found = chats_tab.choices(studio)
        return gr.Tabs(selected="chat"), _kept(found, f"run:{run_id}")

    train.launched.change(shown(to_run), train.launched, [tabs, runs.pick])
    runs.actions.merge.click(shown(to_merge), runs.pick, [tabs, artifacts.pick])
    runs.actions.chat.click(shown(to_chat), runs.pick, [tabs, chats.pick])


def _wire_forks(studio: Studio, tabs: gr.Tabs, train: TrainTab, runs: RunsTab) -> None:
    """Lead from a Run or one of its Checkpoints to the form of a new one."""

    def to_fork(run_id: int | None, step: int | None, keep: str) -> list[Any]:
        if step is None:
            raise NotFoundError("No checkpoint is chosen.", "Choose one in the list.")
        origin = {"run": chosen(run_id), "step": int(step), "keep": keep}
        return [gr.Tabs(selected="train"), *train_tab.opened(studio, origin)]

    def to_clone(run_id: int | None) -> list[Any]:
        return [gr.Tabs(selected="train"), *train_tab.opened(studio, {"run": chosen(run_id)})]

    form = [tabs, train.mode, *train.fields, *train.derived, *train.box.outputs]
    saved = runs.checkpoints
    saved.fork.click(shown(to_fork), [runs.pick, saved.step, saved.keep], form, preprocess=RAW)
    runs.actions.clone.click(shown(to_clone), runs.pick, form, preprocess=RAW)


def _wire_queue(studio: Studio, tabs: gr.Tabs, queue: QueueTab, runs: RunsTab) -> None:
    """Lead from a queued Run to all that is known of it."""

    def to_run(run_id: int | None) -> Any:
        number = chosen(run_id)
        return gr.Tabs(selected="runs"), gr.Radio(choices=runs_tab.choices(studio), value=number)

    queue.open.click(shown(to_run), queue.pick, [tabs, runs.pick], preprocess=RAW)
