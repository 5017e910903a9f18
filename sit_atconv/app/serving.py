"""The page on a port of this machine, until a signal ends it."""

import os
from contextlib import closing
from threading import Event
from typing import TYPE_CHECKING

from sit_atconv.runtime.errors import InputError, option
from sit_atconv.runtime.signals import ENDING, handled

if TYPE_CHECKING:
    import gradio as gr

    from sit_atconv.app.page import Files
    from sit_atconv.app.studio import Studio

QUEUED = 32  # requests that wait at the most
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # both would be sent otherwise


def serve(studio: "Studio", host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> None:
    """Serve the page of a studio, and print its address, until SIGINT or SIGTERM.

    Raises InputError for a port that is taken, and for an address that is not of this machine.
    """
    os.environ.update(QUIET)

    from sit_atconv.app.page import Files

    ended = Event()
    with closing(Files()) as files, handled(ENDING, lambda number, frame: ended.set()):
        page = started(studio, files, host, port, share)
        print(f"the app is at {page.share_url or page.local_url}; Ctrl-C ends it", flush=True)
        try:
            ended.wait()
        finally:
            page.close(verbose=False)


def started(studio: "Studio", files: "Files", host: str, port: int | None = None, share: bool = False) -> "gr.Blocks":
    """The page, which is served in a thread of its own until it is closed. Raises InputError as `serve`."""
    from sit_atconv.app.page import STYLE, build, theme

    page = build(studio, files).queue(max_size=QUEUED)
    try:
        page.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, show_error=True,
            theme=theme(), css=STYLE.read_text(), footer_links=[], run_history=False, ssr_mode=False, pwa=False,
            mcp_server=False, enable_monitoring=False, inbrowser=False,
        )  # fmt: skip
    except OSError as error:  # gradio's own text says what to do with its own arguments
        stated = option("host", host) if port is None else f"{option('host', host)}, {option('port', port)}"
        raise InputError(
            f"{stated}: the app cannot listen there ({type(error).__name__}); take another port, or an address of this "
            "machine"
        ) from None
    return page
