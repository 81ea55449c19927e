"""The tests, in the order of app.py: the rules, the pages, the events, then a live server, browsers and notebooks.

    python -m pytest

Nothing is mocked: what is tested live is `python app.py`, over TCP, with real clients and a real Chromium.
"""

import copy
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import engineio
import nbformat
import psutil
import pytest
import requests
import socketio
from axe_playwright_python.sync_playwright import Axe
from flask_login import FlaskLoginClient
from flask_socketio import SocketIOTestClient
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from playwright.sync_api import expect, sync_playwright

import app as program

expect.set_options(timeout=15_000)  # milliseconds that a busy machine may take to show something

HERE = Path(program.__file__).parent
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome",
            "msedge", "microsoft-edge")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()


def until(condition, seconds=20):
    """Wait until the condition holds, and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """`python app.py` as a program of its own, its output in `log`."""

    def __init__(self, **settings):
        self.port = int(settings.get("PORT") or free_port())
        self.settings = os.environ | {"PORT": str(self.port), "PYTHONUNBUFFERED": ""} | settings
        self.start()

    def start(self):
        self.log = []
        self.process = subprocess.Popen([sys.executable, "app.py"], cwd=HERE, env=self.settings, text=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        threading.Thread(target=self.read, args=(self.process.stdout,), daemon=True).start()
        until(lambda: self.said("Ctrl+C") or self.process.poll() is not None)

    def read(self, output):
        for line in output:
            self.log.append(line.rstrip())

    def said(self, words):
        return [line for line in list(self.log) if words in line]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def usage(self):
        return psutil.Process(self.process.pid)

    def stop(self):
        self.process.kill()
        self.process.wait()


class Relay:
    """A cable between clients and the server that can be cut (`cut`), unplugged (`open = False`) or go silent."""

    def __init__(self, port):
        self.target, self.open, self.silent, self.pairs = port, True, False, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def accept(self):
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                try:
                    assert self.open
                    far = socket.create_connection(("127.0.0.1", self.target))
                except (AssertionError, OSError):
                    near.close()
                    continue
                self.pairs.append((near, far))
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self.carry, args=(one, other), daemon=True).start()

    def carry(self, one, other):
        with suppress(OSError):
            while data := one.recv(65536):
                while self.silent:
                    time.sleep(0.02)
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        """Cut all connections there are; new ones pass unless `open` is False."""
        pairs, self.pairs = self.pairs, []
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


def sign_in(url, name, password="demo", form="login"):
    session = requests.Session()
    answer = session.post(f"{url}/{form}", data={"username": name, "password": password}, allow_redirects=False)
    assert answer.status_code == 302, answer.text
    return session


def register(url, name):
    return sign_in(url, name, "password", "register")


def cookie_of(session):
    """The session's cookies as a header says them."""
    return "; ".join(f"{name}={value}" for name, value in session.cookies.items())


class Client(socketio.Client):
    """The Python client, signed in; `heard` is what it heard: (event, data)."""

    def __init__(self, url, session, **options):
        super().__init__(http_session=session, reconnection=False)
        self.heard = []
        self.on("*", lambda event, data: self.heard.append((event, data)))
        self.handle, self.eio._trigger_event = self.eio._trigger_event, self.in_order
        self.connect(url, **options)

    def in_order(self, event, *data, **options):
        """The library handles each packet in a thread of its own, so that they overtake each other. "1" is a farewell."""
        return self.handle(event, *data, run_async=data == ("1",))

    def texts(self):
        return [data["message"] for event, data in list(self.heard) if event == "chat"]


@pytest.fixture(scope="session")
def server():
    """A live server for tests that leave it as it was; `fresh` is one of a test's own."""
    server = Server()
    yield server
    server.stop()
    comings_and_goings(server)


@pytest.fixture
def fresh():
    servers = []

    def start(**settings):
        servers.append(Server(**settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def connect():
    """connect(server_or_relay, "ana", transports=[...]): a Client that is disconnected after the test."""
    clients = []

    def connect(server, name, **options):
        clients.append(Client(server.url, sign_in(server.url, name), **options))
        return clients[-1]

    yield connect
    for client in clients:
        client.disconnect()


@contextmanager
def launched():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


def open_page(chromium, server, name, path="/", **options):
    """A page of a browser of its own, signed in."""
    context = chromium.new_context(**options)
    cookies = sign_in(server.url, name).cookies.items()
    context.add_cookies([{"name": key, "value": value, "url": server.url} for key, value in cookies])
    page = context.new_page()
    page.goto(server.url + path)
    return page


@pytest.fixture(scope="session")
def chromium():
    if not BROWSER:
        assert "CI" not in os.environ, "no browser"
        pytest.skip("no Chromium, Chrome or Edge on this machine")
    with launched() as browser:
        yield browser


@pytest.fixture
def browser(chromium):
    """browser(server_or_relay, "ana", "/room"): a page as `open_page` makes it, closed after the test."""
    yield partial(open_page, chromium)
    for context in chromium.contexts:
        context.close()


# The rules, without a server -----------------------------------------------------------------------------------------

DEMO = program.generate_password_hash("demo", "pbkdf2:sha256:1")  # quick to check


@pytest.fixture
def state(monkeypatch):
    """A state of the test's own: ana, luis and eva have accounts, nobody is there, nothing was said."""
    program.wrong.storage.reset()
    monkeypatch.setattr(program, "state", program.State())
    for name in ("ana", "luis", "eva"):
        program.state.register(name, DEMO)
    return program.state


@pytest.fixture
def patient(monkeypatch):
    """Whoever has said sixty messages has said them all, however slow this machine is."""
    monkeypatch.setattr(program, "RATE", 1e-6)


def refused(action, *arguments):
    """What is raised when an action is refused."""
    with pytest.raises(program.Refused) as refusal:
        action(*arguments)
    return refusal.value


@pytest.mark.parametrize("data", [{}, *({"room": value} for value in (None, 1, True, [], {}, "half \ud800"))])
def test_only_a_string_of_whole_characters_is_text(data):
    assert program.text({"room": "día 😀"}, "room") == "día 😀"
    assert refused(program.text, data, "room").code == 400


def test_a_user_may_say_sixty_at_once_and_then_twenty_a_second():
    ana = program.User(1, "ana", DEMO)
    for second in (0, 100):  # who was silent for long may say no more than 60 either
        for _ in range(60):
            ana.spend(second)
        assert refused(ana.spend, second).answer["retry_after"] == 0.05
    for _ in range(20):
        ana.spend(101)
    assert refused(ana.spend, 101).code == 429


@pytest.mark.parametrize("second", [0.0001, 0.0123, 0.0234, 0.0337, 0.0499])
def test_who_waits_as_long_as_told_is_not_refused_again(second):
    ana = program.User(1, "ana", DEMO)
    for _ in range(60):
        ana.spend(0)
    ana.spend(second + refused(ana.spend, second).answer["retry_after"])


def test_every_account_gets_a_number_and_a_room_of_its_own(state):
    assert [user.id for user in state.users.values()] == [1, 2, 3]
    zoe = state.register("Zoe", DEMO)
    assert zoe.id == 4 and state.owners["room4"] == "Zoe"
    for name in ("zoe", "Zoe", "ANA"):
        assert refused(state.register, name, DEMO).code == 409
    assert len(state.users) == 4 and "room5" not in state.owners


def test_a_renewed_token_opens_and_the_old_one_does_not(state):
    ana = state.users["ana"]
    old = state.renew(ana)
    assert program.load_user(old) is None
    assert program.load_user(ana.get_id()) is ana
    assert old != ana.get_id()


@pytest.mark.parametrize("name, room, may", [
    ("ana", "python", True), ("luis", "flask", True), ("ana", "staff", True), ("luis", "staff", False),
    ("ana", "room1", True), ("luis", "room1", False), ("luis", "room2", True), ("eva", "room1", True),
])
def test_a_room_lets_in_everybody_or_its_owner_and_guests(state, name, room, may):
    state.guests["room1"].add("eva")
    assert state.may_enter(name, room) is may


def test_members_are_named_once_and_sorted(state):
    state.here["python"] = {"c1": "luis", "c2": "ana", "c3": "luis"}
    state.here[None] = {"c1": "luis", "c2": "ana", "c3": "luis", "c4": "luis", "c5": "eva"}
    assert state.members("python") == ["ana", "luis"]
    assert state.connections("luis", "python") == ["c1", "c3"]
    assert state.connections("luis") == ["c1", "c3", "c4"]


def test_ids_rise_over_all_rooms_and_over_a_restart(state):
    ana, state.here["python"] = state.users["ana"], {"c1": "ana"}
    earliest = time.time() * 1000 - 60_000
    ids = [state.say(ana, {"message": "hi", "room": room}, "c1")[0] for room in (None, "python", None)]
    assert earliest < ids[0] < ids[1] < ids[2]
    until(lambda: program.State().last_id > ids[2])


def test_the_last_500_messages_are_kept_and_a_gap_is_told(state, monkeypatch):
    monkeypatch.setattr(program, "RATE", 1e12)
    ids = [state.say(state.users["ana"], {"message": f"{n}"})[0] for n in range(500)]
    found, gap = state.since(None, 0)
    assert [message["id"] for message in found] == ids and not gap
    ids += [state.say(state.users["ana"], {"message": f"{n}"})[0] for n in (500, 501)]
    for last_id, missed, gap in [(0, 500, True), (ids[0], 500, True), (ids[1], 500, False), (ids[2], 499, False),
                                 (ids[-1], 0, False), (10**400, 0, False)]:
        found, told = state.since(None, last_id)
        assert [message["id"] for message in found] == ids[len(ids) - missed:] and bool(told) is gap


def test_a_user_has_keys_of_his_own_and_the_last_500_are_remembered(state, monkeypatch):
    monkeypatch.setattr(program, "RATE", 1e12)
    ana, luis = state.users["ana"], state.users["luis"]
    ids = [state.say(ana, {"message": "hi", "key": f"{n}"})[0] for n in range(501)]
    assert state.say(ana, {"message": "hi", "key": "1"}) == (ids[1], None)
    assert state.say(luis, {"message": "hi", "key": "1"})[0] > ids[-1]
    assert state.say(ana, {"message": "hi", "key": "0"})[0] > ids[-1]


# Pages ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def web(state):
    """web("ana"): a browser without a window in which ana is signed in; web(): one in which nobody is."""
    return lambda name="": FlaskLoginClient(program.app, program.app.response_class, user=state.users.get(name))


def form(name="ana", password="demo", **more):
    return {"username": name, "password": password, **more}


def test_name_and_password_sign_in(web):
    visitor = web()
    assert visitor.get("/login").status_code == 200
    assert visitor.post("/login", data=form()).location == "/"
    assert visitor.get("/").status_code == visitor.get("/room").status_code == 200


@pytest.mark.parametrize("data", [form("ana", "wrong"), form("nobody"), form("ana", ""), form(""), form("a" * 999), {}])
def test_a_wrong_name_and_a_wrong_password_get_the_same_answer(web, data):
    visitor = web()
    answer = visitor.post("/login", data=data)
    assert answer.status_code == 401
    assert "Name or password is wrong." in answer.text and "password" in answer.text
    assert visitor.get("/").status_code == 302


@pytest.mark.parametrize("name", ["a", "A-b_9", "x" * 20])
def test_who_registers_is_signed_in_and_may_come_back(web, name):
    visitor, elsewhere = web(), web()
    assert visitor.post("/register", data=form(name, "8 is ok!", next="//evil.example")).location == "/"
    assert visitor.get("/").status_code == 200
    assert elsewhere.post("/login", data=form(name, "8 is ok!")).location == "/"


@pytest.mark.parametrize("name, password, status", [
    ("ana", "password", 409), ("ANA", "password", 409),
    ("", "password", 400), ("x" * 21, "password", 400), ("añá", "password", 400), ("a b", "password", 400),
    ("<b>", "password", 400), ("zoe\n", "password", 400), ("zoe\0", "password", 400), ("room:1", "password", 400),
    ("zoe", "7 chars", 400), ("zoe", "", 400), (None, None, 400),
])
def test_a_bad_or_taken_name_and_a_short_password_open_no_account(web, state, name, password, status):
    visitor = web()
    data = {} if name is None else form(name, password)
    assert visitor.post("/register", data=data).status_code == status
    assert visitor.get("/").status_code == 302 and len(state.users) == 3


@pytest.mark.parametrize("path", ["/", "/room", "/room?room=python"])
def test_a_page_asks_to_sign_in_and_then_opens(web, path):
    visitor = web()
    answer = visitor.get(path)
    assert answer.status_code == 302 and answer.location.startswith("/login?next=/")
    assert visitor.post(answer.location, data=form()).location == path


@pytest.mark.parametrize("path, where", [
    ("/room?room=python",) * 2, ("/room?room=a//b",) * 2, ("/messages?after=1&wait=2",) * 2,
    ("", "/"), ("room", "/"), ("//evil.example", "/"), ("/\\evil.example", "/"), ("\\\\evil.example", "/"),
    ("https://evil.example", "/"), ("https:evil.example", "/"), ("/\t/evil.example", "/"), ("/\n/evil.example", "/"),
    (" //evil.example", "/"), ("javascript:alert(1)", "/"), ("/\r\nSet-Cookie: a=b", "/"), ("/room\0", "/"),
])
def test_next_leads_to_own_paths_only(web, path, where):
    assert web().post("/login", query_string={"next": path}, data=form()).location == where
    assert web().post("/login", data=form(next=path)).location == where


def test_log_out_is_by_post_only_and_may_be_pressed_twice(web):
    ana = web("ana")
    assert ana.get("/logout").status_code == 405
    assert ana.get("/").status_code == 200
    assert ana.post("/logout").location == "/login"
    assert ana.get("/").status_code == 302
    again = ana.post("/logout").location  # pressed in a second tab
    assert ana.get(ana.post(again, data=form()).location).status_code == 200


def test_log_out_closes_all_devices_and_copied_cookies_but_nobody_elses(web):
    laptop, phone, thief, luis = web("ana"), web("ana"), web(), web("luis")
    cookie = laptop.get_cookie(f"session-{program.PORT}").value
    laptop.post("/logout")
    laptop.post("/login", data=form())
    thief.set_cookie(f"session-{program.PORT}", cookie)
    assert [client.get("/").status_code for client in (laptop, phone, thief, luis)] == [200, 302, 302, 200]


HERE_NOW, EVIL = "http://localhost", "http://evil.example"


@pytest.mark.parametrize("headers, passes", [
    ({}, True), ({"Origin": HERE_NOW}, True), ({"Origin": EVIL}, False), ({"Origin": "null"}, False),
    ({"Origin": "http://localhost:8000"}, False), ({"Origin": "http://localhost.evil.example"}, False),
    ({"Origin": EVIL, "X-Forwarded-Host": "evil.example"}, False), ({"Sec-Fetch-Site": "same-origin"}, True),
    ({"Sec-Fetch-Site": "none"}, True), ({"Sec-Fetch-Site": "same-site"}, False), ({"Sec-Fetch-Site": "x"}, False),
    ({"Sec-Fetch-Site": "cross-site"}, False), ({"Sec-Fetch-Site": "cross-site", "Origin": HERE_NOW}, False),
])
def test_a_form_of_another_site_is_refused(web, state, headers, passes):
    statuses = [web().post("/login", data=form(), headers=headers).status_code,
                web().post("/register", data=form("zoe", "password"), headers=headers).status_code,
                web("luis").post("/messages", json={"message": "hi"}, headers=headers).status_code,
                web("eva").post("/logout", headers=headers).status_code]
    assert statuses == ([302, 302, 201, 302] if passes else [403] * 4)
    assert (len(state.users), len(state.history[None])) == ((4, 1) if passes else (3, 0))


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites_and_named_by_the_port(web):
    cookie = web().post("/login", data=form()).headers["Set-Cookie"]
    assert cookie.startswith(f"session-{program.PORT}=")
    assert {"HttpOnly", "SameSite=Lax"} <= set(cookie.split("; "))


def test_ten_wrong_passwords_close_the_name_to_that_address_for_the_minute(web):
    here, elsewhere = {"REMOTE_ADDR": "10.0.0.1"}, {"REMOTE_ADDR": "10.0.0.2"}
    tries = ["wrong"] * 5 + ["demo"] * 3 + ["wrong"] * 4 + ["demo"] + ["wrong"]
    statuses = [web().post("/login", data=form(password=word), environ_base=here).status_code for word in tries]
    assert statuses == [302 if word == "demo" else 401 for word in tries]
    closed = web().post("/login", data=form("Ana"), environ_base=here)
    assert closed.status_code == 429 and "minute" in closed.text
    assert web().post("/login", data=form("luis"), environ_base=here).status_code == 302
    assert web().post("/login", data=form("ana"), environ_base=elsewhere).status_code == 302
    reset, _ = program.wrong.get_window_stats(program.TEN_A_MINUTE, "ana", "10.0.0.1")
    assert reset <= time.time() + 60


@pytest.mark.parametrize("path", ["/login", "/", "/room", "/nowhere", "/messages", "/logout", "/socket.io.js"])
def test_no_page_runs_foreign_scripts_or_is_framed(web, path):
    one, other = web("ana").get(path).headers, web("ana").post(path, headers={"Origin": EVIL}).headers
    policy = one["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert "script-src 'nonce-" in policy and policy != other["Content-Security-Policy"]
    assert one["X-Content-Type-Options"] == "nosniff" and "Referrer-Policy" not in one


def test_the_browser_client_comes_from_here(web):
    answer = web("ana").get("/socket.io.js")
    assert answer.mimetype.endswith("javascript") and b"Socket.IO v4.8" in answer.data


def test_there_are_demo_accounts_only_where_the_program_itself_makes_them(web):
    assert program.State().users == {} and program.app.config["DEMO_ACCOUNTS"] == []
    assert "Sign in as" not in web().get("/login").text


def test_who_polls_hears_what_is_newer_and_only_of_the_open_channel(web, state):
    ana, luis, state.here["python"] = web("ana"), web("luis"), {"c1": "ana"}
    start = state.last_id
    state.say(state.users["ana"], {"message": "in a room", "room": "python"}, "c1")
    ids = [ana.post("/messages", json={"message": message}).get_json()["id"] for message in (" <b>día</b> ", "two")]
    heard = luis.get("/messages").get_json()
    assert [(said["id"], said["message"]) for said in heard["messages"]] == [(ids[0], "<b>día</b>"), (ids[1], "two")]
    assert heard["last_id"] == ids[1] and heard == luis.get(f"/messages?after={start}").get_json()
    assert luis.get(f"/messages?after={ids[0]}").get_json()["messages"] == heard["messages"][1:]
    assert luis.get(f"/messages?after={ids[1]}").get_json() == {"messages": [], "last_id": ids[1]}


def test_a_long_poll_is_empty_when_its_time_is_over(web):
    started = time.monotonic()
    assert web("ana").get("/messages?after=7&wait=0.3").get_json() == {"messages": [], "last_id": 7}
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize("query, status", [
    *((f"after={value}", 400) for value in ("", "abc", "nan", "inf", "1.5", "1e3", "0x10", "None", "1" * 5000)),
    *((f"wait={value}", 400) for value in ("", "abc", "nan", "1s", "--1", "None", "1,5")),
    ("after=-1", 200), (f"after={10**400}", 200), ("wait=26", 200), ("wait=1e999", 200), ("wait=0.5", 200),
])
def test_after_and_wait_are_numbers(web, query, status):
    ana = web("ana")
    ana.post("/messages", json={"message": "an answer to all who wait"})
    assert ana.get(f"/messages?{query}").status_code == status


@pytest.mark.parametrize("body", [
    b"", b"hi", b"\xff", b"null", b"7", b'"hi"', b'["hi"]', b"[" * 20_000, b'{"message": ' * 5000, b"{}", b"1" * 5000,
    *(json.dumps({"message": value}) for value in (None, 7, True, [], {}, "", " \n ", "x" * 501, "half \ud800")),
    *(json.dumps({"message": "hi", "key": value}) for value in (7, True, [], {}, "x" * 65, "half \ud800")),
    *(json.dumps({"message": "hi", "room": value}) for value in ("python", "room1", "nowhere", 7, [], "half \ud800")),
])
def test_a_bad_body_says_nothing(web, state, body):
    answer = web("ana").post("/messages", data=body, content_type="application/json")
    assert answer.status_code in (400, 403) and answer.get_json()["error"]
    assert not state.history[None] and not state.history["python"]


def test_messages_speaks_json_in_errors_too(web, patient):
    ana, hi = web("ana"), {"message": "hi"}
    for _ in range(60):
        ana.post("/messages", json=hi)
    errors = [web().get("/messages"), web().post("/messages", json=hi), ana.get("/messages?after=x"),
              ana.post("/messages", json={}), ana.post("/messages", json=hi, headers={"Origin": EVIL}),
              ana.put("/messages"), ana.post("/messages", data="x" * 70_000), ana.post("/messages", json=hi)]
    assert [error.status_code for error in errors] == [401, 401, 400, 400, 403, 405, 413, 429]
    assert all(error.get_json()["ok"] is False and error.get_json()["error"] for error in errors)
    assert errors[-1].get_json()["retry_after"] > 0


# Events, without a network -------------------------------------------------------------------------------------------


class Talker(SocketIOTestClient):
    """A user's connection. `ask` sends an event and returns the ack, `heard` is what came since it was last asked."""

    def ask(self, event, /, **fields):
        return self.emit(event, fields, callback=True)

    def heard(self):
        return [(packet["name"], packet["args"][0]) for packet in self.get_received()]


@pytest.fixture
def online(web):
    """online("ana", "python"): a Talker of ana's who has joined python. What all heard of that is forgotten."""
    talkers = []

    def online(name="", *rooms, **options):
        talker = Talker(program.app, program.socketio, flask_test_client=web(name), **options)
        talkers.append(talker)
        for room in rooms:
            assert talker.ask("join", room=room)["ok"]
        for talker in filter(Talker.is_connected, talkers):
            talker.heard()
        return talkers[-1]

    yield online
    for talker in filter(Talker.is_connected, talkers):
        talker.disconnect()


def refusal(ack):
    """Whether an ack refuses, in words."""
    return ack["ok"] is False and len(ack["error"]) > 10


def test_a_message_reaches_its_room_and_nobody_else(online):
    ana, luis, eva = online("ana", "python"), online("luis", "python", "flask"), online("eva", "flask")
    ack = ana.ask("chat", room="python", message=" día\n")
    (event, said), *more = luis.heard()
    assert ack == {"ok": True, "id": said["id"]} and not more
    assert (event, said["room"], said["username"], said["message"]) == ("chat", "python", "ana", "día")
    when = datetime.fromisoformat(said["created_at"])
    assert when.utcoffset() == timedelta(0) and abs(when.timestamp() - time.time()) < 60
    assert ana.heard() == [(event, said)] and eva.heard() == []


def test_without_a_room_everyone_connected_hears_it(online, web):
    ana, luis, eva, gone = online("ana"), online("luis", "python"), online("eva"), online("eva")
    gone.disconnect()
    gone.queue.clear()
    ack = ana.ask("chat", message=" " + "x" * 500)
    assert ana.heard() == luis.heard() == (heard := eva.heard()) and gone.queue == []
    assert [(event, said["id"], said["room"]) for event, said in heard] == [("chat", ack["id"], None)]
    assert web("eva").get("/messages").get_json()["messages"] == [heard[0][1]]


def test_a_message_over_http_is_heard_by_all_on_sockets(online, web):
    ana, luis = online("ana"), online("luis", "python")
    answer = web("eva").post("/messages", json={"message": "hi"}).get_json()
    assert [said["id"] for _, said in ana.heard()] == [said["id"] for _, said in luis.heard()] == [answer["id"]]


def test_a_join_is_heard_by_the_room_and_the_joiner(online):
    ana, luis, eva = online("ana", "python"), online("luis"), online("eva", "flask")
    ack = luis.ask("join", room="python")
    assert ack == {"ok": True, "room": "python", "members": ["ana", "luis"], "missed": 0, "gap": False}
    assert ana.heard() == luis.heard() == [("join", {"room": "python", "username": "luis", "members": ["ana", "luis"]})]
    assert eva.heard() == []


def test_a_leave_is_heard_by_the_room_and_not_by_the_leaver(online):
    ana, luis, eva = online("ana", "python"), online("luis", "python", "flask"), online("eva", "flask")
    assert luis.ask("leave", room="python") == {"ok": True}
    assert ana.heard() == [("leave", {"room": "python", "username": "luis", "members": ["ana"], "reason": "left"})]
    ana.ask("chat", room="python", message="hi")
    assert luis.heard() == [] and eva.heard() == []


def test_a_lost_connection_leaves_each_of_its_rooms_with_the_reason(online):
    ana, eva, luis = online("ana", "python"), online("eva", "flask"), online("luis", "python", "flask")
    anyone = online("ana")
    luis.disconnect()
    for talker, room, name in ((ana, "python", "ana"), (eva, "flask", "eva")):
        left = {"room": room, "username": "luis", "members": [name], "reason": "client disconnect"}
        assert talker.heard() == [("leave", left)]
    assert anyone.heard() == []


def test_coming_and_going_is_announced_once_per_user(online):
    ana, laptop, phone, eva = online("ana", "python"), online("luis", "python"), online("luis"), online("eva")
    assert phone.ask("join", room="python")["members"] == ["ana", "luis"]
    assert laptop.ask("join", room="python")["ok"] and laptop.ask("leave", room="python")["ok"]
    assert ana.heard() == laptop.heard() == phone.heard() == []
    phone.disconnect()
    assert [(event, data["members"]) for event, data in ana.heard()] == [("leave", ["ana"])]
    assert laptop.heard() == eva.heard() == []


def test_typing_is_heard_by_the_room_but_by_no_connection_of_the_typist(online):
    laptop, phone, luis, eva = online("ana", "python"), online("ana", "python"), online("luis", "python"), online("eva")
    assert laptop.ask("typing", room="python") == {"ok": True}
    assert luis.heard() == [("typing", {"room": "python", "username": "ana"})]
    assert laptop.heard() == phone.heard() == eva.heard() == []


def test_an_invitation_is_heard_by_the_guest_alone_and_opens_the_room(online):
    ana, laptop, phone, eva = online("ana", "room1"), online("luis"), online("luis", "python"), online("eva", "python")
    assert refusal(laptop.ask("join", room="room1"))
    assert ana.ask("invite", room="room1", username="LUIS") == {"ok": True}
    assert laptop.heard() == phone.heard() == [("invite", {"room": "room1", "by": "ana"})]
    assert ana.heard() == eva.heard() == []
    assert laptop.ask("join", room="room1")["members"] == ["ana", "luis"]
    assert online("luis").ask("join", room="room1")["ok"] and refusal(eva.ask("join", room="room1"))


def test_an_expulsion_takes_out_all_connections_and_the_invitation(online):
    ana, eva = online("ana"), online("eva", "python")
    for name in ("luis", "eva"):
        ana.ask("invite", room="room1", username=name)
    online("ana", "room1")
    laptop, phone, guest = online("luis", "room1"), online("luis", "room1"), online("eva", "room1")
    assert ana.ask("expel", room="room1", username="luis") == {"ok": True}
    left = {"room": "room1", "username": "luis", "members": ["ana", "eva"], "reason": "expelled"}
    assert laptop.heard() == phone.heard() == [("expel", {"room": "room1", "by": "ana"})]
    assert guest.heard() == [("leave", left)] and ana.heard() == eva.heard() == []
    assert guest.ask("chat", room="room1", message="hi")["ok"] and laptop.heard() == phone.heard() == []
    assert refusal(phone.ask("join", room="room1")) and refusal(laptop.ask("chat", room="room1", message="hi"))


def test_an_invitation_may_be_withdrawn_before_it_is_used(online):
    ana, luis = online("ana", "room1"), online("luis")
    ana.ask("invite", room="room1", username="luis")
    ana.ask("expel", room="room1", username="luis")
    assert luis.heard() == [("invite", {"room": "room1", "by": "ana"}), ("expel", {"room": "room1", "by": "ana"})]
    assert refusal(luis.ask("join", room="room1")) and ana.heard() == []


def test_who_joins_hears_what_was_said_alone_and_in_order(online):
    ana, eva = online("ana", "python"), online("eva", "python")
    ids = [ana.ask("chat", room="python", message=message)["id"] for message in ("one", "two", "three")]
    ana.ask("chat", message="to all")
    said, luis = [packet for packet in eva.heard() if packet[1]["room"]], online("luis")
    assert luis.ask("join", room="python", last_id=0)["missed"] == 3
    *history, (event, joined) = luis.heard()
    assert history == said and [data["id"] for _, data in history] == ids and event == "join"
    assert eva.heard() == [("join", joined)]


def test_who_comes_back_hears_only_what_is_new_and_announces_nothing_twice(online):
    ana, luis, eva = online("ana", "python"), online("luis"), online("eva", "python")
    ids = [ana.ask("chat", room="python", message=message)["id"] for message in ("one", "two", "three")]
    before_a_restart = 1
    for last_id, missed in ((ids[0], 2), (ids[2], 0), (10**90, 0), (before_a_restart, 3), (None, 3)):
        ack = luis.ask("join", room="python", last_id=last_id)
        assert (ack["missed"], ack["gap"]) == (missed, last_id == before_a_restart)
        assert [data["id"] for event, data in luis.heard() if event == "chat"] == ids[3 - missed:]
    assert [event for event, _ in eva.heard()] == ["chat"] * 3 + ["join"]


def test_a_key_is_said_once_over_whichever_connection_and_before_membership_and_rate(online, web, patient):
    laptop, phone, luis = online("ana", "python"), online("ana"), online("luis", "python")
    ids = [laptop.ask("chat", room="python", message="hi", key=f"{n:64}")["id"] for n in range(60)]
    assert refusal(laptop.ask("chat", room="python", message="hi"))
    again = {"message": "hi", "room": "python", "key": f"{7:64}"}
    assert laptop.ask("chat", **again) == phone.ask("chat", **again) == {"ok": True, "id": ids[7]}
    assert web("ana").post("/messages", json=again).get_json() == {"id": ids[7]}
    assert len(luis.heard()) == 60 and phone.heard() == []
    assert luis.ask("chat", **again)["id"] > ids[-1]


def test_sixty_messages_at_once_are_enough(online, web, patient):
    laptop, phone, luis, eva = online("ana", "python"), online("ana"), online("luis", "python"), online("eva")
    first = [laptop.ask("chat", room=room, message=message) for room in ("python", "flask") for message in ("", "hi")]
    assert [ack["ok"] for ack in first] == [False, True, False, False]
    acks = [phone.ask("chat", message="hi") for _ in range(58)]
    assert all(ack["ok"] for ack in acks) and web("ana").post("/messages", json={"message": "hi"}).status_code == 201
    for client in (laptop, phone):
        ack = client.ask("chat", message="one too many")
        assert refusal(ack) and ack["retry_after"] > 0
    assert len(luis.heard()) == 60 and len(eva.heard()) == 59
    assert laptop.ask("typing", room="python")["ok"] and luis.ask("chat", message="hi")["ok"]


ALL_FIELDS = {"room": "room1", "username": "eva", "message": "hi", "last_id": 0}


@pytest.fixture
def refuses(state, online):
    """refuses("ana", "chat", {...}): that event is refused, changes nothing, and nobody hears it or is disconnected."""
    state.guests["room1"].add("eva")
    ana, luis, eva = online("ana", "room1", "python"), online("luis", "python"), online("eva", "room1", "flask")

    def all_there_is():
        tables = state.here, state.guests, state.history
        return copy.deepcopy([{room: kept for room, kept in table.items() if kept} for table in tables]), state.last_id

    def refuses(name, event, *arguments):
        before = all_there_is()
        assert refusal({"ana": ana, "luis": luis, "eva": eva}[name].emit(event, *arguments, callback=True))
        assert all_there_is() == before
        assert ana.heard() == luis.heard() == eva.heard() == []

    return refuses


@pytest.mark.parametrize("event", ["join", "leave", "typing", "chat", "invite", "expel"])
@pytest.mark.parametrize("arguments", [
    (), (None,), (7,), ("room1",), ([],), ([ALL_FIELDS],), (json.dumps(ALL_FIELDS),), (ALL_FIELDS, ALL_FIELDS), ({},),
])
def test_an_event_carries_one_json_object(refuses, event, arguments):
    refuses("ana", event, *arguments)


WRONG = ..., None, 7, True, [], {}, ["room1"], {"room": "room1"}, "", "nowhere", "x" * 501, "half \ud800", "room1\0"


@pytest.mark.parametrize("event, field, value", [
    *((event, "room", value) for event in ("join", "leave", "typing", "invite", "expel") for value in WRONG),
    *((event, "username", value) for event in ("invite", "expel") for value in WRONG),
    *(("chat", "room", value) for value in WRONG[2:]),
    *(("chat", "message", value) for value in (..., None, 7, True, [], {}, "", " \n", "x" * 501, "half \ud800")),
    *(("chat", "key", value) for value in (7, True, [], {}, ["k"], "x" * 65, "half \ud800")),
    *(("join", "last_id", value) for value in (-1, 1.5, True, "7", [1], {"id": 1}, 1e300, 10**400, float("nan"))),
])
def test_a_field_that_is_missing_or_wrong_is_refused(refuses, event, field, value):
    fields = ALL_FIELDS | {field: value}
    refuses("ana", event, {name: value for name, value in fields.items() if value is not ...})


@pytest.mark.parametrize("name, event, fields", [
    ("luis", "join", {"room": "room1"}), ("luis", "join", {"room": "staff"}), ("luis", "join", {"room": "room:python"}),
    *(("luis", event, {"room": "room1", "message": "hi"}) for event in ("leave", "typing", "chat")),
    *(("luis", event, {"room": "flask", "message": "hi"}) for event in ("leave", "typing", "chat")),
    *((name, event, {"room": room, "username": guest}) for event in ("invite", "expel") for name, room, guest in (
        ("luis", "room1", "eva"), ("eva", "room1", "luis"), ("luis", "python", "eva"), ("luis", "staff", "luis"),
        ("ana", "python", "luis"), ("ana", "room1", "ana"), ("ana", "room1", "ANA"), ("ana", "room1", "nobody"))),
])
def test_what_somebody_may_not_do_is_refused(refuses, name, event, fields):
    refuses(name, event, fields)


@pytest.mark.parametrize("event", ["connect", "disconnect", "*", "", "shout", "message", "chat ", "Chat"])
def test_there_are_no_other_events_and_nobody_names_connect_or_disconnect(refuses, event):
    for arguments in ((), (ALL_FIELDS,), ("client disconnect",)):
        refuses("ana", event, *arguments)


def test_the_id_of_a_connection_is_no_room(state, online):
    ana, luis = online("ana"), online("luis")
    for connection in state.here[None]:
        assert program.channel(connection) != connection
        assert refusal(ana.ask("join", room=connection)) and refusal(ana.ask("chat", room=connection, message="hi"))
    assert ana.heard() == luis.heard() == []


@pytest.mark.parametrize("name, auth, welcome", [
    ("", None, False), ("", {"username": "ana"}, False), ("ana", {"username": "luis"}, False),
    ("ana", {"username": ""}, False), ("ana", {"username": "ana"}, True), ("ana", {}, True), ("ana", None, True),
])
def test_only_who_is_signed_in_connects_and_only_as_himself(state, online, name, auth, welcome):
    luis, visitor = online("luis"), online(name, auth=auth)
    luis.ask("chat", message="hi")
    assert visitor.is_connected() is welcome and len(visitor.queue) == welcome
    assert state.members(None) == (["ana", "luis"] if welcome else ["luis"])


# `python app.py`, over TCP -------------------------------------------------------------------------------------------

ASYNC_MODES = ["threading", "gevent"]
MODES = pytest.mark.parametrize("mode", ASYNC_MODES)
BOTH = pytest.mark.parametrize("fort", ASYNC_MODES, indirect=True)
TRANSPORTS = pytest.mark.parametrize("transports", [["websocket"], ["polling"], ["polling", "websocket"]], ids="+".join)


def comings_and_goings(server):
    """The log after the welcome: there is nothing in it but who comes and goes."""
    log = server.log[server.log.index("Stop with Ctrl+C.") + 1:]
    lines = [re.fullmatch(r"((?:dis)?connected: \w+)( \(.+\))?", line) for line in log]
    assert all(lines), log
    return [line[1] for line in lines]


def test_the_program_says_where_it_is_who_may_sign_in_and_how_to_stop(server):
    welcome = server.log[:3]  # its standard input is no terminal
    assert re.search(r"http://127\.0\.0\.1:\d+", welcome[0])
    assert all(word in welcome[1] for word in ("ana", "luis", "eva", "demo")) and "Ctrl+C" in welcome[2]


def test_who_listens_to_all_the_world_has_no_demo_accounts(fresh):
    server = fresh(HOST="0.0.0.0")
    assert not server.said("Sign in as ana")
    assert requests.post(f"{server.url}/login", data=form()).status_code == 401
    assert "Sign in as" not in requests.get(f"{server.url}/login").text
    assert register(server.url, "ana").get(server.url).url == f"{server.url}/"


@pytest.mark.parametrize("port", ["taken", "abc", "99999"])
def test_a_port_that_cannot_be_had_gets_one_clear_line(server, port):
    port = str(server.port) if port == "taken" else port
    run = subprocess.run([sys.executable, "app.py"], cwd=HERE, env=os.environ | {"PORT": port}, text=True, timeout=60,
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode != 0 and len(run.stdout.splitlines()) == 1
    assert port in run.stdout and "PORT" in run.stdout


@MODES
def test_ctrl_c_stops_the_program_quietly_also_when_somebody_is_connected(fresh, connect, mode):
    server = fresh(ASYNC_MODE=mode)
    people = connect(server, "ana", transports=["websocket"]), connect(server, "luis", transports=["polling"])
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=20) in (0, -signal.SIGINT)
    until(lambda: not any(client.connected for client in people))
    assert {"connected: ana", "connected: luis"} <= set(comings_and_goings(server))


@TRANSPORTS
def test_people_in_a_room_hear_each_other_and_nobody_else_does(server, connect, transports):
    ana, luis, eva = (connect(server, name, transports=transports) for name in ("ana", "luis", "eva"))
    for client, room in ((ana, "python"), (luis, "python"), (eva, "flask")):
        client.call("join", {"room": room})
        client.heard.clear()
    message_id = ana.call("chat", {"room": "python", "message": "día 😀"})["id"]
    ana.call("chat", {"message": "the end"})
    until(lambda: all("the end" in client.texts() for client in (ana, luis, eva)))
    assert ana.texts() == luis.texts() == ["día 😀", "the end"] and eva.texts() == ["the end"]
    assert luis.heard[-2][1]["id"] == message_id


@TRANSPORTS
def test_history_is_heard_before_the_ack(server, connect, transports):
    ana, luis = connect(server, "ana"), connect(server, "luis", transports=transports)
    ana.call("join", {"room": "flask"})
    last_id, _, _ = (ana.call("chat", {"room": "flask", "message": text})["id"] for text in ("old", "one", "two"))
    luis.emit("join", {"room": "flask", "last_id": last_id}, callback=lambda ack: luis.heard.append(("ack", ack)))
    until(lambda: len(luis.heard) == 4)
    assert [event for event, _ in luis.heard] == ["chat", "chat", "join", "ack"] and luis.texts() == ["one", "two"]


@TRANSPORTS
def test_a_history_that_is_longer_than_a_client_takes_in_one_poll_is_heard_whole(server, connect, transports):
    ana, luis = connect(server, "ana"), connect(server, "luis", transports=transports)
    ana.call("join", {"room": "flask"})
    last_id, *ids = (ana.call("chat", {"room": "flask", "message": f"{n}"})["id"] for n in range(19))
    assert engineio.payload.Payload.max_decode_packets < len(ids), "this client takes any number"
    assert luis.call("join", {"room": "flask", "last_id": last_id})["missed"] == len(ids)
    assert [data["id"] for event, data in luis.heard if event == "chat"] == ids


def test_all_hear_one_order_in_which_ids_rise_and_nobody_overtakes_himself(server, connect):
    talkers = [connect(server, name, transports=transports) for name, *transports in
               (("ana", "websocket"), ("luis", "polling"), ("eva", "websocket"))]
    for n in range(15):
        for talker in talkers:
            talker.emit("chat", {"message": f"{n}"})
    until(lambda: all(len(talker.texts()) == 45 for talker in talkers))
    ids = [[data["id"] for _, data in talker.heard] for talker in talkers]
    assert ids[0] == sorted(set(ids[0])) == ids[1] == ids[2]
    for name in ("ana", "luis", "eva"):
        said = [data["message"] for _, data in talkers[0].heard if data["username"] == name]
        assert said == [f"{n}" for n in range(15)]


def test_binary_data_is_refused_like_any_other(server, connect):
    ana, luis = connect(server, "ana"), connect(server, "luis")
    assert refusal(ana.call("join", {"room": b"python"})) and refusal(ana.call("chat", b"hi"))
    assert ana.call("chat", {"message": "hi"})["ok"] and until(luis.texts) == ["hi"]


def test_a_long_poll_wakes_at_a_message_and_on_its_sockets_too(server, connect):
    luis, eva, answers = connect(server, "luis"), sign_in(server.url, "eva"), []
    last_id = luis.call("chat", {"message": "before"})["id"]
    started, ask = time.monotonic(), f"{server.url}/messages?after={last_id}&wait=25"
    waiting = threading.Thread(target=lambda: answers.append(eva.get(ask).json()), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert not answers
    message_id = sign_in(server.url, "ana").post(f"{server.url}/messages", json={"message": "now"}).json()["id"]
    assert [until(lambda: answers)[0]["last_id"]] == [message_id] == [said["id"] for said in answers[0]["messages"]]
    assert time.monotonic() - started < 15 and until(lambda: luis.texts()[1:]) == ["now"]


def test_log_out_ends_sockets_and_long_polls_of_that_user_alone(server, connect):
    answers, before = {}, len(server.said("disconnected: ana"))
    luis, poller = connect(server, "luis"), sign_in(server.url, "ana")
    devices = [connect(server, "ana", transports=transports) for transports in (["websocket"], ["polling"])]
    ask = f"{server.url}/messages?after={time.time() * 1000 + 60_000:.0f}&wait=25"
    waiting = threading.Thread(target=lambda: answers.update(poller=poller.get(ask).status_code), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert not answers
    sign_in(server.url, "ana").post(f"{server.url}/logout")
    assert until(lambda: answers, 15) == {"poller": 401}
    until(lambda: not any(client.connected for client in devices))
    until(lambda: len(server.said("disconnected: ana")) >= before + 2)
    assert luis.call("chat", {"message": "still here"})["ok"]


@TRANSPORTS
def test_a_goodbye_returns_at_once(server, connect, transports):
    seconds = []
    for client in [connect(server, "ana", transports=transports) for _ in range(3)]:
        started = time.monotonic()
        client.disconnect()
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 2  # where the server does not close its end, the client waits for three


def test_the_log_has_one_line_for_each_who_comes_and_goes_and_no_other(fresh, connect):
    server = fresh()
    relay = Relay(server.port)
    connect(server, "ana", transports=["websocket"]).disconnect()
    until(lambda: server.said("disconnected: ana"))
    connect(relay, "luis", transports=["websocket"])
    relay.cut()
    until(lambda: server.said("disconnected: luis"))
    for session, auth in ((requests.Session(), {}), (sign_in(server.url, "eva"), {"username": "ana"})):
        with pytest.raises(socketio.exceptions.ConnectionError):
            Client(server.url, session, auth=auth)
    assert sign_in(server.url, "eva").get(f"{server.url}/nowhere").status_code == 404
    connect(server, "eva").disconnect()
    until(lambda: server.said("disconnected: eva"))
    assert comings_and_goings(server) == [f"{what}: {who}" for who in ("ana", "luis", "eva")
                                          for what in ("connected", "disconnected")]


def test_after_a_restart_nobody_is_taken_for_somebody_else(fresh):
    server = fresh(SECRET_KEY="the same as before")
    before = [sign_in(server.url, "ana"), register(server.url, "zoe")]
    server.stop()
    server.start()
    after = [sign_in(server.url, "ana"), register(server.url, "max")]  # who has zoe's number and room now
    assert [session.get(f"{server.url}/messages").status_code for session in before + after] == [401, 401, 200, 200]


ME, DUCK = "127.0.0.1", "\N{DUCK}"


class Wire:
    """A WebSocket by hand, so that a test decides what goes over it, byte by byte."""

    @classmethod
    def over(cls, tcp):
        """A WebSocket that is open already."""
        wire = cls.__new__(cls)
        wire.tcp, wire.file = tcp, tcp.makefile("rb")
        return wire

    def __init__(self, server, session=None, query="", buffer=None, **headers):
        self.tcp = socket.socket()
        if buffer:
            self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.tcp.settimeout(20)
        self.tcp.connect((ME, server.port))
        self.file = self.tcp.makefile("rb")
        cookie = cookie_of(session) if session else ""
        headers = {"Host": f"{ME}:{server.port}", "Cookie": cookie, "Connection": "Upgrade", "Upgrade": "websocket",
                   "Sec-WebSocket-Key": "MDEyMzQ1Njc4OTAxMjM0NQ==", "Sec-WebSocket-Version": "13"} | headers
        lines = [f"GET /socket.io/?EIO=4&transport=websocket{query} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
        self.tcp.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        self.status = int(self.file.readline().split()[1])
        while self.file.readline().strip():
            pass

    def frame(self, payload=b"", opcode=1, first=0x80, mask=0x80):
        size = len(payload)
        size = bytes([mask | size]) if size < 126 else struct.pack("!BH", mask | 126, size) if size < 65536 \
            else struct.pack("!BQ", mask | 127, size)
        return bytes([first | opcode]) + size + (bytes(4) if mask else b"") + payload  # masked with zeros

    def send(self, *packets):
        self.tcp.sendall(b"".join(self.frame(packet.encode()) for packet in packets))

    def read(self):
        """The next message; None when the server has closed the connection."""
        with suppress(ConnectionError):
            while head := self.file.read(2):
                size = head[1]
                if size > 125:
                    size = int.from_bytes(self.file.read(2 if size == 126 else 8))
                payload = self.file.read(size)
                if head[0] & 15 == 1:
                    return payload.decode()

    def until(self, start):
        """Read up to the packet that begins so, and return all read: pings are answered."""
        packets = []
        while not (packets and packets[-1].startswith(start)):
            packets.append(self.read())
            assert packets[-1] is not None, packets
            if packets[-1] == "2":
                self.send("3")
        return packets

    def enter(self, room=None):
        self.send("40")
        self.until("40")
        if room:
            self.send(f'420["join",{{"room":"{room}"}}]')
            self.until("430")
        return self

    def close(self):
        self.file.close()
        self.tcp.close()

    def hear(self, count):
        """The next so many messages."""
        heard = []
        while len(heard) < count:
            heard += chats(self.until("42"))
        return heard

    def ended(self):
        """Whether the server closes this connection: the kernel says so."""
        with suppress(ConnectionError):
            while self.tcp.recv(65536):
                pass
        return True


class Polls:
    """An Engine.IO session over HTTP by hand."""

    def __init__(self, server, session, connect=True):
        self.url, self.session = f"{server.url}/socket.io/?EIO=4&transport=polling", session
        self.sid = json.loads(self.get()[0][1:])["sid"]
        self.url += f"&sid={self.sid}"
        if connect:
            self.send("40")
            self.until("40")

    def get(self):
        answer = self.session.get(self.url, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.text.split("\x1e")

    def send(self, *packets):
        return self.session.post(self.url, data="\x1e".join(packets).encode(), timeout=30).status_code

    def until(self, start):
        packets = []
        while not any(packet.startswith(start) for packet in packets):
            packets += self.get()
            if "2" in packets:
                packets.remove("2")
                self.send("3")
        return packets


class Stubborn(socketio.Client):
    """A client that reconnects by itself, rejoins with the last id that it heard, and repeats what was not acked."""

    def __init__(self, server, name, transports):
        super().__init__(http_session=sign_in(server.url, name), reconnection_delay=0.1, reconnection_delay_max=0.2)
        handle = self.eio._trigger_event  # the client starts a thread for each packet, which may overtake one another
        self.eio._trigger_event = lambda event, *data, **how: handle(event, *data, **how | {"run_async": False})
        self.heard = []
        self.on("chat", self.heard.append)
        self.on("connect", self.rejoin)
        self.connect(server.url, transports=transports)

    def rejoin(self):
        self.emit("join", {"room": "python", "last_id": self.heard[-1]["id"] if self.heard else 0})

    def say(self, message):
        ack = {}
        with suppress(socketio.exceptions.SocketIOError):
            ack = self.call("chat", {"room": "python", "message": message, "key": message}, timeout=0.4)
        time.sleep(ack.get("retry_after", 0))
        return ack.get("ok")


def chats(packets):
    """The messages in these packets."""
    return [json.loads(packet[2:])[1] for packet in packets if packet.startswith('42["chat"')]


def crowd(server, size, room="python"):
    """So many new users, each with a WebSocket in the room: all may say 60 messages at once."""
    sessions = [register(server.url, f"guest{os.urandom(4).hex()}") for _ in range(size)]
    return [Wire(server, session).enter(room) for session in sessions]


def talk(wires, each, words, pause=0.0):
    """All of them say so many messages in the room, together, each reading what it hears."""
    def run(wire):
        for number in range(each):
            wire.send("421" + json.dumps(["chat", {"room": "python", "message": f"{number} {words}"}]))
            wire.heard += wire.until("431")
            time.sleep(pause)

    threads = [threading.Thread(target=run, args=(wire,)) for wire in wires]
    for wire, thread in zip(wires, threads, strict=True):
        wire.heard = []
        thread.start()
    return threads


def flood(size):
    """So many messages, each with its number as the number of its ack."""
    return [f'42{n}["chat",{{"room":"python","message":"{n}{"x" * 396}"}}]' for n in range(1, size + 1)]


def log_of(server, name="eva"):
    """All messages of the room python, as one hears them who joins now."""
    wire = Wire(server, sign_in(server.url, name)).enter()
    wire.send('420["join",{"room":"python"}]')
    return chats(wire.until("430"))


@pytest.fixture(scope="module")
def fort(request):
    """One server for all tests here that measure nothing; one of each kind for those under BOTH."""
    server = Server(ASYNC_MODE=getattr(request, "param", "threading"))
    yield server
    server.stop()
    assert not server.said("Traceback")


@pytest.fixture
def inside():
    """A server in this process, to look into. Its connections hold little."""
    vars(program.socketio.server).pop("_send_packet", None)  # SocketIOTestClient leaves its own there
    program.socketio.server._send_eio_packet = program.write
    server = program.make_server(ME, 0, program.app, threaded=True, request_handler=program.Handler)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server.url = f"http://{ME}:{server.port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def siege(fort, connect):
    """A server that luis attacks. Afterwards nobody else has noticed, and the log tells of no error."""
    ana, eva = connect(fort, "ana"), connect(fort, "eva", transports=["polling"])
    ana.call("join", {"room": "staff", "last_id": 10**15}), eva.call("join", {"room": "room3"})
    fort.attacker, fort.victims = sign_in(fort.url, "luis"), (ana, eva)
    yield fort
    assert ana.call("chat", {"room": "staff", "message": "all is well"})["ok"]
    until(lambda: ana.texts() == ["all is well"])
    assert [event for event, data in ana.heard + eva.heard] == ["join", "chat", "join"]
    assert ana.connected and eva.connected and fort.process.poll() is None and not fort.said("Traceback")


# Delivery ------------------------------------------------------------------------------------------------------------


@MODES
def test_nothing_is_lost_doubled_or_swapped_while_all_connections_are_cut_again_and_again(fresh, mode):
    relay, done = Relay(fresh(ASYNC_MODE=mode).port), threading.Event()
    sender = Stubborn(relay, "ana", None)
    everybody = [sender, Stubborn(relay, "luis", ["websocket"]), Stubborn(relay, "eva", ["polling"])]
    threading.Thread(target=lambda: [relay.cut() for _ in iter(lambda: done.wait(1.5), True)]).start()
    for number in range(120):
        until(lambda: sender.say(str(number)))
    done.set()
    for client in everybody:
        until(lambda: len(client.heard) >= 120)
        assert [said["message"] for said in client.heard] == [str(number) for number in range(120)]
        client.disconnect()


# Hostile input -------------------------------------------------------------------------------------------------------

FIELDS = {"join": "room last_id", "leave": "room", "chat": "room message key", "typing": "room",
          "invite": "room username", "expel": "room username", "connect": "room", "disconnect": "room", "nope": "room"}
DEEP = "[" * 10_000 + "]" * 10_000
VALUES = ["null", "true", "0", "-1", "1.5", "1e400", "NaN", "9" * 400, "9" * 5000, '""', '"\\u0000"', '"\\ud800"',
          '"SID"', '"EIO"', '"room:staff"', '"user:ana"', f'"{"x" * 60_000}"', "[]", '["staff"]',
          '{"_placeholder":true,"num":0}', DEEP]
SHAPES = ["", ",null", ",1", ',"x"', ",[]", ",[{}]", ",{},{}", ',"a","b","c"', ",{},null", "," + DEEP]
NAMES = [f'"{name}"' for name in FIELDS] + ["null", "1", '""', '"*"', '["chat"]', '{"chat":1}', '"\\ud800"', "true"]
STARTS = ["", "b", "²", "2", "5", "9", "4", "4²", "40", "40/other,", "41", "42", "42²", "42/other,", "43", "44",
          "451-", "461-"]
ENDS = ["", "!", "[", "{}", '"x"', "\0", '["chat"]', '[{"message":"\0"}]', "9" * 101, "[" * 10_000, DEEP]
FRAMES = [{"mask": 0}, {"first": 0xC0}, {"first": 0xA0}, {"first": 0x90}, {"opcode": 0}, {"opcode": 3}, {"opcode": 15},
          {"opcode": 9, "first": 0}, {"opcode": 8}, {"opcode": 2}, {"opcode": 10}, {"first": 0},
          {"payload": b"4\xed\xa0\x80"},
          {"payload": b"4" * 70_000}, {"opcode": 9, "payload": b"x" * 126}, {"opcode": 2, "payload": b""},
          *({"opcode": 8, "payload": code} for code in (b"x", b"\0\0", b"\x03\xed", b"\x03\xe8\xff", b"\xff\xff"))]


def hostile_events(victim):
    """Each field of each event with each value, and each event with each shape of arguments: all must be refused."""
    for name, fields in FIELDS.items():
        for field in fields.split():
            for value in VALUES:
                value = value.replace("SID", victim.get_sid()).replace("EIO", victim.eio.sid)
                data = {"room": '"staff"', "message": '""', "username": '"eva"', field: value}
                pairs = ",".join(f'"{key}":{value}' for key, value in data.items())
                yield f'["{name}",{{{pairs}}}]'
    yield from (f"[{name}{shape}]" for name in NAMES for shape in SHAPES)


@pytest.mark.parametrize("transport", ["websocket", "polling"])
def test_every_hostile_event_is_refused_in_words_and_cuts_nobody(siege, transport):
    packets = [f"42{number}{event}" for number, event in enumerate(hostile_events(siege.victims[0]), 1)]
    assert len(packets) > 400
    wire = Wire(siege, siege.attacker).enter() if transport == "websocket" else Polls(siege, siege.attacker)
    for number, packet in enumerate(packets, 1):
        wire.send(packet)
        ack = wire.until(f"43{number}[")[-1]
        assert '"ok":false' in ack and '"error":"' in ack, packet[:200]


def test_a_client_that_sends_what_no_page_would_is_refused_too(siege, connect):
    luis = connect(siege, "luis")
    for event in FIELDS:
        for data in (b"\0", {"room": b"staff"}, ({}, {}), (b"a", b"b"), [b"x"], None, "staff", 1e308, {"room": {}}):
            assert luis.call(event, data)["error"]
    assert luis.connected


def test_what_is_no_packet_ends_at_most_the_connection_that_sent_it(siege):
    as_a_member = ["40", '420["join",{"room":"python"}]']
    for number, packet in enumerate(start + end for start in STARTS for end in ENDS):
        wire = Wire(siege, siege.attacker)
        wire.send(*as_a_member[:number % 2 * 2], packet, "3")
        wire.close()
    for number, packet in enumerate(start + end for start in STARTS for end in ENDS[:-2]):
        Polls(siege, siege.attacker, connect=False).send(*as_a_member[:number % 2 * 2], packet)


@BOTH
def test_frames_against_the_protocol_end_the_connection(siege):
    for frame in FRAMES:
        wire = Wire(siege, siege.attacker).enter("python")
        wire.tcp.sendall(wire.frame(**{"payload": b"3"} | frame))
        with suppress(OSError):
            wire.send("1")  # goodbye, for those that were no offence
        assert wire.ended(), frame
    wire = Wire(siege, siege.attacker).enter("python")
    wire.tcp.sendall(wire.frame(b"hello", opcode=9) * 5000)
    wire.send('429["leave",{"room":"python"}]')
    assert '"ok":true' in wire.until("439")[-1]


LENGTHS = ["-1", "10000000000", "", "abc", "+5", "1e3", "0x5", "5, 5", "\xb2", "9" * 5000, "65537"]
REQUESTS = [b"\0\xff\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0", b"GET\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n",
            b"GET * HTTP/1.1\r\n\r\n", b"GET //[/%00%ff HTTP/1.1\r\nno colon\r\n : \r\n\r\n",
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"GET /login HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
            b"GET / HTTP/1.1\r\nHost: \xff\r\nCookie: \xff\0;=;\r\n\r\n"]
PATHS = ["/login", "/register", "/messages", "/socket.io/?EIO=4&transport=polling&sid=SID", "/"]
HEADERS = [*(f"Content-Length: {length}" for length in LENGTHS), "X: y", "Transfer-Encoding: chunked",
           "Content-Length: 1000", "Content-Length: 9\r\nContent-Type: multipart/form-data; boundary=\xff"]
FORMS = [{}, {"username": "\0"}, {"username": "x" * 60_000}, {"username": "x" * 70_000}, {"username": ["ana", "luis"]},
         {"username": "x y", "password": b"\xff" * 9, "next": "//\0"}, {"username": "ana\n", "password": "\0" * 9}]
BODIES = [b"", b"{", b"[]", b"null", b"\xff", DEEP.encode(), b'{"message":' + DEEP.encode(), b'{"message":"\\ud800"}',
          b'{"message":NaN}', b'{"message":' + b"9" * 6000 + b"}", b'{"message":"x","room":"staff"}',
          b'{"message":"x","key":[]}', b'{"message":"x","room":{}}', b"x" * 70_000]


@BOTH
def test_hostile_requests_get_an_answer_or_none_but_leave_no_mark(siege):
    cookie = cookie_of(siege.attacker)
    posts = [f"POST {path} HTTP/1.1\r\nCookie: {cookie}\r\n{header}\r\n\r\n5\r\nab\xff\0=\r\n".encode("latin-1")
             for path in PATHS for header in HEADERS]
    for request in REQUESTS + posts:
        with suppress(ConnectionError), socket.create_connection((ME, siege.port)) as tcp:
            sid = Polls(siege, siege.attacker).sid.encode() if b"SID" in request else b""
            tcp.sendall(request.replace(b"SID", sid))
            if b"1000\r" in request:  # vanishes half-way, without a word
                tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                with suppress(OSError):  # it may have ended already
                    tcp.shutdown(socket.SHUT_WR)
                assert b" 500 " not in tcp.recv(100), request
    for form in FORMS:
        assert requests.post(f"{siege.url}/login", data=form).status_code in (400, 401, 413, 429)
        assert requests.post(f"{siege.url}/register", data=form).status_code in (400, 413)
    for body in BODIES:
        assert siege.attacker.post(f"{siege.url}/messages", data=body).status_code in (400, 403, 413)


@BOTH
def test_a_polling_session_serves_only_who_opened_it(siege):
    victim, mine = siege.victims[1].eio, Polls(siege, siege.attacker)
    for query in ("sid=SID", "sid=&sid=SID", f"sid=SID&sid={mine.sid}", "EIO=3&sid=SID", "j=0&sid=SID"):
        query = query.replace("SID", victim.sid)
        url = f"{siege.url}/socket.io/?EIO=4&transport=polling&{query}"
        assert siege.attacker.get(url).status_code == siege.attacker.post(url, data="41").status_code == 403
        assert Wire(siege, siege.attacker, f"&{query}").status == 403


@BOTH
def test_of_several_upgrades_of_one_session_at_most_one_succeeds(siege):
    polls = Polls(siege, siege.attacker)
    wires = [Wire(siege, siege.attacker, f"&sid={polls.sid}") for _ in range(5)]
    for wire in wires:
        with suppress(OSError):
            wire.send("2probe")
    assert [wire.read() for wire in wires].count("3probe") == 1


@BOTH
def test_an_upgrade_that_begins_wrongly_leaves_the_session_on_polling(siege):
    polls = Polls(siege, siege.attacker)
    for packet in ("", "4", "5", "2", "3probe", "b!!!", "42[]", "x" * 70_000):
        wire = Wire(siege, siege.attacker, f"&sid={polls.sid}")
        wire.send(packet)
        assert wire.ended(), packet
    polls.send('420["typing",{"room":"python"}]')
    polls.until("430")


@BOTH
def test_twenty_packets_in_one_polling_post_are_all_delivered(fort):
    eva, polls = Wire(fort, sign_in(fort.url, "eva")).enter("python"), Polls(fort, register(fort.url, "twenty"))
    polls.send('420["join",{"room":"python"}]')
    polls.until("430")
    polls.send(*flood(20))
    acks = [packet for packet in polls.until("4320[") if packet.startswith("43")]
    assert len(acks) == 20 and all('"ok":true' in ack for ack in acks)
    assert [said["message"].rstrip("x") for said in eva.hear(20)] == [str(number) for number in range(1, 21)]


# Before log-in -------------------------------------------------------------------------------------------------------

EVIL = {"Origin": "http://evil.example"}
STRANGERS = [({"Cookie": ""}, 401), ({"Cookie": "session=x"}, 401), (EVIL, 403),
             (EVIL | {"X-Forwarded-Host": "evil.example"}, 403), ({"Origin": "null"}, 403),
             ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Transfer-Encoding": "chunked"}, 413)]


@BOTH
@pytest.mark.parametrize("headers, status", STRANGERS, ids=str)
def test_strangers_and_other_sites_get_no_connection(fort, headers, status):
    session, url = sign_in(fort.url, "luis"), f"{fort.url}/socket.io/?EIO=4&transport=polling"
    assert Wire(fort, session, **headers).status == status
    assert (requests if "Cookie" in headers else session).get(url, headers=headers).status_code == status


@BOTH
def test_half_a_handshake_is_refused(fort):
    session = sign_in(fort.url, "luis")
    for headers in ({"Sec-WebSocket-Key": None}, {"Sec-WebSocket-Version": "7"}, {"Sec-WebSocket-Version": None}):
        assert Wire(fort, session, **headers).status == 400


LENGTH_LIES = ["Content-Length: -1", "Content-Length: 10000000000", "Transfer-Encoding: chunked"]


@BOTH
@pytest.mark.parametrize("kind", ["fragments", "one frame", "bomb", *LENGTH_LIES])
def test_what_strangers_pour_in_fills_no_memory(fort, kind):
    sign_in(fort.url, "ana")  # hashing a password for the first time takes memory, too
    before, data = fort.usage.memory_info().rss, b"f000\r\n" + b"x" * 0xF000 + b"\r\n"
    wire = Wire(fort, None, **{"Sec-WebSocket-Extensions": "permessage-deflate"})
    if kind == "fragments":
        data = wire.frame(data, opcode=0, first=0)
    elif kind == "one frame":
        wire.tcp.sendall(b"\x81\xff" + struct.pack("!Q", 2**40) + bytes(4))
    elif kind == "bomb":
        data = wire.frame(zlib.compress(bytes(40_000_000), wbits=-15), first=0xC0)
    else:
        wire.tcp = socket.create_connection((ME, fort.port))
        wire.tcp.sendall(f"POST /socket.io/?EIO=4 HTTP/1.1\r\nHost: {ME}\r\n{kind}\r\n\r\n".encode())
    with suppress(OSError):
        for number in range(400):  # 24 MB, if the server takes them
            wire.tcp.sendall(data)
            assert number % 20 or requests.get(f"{fort.url}/login").status_code == 200
            assert fort.usage.memory_info().rss - before < 5e6


# After log-in --------------------------------------------------------------------------------------------------------


TOO_LARGE = {"over 64 KB": (0x80, b"4" * 70_000), "in fragments": (0, b"4" * 40_000),
             "compressed": (0xC0, zlib.compress(bytes(10**7), wbits=-15))}


@BOTH
@pytest.mark.parametrize("first, payload", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_message_too_large_or_compressed_ends_its_connection(fort, first, payload):
    wires = [Wire(fort, sign_in(fort.url, "luis")).enter("python") for _ in range(3)]
    before = fort.usage.memory_info().rss
    for wire in wires:
        with suppress(OSError):
            wire.tcp.sendall(wire.frame(payload, first=first) + wire.frame(payload, opcode=0, first=first & 0x80))
        assert wire.ended()
    assert fort.usage.memory_info().rss - before < 5e6


# Flood ---------------------------------------------------------------------------------------------------------------


@MODES
def test_a_flood_is_refused_over_the_rate_and_what_is_acked_is_heard_in_order(fresh, mode):
    server = fresh(ASYNC_MODE=mode)
    stalled = Wire(server, sign_in(server.url, "luis"), buffer=4096).enter("python")
    eva, ana = (Wire(server, sign_in(server.url, name)).enter("python") for name in ("eva", "ana"))
    memory, threads, heard = server.usage.memory_info().rss, server.usage.num_threads(), []
    listener = threading.Thread(target=lambda: heard.extend(chats(eva.until('42["typing"'))))
    sender = threading.Thread(target=ana.send, args=flood(1000))
    [thread.start() for thread in (listener, sender)]
    acks = [json.loads(packet[packet.index("["):])[0] for packet in ana.until("431000[") if packet.startswith("43")]
    ana.send('42["typing",{"room":"python"}]')
    listener.join()
    accepted = [ack["id"] for ack in acks if ack["ok"]]
    assert 60 <= len(accepted) < len(acks) == 1000 and all(ack["ok"] or ack["retry_after"] > 0 for ack in acks)
    assert [said["id"] for said in heard] == accepted and stalled
    assert server.usage.memory_info().rss - memory < 30e6 and server.usage.num_threads() <= threads + 1


def test_who_stops_reading_is_cut_at_once_not_queued_for(inside):
    stalled = Wire(inside, register(inside.url, "stalled"), buffer=4096).enter("python")
    healthy, talker = (Wire(inside, register(inside.url, name)).enter("python") for name in ("healthy", "talker"))
    connection = next(iter(program.socketio.server.eio.sockets.values()))
    for _ in range(10):  # as much as a line holds, then more than it does
        talker.send(*flood(6))
        assert len(healthy.hear(6)) == 6 and len(talker.hear(6)) == 6
    assert stalled.ended()
    until(lambda: connection.closed)
    assert connection.queue.qsize() <= 1 and not connection.websocket.waiting


# Silence -------------------------------------------------------------------------------------------------------------


def test_the_silent_the_hasty_and_the_rude_leave_no_thread_and_no_descriptor(fresh):
    server = fresh()
    luis, eva, relay = sign_in(server.url, "luis"), sign_in(server.url, "eva"), Relay(server.port)
    Wire(server, eva).enter().send("1")  # starts the library's thread that looks for the silent
    until(lambda: server.said("disconnected: eva"))
    usage = server.usage.num_threads(), server.usage.num_fds()
    silent = [Wire(relay, luis).enter("python") for _ in range(5)] + [Polls(relay, luis) for _ in range(5)]
    relay.silent = True
    for number in range(20):
        Wire(server, eva).enter("python").close()
        Wire(server, eva).send("x" * (number % 5))
        for first, payload in TOO_LARGE.values():
            wire = Wire(server, eva).enter()
            with suppress(OSError):
                wire.tcp.sendall(wire.frame(payload, first=first) * 2)
    until(lambda: len(server.said("disconnected: eva (transport close)")) == 80)
    until(lambda: len(server.said("disconnected: luis (ping timeout)")) == len(silent), 40)
    until(lambda: server.usage.num_threads() <= usage[0] and server.usage.num_fds() <= usage[1], 40)


# One frame for a room ------------------------------------------------------------------------------------------------


@BOTH
def test_joining_in_a_storm_misses_nothing_doubles_nothing_and_hears_in_order(fort):
    wire, heard = Wire(fort, sign_in(fort.url, "luis")).enter("python"), []
    storm = talk(crowd(fort, 5), 60, "hail", 0.01)
    first = heard = wire.hear(1)
    for _ in range(100):
        wire.send('421["leave",{"room":"python"}]')
        heard = heard + chats(wire.until("431"))
        wire.send(f'422["join",{{"room":"python","last_id":{heard[-1]["id"]}}}]')
        packets = wire.until("432")
        heard = heard + chats(packets)
        assert json.loads(packets[-1][3:])[0]["missed"] == len(chats(packets))
        assert [packet[4:8] for packet in packets].index("join") == len(packets) - 2  # history, announcement, ack
    [thread.join() for thread in storm]
    whole = [said for said in log_of(fort) if said["id"] >= first[0]["id"]]
    assert heard + wire.hear(len(whole) - len(heard)) == whole


@BOTH
def test_an_upgrade_in_a_storm_misses_nothing_and_doubles_nothing(fort):
    luis = sign_in(fort.url, "luis")
    storm, results = talk(crowd(fort, 5), 60, "snow", 0.01), []
    for _ in range(5):
        polls = Polls(fort, luis)
        polls.send('420["join",{"room":"python"}]')
        packets = polls.until("430")
        wire = Wire(fort, luis, f"&sid={polls.sid}")
        wire.send("2probe")
        assert wire.read() == "3probe"
        while "6" not in (more := polls.get()):  # the poll that ends the polling
            packets += more
        results.append((wire, packets + more))
        time.sleep(0.1)  # what is said now is heard after the upgrade
        wire.send("5")
    [thread.join() for thread in storm]
    whole = log_of(fort)
    for wire, packets in results:
        heard = chats(packets)
        heard += wire.hear(sum(said["id"] > heard[-1]["id"] for said in whole))
        assert heard[-len(whole):] == whole


def test_an_event_reads_no_cookie_again(online, monkeypatch):
    ana, cookies = online("ana"), []
    monkeypatch.setattr(program.SecureCookieSessionInterface, "open_session", lambda *cookie: cookies.append(cookie))
    assert ana.ask("join", room="python")["ok"] and not cookies


@pytest.mark.parametrize("size", [1, 125, 126, 127, 65_535, 65_536, 70_000])
def test_frames_of_every_size_arrive_whole(size):
    near, far = socket.socketpair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    wire = Wire.over(far)
    near.sendall(program.EnginePacket(4, "x" * (size - 1)).frame + program.EnginePacket(4, "\u20ac").frame)
    assert wire.read() == "4" + "x" * (size - 1) and wire.read() == "4\u20ac"


TEXTS = [DUCK * 500, "\u202eשלום\u2028\u2029\ufeff", "a\0b", "\x7f\x85\ufffe\U0010ffff", "<b>&amp;\"'\\\x1e!"]


def test_any_unicode_arrives_as_it_was_sent(fort):
    luis, eva = Wire(fort, sign_in(fort.url, "luis")).enter("flask"), Polls(fort, sign_in(fort.url, "eva"))
    eva.send('420["join",{"room":"flask"}]')
    eva.until("430")
    for text in TEXTS:
        luis.send("420" + json.dumps(["chat", {"room": "flask", "message": text}], ensure_ascii=False))
        assert luis.hear(1)[0]["message"] == chats(eva.until('42["chat"'))[0]["message"] == text


@MODES
def test_who_reads_slowly_gets_all_of_the_history_and_holds_up_nobody(fresh, mode):
    server = fresh(ASYNC_MODE=mode)
    members = crowd(server, 9)
    [thread.join() for thread in talk(members, 56, DUCK * 490, 0.02)]
    slow = Wire(server, sign_in(server.url, "luis"), buffer=4096).enter()
    slow.send('420["join",{"room":"python"}]')
    members[0].until('42["join",{"room":"python","username":"luis"')
    [thread.join() for thread in talk(members[:2], 4, "meanwhile")]  # it has read nothing yet
    packets = []
    while not (packets and packets[-1].startswith("430")):
        packets += slow.until("4")
        time.sleep(0.002)
    assert json.loads(packets[-1][3:])[0]["missed"] == 500
    assert (chats(packets) + slow.hear(8))[-500:] == log_of(server)


def test_a_connection_takes_one_thread(fresh):
    server, wires = fresh(), []
    eva = sign_in(server.url, "eva")
    for _ in range(2):
        threads = server.usage.num_threads()
        wires += [Wire(server, eva).enter() for _ in range(20)]
    assert server.usage.num_threads() == threads + 20


def test_three_hundred_wait_in_long_polls_without_a_thread_and_all_hear_at_once(fresh):
    server = fresh(ASYNC_MODE="gevent")
    ana, eva = sign_in(server.url, "ana"), Wire(server, sign_in(server.url, "eva")).enter()
    last_id = ana.post(f"{server.url}/messages", json={"message": "before"}).json()["id"]
    ask = f"GET /messages?after={last_id}&wait=25 HTTP/1.1\r\nHost: {ME}\r\nCookie: {cookie_of(ana)}\r\n\r\n"
    waiting = [socket.create_connection((ME, server.port), timeout=20) for _ in range(300)]
    for tcp in waiting:
        tcp.sendall(ask.encode())
    until(lambda: server.usage.num_fds() >= 300)
    threads = server.usage.num_threads()
    eva.send('420["chat",{"message":"now"}]')
    for tcp in waiting:
        answer = b""
        while b'"now"' not in answer:
            answer += tcp.recv(65536) or pytest.fail(f"closed after {answer}")
        assert answer.startswith(b"HTTP/1.1 200") and b'"before"' not in answer
    assert threads < 10 and [said["message"] for said in eva.hear(2)] == ["before", "now"]


# The libraries -------------------------------------------------------------------------------------------------------


def test_the_libraries_still_are_as_section_7_read_them(inside):
    """Connections are ours, nothing of theirs is queued, one thread reads and none writes."""
    wire = Wire(inside, register(inside.url, "inside")).enter("python")
    connection = list(program.socketio.server.eio.sockets.values())[-1]
    assert type(connection) is program.Connection and type(connection.websocket) is program.WebSocket
    assert connection.upgraded and connection.queue.empty() and hasattr(socketio.Server, "_send_eio_packet")
    assert not [thread.name for thread in threading.enumerate() if re.search("writer|simple_websocket", thread.name)]
    wire.close()
    until(lambda: connection.closed)


LANES = "Short polling", "Long polling", "Full duplex"


def lane(page, name):
    return page.get_by_role("region", name=name)


def figure(page, name, figure):
    """What a lane counts: requests, empty answers, messages heard."""
    return int(lane(page, name).locator(f"dd[data-figure={figure}]").inner_text() or 0)


def rows(page, name):
    """What a lane shows, oldest first: a message and its delay in each row."""
    return [row.split("\t") for row in reversed(lane(page, name).get_by_role("row").all_inner_texts())]


def shown(page, name):
    return [row[0] for row in rows(page, name)]


def delays(page, name):
    return [row[1] for row in rows(page, name)]


def say(page, text, button="Send"):
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name=button, exact=True).click()


def post(session, url, text):
    assert session.post(f"{url}/messages", json={"message": text}).status_code == 201


def all_show(page, texts, seconds=30):
    """Wait until each lane shows exactly these, in this order: nothing twice, nothing missing."""
    for name in LANES:
        with suppress(AssertionError):
            until(lambda: shown(page, name) == texts, seconds)
        assert shown(page, name) == texts, name


def ready(page):
    """Wait until each lane has had its first answer, so that it is known where all begin."""
    for name in LANES:
        until(lambda: figure(page, name, "requests"))
    return page


def test_a_message_arrives_in_all_three_lanes_each_with_its_delay(server, browser):
    page = browser(server, "ana")
    say(page, "Hello")
    all_show(page, ["ana: Hello"])
    for name in LANES:
        until(lambda: figure(page, name, "heard") == 1)
        assert re.fullmatch(r"\d+ ms|\d+\.\d s", delays(page, name)[0])
        until(lambda: lane(page, name).locator("dd[data-figure=delay]").inner_text() == delays(page, name)[0])


def test_a_lane_begins_with_what_is_said_from_now_on(server, browser):
    post(sign_in(server.url, "ana"), server.url, "before the page was opened")
    page = browser(server, "luis")
    say(page, "now")
    all_show(page, ["luis: now"])


def test_send_ten_gives_ten_in_each_lane_each_once_and_in_order(server, browser):
    page = browser(server, "ana")
    say(page, "Hello", "Send ten")
    all_show(page, [f"ana: Hello {n}" for n in range(1, 11)])


def test_short_polling_asks_more_often_than_long_polling_and_full_duplex_least(server, browser):
    page = browser(server, "ana")
    page.get_by_label("Every").select_option("0.5")
    until(lambda: figure(page, "Short polling", "requests") >= 8)
    assert figure(page, "Long polling", "requests") <= 3
    say(page, "Hello", "Send ten")
    all_show(page, [f"ana: Hello {n}" for n in range(1, 11)])
    assert figure(page, "Short polling", "empty") > figure(page, "Long polling", "empty")
    assert figure(page, "Full duplex", "requests") <= 2 < 10 <= figure(page, "Long polling", "requests")


def test_the_interval_changes_while_it_runs(server, browser):
    page = ready(browser(server, "ana"))

    def asked_in_two_seconds(interval):
        page.get_by_label("Every").select_option(interval)
        before = figure(page, "Short polling", "requests")
        page.wait_for_timeout(2000)
        return figure(page, "Short polling", "requests") - before

    assert asked_in_two_seconds("5") < asked_in_two_seconds("0.5")


def test_two_people_see_each_others_messages_in_all_lanes(server, browser):
    ana, luis = ready(browser(server, "ana")), ready(browser(server, "luis"))
    say(ana, "Hello Luis")
    all_show(luis, ["ana: Hello Luis"])
    say(luis, "Hello Ana")
    for page in (ana, luis):
        all_show(page, ["ana: Hello Luis", "luis: Hello Ana"])
    assert "+0 ms" in [delays(luis, name)[0] for name in LANES]  # one of the lanes was the first to have it
    assert not any("+" in delays(ana, name)[0] for name in LANES)


def test_a_network_gone_for_three_seconds_costs_no_lane_a_message(server, browser):
    relay, luis = Relay(server.port), sign_in(server.url, "luis")
    page = browser(relay, "ana")
    say(page, "before")
    all_show(page, ["ana: before"])
    relay.open = False
    relay.cut()
    for n in range(3):
        post(luis, server.url, f"meanwhile {n}")
    for name in LANES:
        expect(lane(page, name)).to_contain_text("trying again")
    page.wait_for_timeout(3000)
    relay.open = True
    all_show(page, ["ana: before", *(f"luis: meanwhile {n}" for n in range(3))])
    for name in LANES:
        expect(lane(page, name)).to_contain_text("3 caught up")
    say(page, "after")
    all_show(page, ["ana: before", *(f"luis: meanwhile {n}" for n in range(3)), "ana: after"])


def test_what_is_sent_without_a_network_arrives_once_when_it_is_back(server, browser):
    relay = Relay(server.port)
    page = ready(browser(relay, "ana"))
    say(page, "Hello", "Send ten")
    until(lambda: len(shown(page, "Full duplex")) >= 2)
    relay.open = False
    relay.cut()
    page.wait_for_timeout(3000)
    relay.open = True
    all_show(page, [f"ana: Hello {n}" for n in range(1, 11)])


def test_a_line_cut_again_and_again_loses_and_doubles_nothing(server, browser):
    relay = Relay(server.port)
    page = ready(browser(relay, "ana"))
    say(page, "Hello", "Send ten")
    for n in range(1, 11, 2):
        until(lambda: f"ana: Hello {n}" in shown(page, "Short polling"))
        relay.cut()
    all_show(page, [f"ana: Hello {n}" for n in range(1, 11)])


def test_a_restart_of_the_server_is_explained_by_all_three_with_a_link(fresh, browser):
    server = fresh()
    page = browser(server, "ana")
    say(page, "before")
    all_show(page, ["ana: before"])
    server.stop()
    server.start()
    for name in LANES:
        expect(lane(page, name)).to_contain_text("no longer knows you", timeout=20_000)
        expect(lane(page, name).get_by_role("link", name="Sign in again")).to_have_attribute("href", "/login?next=/")
    lane(page, "Full duplex").get_by_role("link").click()
    page.get_by_role("button", name="Sign in as ana").click()
    say(page, "after")
    all_show(page, ["ana: after"])


def test_signing_out_elsewhere_is_explained_too(server, browser):
    page = ready(browser(server, "ana"))
    requests.post(f"{server.url}/logout", cookies={c["name"]: c["value"] for c in page.context.cookies()})
    for name in LANES:
        expect(lane(page, name).get_by_role("link", name="Sign in again")).to_be_visible(timeout=20_000)


@pytest.mark.parametrize("name", ["Long polling", "Full duplex"])
def test_a_paused_lane_stops_asking_and_catches_up_when_it_resumes(server, browser, name):
    page = ready(browser(server, "ana"))
    lane(page, name).get_by_role("button", name=f"Pause {name.lower()}").click()
    asked = figure(page, name, "requests")
    say(page, "Hello", "Send ten")
    for other in set(LANES) - {name}:
        until(lambda: len(shown(page, other)) == 10)
    assert shown(page, name) == [] and figure(page, name, "requests") == asked
    lane(page, name).get_by_role("button", name=f"Resume {name.lower()}").click()
    all_show(page, [f"ana: Hello {n}" for n in range(1, 11)])
    assert set(delays(page, name)) == {"caught up"}  # the pause is not the lane's fault
    expect(lane(page, name)).to_contain_text("10 caught up")


def test_with_all_lanes_paused_nothing_is_asked_and_a_message_still_leaves(server, browser):
    page = ready(browser(server, "ana"))
    for name in LANES:
        page.get_by_role("button", name=f"Pause {name.lower()}").click()
    asked = [figure(page, name, "requests") for name in LANES]
    say(page, "over HTTP")
    until(lambda: "over HTTP" in sign_in(server.url, "luis").get(f"{server.url}/messages?after=0").text)
    page.wait_for_timeout(2000)
    assert asked == [figure(page, name, "requests") for name in LANES]
    for name in LANES:
        page.get_by_role("button", name=f"Resume {name.lower()}").click()
    all_show(page, ["ana: over HTTP"])


def test_reset_clears_counts_and_lists_and_all_go_on(server, browser):
    page = browser(server, "ana")
    say(page, "Hello")
    all_show(page, ["ana: Hello"])
    page.get_by_role("button", name="Reset").click()
    all_show(page, [])
    until(lambda: all(figure(page, name, "heard") == 0 for name in LANES))
    assert figure(page, "Full duplex", "requests") == 0
    say(page, "again")
    all_show(page, ["ana: again"])


def test_markup_stays_text(server, browser):
    page = browser(server, "ana")
    markup = "<img src=x onerror=alert(1)><b>bold</b>"
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    say(page, markup)
    all_show(page, [f"ana: {markup}"])
    assert page.locator(".messages :is(img, b)").count() == 0


def test_an_empty_message_is_refused_in_words(server, browser):
    page = browser(server, "ana")
    say(page, "   ")
    expect(page.get_by_text("A message has 1 to 500 characters.")).to_be_visible()
    say(page, "Hello")
    all_show(page, ["ana: Hello"])


def test_the_chart_sets_delays_and_requests_side_by_side(server, browser):
    page = browser(server, "ana")
    say(page, "Hello", "Send ten")
    all_show(page, [f"ana: Hello {n}" for n in range(1, 11)])
    chart = page.get_by_role("table", name="The three lanes side by side")
    for name in LANES:
        cells = chart.get_by_role("row", name=name).get_by_role("cell").all_inner_texts()
        assert re.fullmatch(r"\d+ ms|\d+\.\d s", cells[0]) and int(cells[1]) >= 1
    shares = [float(bar.evaluate("bar => bar.style.getPropertyValue('--share')"))
              for bar in chart.locator("[data-figure=requests]").all()]
    assert shares[2] == min(shares) and 0.5 < max(shares) <= 1


def test_a_tab_with_another_users_cookie_says_so(server, browser):
    page = ready(browser(server, "ana"))
    other = page.context.new_page()
    other.goto(f"{server.url}/login?next=/")
    other.get_by_role("button", name="Sign in as luis").click()
    page.get_by_role("button", name="Pause full duplex").click()
    page.get_by_role("button", name="Resume full duplex").click()
    expect(lane(page, "Full duplex")).to_contain_text("You are signed in as luis now")


def test_the_page_is_used_by_keyboard(server, browser):
    page = ready(browser(server, "ana"))
    page.get_by_label("Message").focus()
    page.keyboard.type("typed")
    page.keyboard.press("Enter")
    all_show(page, ["ana: typed"])
    for name in ("Send", "Send ten", "Reset", "Pause short polling"):
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name=name, exact=True)).to_be_focused()


def test_the_script_stays_within_120_lines_and_writes_no_markup(server):
    page = sign_in(server.url, "ana").get(server.url).text
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert len([line for script in scripts for line in script.splitlines() if line.strip()]) <= 120
    assert "innerHTML" not in page


def test_a_tab_that_slept_has_everything_once_when_it_wakes(server, browser):
    page, luis = ready(browser(server, "ana")), sign_in(server.url, "luis")
    tab = page.context.new_cdp_session(page)
    tab.send("Page.setWebLifecycleState", {"state": "frozen"})
    for n in range(5):
        post(luis, server.url, f"meanwhile {n}")
    tab.send("Page.setWebLifecycleState", {"state": "active"})
    all_show(page, [f"luis: meanwhile {n}" for n in range(5)])
    say(page, "awake")
    all_show(page, [*(f"luis: meanwhile {n}" for n in range(5)), "ana: awake"])


def join(page, room="python"):
    page.get_by_role("button", name=f"Join {room}").click()
    expect(page.get_by_role("button", name=f"Leave {room}")).to_be_visible()


def send(page, *messages):
    for message in messages:
        page.get_by_label("Message").fill(message)
        page.get_by_role("button", name="Send").click()


def send_at_once(page, messages):
    connected(page)
    page.evaluate("messages => { for (field.value of messages) $('#send').click(); }", messages)


def conversation(page):
    return page.get_by_role("log", name="Conversation")


def said(page):
    """The last messages that the page shows in the room, in order, but not those that wait."""
    rows = page.locator(".talk[aria-current=true] [data-id] .message")
    return rows.evaluate_all("rows => rows.slice(-150).map(row => row.textContent)")


def wait_until_said(page, *messages):
    """Wait until these are the last messages, in this order."""
    until(lambda: said(page)[-len(messages):] == list(messages))


def state_of(page):
    return page.locator("#state")


def connected(page):
    expect(state_of(page)).to_have_text("Connected")


def wire(page):
    return page.get_by_role("list", name="The wire")


def luis_is_gone(ana, luis, reason):
    """The room says so, and he hears nothing of it any more."""
    expect(conversation(ana)).to_contain_text(f"luis is gone: {reason}")
    send(ana, "Among ourselves")
    wait_until_said(ana, "Among ourselves")
    expect(wire(luis)).not_to_contain_text("ourselves")


def test_two_talk_in_a_room_and_a_third_who_has_not_joined_it_hears_nothing(server, browser):
    ana, luis, eva = (browser(server, name, "/room") for name in ("ana", "luis", "eva"))
    join(ana), join(luis), join(eva, "flask")
    send(ana, "Hello, Luis!")
    wait_until_said(luis, "Hello, Luis!")
    send(luis, "Hello, Ana!")
    wait_until_said(ana, "Hello, Luis!", "Hello, Ana!")
    send(eva, "Alone here")
    wait_until_said(eva, "Alone here")
    expect(wire(eva)).not_to_contain_text("Hello")


def test_room_without_a_name_has_joined_nothing_and_with_one_is_in_it(server, browser):
    ana, luis = browser(server, "ana", "/room"), browser(server, "luis", "/room?room=python")
    expect(luis.get_by_role("button", name="Leave python")).to_be_visible()
    connected(ana)
    expect(ana.get_by_role("button", name=re.compile("^Leave"))).to_have_count(0)
    send(luis, "Is anybody here?")
    wait_until_said(luis, "Is anybody here?")
    expect(wire(ana)).not_to_contain_text("anybody")
    join(ana)
    wait_until_said(ana, "Is anybody here?")


def test_a_room_that_does_not_exist_is_called_so(server, browser):
    page = browser(server, "ana", "/room?room=attic")
    expect(page.get_by_role("alert")).to_have_text("There is no room of that name.")
    expect(page.get_by_role("heading", name="No room yet")).to_be_visible()


def test_the_page_shows_who_comes_who_is_there_and_who_goes(server, browser):
    ana, luis = browser(server, "ana", "/room?room=python"), browser(server, "luis", "/room?room=python")
    members = ana.get_by_role("list", name="Members")
    expect(members).to_contain_text("luis")
    expect(conversation(ana)).to_contain_text("luis joined")
    luis.get_by_role("button", name="Leave python").click()
    expect(members).not_to_contain_text("luis")
    luis_is_gone(ana, luis, "left")


def test_the_page_shows_for_a_while_who_is_typing(server, browser):
    ana, luis = browser(server, "ana", "/room?room=python"), browser(server, "luis", "/room?room=python")
    expect(ana.get_by_role("list", name="Members")).to_contain_text("luis")
    luis.get_by_label("Message").press_sequentially("H")
    expect(ana.get_by_text("is typing…")).to_be_visible()
    expect(luis.get_by_text("is typing…")).to_have_count(0)
    expect(ana.get_by_text("is typing…")).to_be_hidden()


def test_enter_sends_and_shift_enter_makes_a_line(server, browser):
    page = browser(server, "ana", "/room?room=python")
    field = page.get_by_label("Message")
    field.press_sequentially("one")
    field.press("Shift+Enter")
    field.press_sequentially("two")
    field.press("Enter")
    wait_until_said(page, "one\ntwo")
    expect(field).to_have_value("")


def test_an_empty_message_is_refused_on_the_spot(server, browser):
    page = browser(server, "ana", "/room?room=python")
    expect(page.get_by_role("button", name="Leave python")).to_be_visible()
    send(page, " ")
    expect(page.get_by_role("alert")).to_contain_text("an empty message is not sent")
    expect(wire(page).locator("[data-way=out]", has_text="chat")).to_have_count(0)


def test_a_refusal_is_shown_in_words_and_what_came_after_is_sent(server, browser):
    page = browser(server, "ana", "/room?room=python")
    send(page, "x" * 501, "This one fits.")
    expect(conversation(page)).to_contain_text("A message has 1 to 500 characters.")
    wait_until_said(page, "This one fits.")
    page.get_by_role("button", name="Join room2").click()
    expect(page.get_by_role("alert")).to_have_text("room2 is luis's, who has not invited you.")


def test_who_is_told_to_slow_down_waits_and_loses_nothing(server, browser, connect):
    page, hasty, told = browser(server, "ana", "/room?room=python"), connect(server, "ana"), threading.Event()

    def hurry():
        while not told.is_set():
            hasty.call("chat", {"message": "hurry"})

    flood, texts = threading.Thread(target=hurry), [f"patient {number}" for number in range(90)]
    flood.start()
    send_at_once(page, texts)
    try:
        expect(wire(page)).to_contain_text("retry_after", timeout=20_000)
    finally:
        told.set()
        flood.join()
    wait_until_said(page, *texts)
    expect(conversation(page).get_by_text("waiting")).to_have_count(0)


def test_markup_in_a_message_stays_text(server, browser):
    markup = "<img src=x onerror=document.title='broken'><b>bold</b>"
    ana, luis = browser(server, "ana", "/room?room=python"), browser(server, "luis", "/room?room=python")
    send(ana, markup)
    wait_until_said(luis, markup)
    for page in (ana, luis):
        assert page.locator("#talking img, .message b").count() == 0 and "broken" not in page.title()


def test_in_two_rooms_each_has_its_own_conversation(server, browser):
    ana, luis = browser(server, "ana", "/room"), browser(server, "luis", "/room?room=python")
    join(ana, "python"), join(ana, "flask")
    send(ana, "About flask")
    wait_until_said(ana, "About flask")
    send(luis, "About python")
    expect(ana.locator("#rooms li", has_text="python").get_by_text("new")).to_be_visible()
    ana.locator("#rooms .name", has_text="python").click()
    wait_until_said(ana, "About python")
    assert "About flask" not in said(luis)


def test_a_locked_room_opens_by_an_invitation_on_all_pages_of_the_guest(fresh, browser):
    server = fresh()
    ana, luis, eva = (browser(server, name, path) for name, path in
                      (("ana", "/room?room=room1"), ("luis", "/room"), ("eva", "/room")))
    second = luis.context.new_page()
    second.goto(luis.url)
    for page in (luis, second):
        expect(page.locator("#locked")).to_contain_text("room1")
        connected(page)
    ana.get_by_label("Who is invited").fill("Luis")
    ana.get_by_role("button", name="Invite").click()
    for page in (luis, second):
        expect(page.get_by_role("alert")).to_have_text("ana invites you to room1")
        expect(page.locator("#open")).to_contain_text("room1")
    join(luis, "room1"), join(second, "room1")
    expect(ana.get_by_role("list", name="Members").get_by_role("listitem")).to_have_count(2)  # two pages, one member
    expect(eva.locator("#locked")).to_contain_text("room1")
    expect(wire(eva)).not_to_contain_text("invite")


def test_who_is_expelled_is_out_at_once_and_told_so(fresh, browser):
    server = fresh()
    ana, luis = browser(server, "ana", "/room?room=room1"), browser(server, "luis", "/room")
    ana.get_by_label("Who is invited").fill("luis")
    ana.get_by_role("button", name="Invite").click()
    expect(luis.locator("#open")).to_contain_text("room1")
    join(luis, "room1")
    ana.get_by_role("button", name="Expel luis").click()
    expect(luis.get_by_role("alert")).to_have_text("ana has expelled you from room1")
    expect(luis.get_by_role("heading", name="No room yet")).to_be_visible()
    expect(luis.locator("#locked")).to_contain_text("room1")
    luis_is_gone(ana, luis, "expelled")


def test_only_the_owner_of_a_room_sees_invite_and_expel(server, browser):
    ana, luis = browser(server, "ana", "/room?room=python"), browser(server, "luis", "/room?room=python")
    expect(ana.get_by_role("list", name="Members")).to_contain_text("luis")
    for button in (ana.get_by_role("button", name="Invite"), ana.get_by_role("button", name="Expel luis")):
        expect(button).to_have_count(0)
    expect(luis.get_by_role("button", name="Expel ana")).to_have_count(0)


def test_with_the_cable_pulled_messages_wait_and_then_arrive_once(server, browser):
    ana, luis = browser(server, "ana", "/room?room=python"), browser(server, "luis", "/room?room=python")
    send(ana, "before")
    wait_until_said(luis, "before")
    ana.get_by_role("button", name="Pull the cable").click()
    expect(state_of(ana)).to_contain_text("The cable is pulled")
    expect(conversation(luis)).to_contain_text("ana is gone: client disconnect")
    send(ana, "one", "two")
    expect(conversation(ana).get_by_text("waiting")).to_have_count(2)
    send(luis, "three", "four")
    wait_until_said(luis, "before", "three", "four")
    ana.get_by_role("button", name="Plug it in").click()
    expect(conversation(ana)).to_contain_text("Missed and got back: 2")
    for page in (ana, luis):
        wait_until_said(page, "before", "three", "four", "one", "two")
    expect(conversation(ana).get_by_text("waiting")).to_have_count(0)


def test_a_pulled_cable_stays_pulled(server, browser):
    page = browser(server, "ana", "/room")
    page.get_by_role("button", name="Pull the cable").click()
    packets = wire(page).get_by_role("listitem").count()
    page.wait_for_timeout(4000)  # longer than the page waits between two tries
    assert wire(page).get_by_role("listitem").count() == packets
    join_button = page.get_by_role("button", name="Join python")
    join_button.click()
    expect(page.get_by_role("alert")).to_have_text("Not now: there is no connection.")
    expect(join_button).to_be_visible()


def test_cut_while_it_sends_the_page_loses_and_doubles_nothing(server, browser):
    relay, texts = Relay(server.port), [f"through a cut {number}" for number in range(40)]
    ana, luis = browser(relay, "ana", "/room?room=python"), browser(server, "luis", "/room?room=python")
    connected(ana)
    for number, message in enumerate(texts):
        send(ana, message)
        if number % 15 == 7:
            relay.cut()
    for page in (ana, luis):
        until(lambda page=page: "through a cut 39" in said(page), 60)
        assert [text for text in said(page) if "through a cut" in text] == texts


def test_the_wire_shows_every_packet_as_it_is_newest_first(server, browser):
    page = browser(server, "ana", "/room?room=python")
    send(page, "Hé")
    wait_until_said(page, "Hé")
    expect(wire(page)).to_contain_text('["chat",{"room":"python","message":"Hé","key":"')
    rows = wire(page).get_by_role("listitem").all_inner_texts()
    assert rows[-1].startswith("in open, ") and '0{"sid":"' in rows[-1]
    assert rows[-2] == 'out connect, 20 bytes 40{"username":"ana"}'
    assert any(row.startswith("in ack, ") and '[{"ok":true,"id":' in row for row in rows)
    for row in rows:
        size, raw = re.search(r"(\d+) bytes (.*)", row, re.S).groups()
        assert int(size) == len(raw.encode())


def test_the_wire_can_be_paused_and_its_pings_hidden(server, browser):
    page = browser(server, "ana", "/room?room=python")
    ping = wire(page).get_by_text("ping, 1 bytes").first
    expect(ping).to_be_visible(timeout=20_000)
    page.get_by_label("Hide pings").check()
    expect(ping).to_be_hidden()
    page.get_by_label("Pause").check()
    send(page, "unseen")
    wait_until_said(page, "unseen")
    expect(wire(page)).not_to_contain_text("unseen")


def test_the_wire_keeps_two_hundred_packets(server, browser):
    page = browser(server, "ana", "/room?room=python")
    texts = [f"packet {number}" for number in range(70)]
    send_at_once(page, texts)
    wait_until_said(page, *texts)  # three packets each: event, ack, event
    assert wire(page).locator("li").count() == 200


def test_the_handler_that_ran_last_is_shown_as_it_stands_in_the_program(server, browser):
    page = browser(server, "ana", "/room")
    source = page.locator(".source:visible")

    def ran(name):
        expect(page.get_by_role("radio", name=name, exact=True)).to_be_checked()
        expect(source.locator("pre")).to_contain_text(f"def {name}(")
        line = int(re.search(r"line (\d+)", source.inner_text())[1])
        first = source.locator("pre").inner_text().splitlines()[0]
        assert (HERE / "app.py").read_text().splitlines()[line - 1] == first

    ran("connect")
    join(page), ran("join")
    send(page, "Run chat!"), ran("chat")
    page.get_by_role("button", name="Pull the cable").click(), ran("disconnect")
    page.get_by_role("button", name="Plug it in").click(), ran("connect")
    page.get_by_role("button", name="Leave python").click(), ran("leave")


def test_breaking_in_is_really_tried_and_refused(server, browser):
    page = browser(server, "ana", "/room")
    connected(page)
    for button, answer in {
        "Speak in room2": "Only those who have joined a room may speak in it.",
        "Walk into room2": "room2 is luis's, who has not invited you.",
        "Say nothing at all": "A message has 1 to 500 characters.",
        "Throw luis out": "Only the owner of a room invites and expels.",
    }.items():
        page.get_by_role("button", name=button).click()
        expect(page.locator("#ack")).to_have_text(f'{{"ok":false,"error":"{answer}"}}')
        expect(wire(page)).to_contain_text(f'[{{"ok":false,"error":"{answer}"}}]')
    expect(page.get_by_role("heading", name="No room yet")).to_be_visible()


def test_the_log_keeps_its_place_and_says_that_there_is_something_new(server, browser):
    ana, luis = browser(server, "ana", "/room?room=python"), browser(server, "luis", "/room?room=python")
    send_at_once(luis, [f"line {number}" for number in range(40)])
    wait_until_said(ana, "line 39")
    line, newer = conversation(ana).get_by_text("line 9", exact=True), ana.get_by_role("button", name="New messages")
    line.scroll_into_view_if_needed()
    place = line.bounding_box()
    send(luis, "And one more, of several lines" + "\n." * 5)
    expect(newer).to_be_visible()
    assert "And one more" in said(ana)[-1] and abs(line.bounding_box()["y"] - place["y"]) < 2
    newer.click()
    expect(conversation(ana).get_by_text("And one more")).to_be_in_viewport()
    expect(newer).to_be_hidden()


def test_signed_out_elsewhere_is_explained_and_signed_in_again_goes_on(server, browser):
    page = browser(server, "ana", "/room?room=python")
    connected(page)
    second = page.context.new_page()
    second.goto(server.url)
    second.get_by_role("button", name="Sign out").click()
    expect(state_of(page)).to_contain_text("You are signed out")
    send(page, "Said while signed out")
    second.get_by_role("button", name="Sign in as ana").click()
    wait_until_said(page, "Said while signed out")


def test_after_a_restart_of_the_server_the_page_says_sign_in_again(fresh, browser):
    server = fresh()
    page = browser(server, "ana", "/room?room=python")
    connected(page)
    server.stop()
    expect(state_of(page)).to_contain_text("trying again")
    server.start()
    page.get_by_role("link", name="sign in again").click()
    page.get_by_role("button", name="Sign in as ana").click()
    expect(page.get_by_role("button", name="Leave python")).to_be_visible()


def test_a_page_whose_user_has_changed_is_told_to_load_again(server, browser):
    page = browser(server, "ana", "/room")
    page.context.request.post(f"{server.url}/login", form={"username": "luis", "password": "demo"})
    page.get_by_role("button", name="Pull the cable").click()
    page.get_by_role("button", name="Plug it in").click()
    expect(state_of(page)).to_contain_text("You are signed in as luis now")
    page.get_by_role("link", name="Load the page again").click()
    expect(page.get_by_text("Signed in as luis")).to_be_visible()


# Everyone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/login", "/room?room=room1", "/"])
def test_axe_finds_nothing_on_any_page_and_nothing_scrolls_sideways(server, browser, path):
    page = browser(server, "ana", path, reduced_motion="reduce")
    if path != "/login":
        page.get_by_label("Message").fill("hello")
        page.get_by_role("button", name="Send", exact=True).click()
        page.get_by_text("hello").first.wait_for()
    for width, colours in ((1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=colours)
        found = Axe().run(page).response["violations"]
        assert not [(width, colours, rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width


def test_a_message_is_sent_by_keyboard_alone(server, browser):
    page = browser(server, "ana", "/room")
    page.get_by_role("button", name="Join python").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Leave python").wait_for()
    page.keyboard.press("Tab")
    for _ in range(40):
        if page.evaluate("document.activeElement.tagName") == "TEXTAREA":
            break
        page.keyboard.press("Tab")
    page.keyboard.type("no mouse")
    page.keyboard.press("Enter")
    expect(page.get_by_role("log", name="Conversation")).to_contain_text("no mouse")


def test_a_class_finds_the_address_and_no_demo_accounts(fresh, chromium):
    server = fresh(HOST="0.0.0.0")
    page = chromium.new_page()
    page.goto(f"{server.url}/login")
    expect(page.get_by_role("img", name="QR code")).to_be_visible()
    expect(page.get_by_text("there are no demo accounts")).to_be_visible()
    expect(page.get_by_role("button", name="Sign in as")).to_have_count(0)
    assert server.said("█") and server.said("everybody registers")
    assert requests.post(f"{server.url}/login", {"username": "ana", "password": "demo"}).status_code == 401
    page.close()


NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))


def execute(notebook):
    options = {"timeout": 120, "record_timing": False, "coalesce_streams": True}
    return NotebookClient(notebook, resources={"metadata": {"path": HERE / "notebooks"}}, **options).execute()


def masked(text):
    """The text without what differs from run to run: dates, tokens, numbers, the width of columns."""
    return re.sub(r" +", " ", re.sub(r"(Date|Accept-Encoding): .*|[\w.=-]{16,}|\d[\d.,]*", "#", text))


def outputs(notebook):
    """What each cell shows: its text, masked, and of anything else only that it is there."""
    return [
        [masked(output["text"]) if "text" in output else sorted(output["data"]) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_is_committed(path):
    committed = nbformat.read(path, 4)
    assert outputs(execute(nbformat.read(path, 4))) == outputs(committed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_goes_in_small_steps(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert 20 <= len(notebook.cells) <= 30
    for cell in notebook.cells:
        if cell.cell_type == "code":
            picture = any("image/png" in output.get("data", {}) for output in cell.outputs)
            assert len(cell.source.splitlines()) <= (12 if picture else 8), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_one_run_from_top_to_bottom_made_it(path):
    notebook = nbformat.read(path, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.get("name") != "stderr" and output.output_type != "error" for c in cells for output in c.outputs)
    assert not any("execution" in cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("path, accident", [(NOTEBOOKS[0], "1 / 0"), (NOTEBOOKS[-1], "import os; os._exit(1)")],
                         ids=["an error", "a crash"])
def test_the_server_ends_with_the_notebook_that_started_it_however_that_ends(path, accident):
    notebook = nbformat.read(path, 4)
    start = next(i for i, cell in enumerate(notebook.cells) if "app.py" in cell.source and cell.cell_type == "code")
    notebook.cells[start + 1 :] = [nbformat.v4.new_code_cell(accident)]
    with pytest.raises((CellExecutionError, DeadKernelError)):
        execute(notebook)
    port = int(re.search(r"http://[\d.]+:(\d+)", str(notebook.cells[start].outputs))[1])
    until(lambda: socket.socket().connect_ex(("127.0.0.1", port)))
