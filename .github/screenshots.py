"""Take the README's pictures of the running program: python .github/screenshots.py"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from test_app import BROWSERS, FLAGS, LANES, Server, shown, until


def sign_in(browser, server, name, path):
    page = browser.new_context(viewport={"width": 1280, "height": 860}).new_page()
    page.goto(f"{server.url}/login?next={path}")
    page.get_by_role("button", name=f"Sign in as {name}").click()
    page.wait_for_url(f"**{path}")
    return page


def say(page, *texts):
    for text in texts:
        page.get_by_label("Message").fill(text)
        page.get_by_role("button", name="Send", exact=True).click()


def take(page, name):
    page.screenshot(path=HERE / f"{name}.png", animations="disabled")


server = Server(PORT="5000")
with sync_playwright() as playwright:
    path = next(filter(None, map(shutil.which, BROWSERS)))
    browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.goto(f"{server.url}/login")
    take(page, "login")

    page = sign_in(browser, server, "ana", "/")
    say(page, "One message,", "three ways.", "Which one is here first?")
    page.get_by_role("button", name="Send ten").click()
    until(lambda: all(len(shown(page, lane)) == 13 for lane in LANES))
    take(page, "index")

    ana, luis = (sign_in(browser, server, name, "/room?room=python") for name in ("ana", "luis"))
    say(ana, "Who can hear me now?")
    say(luis, "I can: I have joined python.", "And eva, who has not?")
    say(ana, "She hears nothing. Leave the room and try it!")
    until(lambda: "try it!" in ana.get_by_role("log", name="Conversation").inner_text())
    take(ana, "room")
    browser.close()
server.stop()
