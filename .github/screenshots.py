"""Take the README's pictures of the running program: python .github/screenshots.py"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parent / "notebooks")]

from test_app import all_show, launched, open_page, press, send, started, wait_until_said

LOOK = {"viewport": {"width": 1280, "height": 860}}
TEXTS = ["One message,", "three ways.", "Which one is here first?"]


def take(page, name):
    """Keep what the page shows as a picture."""
    page.screenshot(path=HERE / f"{name}.png", animations="disabled")


with started(PORT="5000") as server, launched() as chromium:
    page = chromium.new_page(**LOOK)
    page.goto(f"{server.url}/login")
    take(page, "login")

    page = open_page(chromium, server, "ana", **LOOK)
    send(page, *TEXTS)
    press(page, "Send ten")
    all_show(page, *(f"ana: {text}" for text in [*TEXTS, *range(1, 11)]))
    take(page, "index")

    ana, luis = (
        open_page(chromium, server, name, "/room?room=python", **LOOK) for name in ("ana", "luis")
    )
    send(ana, "Who can hear me now?")
    send(luis, "I can: I have joined python.", "And eva, who has not?")
    send(ana, end := "She hears nothing. Leave the room and try it!")
    wait_until_said(ana, end)
    take(ana, "room")
