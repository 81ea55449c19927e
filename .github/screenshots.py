"""Take the README's pictures of the running program: python .github/screenshots.py"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from test_app import Server, all_show, launched, open_page, say, send, wait_until_said

SIZE = {"width": 1280, "height": 860}


def take(page, name):
    page.screenshot(path=HERE / f"{name}.png", animations="disabled")


server = Server(PORT="5000")
with launched() as chromium:
    page = chromium.new_page(viewport=SIZE)
    page.goto(f"{server.url}/login")
    take(page, "login")

    page = open_page(chromium, server, "ana", viewport=SIZE)
    for text in (texts := ["One message,", "three ways.", "Which one is here first?"]):
        say(page, text)
    say(page, "", "Send ten")
    all_show(page, [f"ana: {text}" for text in [*texts, *range(1, 11)]])
    take(page, "index")

    ana, luis = (open_page(chromium, server, name, "/room?room=python", viewport=SIZE) for name in ("ana", "luis"))
    send(ana, "Who can hear me now?")
    send(luis, "I can: I have joined python.", "And eva, who has not?")
    send(ana, end := "She hears nothing. Leave the room and try it!")
    wait_until_said(ana, end)
    take(ana, "room")
server.stop()
