"""Upload through the page, beside a copy on the disk and the validation of the same file.

    python benchmarks/upload.py --mb 1000 --rounds 3

A headless Chromium sends the file through the real upload box to the real routes on this machine.
Each round also copies the file with `cp` and validates it, so that all see the same machine. While
the browser sends, another process asks /healthz every 20 ms: the page has to stay responsive.
Goal: upload <= 1.5 x (copy + validation).
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.02
GOAL = 1.5


def serve(home: Path, port: int) -> None:
    """Serve a page that has nothing but the upload box."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from studio.services.studio import open_studio
    from studio.settings import Settings
    from studio.ui import look
    from studio.ui.guard import Guard
    from studio.ui.upload import upload_box
    from studio.ui.upload_routes import mount_uploads

    app = FastAPI()

    @app.get("/healthz")
    def health() -> dict[str, str]:
        return {}

    mount_uploads(app, open_studio(Settings(home=home, max_upload_bytes=2**40)))
    with gr.Blocks(analytics_enabled=False) as blocks:
        upload_box()
    gr.mount_gradio_app(app, blocks, path="", css=look.css(), head=look.head(), ssr_mode=False)
    uvicorn.run(Guard(app), port=port, log_level="error")


def copied(file: Path, folder: Path) -> float:
    """Return the seconds of a copy on the disk."""
    target = folder / "copy"
    started = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", file, target], check=True)
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def validated(file: Path) -> float:
    """Return the seconds that a process of its own needs to validate the file."""
    code = (
        "import sys, time; from pathlib import Path; from studio.intake.read import check_file; "
        "started = time.perf_counter(); report = check_file(Path(sys.argv[1])); "
        "assert report.is_accepted; print(time.perf_counter() - started)"
    )
    command = [sys.executable, "-c", code, str(file)]
    return float(subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout)


def uploaded(page: Page, address: str, file: Path) -> float:
    """Return the seconds from choosing the file to its sha256 on the page."""
    page.goto(address)
    page.wait_for_selector(".dropzone")
    started = time.perf_counter()
    page.set_input_files(".uploads input", file)
    page.wait_for_function(
        "document.querySelector('.uploadhash')?.textContent.startsWith('sha256')", timeout=600_000
    )
    return time.perf_counter() - started


def asked(address: str, stop: threading.Event, seconds: list[float]) -> None:
    """Ask /healthz again and again, and note how long each answer takes."""
    with httpx.Client(trust_env=False) as client:
        while not stop.wait(POLL_SECONDS):
            started = time.perf_counter()
            client.get(f"{address}/healthz").raise_for_status()
            seconds.append(time.perf_counter() - started)


def emptied(home: Path) -> None:
    """Remove what was uploaded, as the page does after reading it."""
    for folder in (home / "incoming").iterdir():
        shutil.rmtree(folder)


def measure(file: Path, folder: Path, address: str, rounds: int) -> dict[str, object]:
    """Take turns at copying, validating and uploading."""
    copies, checks, uploads, answers = [], [], [], list[float]()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        for _ in range(rounds):
            copies.append(copied(file, folder))
            checks.append(validated(file))
            stop = threading.Event()
            poll = threading.Thread(target=asked, args=(address, stop, answers))
            poll.start()
            page = browser.new_page()
            try:
                uploads.append(uploaded(page, address, file))
            finally:
                stop.set()
                poll.join()
                page.close()
            emptied(folder / "home")
        browser.close()
    copy, check, upload = map(statistics.median, (copies, checks, uploads))
    return {
        "megabytes": round(file.stat().st_size / 1e6),
        "copy_s": round(copy, 2),
        "validate_s": round(check, 2),
        "upload_s": round(upload, 2),
        "megabytes_per_s": round(file.stat().st_size / 1e6 / upload),
        "ratio": round(upload / (copy + check), 2),
        "goal": GOAL,
        "healthz_p95_ms": round(statistics.quantiles(answers, n=20)[-1] * 1000, 1),
        "healthz_max_ms": round(max(answers) * 1000, 1),
        "answers": len(answers),
    }


def main() -> None:
    """Make the file, start the server, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", nargs=2, metavar=("HOME", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.serve:
        serve(Path(options.serve[0]), int(options.serve[1]))
        return
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        folder, file = Path(name), Path(name) / "chats.jsonl"
        chats = [sys.executable, str(ROOT / "benchmarks" / "chats.py"), str(file)]
        subprocess.run([*chats, "--megabytes", str(options.mb)], check=True)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [sys.executable, __file__, "--serve", str(folder / "home"), str(port)]
        server = subprocess.Popen(command, cwd=ROOT)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address)
            figures = measure(file, folder, address, options.rounds)
        finally:
            server.terminate()
            server.wait()
    figures["cores"] = len(os.sched_getaffinity(0))
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def wait_for(address: str) -> None:
    """Wait until the server answers."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            httpx.get(f"{address}/healthz", trust_env=False).raise_for_status()
        except httpx.TransportError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
