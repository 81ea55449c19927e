"""The tests: the sections of app.py in their order, then the pages, the notebooks and the README.

    python -m pytest -m "not live"     the rules, the pages, the events: seconds
    python -m pytest                   all of it: also live servers, hostile clients, real browsers

Nothing is mocked: what is tested live is `python app.py`, over TCP, with real clients.
"""

import ast
import base64
import copy
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
import zlib
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from itertools import product
from pathlib import Path

import engineio
import judge
import lab
import nbformat
import psutil
import pytest
import record
import redis
import requests
import socketio
from axe_playwright_python.sync_playwright import Axe
from flask_login import FlaskLoginClient
from flask_socketio import SocketIOTestClient
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lab import ME, Relay, Server, until
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect, sync_playwright
from wsproto import ConnectionType
from wsproto.connection import Connection

import app as program

HERE = Path(program.__file__).parent

# What all sections need: accounts, servers, clients -----------------------------------------------


def form(name="ana", password="demo", **more):
    return {"username": name, "password": password, **more}


jars = {}  # (url, name, password) -> the cookies of whoever signed in so


def sign_in(*who):
    """A session of a user. A cookie that still opens is used again: to check a password is slow."""
    session = requests.Session()
    session.cookies.update(jars.get(who, {}))
    if session.get(f"{who[0]}/messages?after={10**15}").status_code == 401:
        session = lab.sign_in(*who)
        jars[who] = session.cookies
    return session


def register(server, name=""):
    """A session of somebody new."""
    name = name or f"guest{os.urandom(4).hex()}"
    return lab.sign_in(server.url, name, "password", "register")


def missing(package):
    """Skip a test that needs what this machine does not have; in CI nothing is skipped."""
    assert "CI" not in os.environ, package
    pytest.skip(f"needs {package}")


def cookie_of(session):
    """The session's cookies as a header says them."""
    return "; ".join(f"{name}={value}" for name, value in session.cookies.items())


def refusal(ack):
    """Whether an ack refuses, in words."""
    return ack["ok"] is False and len(ack["error"]) > 10


LOG_LINE = re.compile(
    r"(dis)?connected: \w+( \(.+\))?"
    r"|.* code 4.., message .*|.* Request timed out: .*"  # the libraries' words
    r"|Unexpected HTTP request for session .*"
)


def comings_and_goings(server):
    """The log after the welcome: who connected and disconnected, and bad requests."""
    until(lambda: server.said("Ctrl+C"))
    log = server.log[server.log.index("Stop with Ctrl+C.") + 1 :]
    assert [line for line in log if not LOG_LINE.fullmatch(line)] == []
    return [line.partition(" (")[0] for line in log]


def who_is_there(server):
    """How many connections each user has, by the server's log."""
    there = Counter()
    for line in server.said("connected: "):
        what, name, *_ = line.split()
        there[name] += 1 if what == "connected:" else -1
    return there


@contextmanager
def started(*command, **settings):
    """A program of its own, `python app.py` by default; whatever happened, it says no word more."""
    with Server(*command, **settings) as server:
        if not command:
            until(lambda: server.said("Ctrl+C"))
        yield server
    if not command:
        comings_and_goings(server)


def variant(before="", after=""):
    """The command for `app.py` with lines of a student's own, before or after it is read."""
    return "-c", f"{before}\nimport app\n{after}\napp.main()"


QUICK_TO_HASH = """
hash_slowly = app.generate_password_hash
app.generate_password_hash = lambda password: hash_slowly(password, "pbkdf2:sha256:1")
"""
IMPATIENT = "app.PING_EVERY, app.PATIENCE, app.Handler.timeout = 2, 6, 6  # seconds"


@pytest.fixture(scope="session")
def server():
    """A live server for tests that leave it as it was; `fresh` is one of a test's own."""
    with started() as server:
        yield server


@pytest.fixture
def fresh():
    """fresh(HOST="0.0.0.0"): a live server with these settings."""
    with ExitStack() as stack:
        yield lambda *command, **settings: stack.enter_context(started(*command, **settings))


@pytest.fixture
def changed(fresh):
    """changed(after="..."): a live server of this `variant` of app.py."""
    return lambda before="", after="": fresh(*variant(before, after))


class Client(socketio.Client):
    """The Python client, signed in; `heard` is what it heard: (event, data)."""

    def __init__(self, url, session, reconnection=False, **options):
        again = {"reconnection_delay": 0.1, "reconnection_delay_max": 0.2}
        super().__init__(http_session=session, reconnection=reconnection, **again)
        self.heard = []
        self.on("*", lambda event, data: self.heard.append((event, data)))
        self.handle, self.eio._trigger_event = self.eio._trigger_event, self.in_order
        self.connect(url, **options)

    def in_order(self, event, *data, **options):
        """The library handles each packet in a thread, and they overtake. "1" is a farewell."""
        return self.handle(event, *data, run_async=data == ("1",))

    def chats(self):
        return [data for event, data in list(self.heard) if event == "chat"]

    def texts(self):
        return [said["message"] for said in self.chats()]


@pytest.fixture
def connect():
    """connect(server_or_relay, "ana", transports=[...]): a Client, disconnected after the test."""
    clients = []

    def connect(server, name, **options):
        clients.append(Client(server.url, sign_in(server.url, name), **options))
        return clients[-1]

    yield connect
    for client in clients:
        client.disconnect()


class Wire(lab.Wire):
    """A WebSocket of which a test decides every byte."""

    def __init__(self, server, session=None, query="", **options):
        super().__init__(server.port, session, query, **options)

    def enter(self, room=None):
        self.send("40")
        self.until("40")
        assert not room or self.ask("join", room=room)["ok"]
        return self

    def ask(self, event, **fields):
        """The ack of an event; `heard` is what came before it."""
        self.send("420" + json.dumps([event, fields]))
        *self.heard, ack = self.until("430")
        return json.loads(ack[3:])[0]

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


def frame(payload=b"", opcode=1, first=0x80, mask=0x80):
    """A frame, right or wrong, as a client sends it: masked, but with zeros."""
    size = len(payload)
    if size < 126:
        head = struct.pack("!B", mask | size)
    elif size < 65536:
        head = struct.pack("!BH", mask | 126, size)
    else:
        head = struct.pack("!BQ", mask | 127, size)
    return bytes([first | opcode]) + head + bytes(4 if mask else 0) + payload


class Polls:
    """An Engine.IO connection over HTTP by hand."""

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
        body = "\x1e".join(packets).encode()
        return self.session.post(self.url, data=body, timeout=30).status_code

    def until(self, start):
        packets = []
        while not any(packet.startswith(start) for packet in packets):
            packets += self.get()
            assert packets[-4:] != ["2"] * 4, packets[-9:]
            if packets[-1] == "2":
                self.send("3")
        return packets

    def ask(self, event, **fields):
        """The ack of an event; `heard` is what came with it."""
        self.send("420" + json.dumps([event, fields]))
        self.heard = self.until("430")
        (ack,) = [packet for packet in self.heard if packet.startswith("430")]
        return json.loads(ack[3:])[0]


def chats(packets):
    """The messages in these packets."""
    return [json.loads(packet[2:])[1] for packet in packets if packet.startswith('42["chat"')]


def burst(size, text="x" * 400):
    """So many messages, each with its number as the number of its ack."""
    said = [{"room": "python", "message": f"{number} {text}"} for number in range(1, size + 1)]
    return [f"42{number}" + json.dumps(["chat", data]) for number, data in enumerate(said, 1)]


def numbers(messages):
    """Which of a burst these are."""
    return [int(said["message"].split()[0]) for said in messages]


def crowd(server, size):
    """So many new users, each with a WebSocket in python: all may say 60 messages at once."""
    sessions = [register(server) for _ in range(size)]
    return [Wire(server, session).enter("python") for session in sessions]


def log_of(server):
    """All messages of python, as a client that joins now hears them."""
    wire = Wire(server, sign_in(server.url, "eva")).enter("python")
    return chats(wire.heard)


# 2. Set-up ----------------------------------------------------------------------------------------


def test_no_host_is_the_default_host(fresh):
    server = fresh(HOST="")
    assert server.said(f"http://127.0.0.1:{server.port}") and sign_in(server.url, "ana")


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "127.0.0.1.evil", ""])
def test_another_name_for_this_machine_leads_nowhere(server, name):
    for path in ("/login", "/socket.io/?EIO=4&transport=polling"):
        answer = sign_in(server.url, "ana").get(server.url + path, headers={"Host": name})
        assert answer.status_code == 400
    assert requests.get(f"http://localhost:{server.port}/login").status_code == 200


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites_and_named_by_the_port(web):
    cookie = web().post("/login", data=form()).headers["Set-Cookie"]
    assert cookie.startswith(f"session-{program.PORT}=")
    assert {"HttpOnly", "SameSite=Lax"} <= set(cookie.split("; "))


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST:5000", "127.0.0.1:5000", "[::1]:5000"])
def test_every_name_of_this_machine_leads_here(web, name):
    assert web().get("/login", headers={"Host": name}).status_code == 200


def test_a_domain_may_be_written_in_capitals(fresh):
    server = fresh(DOMAIN="Chat.Example, other.example")
    for name, status in (("chat.example", 200), ("CHAT.example", 200), ("localhost", 400)):
        answer = requests.get(f"{server.url}/login", headers={"Host": name})
        assert answer.status_code == status


def test_a_space_after_the_port_is_ignored(changed):
    server = changed('import os; os.environ["PORT"] += " "')  # from `set PORT=5001 && ...`
    page = sign_in(server.url, "ana").get(f"{server.url}/room", allow_redirects=False)
    assert page.status_code == 200  # with a space in its name the cookie does not come back


def test_an_old_python_and_one_without_packages_get_one_line_of_help():
    ast.parse((HERE / "app.py").read_text("utf-8"), feature_version=(3, 8))  # it can be read
    run = subprocess.run([sys.executable, "-S", "app.py"], cwd=HERE, text=True, capture_output=True)
    assert run.returncode and "pip install -r requirements.txt" in run.stderr
    assert len(run.stderr.splitlines()) == 1 and not run.stdout


# 3. State: the rules ------------------------------------------------------------------------------

hash_quickly = partial(program.generate_password_hash, method="pbkdf2:sha256:1")
DEMO = hash_quickly("demo")


@pytest.fixture
def state(monkeypatch):
    """A state of the test's own: ana, luis and eva have accounts; nobody is there or has spoken."""
    program.failed_logins.storage.reset()
    monkeypatch.setattr(program, "state", program.State())
    monkeypatch.setattr(program, "generate_password_hash", hash_quickly)
    monkeypatch.setattr(program, "DUMMY_HASH", hash_quickly("nobody knows it"))
    for name in ("ana", "luis", "eva"):
        program.state.register(name, DEMO)
    return program.state


@pytest.fixture
def patient(monkeypatch):
    """After sixty messages a user may send no more, however slow this machine is."""
    monkeypatch.setattr(program, "RATE", 1e-6)


@pytest.fixture
def hasty(monkeypatch):
    """Everybody may say as much as they like."""
    monkeypatch.setattr(program, "RATE", 1e12)


def refused(action, *arguments):
    """What is raised when an action is refused."""
    with pytest.raises(program.Refused) as refusal:
        action(*arguments)
    return refusal.value


@pytest.mark.parametrize(
    "data", [{}, *({"room": value} for value in (None, 1, True, [], {}, "half \ud800"))]
)
def test_only_a_string_of_whole_characters_is_text(data):
    assert program.text_field({"room": "día 😀"}, "room") == "día 😀"
    assert refused(program.text_field, data, "room").code == 400


def test_a_user_may_send_sixty_at_once_and_then_twenty_a_second():
    allowance = program.Allowance()
    for second in (0, 100):  # after a long silence it is no more than 60 either
        for _ in range(60):
            allowance.spend(second)
        assert refused(allowance.spend, second).answer["retry_after"] == 0.05
    for _ in range(20):
        allowance.spend(101)
    assert refused(allowance.spend, 101).code == 429


@pytest.mark.parametrize("second", [0.0001, 0.0123, 0.0234, 0.0337, 0.0499])
def test_a_client_that_waits_as_long_as_told_is_not_refused_again(second):
    allowance = program.Allowance()
    for _ in range(60):
        allowance.spend(0)
    allowance.spend(second + refused(allowance.spend, second).answer["retry_after"])


def test_every_account_gets_a_number_and_a_room_of_its_own(state):
    assert [state.user(name).id for name in ("ana", "LUIS", "Eva")] == [1, 2, 3]
    zoe = state.register("Zoe", DEMO)
    assert zoe.id == 4
    assert {"room": "room4", "owner": "Zoe", "open": True} in state.rooms("Zoe")
    for name in ("zoe", "Zoe", "ANA", "Iuis"):  # the last begins with a capital i
        assert refused(state.register, name, DEMO).code == 409
    assert len(state.users) == 4 and "room5" not in state.owners and not state.user("nobody")


def test_a_renewed_token_opens_and_the_old_one_does_not(state):
    ana = state.user("ana")
    old = state.renew(ana)
    assert old != ana.get_id()
    assert program.load_user(old) is None
    assert program.load_user(ana.get_id()) is ana


# fmt: off
ENTRIES = [
    ("ana", "python", True), ("luis", "flask", True), ("ana", "staff", True),
    ("luis", "staff", False), ("ana", "room1", True), ("luis", "room1", False),
    ("luis", "room2", True), ("eva", "room1", True),
]
# fmt: on


@pytest.mark.parametrize("name, room, may", ENTRIES)
def test_a_room_lets_in_everybody_or_its_owner_and_guests(state, name, room, may):
    state.invite("ana", "room1", "EVA")
    assert [entry["open"] for entry in state.rooms(name) if entry["room"] == room] == [may]
    if may:
        state.check_entry(name, room)
    else:
        refused(state.check_entry, name, room)


def test_a_guest_may_enter_until_the_owner_expels_them(state):
    refused(state.check_entry, "luis", "room1"), refused(state.check_entry, "ana", "attic")
    assert state.guest("ana", "room1", " Luis ") == "luis"  # as registered
    state.invite("ana", "room1", "Luis")
    state.check_entry("luis", "room1")
    state.expel("ana", "room1", "LUIS")
    refused(state.check_entry, "luis", "room1")


def test_members_are_named_once_and_sorted(state):
    for sid, name in {"c1": "luis", "c2": "ana", "c3": "luis", "c4": "luis", "c5": "eva"}.items():
        state.add(sid, name)
    new = [state.add(sid, state.present[None][sid], "python") for sid in ("c1", "c2", "c3")]
    assert new == [True, True, False]
    assert state.members("python") == ["ana", "luis"] and state.rooms_of("c1") == ["python"]
    assert state.connections("luis", "python") == ["c1", "c3"]
    assert state.connections("luis") == ["c1", "c3", "c4"]
    assert state.remove("c1", "python") == ("luis", False)
    assert state.remove("c3", "python") == ("luis", True)
    assert state.members("python") == ["ana"] and state.rooms_of("c1") == []


def test_ids_rise_over_all_rooms_and_over_a_restart(state):
    ana, earliest = state.user("ana"), time.time() * 1000 - 60_000
    state.add("c1", "ana", "python")
    rooms = (None, "python", None)
    ids = [state.say(ana, {"message": "hi", "room": room}, "c1")[0] for room in rooms]
    assert earliest < ids[0] < ids[1] < ids[2] == state.newest()
    until(lambda: program.State().newest() > ids[2])


def test_the_last_500_messages_are_kept_and_a_gap_is_told(state, hasty):
    ids = [state.say(state.user("ana"), {"message": f"{n}"})[0] for n in range(500)]
    found, gap = state.since(None, 0)
    assert [message["id"] for message in found] == ids and not gap
    ids += [state.say(state.user("ana"), {"message": f"{n}"})[0] for n in (500, 501)]
    # fmt: off
    for last_id, missed, gap in [(0, 500, True), (ids[0], 500, True), (ids[1], 500, False),
                                 (ids[2], 499, False), (ids[-1], 0, False), (ids[-1] + 1, 0, True)]:
        # fmt: on
        found, told = state.since(None, last_id)
        assert [message["id"] for message in found] == ids[len(ids) - missed :]
        assert bool(told) is gap


def test_each_user_has_keys_of_their_own_and_the_last_500_are_remembered(state, hasty):
    ana, luis = state.user("ana"), state.user("luis")
    ids = [state.say(ana, {"message": "hi", "key": f"{n}"})[0] for n in range(501)]
    assert state.say(ana, {"message": "hi", "key": "1"}) == (ids[1], None)
    assert state.say(luis, {"message": "hi", "key": "1"})[0] > ids[-1]
    assert state.say(ana, {"message": "hi", "key": "0"})[0] > ids[-1]


# 4. Users -----------------------------------------------------------------------------------------


@pytest.fixture
def web(state):
    """web("ana"): a browser without a window in which ana is signed in; web(): nobody is."""
    reply = program.app.response_class
    return lambda name="": FlaskLoginClient(program.app, reply, user=state.user(name))


def test_name_and_password_sign_in(web):
    visitor = web()
    assert visitor.get("/login").status_code == 200
    assert visitor.post("/login", data=form()).location == "/"
    assert visitor.get("/").status_code == visitor.get("/room").status_code == 200


# fmt: off
NO_LOG_INS = [
    form("ana", "wrong"), form("nobody"), form("ana", ""), form(""), form("a" * 999), {},
]
NEXTS = [
    *((path,) * 2 for path in ("/room?room=python", "/room?room=a//b", "/messages?after=1&wait=2")),
    *((path, "/") for path in (
        "", "room", "//evil.example", "/\\evil.example", "https:evil.example",
        "https://evil.example", "\\\\evil.example", "/\t/evil.example", "/\n/evil.example",
        " //evil.example", "/room\0", "javascript:alert(1)", "/\r\nSet-Cookie: a=b")),
]
NO_ACCOUNTS = [
    *((name, "password", 409) for name in ("ana", "ANA")),
    *((name, "password", 400) for name in (
        "", "x" * 21, "añá", "a b", "<b>", "zoe\n", "zoe\0", "room:1")),
    ("zoe", "7 chars", 400), ("zoe", "", 400), (None, None, 400),
]
# fmt: on


@pytest.mark.parametrize("data", NO_LOG_INS)
def test_a_wrong_name_and_a_wrong_password_get_the_same_answer(web, data):
    visitor = web()
    answer = visitor.post("/login", data=data)
    assert answer.status_code == 401
    assert "Wrong name or password." in answer.text and "password" in answer.text
    assert visitor.get("/").status_code == 302


@pytest.mark.parametrize("path, where", NEXTS)
def test_next_leads_to_own_paths_only(web, path, where):
    assert web().post("/login", query_string={"next": path}, data=form()).location == where
    assert web().post("/login", data=form(next=path)).location == where


def test_ten_wrong_passwords_close_the_name_to_that_address_for_the_minute(web):
    def try_to_enter(name="ana", password="demo", address="127.0.0.1"):
        data, environ = form(name, password), {"REMOTE_ADDR": address}
        return web().post("/login", data=data, environ_base=environ)

    words = ["wrong"] * 5 + ["demo"] * 3 + ["wrong"] * 4 + ["demo"] + ["wrong"]
    statuses = [try_to_enter(password=word).status_code for word in words]
    assert statuses == [302 if word == "demo" else 401 for word in words]
    closed = try_to_enter("Ana")
    assert closed.status_code == 429 and "minute" in closed.text
    assert try_to_enter("luis").status_code == 302
    assert try_to_enter("ana", address="127.0.0.2").status_code == 302
    reset, _ = program.failed_logins.get_window_stats(program.TEN_A_MINUTE, "ana", "127.0.0.1")
    assert time.time() < reset <= time.time() + 60


def test_a_wrong_password_opens_nothing_even_if_it_is_one_too_many_to_count(web, monkeypatch):
    monkeypatch.setattr(program.failed_logins, "hit", lambda *attempts: False)
    assert web().post("/login", data=form(password="wrong")).status_code == 401


def test_of_sixty_wrong_passwords_at_once_only_ten_are_checked_and_none_opens(server):
    name, statuses = f"safe{os.urandom(4).hex()}", []
    register(server, name)

    def guess(password):
        answer = requests.post(f"{server.url}/login", form(name, password), allow_redirects=False)
        statuses.append(answer.status_code)

    guesses = [threading.Thread(target=guess, args=[f"guess {n}"]) for n in range(60)]
    for thread in guesses:
        thread.start()
    for thread in guesses:
        thread.join()
    assert sorted(statuses) == [401] * 10 + [429] * 50
    guess("password")
    assert statuses[-1] == 429


@pytest.mark.parametrize("name", ["a", "A-b_9", "x" * 20])
def test_a_new_user_is_signed_in_and_can_sign_in_again(web, name):
    visitor, elsewhere, data = web(), web(), form(name, "8 is ok!", next="//evil.example")
    assert visitor.post("/register", data=data).location == "/"
    assert visitor.get("/").status_code == 200
    assert elsewhere.post("/login", data=form(name, "8 is ok!")).location == "/"


@pytest.mark.parametrize("name, password, status", NO_ACCOUNTS)
def test_a_bad_or_taken_name_and_a_short_password_open_no_account(
    web, state, name, password, status
):
    visitor, data = web(), {} if name is None else form(name, password)
    assert visitor.post("/register", data=data).status_code == status
    assert visitor.get("/").status_code == 302 and len(state.users) == 3


def test_there_are_demo_accounts_only_where_the_program_itself_makes_them(web):
    assert program.State().users == {} and program.app.config["DEMO_ACCOUNTS"] == []
    assert "Sign in as" not in web().get("/login").text


def test_log_out_is_by_post_only_and_may_be_pressed_twice(web):
    ana = web("ana")
    assert ana.get("/logout").status_code == 405
    assert ana.get("/").status_code == 200
    assert ana.post("/logout").location == "/login"
    assert ana.get("/").status_code == 302
    again = ana.post("/logout").location  # pressed in a second tab
    assert ana.get(ana.post(again, data=form()).location).status_code == 200


def test_log_out_ends_all_sessions_and_copied_cookies_of_that_user_alone(web):
    laptop, phone, thief, luis = web("ana"), web("ana"), web(), web("luis")
    cookie = laptop.get_cookie(f"session-{program.PORT}").value
    laptop.post("/logout")
    laptop.post("/login", data=form())
    thief.set_cookie(f"session-{program.PORT}", cookie)
    clients = (laptop, phone, thief, luis)
    assert [client.get("/").status_code for client in clients] == [200, 302, 302, 200]


def test_log_out_ends_connections_and_long_polls_of_that_user_alone(server, connect):
    answers, before = {}, len(server.said("disconnected: ana"))
    luis, poller = connect(server, "luis"), sign_in(server.url, "ana")
    transports = (["websocket"], ["polling"])
    devices = [connect(server, "ana", transports=transport) for transport in transports]
    ask = f"{server.url}/messages?after={time.time() * 1000 + 60_000:.0f}&wait=25"
    waiting = threading.Thread(target=lambda: answers.update(poller=poller.get(ask).status_code))
    waiting.start()
    waiting.join(0.3)
    assert not answers
    sign_in(server.url, "ana").post(f"{server.url}/logout")
    assert until(lambda: answers, 15) == {"poller": 401}
    until(lambda: not any(client.connected for client in devices))
    until(lambda: len(server.said("disconnected: ana")) >= before + 2)
    assert luis.call("chat", {"message": "still here"})["ok"]


def test_after_a_restart_nobody_is_taken_for_somebody_else(fresh):
    server = fresh(SECRET_KEY="the same as before")
    before = [sign_in(server.url, "ana"), register(server, "zoe")]
    server.stop()
    server.start()
    after = [sign_in(server.url, "ana"), register(server, "max")]  # max has zoe's number now
    sessions = before + after
    statuses = [session.get(f"{server.url}/messages").status_code for session in sessions]
    assert statuses == [401, 401, 200, 200]


# 5. Pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/room", "/room?room=python"])
def test_a_page_asks_to_sign_in_and_then_opens(web, path):
    visitor = web()
    answer = visitor.get(path)
    assert answer.status_code == 302 and answer.location.startswith("/login?next=/")
    assert visitor.post(answer.location, data=form()).location == path


@pytest.mark.parametrize(
    "path", ["/login", "/", "/room", "/nowhere", "/messages", "/logout", "/socket.io.js"]
)
def test_no_page_runs_foreign_scripts_or_is_framed(web, path):
    one, other = web("ana").get(path).headers, web("ana").post(path).headers
    policy = one["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "script-src 'nonce-" in policy and "unsafe" not in policy
    assert policy != other["Content-Security-Policy"]  # a nonce serves once
    assert one["X-Content-Type-Options"] == "nosniff" and "Referrer-Policy" not in one


def test_no_page_is_kept_on_a_disk(web):
    assert web("ana").get("/room").headers["Cache-Control"] == "no-store"


def test_the_browser_client_comes_from_here(web):
    answer = web("ana").get("/socket.io.js")
    assert answer.mimetype.endswith("javascript") and b"Socket.IO v4.8" in answer.data


HOME, EVIL = "http://localhost", "http://evil.example"
# fmt: off
SENDERS = [
    ({}, True), ({"Origin": HOME}, True), ({"Origin": EVIL}, False), ({"Origin": "null"}, False),
    ({"Origin": f"{HOME}:8000"}, False), ({"Origin": f"{HOME}.evil.example"}, False),
    ({"Origin": EVIL, "X-Forwarded-Host": "evil.example"}, False),
    ({"Sec-Fetch-Site": "same-origin"}, True), ({"Sec-Fetch-Site": "none"}, True),
    ({"Sec-Fetch-Site": "same-site"}, False), ({"Sec-Fetch-Site": "x"}, False),
    ({"Sec-Fetch-Site": "cross-site"}, False),
    ({"Sec-Fetch-Site": "cross-site", "Origin": HOME}, False),
]
# fmt: on


@pytest.mark.parametrize("headers, passes", SENDERS)
def test_a_form_of_another_site_is_refused(web, state, headers, passes):
    posts = [
        web().post("/login", data=form(), headers=headers),
        web().post("/register", data=form("zoe", "password"), headers=headers),
        web("luis").post("/messages", json={"message": "hi"}, headers=headers),
        web("eva").post("/logout", headers=headers),
    ]
    statuses = [302, 302, 201, 302] if passes else [403] * 4
    assert [answer.status_code for answer in posts] == statuses
    assert (len(state.users), len(state.history[None])) == ((4, 1) if passes else (3, 0))


def test_a_poller_hears_newer_messages_and_only_of_the_open_channel(web, state):
    ana, luis, start = web("ana"), web("luis"), state.newest()
    state.add("c1", "ana", "python")
    state.say(state.user("ana"), {"message": "in a room", "room": "python"}, "c1")
    posts = [ana.post("/messages", json={"message": text}) for text in ("\n<b>día</b> ", "two")]
    ids = [answer.get_json()["id"] for answer in posts]
    heard = luis.get("/messages").get_json()
    texts = [(said["id"], said["message"]) for said in heard["messages"]]
    assert texts == [(ids[0], "<b>día</b>"), (ids[1], "two")] and heard["last_id"] == ids[1]
    assert luis.get(f"/messages?after={start}").get_json() == heard
    newer = luis.get(f"/messages?after={ids[0]}").get_json()
    assert newer["messages"] == heard["messages"][1:]
    nothing = luis.get(f"/messages?after={ids[1]}").get_json()
    assert nothing == {"messages": [], "last_id": ids[1], "gap": False}


def test_a_long_poll_is_empty_when_its_time_is_over(web):
    began, nothing = time.monotonic(), {"messages": [], "last_id": 7, "gap": True}
    assert web("ana").get("/messages?after=7&wait=0.3").get_json() == nothing
    assert time.monotonic() - began >= 0.3


# fmt: off
QUERIES = [
    *((f"after={value}", 400) for value in (
        "", "abc", "nan", "inf", "1.5", "1e3", "0x10", "None", "1" * 5000)),
    *((f"wait={value}", 400) for value in ("", "abc", "nan", "1s", "--1", "None", "1,5")),
    ("after=-1", 200), (f"after={10**400}", 200), ("wait=26", 200), ("wait=1e999", 200),
    ("wait=0.5", 200),
]
BAD_BODIES = [
    b"", b"hi", b"\xff", b"null", b"7", b'"hi"', b'["hi"]', b"[" * 20_000, b'{"message": ' * 5000,
    b"{}", b"1" * 5000,
    *({"message": value} for value in (None, 7, True, [], {}, "", " \n ", "x" * 501, "\ud800")),
    *({"message": "hi", "key": value} for value in (7, True, [], {}, "", "x" * 65, "\ud800")),
    *({"message": "hi", "room": value} for value in ("python", "room1", "attic", 7, [], "\ud800")),
]
# fmt: on


@pytest.mark.parametrize("query, status", QUERIES)
def test_after_and_wait_are_numbers(web, query, status):
    ana = web("ana")
    ana.post("/messages", json={"message": "an answer to all who wait"})
    assert ana.get(f"/messages?{query}").status_code == status


@pytest.mark.parametrize("body", BAD_BODIES)
def test_a_bad_body_says_nothing(web, state, body):
    data = json.dumps(body) if isinstance(body, dict) else body
    answer = web("ana").post("/messages", data=data, content_type="application/json")
    assert answer.status_code in (400, 403) and answer.get_json()["error"]
    assert not state.history[None] and not state.history["python"]


def test_messages_speaks_json_in_errors_too(web, patient):
    ana, hi = web("ana"), {"message": "hi"}
    for _ in range(60):
        ana.post("/messages", json=hi)
    errors = [
        (401, web().get("/messages")),
        (401, web().post("/messages", json=hi)),
        (400, ana.get("/messages?after=x")),
        (400, ana.post("/messages", json={})),
        (403, ana.post("/messages", json=hi, headers={"Origin": EVIL})),
        (405, ana.put("/messages")),
        (413, ana.post("/messages", data="x" * 70_000)),
        (429, ana.post("/messages", json=hi)),
    ]
    for status, error in errors:
        assert error.status_code == status and refusal(error.get_json())
    assert error.get_json()["retry_after"] > 0


def test_a_long_poll_wakes_at_a_message_and_on_its_connections_too(server, connect):
    luis, eva, answers = connect(server, "luis"), sign_in(server.url, "eva"), []
    last_id = luis.call("chat", {"message": "before"})["id"]
    began, ask = time.monotonic(), f"{server.url}/messages?after={last_id}&wait=25"
    waiting = threading.Thread(target=lambda: answers.append(eva.get(ask).json()))
    waiting.start()
    waiting.join(0.3)
    assert not answers
    said = sign_in(server.url, "ana").post(f"{server.url}/messages", json={"message": "now"})
    answer, message_id = until(lambda: answers)[0], said.json()["id"]
    assert answer["last_id"] == message_id == answer["messages"][0]["id"]
    assert time.monotonic() - began < 15 and until(lambda: luis.texts()[1:]) == ["now"]


def test_a_hundred_wait_in_long_polls_and_all_hear_at_once(fresh):
    server = fresh()
    ana, eva = sign_in(server.url, "ana"), Wire(server, sign_in(server.url, "eva")).enter()
    post = ana.post(f"{server.url}/messages", json={"message": "before"})
    head = f"Host: {ME}\r\nCookie: {cookie_of(ana)}\r\n\r\n"
    ask = f"GET /messages?after={post.json()['id']}&wait=25 HTTP/1.1\r\n{head}".encode()
    waiting = [socket.create_connection((ME, server.port), timeout=20) for _ in range(100)]
    for tcp in waiting:
        tcp.sendall(ask)
    until(lambda: server.usage.num_threads() >= 100)
    assert eva.ask("chat", message="now")["ok"]
    for tcp in waiting:
        answer = b"".join(iter(lambda tcp=tcp: tcp.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.0 200")
        assert b'"now"' in answer and b'"before"' not in answer
    until(lambda: server.usage.num_threads() < 10)


# 6. Events ----------------------------------------------------------------------------------------


class Talker(SocketIOTestClient):
    """A user's connection. `ask` returns the ack, `heard` what came since it was last asked."""

    def ask(self, event, /, **fields):
        return self.emit(event, fields, callback=True)

    def heard(self):
        return [(packet["name"], packet["args"][0]) for packet in self.get_received()]


@pytest.fixture
def online(web):
    """online("ana", "python"): ana's Talker, who has joined python; what all heard is forgotten."""
    talkers = []

    def online(name="", *rooms, **options):
        visitor = web(name)
        talker = Talker(program.app, program.socketio, flask_test_client=visitor, **options)
        talkers.append(talker)
        for room in rooms:
            assert talker.ask("join", room=room)["ok"]
        for talker in filter(Talker.is_connected, talkers):
            talker.heard()
        return talkers[-1]

    yield online
    for talker in filter(Talker.is_connected, talkers):
        talker.disconnect()


# fmt: off
WELCOMES = [
    ("", None, False), ("", {"username": "ana"}, False), ("ana", {"username": "luis"}, False),
    ("ana", {"username": ""}, False), ("ana", {"username": "ana"}, True), ("ana", {}, True),
    ("ana", None, True),
]
# fmt: on


@pytest.mark.parametrize("name, auth, welcome", WELCOMES)
def test_only_a_signed_in_user_connects_and_only_under_their_own_name(
    state, online, name, auth, welcome
):
    luis, visitor = online("luis"), online(name, auth=auth)
    luis.ask("chat", message="hi")
    assert visitor.is_connected() is welcome and len(visitor.queue) == welcome
    assert state.members(None) == (["ana", "luis"] if welcome else ["luis"])


def test_a_message_reaches_its_room_and_nobody_else(online):
    ana, luis = online("ana", "python"), online("luis", "python", "flask")
    eva = online("eva", "flask")
    ack = ana.ask("chat", room="python", message=" \n día\n")
    ((event, said),) = luis.heard()
    assert ack == {"ok": True, "id": said["id"]} and event == "chat"
    assert (said["room"], said["username"], said["message"]) == ("python", "ana", " día")
    when = datetime.fromisoformat(said["created_at"])
    assert when.utcoffset() == timedelta(0) and abs(when.timestamp() - time.time()) < 60
    assert ana.heard() == [(event, said)] and eva.heard() == []


def test_without_a_room_everyone_connected_hears_it(online, web):
    ana, luis, eva, gone = online("ana"), online("luis", "python"), online("eva"), online("eva")
    gone.disconnect()
    gone.queue.clear()
    ack = ana.ask("chat", message="\n" + "x" * 500)
    heard = eva.heard()
    assert ana.heard() == luis.heard() == heard and gone.queue == []
    assert [(event, said["id"], said["room"]) for event, said in heard] == [
        ("chat", ack["id"], None)
    ]
    assert web("eva").get("/messages").get_json()["messages"] == [heard[0][1]]


def test_a_message_over_http_is_heard_by_all_who_are_connected(online, web):
    ana, luis = online("ana"), online("luis", "python")
    message_id = web("eva").post("/messages", json={"message": "hi"}).get_json()["id"]
    for talker in (ana, luis):
        assert [said["id"] for _, said in talker.heard()] == [message_id]


def test_a_join_is_heard_by_the_room_and_the_joiner(online):
    ana, luis, eva = online("ana", "python"), online("luis"), online("eva", "flask")
    there = {"room": "python", "members": ["ana", "luis"]}
    ack = luis.ask("join", room="python")
    assert ack | {"ok": True, "missed": 0, "gap": False} | there == ack
    assert ana.heard() == luis.heard() == [("join", {"username": "luis"} | there)]
    assert eva.heard() == []


def test_a_leave_is_heard_by_the_room_and_not_by_the_leaver(online):
    ana, luis = online("ana", "python"), online("luis", "python", "flask")
    eva = online("eva", "flask")
    assert luis.ask("leave", room="python") == {"ok": True}
    left = {"room": "python", "username": "luis", "members": ["ana"], "reason": "left"}
    assert ana.heard() == [("leave", left)]
    ana.ask("chat", room="python", message="hi")
    assert luis.heard() == [] and eva.heard() == []


def test_a_lost_connection_leaves_each_of_its_rooms_with_the_reason(online):
    ana, eva = online("ana", "python"), online("eva", "flask")
    luis, anyone = online("luis", "python", "flask"), online("ana")
    luis.disconnect()
    left = {"username": "luis", "reason": "client disconnect"}
    assert ana.heard() == [("leave", left | {"room": "python", "members": ["ana"]})]
    assert eva.heard() == [("leave", left | {"room": "flask", "members": ["eva"]})]
    assert anyone.heard() == []


def test_coming_and_going_is_announced_once_per_user(online):
    ana, laptop = online("ana", "python"), online("luis", "python")
    phone, eva = online("luis"), online("eva")
    assert phone.ask("join", room="python")["members"] == ["ana", "luis"]
    assert laptop.ask("join", room="python")["ok"] and laptop.ask("leave", room="python")["ok"]
    assert ana.heard() == laptop.heard() == phone.heard() == []
    phone.disconnect()
    assert [(event, data["members"]) for event, data in ana.heard()] == [("leave", ["ana"])]
    assert laptop.heard() == eva.heard() == []


def test_typing_is_heard_by_the_room_but_by_no_connection_of_the_typist(online):
    laptop, phone = online("ana", "python"), online("ana", "python")
    luis, eva = online("luis", "python"), online("eva")
    assert laptop.ask("typing", room="python") == {"ok": True}
    assert luis.heard() == [("typing", {"room": "python", "username": "ana"})]
    assert laptop.heard() == phone.heard() == eva.heard() == []


def test_an_invitation_is_heard_by_the_guest_alone_and_opens_the_room(online):
    ana, laptop = online("ana", "room1"), online("luis")
    phone, eva = online("luis", "python"), online("eva", "python")
    assert refusal(laptop.ask("join", room="room1"))
    ack = ana.ask("invite", room="room1", username="LUIS")
    assert ack == {"ok": True, "username": "luis"}
    assert laptop.heard() == phone.heard() == [("invite", {"room": "room1", "by": "ana"})]
    assert ana.heard() == eva.heard() == []
    assert laptop.ask("join", room="room1")["members"] == ["ana", "luis"]
    assert online("luis").ask("join", room="room1")["ok"]
    assert refusal(eva.ask("join", room="room1"))


def test_an_expulsion_takes_out_all_connections_and_the_invitation(online):
    ana, eva, owner = online("ana"), online("eva", "python"), online("ana", "room1")
    for name in ("luis", "eva"):
        ana.ask("invite", room="room1", username=name)
    laptop, phone, guest = (online(name, "room1") for name in ("luis", "luis", "eva"))
    assert ana.ask("expel", room="room1", username="luis") == {"ok": True}
    members = {"members": ["ana", "eva"], "reason": "expelled"}
    assert laptop.heard() == phone.heard() == [("expel", {"room": "room1", "by": "ana"})]
    left = ("leave", {"room": "room1", "username": "luis"} | members)
    assert guest.heard() == owner.heard() == [left] and ana.heard() == eva.heard() == []
    assert guest.ask("chat", room="room1", message="hi")["ok"]
    assert laptop.heard() == phone.heard() == []
    assert refusal(phone.ask("join", room="room1"))
    assert refusal(laptop.ask("chat", room="room1", message="hi"))


def test_an_invitation_may_be_withdrawn_before_it_is_used(online):
    ana, luis, news = online("ana", "room1"), online("luis"), {"room": "room1", "by": "ana"}
    ana.ask("invite", room="room1", username="luis")
    ana.ask("expel", room="room1", username="luis")
    assert luis.heard() == [("invite", news), ("expel", news)]
    assert refusal(luis.ask("join", room="room1")) and ana.heard() == []


def test_a_joiner_alone_hears_the_history_in_order(online):
    ana, eva = online("ana", "python"), online("eva", "python")
    ids = [ana.ask("chat", room="python", message=text)["id"] for text in ("one", "two", "three")]
    ana.ask("chat", message="to all")
    said, luis = [packet for packet in eva.heard() if packet[1]["room"]], online("luis")
    assert luis.ask("join", room="python", last_id=0)["missed"] == 3
    *history, (event, joined) = luis.heard()
    assert history == said and [data["id"] for _, data in history] == ids
    assert event == "join" and eva.heard() == [("join", joined)]


def test_a_returning_client_hears_only_what_is_new_and_announces_nothing_twice(online):
    ana, luis, eva = online("ana", "python"), online("luis"), online("eva", "python")
    ids = [ana.ask("chat", room="python", message=text)["id"] for text in ("one", "two", "three")]
    unknown = before_a_restart, ahead = 1, 10**90
    for last_id, missed in {ids[0]: 2, ids[2]: 0, ahead: 0, before_a_restart: 3, None: 3}.items():
        ack = luis.ask("join", room="python", last_id=last_id)
        assert (ack["missed"], ack["gap"]) == (missed, last_id in unknown)
        assert ack["last_id"] == ids[2]
        heard = [data["id"] for event, data in luis.heard() if event == "chat"]
        assert heard == ids[3 - missed :]
    assert [event for event, _ in eva.heard()] == ["chat"] * 3 + ["join"]


def test_a_key_is_said_once_whichever_way_and_before_membership_and_rate(online, web, patient):
    laptop, phone, luis = online("ana", "python"), online("ana"), online("luis", "python")
    keys, said = [f"{n:64}" for n in range(60)], {"message": "hi", "room": "python"}
    ids = [laptop.ask("chat", key=key, **said)["id"] for key in keys]
    assert refusal(laptop.ask("chat", **said))
    again = said | {"key": keys[7]}
    assert laptop.ask("chat", **again) == phone.ask("chat", **again) == {"ok": True, "id": ids[7]}
    assert web("ana").post("/messages", json=again).get_json() == {"id": ids[7]}
    assert len(luis.heard()) == 60 and phone.heard() == []
    assert luis.ask("chat", **again)["id"] > ids[-1]


def test_sixty_messages_at_once_are_enough(online, web, patient):
    laptop, phone = online("ana", "python"), online("ana")
    luis, eva = online("luis", "python"), online("eva")
    tries = [(room, text) for room in ("python", "flask") for text in ("", "hi")]
    acks = [laptop.ask("chat", room=room, message=text)["ok"] for room, text in tries]
    assert acks == [False, True, False, False]
    assert all(phone.ask("chat", message="hi")["ok"] for _ in range(58))
    assert web("ana").post("/messages", json={"message": "hi"}).status_code == 201
    for client in (laptop, phone):
        ack = client.ask("chat", message="one too many")
        assert refusal(ack) and ack["retry_after"] > 0
    assert len(luis.heard()) == 60 and len(eva.heard()) == 59
    assert laptop.ask("typing", room="python")["ok"] and luis.ask("chat", message="hi")["ok"]


@pytest.fixture
def refuses(state, online):
    """refuses("ana", "chat", {...}): it is refused, changes nothing; nobody hears it or is cut."""
    state.invite("ana", "room1", "eva")
    rooms = {"ana": ["room1", "python"], "luis": ["python"], "eva": ["room1", "flask"]}
    talkers = {name: online(name, *joined) for name, joined in rooms.items()}

    def all_there_is():
        tables = state.present, state.guests, state.history
        kept = [{room: rows for room, rows in table.items() if rows} for table in tables]
        return copy.deepcopy(kept), state.newest()

    def refuses(name, event, *arguments):
        before = all_there_is()
        assert refusal(talkers[name].emit(event, *arguments, callback=True))
        assert all_there_is() == before
        assert not any(talker.heard() for talker in talkers.values())

    for talker in talkers.values():
        talker.heard()
    return refuses


EVENTS = ["join", "leave", "typing", "chat", "invite", "expel"]
ALL_FIELDS = {"room": "room1", "username": "eva", "message": "hi", "last_id": 0}
# fmt: off
NO_OBJECTS = [
    (), (None,), (7,), ("room1",), ([],), ([ALL_FIELDS],), (json.dumps(ALL_FIELDS),), ({},),
    (ALL_FIELDS, ALL_FIELDS),
]
NO_TEXT = ..., None, 7, True, [], {}, "", "half \ud800"  # ...: no such field
NOWHERE = *NO_TEXT, ["room1"], {"room": "room1"}, "nowhere", "x" * 501, "room1\0"
NO_LAST_ID = -1, 1.5, True, "7", [1], {"id": 1}, 1e300, 10**400, float("nan")
WRONG_FIELDS = [
    *((event, "room", value) for event in EVENTS if event != "chat" for value in NOWHERE),
    *((event, "username", value) for event in ("invite", "expel") for value in NOWHERE),
    *(("chat", "room", value) for value in NOWHERE[2:]),
    *(("chat", "message", value) for value in (*NO_TEXT, " \n", "x" * 501)),
    *(("chat", "key", value) for value in (7, True, [], {}, ["k"], "", "x" * 65, "half \ud800")),
    *(("join", "last_id", value) for value in NO_LAST_ID),
]
FORBIDDEN = [
    *(("luis", "join", {"room": room}) for room in ("room1", "staff", "room:python")),
    *(("luis", event, {"room": room, "message": "hi"})
      for event in ("leave", "typing", "chat") for room in ("room1", "flask")),
    *((name, event, {"room": room, "username": guest})
      for event in ("invite", "expel") for name, room, guest in (
        ("luis", "room1", "eva"), ("eva", "room1", "luis"), ("luis", "python", "eva"),
        ("luis", "staff", "luis"), ("ana", "python", "luis"), ("ana", "room1", "ana"),
        ("ana", "room1", "ANA"), ("ana", "room1", "nobody"))),
]
# fmt: on


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("arguments", NO_OBJECTS)
def test_an_event_carries_one_json_object(refuses, event, arguments):
    refuses("ana", event, *arguments)


@pytest.mark.parametrize("event, field, value", WRONG_FIELDS)
def test_a_field_that_is_missing_or_wrong_is_refused(refuses, event, field, value):
    fields = ALL_FIELDS | {field: value}
    refuses("ana", event, {name: value for name, value in fields.items() if value is not ...})


@pytest.mark.parametrize("name, event, fields", FORBIDDEN)
def test_a_forbidden_action_is_refused(refuses, name, event, fields):
    refuses(name, event, fields)


@pytest.mark.parametrize(
    "event", ["connect", "disconnect", "*", "", "shout", "message", "chat ", "Chat"]
)
def test_there_are_no_other_events_and_nobody_names_connect_or_disconnect(refuses, event):
    for arguments in ((), (ALL_FIELDS,), ("client disconnect",)):
        refuses("ana", event, *arguments)


def test_the_id_of_a_connection_is_no_room(state, online):
    ana, luis = online("ana"), online("luis")
    for sid in state.present[None]:
        assert program.channel(sid) != sid
        assert refusal(ana.ask("join", room=sid))
        assert refusal(ana.ask("chat", room=sid, message="hi"))
    assert ana.heard() == luis.heard() == []


TRANSPORTS = pytest.mark.parametrize(
    "transports", [["websocket"], ["polling"], ["polling", "websocket"]], ids="+".join
)


@TRANSPORTS
def test_members_of_a_room_hear_each_other_and_nobody_else_does(server, connect, transports):
    names = ("ana", "luis", "eva")
    ana, luis, eva = people = [connect(server, name, transports=transports) for name in names]
    for client, room in zip(people, ("python", "python", "flask"), strict=True):
        client.call("join", {"room": room})
        client.heard.clear()
    message_id = ana.call("chat", {"room": "python", "message": "día 😀"})["id"]
    ana.call("chat", {"message": "the end"})
    until(lambda: all("the end" in client.texts() for client in people))
    assert ana.texts() == luis.texts() == ["día 😀", "the end"] and eva.texts() == ["the end"]
    assert luis.chats()[0]["id"] == message_id


@TRANSPORTS
def test_history_is_heard_before_the_ack(server, connect, transports):
    ana, luis = connect(server, "ana"), connect(server, "luis", transports=transports)
    ana.call("join", {"room": "flask"})
    said = [{"room": "flask", "message": text} for text in ("old", "one", "two")]
    ids = [ana.call("chat", data)["id"] for data in said]
    acked = partial(lambda *heard: luis.heard.append(heard), "ack")
    luis.emit("join", {"room": "flask", "last_id": ids[0]}, callback=acked)
    until(lambda: len(luis.heard) == 4)
    assert [event for event, _ in luis.heard] == ["chat", "chat", "join", "ack"]
    assert luis.texts() == ["one", "two"]


@TRANSPORTS
def test_a_history_longer_than_a_client_takes_in_one_poll_is_heard_whole(
    arena, connect, transports, monkeypatch
):
    monkeypatch.setattr(engineio.payload.Payload, "max_decode_packets", 16)  # as it comes
    speaker = Wire(arena, register(arena)).enter("flask")
    luis = connect(arena, "luis", transports=transports)
    said = [speaker.ask("chat", room="flask", message=f"{n}") for n in range(19)]
    last_id, *ids = [ack["id"] for ack in said]
    assert luis.call("join", {"room": "flask", "last_id": last_id})["missed"] == len(ids)
    assert [said["id"] for said in luis.chats()] == ids


def test_everyone_hears_the_same_order_in_which_ids_rise(arena):
    talkers = {}
    for transport in ("websocket", "polling", "websocket"):
        name = f"talker{os.urandom(4).hex()}"
        talkers[name] = Client(arena.url, register(arena, name), transports=[transport])
    everyone = talkers.values()
    for n in range(15):
        for talker in everyone:
            talker.emit("chat", {"message": f"{n}"})
    until(lambda: all(len(talker.chats()) == 45 for talker in everyone))
    one, *others = [talker.chats() for talker in everyone]
    ids = [said["id"] for said in one]
    assert others == [one, one] and ids == sorted(set(ids))
    for name, talker in talkers.items():
        texts = [said["message"] for said in one if said["username"] == name]
        assert texts == [f"{n}" for n in range(15)]
        talker.disconnect()


def test_binary_data_is_refused_like_any_other(server, connect):
    ana, luis = connect(server, "ana"), connect(server, "luis")
    assert refusal(ana.call("join", {"room": b"python"})) and refusal(ana.call("chat", b"hi"))
    assert ana.call("chat", {"message": "hi"})["ok"] and until(luis.texts) == ["hi"]


DUCK = "\N{DUCK}"
# fmt: off
TEXTS = [
    DUCK * 500, "\u202eשלום\u2028\u2029\ufeff", "a\0b", "\x7f\x85\ufffe\U0010ffff", "&\"'\\\x1e!",
]
# fmt: on


def test_any_unicode_arrives_as_it_was_sent(server):
    luis, eva = sign_in(server.url, "luis"), sign_in(server.url, "eva")
    luis, eva = Wire(server, luis).enter("flask"), Polls(server, eva)
    assert eva.ask("join", room="flask")["ok"]
    for text in TEXTS:
        fields = {"room": "flask", "message": text}
        luis.send("42" + json.dumps(["chat", fields], ensure_ascii=False))
        assert luis.hear(1)[0]["message"] == chats(eva.until('42["chat"'))[0]["message"] == text


# 7. One frame for a room --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 125, 126, 127, 65_535, 65_536, 70_000])
def test_frames_of_every_size_are_read_whole(size):
    client, text = Connection(ConnectionType.CLIENT), "4" + "x" * (size - 1)
    client.receive_data(program.frame(text) + program.frame("4\u20ac"))
    texts = [event.data for event in client.events()]
    assert texts == [text, "4\u20ac"]


class Stubborn(Client):
    """A Client that joins again, with the last id it heard, whenever it is back."""

    def join(self):
        last_id = self.chats()[-1]["id"] if self.chats() else 0
        self.emit("join", {"room": "python", "last_id": last_id})

    def say(self, message):
        """Say it (once more) with the same key; whether it was acked in time."""
        ack, data = {}, {"room": "python", "message": message, "key": message}
        with suppress(socketio.exceptions.SocketIOError):
            ack = self.call("chat", data, timeout=0.4)
        time.sleep(ack.get("retry_after", 0))
        return ack.get("ok")


def test_nothing_is_lost_doubled_or_swapped_while_all_are_cut_again_and_again(fresh):
    relay, texts, done = Relay(fresh().port), [str(number) for number in range(120)], []
    everybody = []
    for name, transports in {"ana": None, "luis": ["websocket"], "eva": ["polling"]}.items():
        session = sign_in(relay.url, name)
        client = Stubborn(relay.url, session, reconnection=True, transports=transports)
        client.on("connect", client.join)
        client.join()
        everybody.append(client)

    def cut_again_and_again():
        while not done:
            relay.cut()
            time.sleep(1.5)

    threading.Thread(target=cut_again_and_again).start()
    for text in texts:
        until(lambda text=text: everybody[0].say(text))
    done.append(True)
    for client in everybody:
        until(lambda client=client: len(client.chats()) >= len(texts))
        assert client.texts() == texts
        client.disconnect()


GOODBYES = {
    "nothing": b"",
    "41": frame(b"41"),
    "1": frame(b"1"),
    "a close frame": frame(b"\x03\xe8", opcode=8),
    "both": frame(b"41") + frame(b"\x03\xe8", opcode=8),
}


@pytest.mark.parametrize("goodbye", GOODBYES.values(), ids=GOODBYES)
def test_last_words_are_heard_though_the_connection_is_closed(arena, goodbye):
    eva, speaker = Wire(arena, sign_in(arena.url, "eva")).enter("python"), crowd(arena, 1)[0]
    speaker.tcp.sendall(b"".join(frame(packet.encode()) for packet in burst(20)) + goodbye)
    speaker.tcp.close()
    assert numbers(eva.hear(20)) == list(range(1, 21))


def test_twenty_packets_in_one_polling_post_are_all_delivered(arena):
    eva = Wire(arena, sign_in(arena.url, "eva")).enter("python")
    polls = Polls(arena, register(arena))
    assert polls.ask("join", room="python")["ok"]
    polls.send(*burst(20))
    acks = [packet for packet in polls.until("4320[") if packet.startswith("43")]
    assert len(acks) == 20 and all('"ok":true' in ack for ack in acks)
    assert numbers(eva.hear(20)) == list(range(1, 21))


def test_the_answer_to_a_poll_says_its_length(server):
    """Without it, a client takes an answer that is cut off for a whole one, and loses messages."""
    polls = Polls(server, sign_in(server.url, "luis"))
    polls.send('420["join",{"room":"python"}]')
    answer = polls.session.get(polls.url, headers={"Accept-Encoding": "identity"})
    assert answer.headers["Content-Length"] == str(len(answer.content))


FULL_ROOMS = f"""
app.start()
app.state.owners |= {{"a": None, "b": None}}
for room in ("python", "flask", "staff", "room1", "a", "b"):
    for number in range(500):
        text = f"{{number}} of {{room}} " + "{DUCK}" * 480 * (room == "python")
        app.state.store(app.state.user("ana"), room, text, None)
"""


@pytest.fixture(scope="session")
def full():
    """An impatient server where six rooms are full; python has three megabytes in it."""
    with started(*variant(after=FULL_ROOMS + QUICK_TO_HASH + IMPATIENT)) as server:
        yield server


@pytest.fixture(scope="session")
def arena():
    """A server for tests that say much: pages on `server` stay short."""
    with started(*variant(after=QUICK_TO_HASH)) as server:
        yield server


@contextmanager
def storm(server):
    """Five users say sixty things each, in their own time, each reading what it hears."""

    def talk(wire):
        for number in range(60):
            assert wire.ask("chat", room="python", message=f"{number}")["ok"]
            time.sleep(0.01)

    talks = [threading.Thread(target=talk, args=[wire]) for wire in crowd(server, 5)]
    for thread in talks:
        thread.start()
    yield
    for thread in talks:
        thread.join()


def test_joining_in_a_storm_misses_nothing_doubles_nothing_and_hears_in_order(arena):
    stays = Wire(arena, sign_in(arena.url, "luis")).enter("python")
    wire = Wire(arena, sign_in(arena.url, "luis")).enter("python")  # comes and goes unannounced
    with storm(arena):
        heard = wire.hear(1)
        for _ in range(100):
            assert wire.ask("leave", room="python")["ok"]
            heard += chats(wire.heard)
            ack = wire.ask("join", room="python", last_id=heard[-1]["id"])
            heard += chats(wire.heard)
            assert ack["missed"] == len(chats(wire.heard))  # the history comes before the ack
    whole = [said for said in log_of(arena) if said["id"] >= heard[0]["id"]]
    assert heard + wire.hear(len(whole) - len(heard)) == whole
    stays.tcp.close()


def upgrading(server, session, polls, meanwhile=None):
    """A WebSocket that has probed the way for a connection over HTTP."""
    wire = Wire(server, session, f"&sid={polls.sid}")
    if meanwhile:
        meanwhile.start()
    wire.send("2probe")
    assert wire.read() == "3probe"
    return wire


def test_an_upgrade_in_a_storm_misses_nothing_and_doubles_nothing(arena):
    luis, upgraded = sign_in(arena.url, "luis"), []
    with storm(arena):
        for _ in range(5):
            polls = Polls(arena, luis)
            polls.ask("join", room="python")
            wire, packets = upgrading(arena, luis, polls), polls.heard
            while "6" not in packets:  # the poll that ends the polling
                packets += polls.get()
            time.sleep(0.1)  # what is said now is heard after the upgrade
            wire.send("5")
            upgraded.append((wire, chats(packets)))
    whole = log_of(arena)
    for wire, heard in upgraded:
        heard += wire.hear(sum(said["id"] > heard[-1]["id"] for said in whole))
        assert heard[-len(whole) :] == whole


def test_fifteen_hundred_messages_that_wait_survive_the_upgrade(full):
    luis = sign_in(full.url, "luis")
    polls = Polls(full, luis)
    polls.send(*(f'42{n}["join",{{"room":"python"}}]' for n in range(3)))
    wire = upgrading(full, luis, polls)
    wire.send("5")
    packets = wire.until("432[")
    acks = [json.loads(packet[3:])[0] for packet in packets if packet.startswith("43")]
    assert [ack["missed"] for ack in acks] == [500, 500, 500]
    ids = [said["id"] for said in chats(packets)]
    assert len(ids) == 1500 and ids[:500] == ids[500:1000] == ids[1000:] == sorted(set(ids))
    assert wire.ask("typing", room="python")["ok"]


def test_behind_a_proxy_that_swallows_frames_polling_goes_on(server):
    luis, eva = sign_in(server.url, "luis"), sign_in(server.url, "eva")
    relay, polls = Relay(server.port), Polls(server, luis)
    wire = Wire(relay, luis, f"&sid={polls.sid}")
    relay.silent = True
    wire.send("2probe")
    for text in ("one", "two", "three", "and after the proxy has given up"):
        if " " in text:
            relay.cut()
        said = {"json": {"message": text}}
        threading.Timer(0.4, eva.post, [f"{server.url}/messages"], said).start()
        answers = [polls.get()]
        while text not in [message["message"] for message in chats(answers[-1])]:
            answers.append(polls.get())
        assert len(answers) < 5  # no storm of empty answers
    assert polls.ask("join", room="python")["ok"]


RIVALS = pytest.mark.parametrize("packets", [(), ("2probe",), ("2probe", "5"), ("40",)], ids=str)


@RIVALS
def test_a_second_websocket_does_not_take_a_connection_over(server, packets):
    luis = sign_in(server.url, "luis")
    for milliseconds in (0, 1, 2, 4, 8, 16, 50):  # after the first was opened
        polls, second = Polls(server, luis), []

        def interfere(polls=polls, second=second):
            second.append(Wire(server, luis, f"&sid={polls.sid}"))
            with suppress(OSError):
                second[0].send(*packets)
            if not packets:
                second[0].tcp.close()

        rival = threading.Timer(milliseconds / 1000, interfere)
        first = upgrading(server, luis, polls, rival)
        first.send("5")
        rival.join()
        assert first.ask("join", room="python")["ok"]
        assert not packets or second[0].ended()
        assert first.ask("typing", room="python")["ok"]


def test_an_upgrade_that_begins_wrongly_leaves_the_connection_on_polling(server):
    luis = sign_in(server.url, "luis")
    polls = Polls(server, luis)
    for packet in ("", "4", "5", "2", "3probe", "b!!!", "42[]", "x" * 70_000):
        wire = Wire(server, luis, f"&sid={polls.sid}")
        wire.send(packet)
        assert wire.ended(), packet
    assert polls.ask("join", room="python")["ok"]


def test_a_slow_reader_gets_the_whole_history_and_holds_up_nobody(full):
    slow, (ana, eva) = Wire(full, sign_in(full.url, "luis")).enter(), crowd(full, 2)
    join, typing = (f'42["{event}",{{"room":"python"}}]' for event in ("join", "typing"))
    slow.send(join, join, typing)  # more is heard of that than fits into the line
    ana.until('42["typing"')
    for wire in (ana, eva):  # it has read nothing yet
        acks = [wire.ask("chat", room="python", message=f"{n} meanwhile") for n in range(4)]
        assert all(ack["ok"] for ack in acks)
    while slow.take() and "meanwhile" not in "".join(slow.inbox[-9:]):
        time.sleep(0.1)  # in all for longer than the server waits for a silent client
    heard = chats(slow.inbox)
    assert len(heard) >= 1000 and heard[:500] == heard[500:1000]
    assert (heard + slow.hear(1008 - len(heard)))[-500:] == log_of(full)


def test_a_flood_is_refused_over_the_rate_and_what_is_acked_is_heard_in_order(full):
    stalled, (speaker, listener) = Wire(full, sign_in(full.url, "luis")).enter(), crowd(full, 2)
    stalled.send(*['42["join",{"room":"python"}]'] * 2)  # and reads nothing of it
    memory, threads = full.usage.memory_info().rss, full.usage.num_threads()
    packets = burst(1000)

    def acks():
        return [packet for packet in speaker.inbox if packet.startswith("43")]

    for end in range(200, 1200, 200):
        speaker.send(*packets[end - 200 : end])
        lab.attend([speaker, listener], lambda end=end: len(acks()) == end)
    acks = [json.loads(packet[packet.index("[") :])[0] for packet in acks()]
    speaker.ask("typing", room="python")
    heard = chats(listener.until('42["typing"'))
    accepted = [ack["id"] for ack in acks if ack["ok"]]
    assert 60 <= len(accepted) < len(acks) == 1000
    assert all(ack["ok"] or ack["retry_after"] > 0 for ack in acks)
    assert [said["id"] for said in heard] == accepted
    assert full.usage.memory_info().rss - memory < 30e6
    assert full.usage.num_threads() <= threads + 1 and stalled.ended()


def longest_wait(wire, busy):
    """How long an ack takes at most, asked for again and again while `busy()`."""
    longest = 0
    while busy():
        began = time.monotonic()
        assert wire.ask("join", room="python", last_id=2**53)["ok"]  # in there already: no notice
        longest = max(longest, time.monotonic() - began)
        time.sleep(0.01)
    return longest


def test_two_thousand_joins_in_one_post_take_no_memory_and_nobodys_time(full):
    ana = Wire(full, sign_in(full.url, "ana")).enter("python")
    polls, memory = Polls(full, sign_in(full.url, "luis")), [full.usage.memory_info().rss]

    def post():
        with suppress(requests.RequestException):
            polls.send(*['42["join",{"room":"python"}]'] * 2000)

    def busy():
        memory.append(full.usage.memory_info().rss)
        return posting.is_alive()

    posting = threading.Thread(target=post)
    posting.start()
    assert longest_wait(ana, busy) < 2  # seconds
    assert max(memory) - memory[0] < 50e6


FLOODS = {
    "events": frame(b'42["typing",{"room":"flask"}]'),
    "acks": frame(b'421["typing",{"room":"flask"}]'),
    "pongs": frame(b"3"),
    "pings": frame(b"", opcode=9),
    "fragments": frame(b"", opcode=0, first=0),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_client_that_sends_without_a_pause_holds_up_nobody(server, kind):
    luis, eva = sign_in(server.url, "luis"), Wire(server, sign_in(server.url, "eva"))
    over, rounds = threading.Event(), []

    def drain(wire):
        with suppress(OSError):
            wire.ended()  # reads all answers

    def attack():
        while not over.is_set():
            wire = Wire(server, luis).enter("flask")
            threading.Thread(target=drain, args=[wire]).start()
            with suppress(OSError):
                if kind == "fragments":
                    wire.tcp.sendall(frame(b"4", first=0))
                while not over.is_set():
                    wire.tcp.sendall(FLOODS[kind] * 500)
                    rounds.append(kind)
            wire.tcp.close()

    attacker = threading.Thread(target=attack)
    attacker.start()
    until(lambda: rounds)
    end = time.monotonic() + 2
    try:
        assert longest_wait(eva.enter("python"), lambda: time.monotonic() < end) < 2  # seconds
    finally:
        over.set()
        attacker.join()


def remote_ports(server):
    """The ports of those to whom the server has a TCP connection."""
    connections = server.usage.net_connections()
    return [connection.raddr.port for connection in connections if connection.raddr]


@pytest.mark.parametrize("transport", [Wire, Polls])
@pytest.mark.parametrize("event, bytes", [("join", 25e6), ("typing", 10e6)])
def test_a_client_that_sends_and_never_reads_is_closed_and_costs_little(
    full, transport, event, bytes
):
    packets, name = [f'421["{event}",{{"room":"python"}}]'] * 100, f"never{os.urandom(4).hex()}"
    client, before = transport(full, register(full, name)), full.usage.memory_info().rss
    if transport is Wire:
        client.enter().tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # soon full
        client.tcp.settimeout(2)  # seconds until it gives up sending, too
    with suppress(OSError):  # what requests raises is one, too
        while not full.said(f"disconnected: {name}"):
            client.send(*packets)
            assert full.usage.memory_info().rss - before < bytes
    until(lambda: full.said(f"disconnected: {name}"))
    if transport is Wire:
        _, port = client.tcp.getsockname()
        until(lambda: port not in remote_ports(full))


def test_a_connection_takes_two_threads_at_most(changed):
    server = changed(after=QUICK_TO_HASH)
    eva, wires, threads = sign_in(server.url, "eva"), [], []
    for _ in range(2):
        threads.append(server.usage.num_threads())
        wires += [Wire(server, eva).enter() for _ in range(20)]
    assert server.usage.num_threads() <= threads[1] + 40


def test_silent_hasty_and_rude_clients_leave_no_thread_and_no_descriptor(changed):
    server = changed(after=QUICK_TO_HASH + IMPATIENT)
    luis, eva, relay = sign_in(server.url, "luis"), register(server, "eva2"), Relay(server.port)
    Wire(server, eva).enter().send("1")  # starts the thread that looks for the silent
    until(lambda: server.said("disconnected: eva2"))
    usage = server.usage.num_threads(), server.usage.num_fds()
    silent = [Wire(relay, luis).enter("python") for _ in range(5)]
    silent += [Polls(relay, luis) for _ in range(5)]
    relay.silent = True
    halves = [socket.create_connection((ME, server.port)) for _ in range(5)]
    for tcp in halves:
        tcp.sendall(b"GET / HTTP/1.1\r\nHost:")  # and no more
    left = [Polls(server, luis) for _ in range(50)]
    for number in range(8):
        Wire(server, eva).enter("python").tcp.close()
        Wire(server, eva).send("x" * (number % 5))
        for first, payload in TOO_LARGE.values():
            wire = Wire(server, eva).enter()
            with suppress(OSError):
                wire.tcp.sendall(frame(payload, first=first) * 2)
    luis.close()
    until(lambda: len(server.said("disconnected: eva2 (transport close)")) == 32)
    until(lambda: len(server.said("(ping timeout)")) == len(silent + left), 40)
    until(lambda: (server.usage.num_threads(), server.usage.num_fds()) <= usage, 40)


FORGETFUL = """
app.PATIENCE = app.PING_EVERY = 3

@app.socketio.on("count")
def count(data):
    return {"ok": True, "connections": len(app.engine.sockets)}
"""


def test_a_handshake_that_fails_is_forgotten(changed):
    server = changed(after=FORGETFUL)
    ana = sign_in(server.url, "ana")
    wire = Wire(server, ana).enter()
    half = {"Upgrade": "websocket", "Connection": "Upgrade"}  # without a key
    for _ in range(5):
        url = f"{server.url}/socket.io/?EIO=4&transport=websocket"
        assert ana.get(url, headers=half).status_code == 400
    assert wire.ask("count")["connections"] > 1
    until(lambda: wire.ask("count")["connections"] == 1)


PHOTO = """
@app.socketio.on("photo")
def photo(data):
    app.socketio.emit("photo", bytes(data["size"]))
    return {"ok": True}
"""


def test_bytes_of_a_students_handler_are_heard_over_both_transports(changed):
    server = changed(after=PHOTO)
    wire, polls = (
        Wire(server, sign_in(server.url, "ana")),
        Polls(server, sign_in(server.url, "eva")),
    )
    wire.enter("python")
    assert polls.ask("join", room="python")["ok"]
    for size in (1000, 50):
        wire.send("420" + json.dumps(["photo", {"size": size}]))  # Wire passes over binary frames
        assert wire.ask("chat", room="python", message=f"{size}")["ok"]
        heard = polls.until('42["chat"')
        photo = heard[heard.index('451-["photo",{"_placeholder":true,"num":0}]') + 1]
        assert base64.b64decode(photo[1:]) == bytes(size)


NAP = """
@app.socketio.on("nap")
{mark}
def nap(data):
    app.emit("napping", {{}})
    before, deadline = app.state.newest(), time.monotonic() + 3
    while app.state.newest() == before and time.monotonic() < deadline:
        time.sleep(0.01)
    return {{"ok": True, "woken": app.state.newest() > before}}
"""


@pytest.mark.parametrize("mark, woken", [("", True), ("@app.one_at_a_time", False)])
def test_a_slow_handler_holds_up_nobody_unless_it_is_marked(changed, mark, woken):
    server = changed("import time", NAP.format(mark=mark))
    ana, eva = (Wire(server, sign_in(server.url, name)).enter("python") for name in ("ana", "eva"))
    ana.send('420["nap",{}]')
    ana.until('42["napping"')
    assert eva.ask("chat", room="python", message="beside")["ok"]
    ack = json.loads(ana.until("430")[-1][3:])[0]
    assert ack == {"ok": True, "woken": woken} and ana.ask("leave", room="python")["ok"]


def test_six_full_rooms_joined_in_one_post_are_heard_whole(full):
    polls = Polls(full, sign_in(full.url, "ana"))
    rooms = ["python", "flask", "staff", "room1", "a", "b"]
    joins = (
        f"42{number}" + json.dumps(["join", {"room": room}]) for number, room in enumerate(rooms)
    )
    assert polls.send(*joins) == 200
    heard = chats(packet for packet in polls.until("435[") if packet.startswith('42["chat"'))
    assert [said["room"] for said in heard] == [room for room in rooms for _ in range(500)]


STEP = """
import os, time
now = time.time
time.time = lambda: now() - 3600 * os.path.exists({flag!r})
"""


def test_a_clock_that_is_set_back_cuts_nobody_and_signs_nobody_out(changed, tmp_path):
    flag = tmp_path / "back"
    server = changed(STEP.format(flag=str(flag)), "app.PING_EVERY = 1")
    ana, polls = sign_in(server.url, "ana"), Polls(server, sign_in(server.url, "eva"))
    wire = Wire(server, ana).enter("python")
    first = wire.ask("chat", room="python", message="before")["id"]
    flag.touch()
    wire.until("2")  # a ping
    assert polls.ask("join", room="python")["missed"] == 1
    assert wire.ask("chat", room="python", message="after")["id"] > first
    assert ana.get(f"{server.url}/messages?after=5").json()["gap"]


def test_a_room_message_wakes_no_long_poll(fresh):
    server, used = fresh(), []
    ana = Wire(server, sign_in(server.url, "ana")).enter("python")
    luis = cookie_of(sign_in(server.url, "luis"))
    head = f"GET /messages?after={10**15}&wait=25 HTTP/1.0\r\nHost: {ME}\r\nCookie: {luis}\r\n\r\n"
    polls = [socket.create_connection((ME, server.port)) for _ in range(200)]
    for waiting in (False, True):
        for poll in polls if waiting else ():
            poll.sendall(head.encode())
        until(lambda many=waiting: (server.usage.num_threads() > 200) == many)
        time.sleep(1)
        before = sum(server.usage.cpu_times()[:2])
        for number in range(20):
            ana.ask("chat", room="python", message=f"{number}")
            time.sleep(0.05)
        used.append(sum(server.usage.cpu_times()[:2]) - before)
    assert used[1] < 4 * used[0] + 0.1


# 8. The door --------------------------------------------------------------------------------------

# fmt: off
STRANGERS = [
    ({"Cookie": ""}, 401), ({"Cookie": "session=x"}, 401), ({"Origin": EVIL}, 403),
    ({"Origin": EVIL, "X-Forwarded-Host": "evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Transfer-Encoding": "chunked"}, 413),
]
HALVES = [
    {"Sec-WebSocket-Key": None}, {"Sec-WebSocket-Version": "7"}, {"Sec-WebSocket-Version": None},
    {"Sec-WebSocket-Protocol": "\xe9"}, {"Connection": "Upgrade, \xe9"},
]
LENGTH_LIES = ["Content-Length: -1", "Content-Length: 10000000000", "Transfer-Encoding: chunked"]
TOO_LARGE = {
    "over 64 KB": (0x80, b"4" * 70_000), "in fragments": (0, b"4" * 40_000),
    "compressed": (0xC0, zlib.compress(bytes(10**7), wbits=-15)),
}
# fmt: on


@pytest.mark.parametrize("headers, status", STRANGERS, ids=str)
def test_strangers_and_other_sites_get_no_connection(server, headers, status):
    session, url = sign_in(server.url, "luis"), f"{server.url}/socket.io/?EIO=4&transport=polling"
    assert Wire(server, session, **headers).status == status
    visitor = requests if "Cookie" in headers else session
    assert visitor.get(url, headers=headers).status_code == status


@pytest.mark.parametrize("headers", HALVES, ids=str)
def test_half_a_handshake_is_refused(server, headers):
    assert Wire(server, sign_in(server.url, "luis"), **headers).status == 400


@pytest.mark.parametrize("kind", ["fragments", "one frame", "bomb", *LENGTH_LIES])
def test_a_flood_from_strangers_fills_no_memory(server, kind):
    sign_in(server.url, "ana")  # hashing a password for the first time takes memory, too
    before, data = server.usage.memory_info().rss, b"f000\r\n" + b"x" * 0xF000 + b"\r\n"
    tcp = Wire(server, None, compress=True).tcp
    if kind == "fragments":
        data = frame(data, opcode=0, first=0)
    elif kind == "one frame":
        tcp.sendall(b"\x81\xff" + struct.pack("!Q", 2**40) + bytes(4))
    elif kind == "bomb":
        data = frame(zlib.compress(bytes(40_000_000), wbits=-15), first=0xC0)
    else:
        tcp = socket.create_connection((ME, server.port))
        head = f"Host: {ME}:{server.port}\r\n{kind}"
        tcp.sendall(f"POST /socket.io/?EIO=4 HTTP/1.1\r\n{head}\r\n\r\n".encode())
    with suppress(OSError):
        for number in range(400):  # 24 MB, if the server takes them
            tcp.sendall(data)
            assert number % 20 or requests.get(f"{server.url}/login").status_code == 200
            assert server.usage.memory_info().rss - before < 5e6


def test_heads_without_an_end_fill_no_memory(server):
    before, line = server.usage.memory_info().rss, b"X: " + b"x" * 65_000 + b"\r\n"
    tcps = [socket.create_connection((ME, server.port)) for _ in range(20)]
    for tcp in tcps:
        with suppress(OSError):
            tcp.sendall(b"GET / HTTP/1.1\r\n" + line * 90)
    assert server.usage.memory_info().rss - before < 30e6


def test_a_client_that_joins_and_leaves_without_end_is_heard_in_measure(server):
    eva, guest = (Wire(server, register(server, name)).enter() for name in ("calm", "restless"))
    assert eva.ask("join", room="python")["ok"]
    data = '{"room":"python","last_id":9007199254740992}'  # without the history
    loop = [f'421["join",{data}]', f'421["leave",{data}]'] * 200
    began = time.monotonic()
    guest.send(*loop, '422["join",{}]')
    guest.until("432")
    allowance = 60 + 20 * (time.monotonic() - began)
    assert eva.ask("chat", room="python", message="that was it")["ok"]
    assert 60 <= len([packet for packet in eva.heard if '"restless"' in packet]) <= allowance


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address: 127.0.0.2")
def test_ten_logins_at_a_time_from_one_address_do_not_hold_up_another(fresh):
    server, answered = fresh(), []

    def log_in(address, name):
        body = f"username={name}&password=demo"
        kind = "Content-Type: application/x-www-form-urlencoded"
        head = f"Host: {ME}\r\n{kind}\r\nContent-Length: {len(body)}"
        with socket.create_connection((ME, server.port), 60, (address, 0)) as tcp:
            tcp.sendall(f"POST /login HTTP/1.0\r\n{head}\r\n\r\n{body}".encode())
            assert tcp.recv(100)
        answered.append(name)

    names = [f"n{number}" for number in range(10)]
    crowd = [threading.Thread(target=log_in, args=["127.0.0.2", name]) for name in names]
    for thread in crowd:
        thread.start()
    until(lambda: answered)
    log_in("127.0.0.1", "ana")
    assert answered.index("ana") < 6
    for thread in crowd:
        thread.join()


@pytest.mark.parametrize("first, payload", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_message_too_large_or_compressed_ends_its_connection(server, first, payload):
    luis = sign_in(server.url, "luis")
    wires = [Wire(server, luis, compress=True).enter("python") for _ in range(3)]
    before, more = server.usage.memory_info().rss, frame(payload, opcode=0, first=first & 0x80)
    for wire in wires:
        with suppress(OSError):
            wire.tcp.sendall(frame(payload, first=first) + more)
        assert wire.ended()
    assert server.usage.memory_info().rss - before < 5e6


def test_a_message_without_an_end_ends_its_connection_before_it_fills_memory(server):
    wire = Wire(server, sign_in(server.url, "luis")).enter("python")
    before = server.usage.memory_info().rss
    with pytest.raises(OSError):
        wire.tcp.sendall(frame(b"4", first=0))
        for _ in range(400):  # 24 MB, if the server takes them
            wire.tcp.sendall(frame(b"x" * 60_000, opcode=0, first=0))
    assert server.usage.memory_info().rss - before < 5e6


@pytest.fixture
def siege(server, connect):
    """A server that luis attacks. Afterwards, nobody else has noticed, and the log has no error."""
    ana, eva = connect(server, "ana"), connect(server, "eva", transports=["polling"])
    until(lambda: all(who_is_there(server)[name] == 1 for name in ("ana", "eva")))
    ana.call("join", {"room": "staff", "last_id": 10**15})
    eva.call("join", {"room": "room3"})
    server.attacker, server.victims = sign_in(server.url, "luis"), (ana, eva)
    yield server
    assert ana.call("chat", {"room": "staff", "message": "all is well"})["ok"]
    assert until(ana.texts) == ["all is well"]
    assert [event for event, _ in ana.heard + eva.heard] == ["join", "chat", "join"]
    assert ana.connected and eva.connected and comings_and_goings(server)


# fmt: off
FIELDS = {
    "join": "room last_id", "leave": "room", "chat": "room message key", "typing": "room",
    "invite": "room username", "expel": "room username", "connect": "room", "disconnect": "room",
    "nope": "room",
}
DEEP = "[" * 10_000 + "]" * 10_000
VALUES = [
    "null", "true", "0", "-1", "1.5", "1e400", "NaN", "9" * 400, "9" * 5000, '""', '"\\u0000"',
    '"\\ud800"', '"SID"', '"EIO"', '"room:staff"', '"user:ana"', f'"{"x" * 60_000}"', "[]",
    '["staff"]', '{"_placeholder":true,"num":0}', DEEP,
]
SHAPES = [
    "", ",null", ",1", ',"x"', ",[]", ",[{}]", ",{},{}", ',"a","b","c"', ",{},null", "," + DEEP,
]
NAMES = [
    *(f'"{name}"' for name in FIELDS), "null", "1", '""', '"*"', '["chat"]', '{"chat":1}',
    '"\\ud800"', "true",
]
NO_JSON = b"\0", {"room": b"staff"}, ({}, {}), (b"a", b"b"), [b"x"], None, "staff", 1e308
STARTS = [
    "", "b", "²", "2", "5", "9", "4", "4²", "40", "40/other,", "41", "42", "42²", "42/other,",
    "43", "44", "451-", "461-",
]
ENDS = [
    "", "!", "[", "{}", '"x"', "\0", '["chat"]', '[{"message":"\0"}]', "9" * 101, "[" * 10_000,
    DEEP,
]
NO_FRAMES = [
    {"mask": 0}, {"first": 0xC0}, {"first": 0xA0}, {"first": 0x90}, {"opcode": 0}, {"opcode": 3},
    {"opcode": 15}, {"opcode": 9, "first": 0}, {"opcode": 8}, {"opcode": 2}, {"opcode": 10},
    {"first": 0}, {"payload": b"4\xed\xa0\x80"}, {"payload": b"4" * 70_000},
    {"opcode": 9, "payload": b"x" * 126}, {"opcode": 2, "payload": b""},
    *({"opcode": 8, "payload": code}
      for code in (b"x", b"\0\0", b"\x03\xed", b"\x03\xe8\xff", b"\xff\xff")),
]
# fmt: on


def hostile_events(victim):
    """Each field of each event with each value, each event with each shape of arguments."""
    for name, fields in FIELDS.items():
        for field in fields.split():
            for value in VALUES:
                value = value.replace("SID", victim.get_sid()).replace("EIO", victim.eio.sid)
                data = {"room": '"staff"', "message": '""', "username": '"eva"', field: value}
                pairs = ",".join(f'"{key}":{value}' for key, value in data.items())
                yield f'["{name}",{{{pairs}}}]'
    yield from (f"[{name}{shape}]" for name in NAMES for shape in SHAPES)


@pytest.mark.parametrize("transport", [Wire, Polls])
def test_every_hostile_event_is_refused_in_words_and_cuts_nobody(siege, transport):
    events = enumerate(hostile_events(siege.victims[0]), 1)
    packets = {number: f"42{number}{event}" for number, event in events}
    assert len(packets) > 400
    client = transport(siege, siege.attacker)
    if transport is Wire:
        client.enter()
    short = [number for number in packets if len(packets[number]) < 5000]
    batches = [short[first : first + 10] for first in range(0, len(short), 10)]
    for batch in [*batches, *([number] for number in packets if number not in short)]:
        client.send(*(packets[number] for number in batch))
        heard = client.until(f"43{batch[-1]}[")
        for number in batch:
            (ack,) = [ack for ack in heard if ack.startswith(f"43{number}[")]
            assert '"ok":false' in ack and '"error":"' in ack, packets[number][:200]


def test_a_client_that_sends_what_no_page_would_is_refused_too(siege, connect):
    luis = connect(siege, "luis")
    for event in FIELDS:
        for data in NO_JSON:
            assert luis.call(event, data)["error"]
    assert luis.connected


def test_an_invalid_packet_ends_at_most_the_connection_that_sent_it(siege):
    as_a_member = ["40", '420["join",{"room":"python"}]']
    for number, packet in enumerate(start + end for start in STARTS for end in ENDS):
        wire = Wire(siege, siege.attacker)
        wire.send(*as_a_member[: number % 2 * 2], packet, "3")
        wire.tcp.close()
    for number, packet in enumerate(start + end for start in STARTS for end in ENDS[:-2]):
        polls = Polls(siege, siege.attacker, connect=False)
        polls.send(*as_a_member[: number % 2 * 2], packet)


def test_frames_against_the_protocol_end_the_connection(siege):
    for wrong in NO_FRAMES:
        wire = Wire(siege, siege.attacker).enter("python")
        wire.tcp.sendall(frame(**{"payload": b"3"} | wrong))
        with suppress(OSError):
            wire.tcp.sendall(frame(b"1"))  # goodbye, for those that were no offence
        assert wire.ended(), wrong
    wire = Wire(siege, siege.attacker).enter("python")
    wire.tcp.sendall(frame(b"hello", opcode=9) * 5000)
    assert wire.ask("leave", room="python")["ok"]


# fmt: off
LENGTHS = ["-1", "10000000000", "", "abc", "+5", "1e3", "0x5", "5, 5", "\xb2", "9" * 5000, "65537"]
REQUESTS = [
    b"\0\xff\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0", b"GET\r\n\r\n",
    b"GET http://[ HTTP/1.1\r\n\r\n", b"GET * HTTP/1.1\r\n\r\n",
    b"GET //[/%00%ff HTTP/1.1\r\nno colon\r\n : \r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /login HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: \xff\r\nCookie: \xff\0;=;\r\n\r\n",
]
PATHS = ["/login", "/register", "/messages", "/socket.io/?EIO=4&transport=polling&sid=SID", "/"]
HEADERS = [
    *(f"Content-Length: {length}" for length in LENGTHS), "X: y", "Transfer-Encoding: chunked",
    "Content-Length: 1000", "Content-Length: 9\r\nContent-Type: multipart/form-data; boundary=\xff",
]
FORMS = [
    {}, {"username": "\0"}, {"username": "x" * 60_000}, {"username": "x" * 70_000},
    {"username": ["ana", "luis"]}, {"username": "x y", "password": b"\xff" * 9, "next": "//\0"},
    {"username": "ana\n", "password": "\0" * 9},
]
BODIES = [
    b"", b"{", b"[]", b"null", b"\xff", DEEP.encode(), b'{"message":' + DEEP.encode(),
    b'{"message":"\\ud800"}', b'{"message":NaN}', b'{"message":' + b"9" * 6000 + b"}",
    b'{"message":"x","room":"staff"}', b'{"message":"x","key":[]}', b'{"message":"x","room":{}}',
    b"x" * 70_000,
]
# fmt: on


def test_hostile_requests_get_an_answer_or_none_but_leave_no_mark(siege):
    home = f"Host: {ME}:{siege.port}\r\nCookie: {cookie_of(siege.attacker)}"
    heads = [f"POST {path} HTTP/1.1\r\n{home}\r\n{head}" for path in PATHS for head in HEADERS]
    posts = [f"{head}\r\n\r\n5\r\nab\xff\0=\r\n".encode("latin-1") for head in heads]
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


def test_hostile_forms_and_bodies_get_an_answer_in_words(siege):
    for data in FORMS:
        answer = requests.post(f"{siege.url}/login", data=data)
        assert answer.status_code in (400, 401, 413, 429)
        assert requests.post(f"{siege.url}/register", data=data).status_code in (400, 413)
    for body in BODIES:
        answer = siege.attacker.post(f"{siege.url}/messages", data=body)
        assert answer.status_code in (400, 403, 413) and refusal(answer.json())


def test_a_connection_serves_only_who_opened_it(siege):
    victim, mine = siege.victims[1].eio, Polls(siege, siege.attacker)
    for query in (
        "sid=SID",
        "sid=&sid=SID",
        f"sid=SID&sid={mine.sid}",
        "EIO=3&sid=SID",
        "j=0&sid=SID",
    ):
        query = query.replace("SID", victim.sid)
        url = f"{siege.url}/socket.io/?EIO=4&transport=polling&{query}"
        assert siege.attacker.get(url).status_code == 403
        assert siege.attacker.post(url, data="41").status_code == 403
        assert Wire(siege, siege.attacker, f"&{query}").status == 403


def test_a_connection_does_not_open_if_its_user_has_just_signed_out(state):
    token = state.renew(state.user("ana"))
    assert program.open_connection("a new connection", {"REMOTE_USER": token}) is False


def test_a_log_out_leaves_no_connection_that_was_just_being_opened(changed):
    server, wires = changed(after=QUICK_TO_HASH), []
    Wire(server, sign_in(server.url, "eva")).enter().send("1")
    until(lambda: server.said("disconnected: eva"))
    usage = server.usage.num_threads(), server.usage.num_fds()

    def open_one(session, delay):
        time.sleep(max(0, delay))
        wires.append(Wire(server, session))
        with suppress(OSError):
            wires[-1].send("40")

    for number in range(40):  # each time at another moment of its opening
        session, delay = sign_in(server.url, "luis"), (number % 20 - 10) / 2000
        opening = threading.Thread(target=open_one, args=[session, delay])
        opening.start()
        time.sleep(max(0, -delay))
        requests.post(f"{server.url}/logout", cookies=session.cookies, allow_redirects=False)
        opening.join()
    assert len(wires) == 40 and {wire.status for wire in wires} == {101, 401}
    for wire in wires:
        while packet := wire.read():
            assert packet != "2"  # a ping: this one has been left behind
        wire.tcp.close()
    until(lambda: (server.usage.num_threads(), server.usage.num_fds()) <= usage)


# A model finds the next ones ----------------------------------------------------------------------


class Model:
    """Who hears what, by the contract alone. A line is a connection: here, a number."""

    def __init__(self, newest):
        self.newest, self.said, self.keys = newest, [], defaultdict(list)  # name -> [(key, id)]
        self.owners, self.guests = {"python": None}, set()  # room -> name; (name, room)
        self.lines, self.inside = {}, set()  # line -> name; (line, room)
        self.spent, self.heard = Counter(), defaultdict(list)  # line -> [(event, data)]

    def tell(self, lines, event, **data):
        for line in lines:
            self.heard[line].append((event, data))

    def listeners(self, room):
        return [line for line in self.lines if room is None or (line, room) in self.inside]

    def lines_of(self, name, room=None):
        return [line for line in self.listeners(room) if self.lines[line] == name]

    def may(self, name, kind):
        self.spent[name, kind] += 1
        return self.spent[name, kind] <= program.BURST

    def since(self, room, last_id):
        newer = [said for said in self.said if said["room"] == room and said["id"] > last_id]
        gap = len(newer) > program.HISTORY or last_id > self.newest
        return newer[-program.HISTORY :], gap

    def who(self, name, room):
        members = sorted({self.lines[line] for line in self.listeners(room)})
        return {"room": room, "username": name, "members": members}

    # What somebody does. Each returns what the ack adds, or None if it is refused.

    def join(self, line, room, last_id):
        name, (missed, gap) = self.lines[line], self.since(room, last_id)
        if self.owners[room] not in (None, name) and (name, room) not in self.guests:
            return None
        new = not self.lines_of(name, room)
        if new and not self.may(name, "notices"):
            return None
        for said in missed:
            self.tell([line], "chat", **said)
        self.inside.add((line, room))
        if new:
            self.tell(self.listeners(room), "join", **self.who(name, room))
        ack = {"missed": len(missed), "gap": gap, "last_id": self.newest}
        return ack | self.who(name, room)

    def leave(self, line, room):
        last = self.lines_of(self.lines[line], room) == [line]
        if (line, room) not in self.inside or (last and not self.may(self.lines[line], "notices")):
            return None
        return self.take_out(line, room, "left")

    def take_out(self, line, room, reason):
        name = self.lines[line]
        self.inside.remove((line, room))
        if not self.lines_of(name, room):
            self.tell(self.listeners(room), "leave", reason=reason, **self.who(name, room))
        return {}

    def end(self, line, reason):
        for room in self.owners:
            if (line, room) in self.inside:
                self.take_out(line, room, reason)
        del self.lines[line]

    def chat(self, name, line, new_id, message, key, room=None):
        known = dict(self.keys[name][-program.HISTORY :]).get(key)
        if known:
            return {"id": known}
        if (room and (line, room) not in self.inside) or not self.may(name, "messages"):
            return None
        assert new_id > self.newest
        self.newest = new_id
        self.keys[name] += [(key, new_id)] if key else []
        self.said.append({"id": new_id, "room": room, "username": name, "message": message})
        self.tell(self.listeners(room), "chat", **self.said[-1])
        return {"id": new_id}

    def typing(self, line, room):
        name = self.lines[line]
        if (line, room) not in self.inside or not self.may(name, "notices"):
            return None
        others = [other for other in self.listeners(room) if self.lines[other] != name]
        self.tell(others, "typing", room=room, username=name)
        return {}

    def invite(self, line, room, username, event="invite"):
        host = self.lines[line]
        if self.owners[room] != host or username == host or not self.may(host, "notices"):
            return None
        self.guests.add((username, room))
        self.tell(self.lines_of(username), event, room=room, by=host)
        return {"username": username}

    def expel(self, line, room, username):
        if not self.invite(line, room, username, "expel"):
            return None
        self.guests.remove((username, room))
        for inside in self.lines_of(username, room):
            self.take_out(inside, room, "expelled")
        return {}


def one_of(choices):
    """One of those there are at this moment, in the machine that runs."""
    return st.runner().flatmap(lambda people: st.sampled_from(list(choices(people))))


NAME, LINE = one_of(lambda people: people.sessions), one_of(lambda people: people.lines)
ROOM = one_of(lambda people: people.model.owners)
SEAT, GUEST = one_of(lambda people: people.seats()), one_of(lambda people: people.guests())
LAST_ID = one_of(lambda people: people.last_ids())
KEY = st.sampled_from([None, None, *"abcdefg"])


class People(RuleBasedStateMachine):
    """People do what they can, and all hear what the model says they hear and nothing else."""

    def __init__(self, place):
        super().__init__()
        self.place, self.model = place, Model(place.begin())
        self.began, self.count = self.model.newest, 0
        self.sessions, self.signed_out, self.lines = {}, set(), {}
        for _ in range(3):
            self.register()
        for name in self.sessions:
            self.connect(name, "python", self.began)
        _, room, _ = self.model.owners
        self.do(1, room, "invite", username=self.model.lines[2])
        for line in (1, 2):
            self.do(line, room, "join", last_id=self.began)

    def seats(self):
        """Where somebody may do something: mostly where they are."""
        everywhere = list(product(self.lines, self.model.owners))
        return sorted(self.model.inside) * 6 + everywhere

    def guests(self):
        """Owner, room and guest of an invitation or expulsion: mostly a guest who is inside."""
        visits = list(product(self.lines, self.model.owners, self.sessions))
        hosted = [
            (line, room, name)
            for line, room, name in visits
            if self.model.owners[room] == self.model.lines[line] != name
        ]
        inside = [visit for visit in hosted if self.model.lines_of(visit[2], visit[1])]
        return inside * 30 + hosted * 3 + visits

    def last_ids(self):
        newest = self.model.newest
        return [self.began, newest + 9, *(said["id"] for said in self.model.said)]

    def agree(self, ack, expected):
        assert refusal(ack) if expected is None else ack == {"ok": True} | expected

    def do(self, line, room, event, **more):
        ack = self.lines[line].ask(event, room=room, **more)
        self.agree(ack, getattr(self.model, event)(line, room, **more))

    @precondition(lambda self: len(self.sessions) < 4)
    @rule()
    def register(self):
        name, room, session = self.place.register()
        self.sessions[name] = session
        if len(self.sessions) < 3:  # of the others' rooms nobody speaks
            self.model.owners[room] = name

    @precondition(lambda self: len(self.lines) < 8)
    @rule(name=NAME, room=ROOM, last_id=LAST_ID)
    def connect(self, name, room, last_id):
        if name in self.signed_out:
            assert self.place.refuses(self.sessions[name])
            self.signed_out.remove(name)
            self.sessions[name] = self.place.sign_in(name)
        self.count += 1
        self.lines[self.count] = self.place.connect(self.sessions[name])
        self.model.lines[self.count] = name
        self.do(self.count, room, "join", last_id=last_id)

    @precondition(lambda self: len(self.lines) > 3)
    @rule(line=LINE)
    def cut(self, line):
        self.model.end(line, self.place.cut(self.lines.pop(line)))

    @precondition(lambda self: len(self.lines) > 3)
    @rule(line=LINE)
    def log_out(self, line):
        name = self.model.lines[line]
        self.sessions[name].post(f"{self.place.url}/logout")
        self.signed_out.add(name)
        own = {line: self.lines.pop(line) for line in self.model.lines_of(name)}
        for line, client in own.items():
            self.model.end(line, "server disconnect")
            assert self.place.has_ended(client)

    @precondition(lambda self: self.lines)
    @rule(line=LINE, room=ROOM, last_id=LAST_ID)
    def join(self, line, room, last_id):
        self.do(line, room, "join", last_id=last_id)

    @precondition(lambda self: self.lines)
    @rule(seat=SEAT, event=st.sampled_from(["leave", "typing"]))
    def leave_or_type(self, seat, event):
        self.do(*seat, event)

    @precondition(lambda self: self.lines)
    @rule(guest=GUEST, event=st.sampled_from(["invite", "expel"]))
    def invite_or_expel(self, guest, event):
        line, room, name = guest
        self.do(line, room, event, username=name)

    @precondition(lambda self: self.lines)
    @rule(seat=SEAT, to_all=st.sampled_from([False, False, True]), key=KEY)
    def chat(self, seat, to_all, key):
        line, room = seat
        said = {"message": f"after {self.model.newest}", "key": key}
        said["room"] = None if to_all else room
        ack, name = self.lines[line].ask("chat", **said), self.model.lines[line]
        self.agree(ack, self.model.chat(name, line, ack.get("id", 0), **said))

    @rule(name=NAME, key=KEY, last_id=LAST_ID)
    def post_and_poll(self, name, key, last_id):
        said = {"message": f"after {self.model.newest}", "key": key}
        session, url = self.sessions[name], f"{self.place.url}/messages"
        posted, polled = session.post(url, json=said), session.get(f"{url}?after={last_id}")
        if name in self.signed_out:
            assert posted.status_code == polled.status_code == 401
            return
        ack = {"ok": posted.status_code == 201} | json.loads(posted.text)
        self.agree(ack, self.model.chat(name, None, ack.get("id", 0), **said))
        (missed, gap), heard = self.model.since(None, last_id), json.loads(polled.text)
        assert [without_time(data) for data in heard["messages"]] == missed
        assert heard["gap"] is gap

    @invariant()
    def all_hear_what_they_should(self):
        for line, client in self.lines.items():
            heard = [(event, without_time(data)) for event, data in self.place.heard(client)]
            assert by_room(heard) == by_room(self.model.heard.pop(line, []))
        assert not self.model.heard

    def teardown(self):
        for client in self.lines.values():
            self.place.cut(client)


def without_time(data):
    return {field: value for field, value in data.items() if field != "created_at"}


def by_room(heard):
    """In each room the order counts."""
    return sorted(heard, key=lambda packet: packet[1]["room"] or "")


class Indoors:
    """A place where events go straight to the handlers."""

    url = ""

    def begin(self):
        program.state = program.State()
        return program.state.newest()

    def register(self):
        number = len(program.state.users) + 1
        name = program.state.register(f"user{number}", DEMO).name
        return name, f"room{number}", self.sign_in(name)

    def sign_in(self, name):
        user = program.state.user(name)
        return FlaskLoginClient(program.app, program.app.response_class, user=user)

    def connect(self, session):
        return Talker(program.app, program.socketio, flask_test_client=session)

    def refuses(self, session):
        return not self.connect(session).is_connected()

    def heard(self, talker):
        return talker.heard()

    def cut(self, talker):
        talker.disconnect()
        return "client disconnect"

    def has_ended(self, talker):
        return not talker.is_connected()


class Outdoors:
    """A live server that nobody else uses, with people on WebSockets and on polling."""

    def __init__(self, server):
        self.server, self.url, self.users = server, server.url, 3
        self.ana, self.opened, self.ends = sign_in(server.url, "ana"), 0, Counter()

    def begin(self):
        return self.ana.post(f"{self.url}/messages", json={"message": "Begin"}).json()["id"]

    def register(self):
        self.users += 1
        name = f"user{self.users}"
        return name, f"room{self.users}", register(self.server, name)

    def sign_in(self, name):
        return sign_in(self.url, name, "password")

    def connect(self, session):
        self.opened += 1
        if self.opened % 3 == 0:
            return AttentivePolls(self.server, session)
        return AttentiveWire(self.server, session).enter()

    def refuses(self, session):
        return Wire(self.server, session).status == 401

    def heard(self, client):
        client.ask("fence")  # no such event: its ack comes after all that was on its way
        packets, client.heard = client.heard, []
        return [json.loads(packet[2:]) for packet in packets if packet.startswith("42")]

    def cut(self, client):
        polls = isinstance(client, Polls)
        client.send("1") if polls else client.tcp.close()
        return self.wait_for_an_end("client disconnect" if polls else "transport close")

    def has_ended(self, client):
        self.wait_for_an_end("server disconnect")
        return isinstance(client, Polls) or client.ended()

    def wait_for_an_end(self, reason):
        self.ends[reason] += 1
        until(lambda: len(self.server.said(f"({reason})")) >= self.ends[reason])
        return reason


class Attentive:
    """A client whose `heard` is all that it has heard since somebody emptied it."""

    heard = ()

    def ask(self, event, **fields):
        earlier = self.heard
        ack = super().ask(event, **fields)
        self.heard = [*earlier, *self.heard]
        return ack


class AttentiveWire(Attentive, Wire):
    pass


class AttentivePolls(Attentive, Polls):
    pass


def try_everything(place, **options):
    """Run the machine, the same way each time."""
    options = {"derandomize": True, "print_blob": False, "deadline": None} | options
    run_state_machine_as_test(partial(People, place), settings=settings(database=None, **options))


@pytest.fixture
def modest(state, monkeypatch, tmp_path):
    """Little is remembered and allowed: what happens at the limits happens soon."""
    for name, value in {"HISTORY": 5, "BURST": 20, "RATE": 1e-6}.items():
        monkeypatch.setattr(program, name, value)
    set_hypothesis_home_dir(tmp_path)  # it would leave files here


def test_a_thousand_steps_in_any_order_are_heard_by_whom_they_should(modest):
    try_everything(Indoors(), max_examples=25, stateful_step_count=50)


def test_a_guest_who_stays_inside_after_an_expulsion_is_found(modest, monkeypatch):
    def leave_inside(sid, room, reason, remove=program.remove_from_room):
        return reason == "expelled" or remove(sid, room, reason)

    monkeypatch.setattr(program, "remove_from_room", leave_inside)
    with pytest.raises(AssertionError):
        try_everything(Indoors(), max_examples=200, stateful_step_count=50, phases=[Phase.generate])


def test_hundreds_of_steps_over_the_network_are_heard_by_whom_they_should(changed, tmp_path):
    set_hypothesis_home_dir(tmp_path)
    size = {"max_examples": 3, "stateful_step_count": 50}  # few enough: nobody is told to slow down
    try_everything(Outdoors(changed(after=QUICK_TO_HASH)), phases=[Phase.generate], **size)


SLOW = """
import time
app.PING_EVERY, app.PATIENCE = 0.2, 0.5
upgrades = app.engine._upgrades
app.engine._upgrades = lambda *connection: time.sleep(0.5) or upgrades(*connection)

@app.socketio.on("slow join")
@app.one_at_a_time
def slow_join(data):
    time.sleep(0.05)
    return app.join(data)
"""


def test_no_ping_comes_before_the_first_packet(changed):
    server = changed(after=SLOW + QUICK_TO_HASH)
    ana = sign_in(server.url, "ana")
    assert Wire(server, ana).read().startswith("0{")
    assert Polls(server, ana, connect=False).sid


def test_nobody_stays_in_a_room_whose_connection_ends_while_they_join(changed):
    server, lines, names = changed(after=SLOW + QUICK_TO_HASH), [], [f"user{n}" for n in range(6)]
    joins = [f'42["{event}",{{"room":"python"}}]' for event in ("slow join", "join")]

    def visit(session, number, delay):
        with suppress(OSError, AssertionError):  # sooner or later each connection ends
            line = Wire(server, session).enter() if number % 3 else Polls(server, session)
            lines.append(line)  # else it would be closed with this function
            time.sleep(delay)
            line.send(*joins)
            if number % 4 == 1:
                line.send("1")

    for number, name in enumerate(names):
        session, silent = register(server, name), number % 2
        delays = [silent * n / 30 for n in range(20)]  # those who are silent are cut after 0.5 s
        visits = [threading.Thread(target=visit, args=[session, *v]) for v in enumerate(delays)]
        for thread in visits:
            thread.start()
        if not silent:
            until(lambda name=name: server.said(f"connected: {name}"))
            time.sleep(number / 20)
            session.post(f"{server.url}/logout")
        for thread in visits:
            thread.join()
    until(lambda: len(server.said("connected: ")) == 2 * len(server.said("disconnected: ")) > 80)
    eva = sign_in(server.url, "eva")

    def members():
        with suppress(OSError, AssertionError):
            return Wire(server, eva).enter().ask("join", room="python")["members"]

    assert until(members) == ["eva"]


# 9. Run -------------------------------------------------------------------------------------------


def test_the_program_says_where_it_is_who_may_sign_in_and_how_to_stop(server):
    where, who, how = server.log[:3]  # its standard input is no terminal
    assert re.search(r"http://127\.0\.0\.1:\d+", where) and "Ctrl+C" in how
    assert all(word in who for word in ("ana", "luis", "eva", "demo"))


@pytest.fixture(scope="session")
def classroom():
    """A server that listens to all the world."""
    with started(HOST="0.0.0.0", LECTURER_PASSWORD="chalk-and-talk") as server:
        yield server


@pytest.mark.parametrize("name", ["ana", "luis", "eva", "lecturer", "Ana", "LUIS", "Lecturer"])
def test_a_class_has_no_demo_accounts_and_nobody_takes_their_names(classroom, name):
    assert not classroom.said("Sign in as ana")
    assert "Sign in as" not in requests.get(f"{classroom.url}/login").text
    assert requests.post(f"{classroom.url}/login", data=form(name)).status_code == 401
    taken = form(name, "password")
    assert requests.post(f"{classroom.url}/register", data=taken).status_code == 409


def test_a_class_has_a_lecturer_who_owns_staff(classroom):
    (line,) = classroom.said("lecturer")
    assert "chalk-and-talk" in line
    session, zoe = sign_in(classroom.url, "lecturer", "chalk-and-talk"), register(classroom, "zoe")
    lecturer, guest = (Wire(classroom, who).enter() for who in (session, zoe))
    assert refusal(guest.ask("join", room="staff")) and lecturer.ask("join", room="staff")["ok"]
    assert lecturer.ask("invite", room="staff", username="ZOE")["username"] == "zoe"
    assert guest.ask("join", room="staff")["members"] == ["lecturer", "zoe"]
    assert refusal(guest.ask("invite", room="staff", username="lecturer"))


def test_the_lecturers_password_is_another_each_time_unless_it_is_set(fresh):
    servers = fresh(HOST="0.0.0.0"), fresh(HOST="0.0.0.0", LECTURER_PASSWORD="")
    lines = [server.said("lecturer")[0] for server in servers]
    words = [re.search(r"password ([\w-]{8,})", line)[1] for line in lines]
    assert words[0] != words[1]
    for server, word in zip(servers, words, strict=True):
        assert sign_in(server.url, "lecturer", word)


@pytest.mark.parametrize("port", ["taken", "abc", "99999"])
def test_a_port_that_cannot_be_had_gets_one_clear_line(server, port):
    port = str(server.port) if port == "taken" else port
    run = subprocess.run(
        [sys.executable, "app.py"],
        cwd=HERE,
        env=os.environ | {"PORT": port},
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert run.returncode != 0 and len(run.stdout.splitlines()) == 1
    assert port in run.stdout and "PORT" in run.stdout


def test_ctrl_c_stops_the_program_quietly_also_when_somebody_is_connected(fresh, connect):
    server = fresh()
    people = [connect(server, "ana"), connect(server, "luis", transports=["polling"])]
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=20) in (0, -signal.SIGINT)
    until(lambda: not any(client.connected for client in people))
    assert {"connected: ana", "connected: luis"} <= set(comings_and_goings(server))


@TRANSPORTS
def test_a_goodbye_returns_at_once(server, connect, transports):
    seconds = []
    for client in [connect(server, "ana", transports=transports) for _ in range(3)]:
        began = time.monotonic()
        client.disconnect()
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 2  # where the server does not close its end, the client waits for three


def test_the_log_has_one_line_for_each_who_comes_and_goes_and_no_other(fresh, connect):
    server = fresh()
    relay, eva = Relay(server.port), sign_in(server.url, "eva")
    connect(server, "ana", transports=["websocket"]).disconnect()
    until(lambda: server.said("disconnected: ana"))
    connect(relay, "luis", transports=["websocket"])
    relay.cut()
    until(lambda: server.said("disconnected: luis"))
    for session, auth in ((requests.Session(), {}), (eva, {"username": "ana"})):
        with pytest.raises(socketio.exceptions.ConnectionError):
            Client(server.url, session, auth=auth)
    assert eva.get(f"{server.url}/nowhere").status_code == 404
    connect(server, "eva").disconnect()
    until(lambda: server.said("disconnected: eva"))
    lines = [(f"connected: {name}", f"disconnected: {name}") for name in ("ana", "luis", "eva")]
    assert comings_and_goings(server) == [line for pair in lines for line in pair]
    assert len(server.log) == 3 + 2 * len(lines)


FLASK_RUN = """
import os, sys
from flask.cli import main
sys.argv = ["flask", "--app", "app", "run", "--port", os.environ["PORT"]]
main()
"""
GUNICORN = ["-m", "gunicorn", "-w", "1", "--threads", "50", "app:app"]
OUTPUTS = {
    "closed": "import sys; sys.stdout = None",
    "no reader": "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)",
    "stopped": """
import os
r, w = os.pipe()
os.set_blocking(w, False)
try:
    while os.write(w, b"x" * 512): pass
except BlockingIOError:
    os.set_blocking(w, True)
os.dup2(w, 1)""",
    "IDLE's": "import io, sys; sys.stdout = io.StringIO()",
}


def talks(server):
    """Whether people can sign in, meet over both transports, open the pages and go."""
    ana, luis = sign_in(server.url, "ana"), sign_in(server.url, "luis")
    wire, polls = Wire(server, ana).enter("python"), Polls(server, luis)
    assert polls.ask("join", room="python")["members"] == ["ana", "luis"]
    assert wire.ask("chat", room="python", message="hello")["ok"]
    assert polls.until('42["chat"') and luis.get(f"{server.url}/room").status_code == 200
    wire.send("1")
    return polls.until('42["leave"')


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_people_can_talk_whether_or_not_somebody_reads_what_is_printed(changed, output):
    assert talks(changed(output))


@pytest.mark.parametrize("command", [["-c", FLASK_RUN], GUNICORN], ids=["flask run", "gunicorn"])
def test_people_can_talk_however_the_program_is_started(fresh, command):
    if "gunicorn" in command:
        pytest.importorskip("gunicorn", reason="pip install gunicorn")
    server = fresh(*command)
    assert talks(server) and not server.said("Traceback")


@pytest.mark.live
def test_ctrl_c_while_the_first_accounts_are_made_is_quiet():
    with subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=HERE,
        env=os.environ | {"PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        run.stdout.readline()  # the address
        run.send_signal(signal.SIGINT)
        assert run.communicate()[1] == b"" and run.returncode in (0, -signal.SIGINT)


def test_a_class_is_told_every_address_of_this_machine(classroom):
    (line,) = classroom.said("Full duplex and rooms")
    entries = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    addresses = [entry.address for entry in entries if entry.family == socket.AF_INET]
    others = [address for address in addresses if not address.startswith("127.")]
    assert all(f"http://{address}:{classroom.port}" in line for address in others or [ME])


def test_scripts_are_sent_as_scripts_whatever_the_registry_says(changed):
    server = changed('import mimetypes; mimetypes.add_type("text/plain", ".js")')
    page = sign_in(server.url, "ana").get(f"{server.url}/room").text
    paths = re.findall(r'src="(/[^"]+)"', page)
    assert "/socket.io.js" in paths
    for path in paths:
        assert "javascript" in requests.get(server.url + path).headers["Content-Type"]


# Both pages: what they share ----------------------------------------------------------------------

expect.set_options(timeout=40_000)  # milliseconds that a busy machine may take to show something

# fmt: off
BROWSERS = [
    "chromium-headless-shell", "chromium", "google-chrome", "google-chrome-stable",
    "chromium-browser", "chrome", "msedge", "microsoft-edge",
]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]
# fmt: on
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
LANES = "Short polling", "Long polling", "Full duplex"


def launch(kind, *flags):
    """A real browser, without a window; None if there is none."""
    places = [{"channel": "chrome"}, {"channel": "msedge"}, {}]  # where Playwright knows to look
    for place in [{"executable_path": BROWSER}] if BROWSER else places:
        with suppress(PlaywrightError):
            return kind.launch(args=[*FLAGS, *flags], **place)


@contextmanager
def launched():
    """Yield a browser, or None."""
    with sync_playwright() as playwright:
        browser = launch(playwright.chromium)
        yield browser
        if browser:
            browser.close()


def open_page(chromium, server, name, path="/", password="demo", **options):
    """A page of a browser of its own, signed in. What moves takes a third of the time."""
    context = chromium.new_context(**{"reduced_motion": "reduce"} | options)
    cookies = sign_in(server.url, name, password).cookies.items()
    context.add_cookies(
        [{"name": key, "value": value, "url": server.url} for key, value in cookies]
    )
    page = context.new_page()
    page.goto(server.url + path)
    return page


@pytest.fixture(scope="session")
def chromium():
    with launched() as browser:
        if not browser:
            missing("Chromium, Chrome or Edge: apt install chromium")
        yield browser


@pytest.fixture
def browser(chromium):
    """browser(server_or_relay, "ana", "/room"): a page as `open_page` makes it."""
    yield partial(open_page, chromium)
    for context in chromium.contexts:
        context.close()


def press(page, name, exact=True):
    page.get_by_role("button", name=name, exact=exact).click()


def send(page, *messages, button="Send"):
    for message in messages:
        page.get_by_label("Message").fill(message)
        press(page, button)


def lane(page, name):
    return page.get_by_role("region", name=name)


def conversation(page):
    return page.get_by_role("log", name="Conversation")


def state_of(page):
    """Where the page says how its connection is."""
    return page.locator("#state") if "/room" in page.url else lane(page, "Full duplex")


def voices(page):
    """All places where the page says how its connections are."""
    return [state_of(page)] if "/room" in page.url else [lane(page, name) for name in LANES]


def rows(page, name):
    """What a lane shows, oldest first: a message and its delay in each row."""
    texts = lane(page, name).get_by_role("row").all_inner_texts()
    return [row.split("\t") for row in reversed(texts)]


def shown(page, name):
    return [row[0] for row in rows(page, name)]


def said_in(page):
    """The last messages that the room page shows, in order, but not those that wait."""
    texts = page.locator(".view.shown [data-id] .message")
    return texts.evaluate_all("rows => rows.slice(-150).map(row => row.textContent)")


def wait_until_said(page, *messages):
    """Wait until these are the last messages in the room, in this order."""
    until(lambda: said_in(page)[-len(messages) :] == list(messages))


def all_show(page, *texts):
    """Wait until each lane shows exactly these, in this order: nothing twice, nothing missing."""
    for name in LANES:
        with suppress(AssertionError):
            until(lambda name=name: shown(page, name) == list(texts), 30)
        assert shown(page, name) == list(texts), name


def wait_until_shown(page, *messages):
    """Wait until the page shows ana's messages, each once and in this order."""
    if "/room" in page.url:
        wait_until_said(page, *messages)
        assert [text for text in said_in(page) if text in messages] == list(messages)
    else:
        all_show(page, *(f"ana: {message}" for message in messages))


def ready(page):
    """Wait until the page is connected: it is known then where each lane begins."""
    if "/room" in page.url:
        expect(state_of(page)).to_have_text("Connected")
    else:
        for name in LANES:
            until(lambda name=name: figure(page, name, "requests"))
    return page


ROOM = "/room?room=python"
BOTH_PAGES = pytest.mark.parametrize("path", ["/", ROOM])
AGAIN = re.compile("^sign in again$", re.IGNORECASE)


@BOTH_PAGES
def test_markup_stays_text(server, browser, path):
    markup, page = "<img src=x onerror=alert(1)><b>bold</b>", ready(browser(server, "ana", path))
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    send(page, markup)
    wait_until_shown(page, markup)
    assert page.locator("img[src=x], .messages b, .message b").count() == 0


@BOTH_PAGES
def test_an_empty_message_is_refused_in_words(server, browser, path):
    page = ready(browser(server, "ana", path))
    send(page, "   ")
    words = {"/": "A message has 1 to 500 characters.", ROOM: "an empty message is not sent"}
    expect(page.locator("#told")).to_contain_text(words[path])
    send(page, "Hello")
    wait_until_shown(page, "Hello")


@BOTH_PAGES
def test_an_enter_that_ends_a_composition_sends_nothing(server, browser, path):
    """In Safari only the keyCode of such an Enter, 229, tells it from another."""
    page = ready(browser(server, "ana", path))
    page.get_by_label("Message").fill("にほ")
    kind = "rawKeyDown" if path == ROOM else "keyDown"  # in one line, Enter sends by itself
    enter = {"type": kind, "key": "Enter", "text": "\r", "windowsVirtualKeyCode": 229}
    page.context.new_cdp_session(page).send("Input.dispatchKeyEvent", enter)
    page.get_by_label("Message").press_sequentially("ん")
    page.keyboard.press("Enter")
    wait_until_shown(page, "にほん")


@BOTH_PAGES
def test_a_message_is_sent_by_keyboard_alone(server, browser, path):
    page = ready(browser(server, "ana", path))
    page.locator("body").press("Tab")
    for _ in range(50):
        if page.get_by_label("Message").evaluate("field => field === document.activeElement"):
            break
        page.keyboard.press("Tab")
    page.keyboard.type("no mouse")
    page.keyboard.press("Enter")
    wait_until_shown(page, "no mouse")


@BOTH_PAGES
def test_a_connection_cut_again_and_again_loses_and_doubles_nothing(server, browser, path):
    relay, texts = Relay(server.port), [f"Hello {number}" for number in range(1, 11)]
    page, luis = ready(browser(relay, "ana", path)), ready(browser(server, "luis", path))
    for number, text in enumerate(texts):
        send(page, text)
        if number % 2:
            until(lambda: "Hello" in page.locator("tr, .line:not(.waiting)").last.inner_text())
            relay.cut()
    for reader in (page, luis):
        wait_until_shown(reader, *texts)


def test_after_a_restart_of_the_server_both_pages_say_sign_in_again(fresh, browser):
    server = fresh()
    pages = [ready(browser(server, "ana", path)) for path in ("/", ROOM)]
    server.stop()
    for page in pages:
        expect(state_of(page)).to_contain_text("trying again")
    server.start()
    for page in pages:
        for voice in voices(page):
            expect(voice).to_contain_text("no longer knows you", timeout=60_000)
            expect(voice.get_by_role("link", name=AGAIN)).to_be_visible()
        state_of(page).get_by_role("link", name=AGAIN).click()
        press(page, "Sign in as ana")
        send(ready(page), "after")
        wait_until_shown(page, "after")


def test_signed_out_elsewhere_is_explained_in_all_lanes(server, browser):
    page = ready(browser(server, "ana"))
    second = page.context.new_page()
    second.goto(server.url)
    press(second, "Sign out")
    for voice in voices(page):
        expect(voice).to_contain_text("no longer knows you", timeout=60_000)


def test_signed_in_again_elsewhere_a_page_goes_on_with_what_was_said_meanwhile(server, browser):
    page = ready(browser(server, "ana", ROOM))
    second = page.context.new_page()
    second.goto(server.url)
    press(second, "Sign out")
    expect(state_of(page)).to_contain_text("no longer knows you")
    send(page, "Said while signed out")
    press(second, "Sign in as ana")
    wait_until_said(page, "Said while signed out")


@pytest.mark.parametrize(
    "path, off, on",
    [("/", "Pause full duplex", "Resume full duplex"), (ROOM, "Pull the cable", "Plug it in")],
)
def test_a_page_whose_user_has_changed_says_so(server, browser, path, off, on):
    page = ready(browser(server, "ana", path))
    page.context.request.post(f"{server.url}/login", form=form("luis"))
    press(page, off), press(page, on)
    expect(state_of(page)).to_contain_text("You are now signed in as luis")
    if path == ROOM:
        page.get_by_role("link", name="Reload").click()
        expect(page.get_by_text("Signed in as luis")).to_be_visible()


TEMPLATES = sorted((HERE / "templates").glob("*.html"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_has_a_short_script_and_writes_no_markup(path):
    text = path.read_text("utf-8")
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    lines = [line for script in scripts for line in script.splitlines() if line.strip()]
    assert len(lines) <= 220 and "innerHTML" not in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("event", EVENTS)
def test_the_articles_calls_stand_in_plain_sight(event):
    script = (HERE / "templates" / "room.html").read_text("utf-8")
    assert re.search(rf'socket(\.volatile)?\.emit(WithAck)?\("{event}", {{ room', script)


# The index page: one message, three ways ----------------------------------------------------------


def cell(page, name, figure):
    """Where the page counts for a lane (delay, requests, empty, heard) or for a way to speak."""
    return page.get_by_role("row", name=name).locator(f"[data-figure={figure}]")


def figure(page, name, figure):
    return int(cell(page, name, figure).inner_text() or 0)


def figures(page, figure_name):
    return [figure(page, name, figure_name) for name in LANES]


def delays(page, name):
    return [row[1] for row in rows(page, name)]


def measured(page, name):
    """Which of the messages that a lane shows have a delay."""
    return [bool(DELAY.fullmatch(delay)) for delay in delays(page, name)]


def post(server, *texts, name="luis"):
    session = sign_in(server.url, name)
    for text in texts:
        answer = session.post(f"{server.url}/messages", json={"message": text})
        assert answer.status_code == 201


HELLOS = [f"Hello {n}" for n in range(1, 11)]
DELAY = re.compile(r"\d+ ms|\d+\.\d s")


def test_a_message_arrives_in_all_three_lanes_each_with_its_delay(server, browser):
    page = ready(browser(server, "ana"))
    send(page, "Hello")
    all_show(page, "ana: Hello")
    until(lambda: figures(page, "heard") == [1, 1, 1])
    for name in LANES:
        until(lambda name=name: measured(page, name) == [True])
        (delay,) = delays(page, name)
        expect(cell(page, name, "delay")).to_have_text(delay)


def test_a_lane_begins_with_what_is_said_from_now_on(server, browser):
    post(server, "before the page was opened")
    page = browser(server, "ana")
    send(page, "now")
    all_show(page, "ana: now")


def test_send_ten_gives_ten_in_each_lane_and_the_chart_sets_them_side_by_side(server, browser):
    page = ready(browser(server, "ana"))
    send(page, "Hello", button="Send ten")
    wait_until_shown(page, *HELLOS)
    chart = page.get_by_role("table", name="The three lanes side by side")
    for name in LANES:
        cells = chart.get_by_role("row", name=name).get_by_role("cell").all_inner_texts()
        assert DELAY.fullmatch(cells[0]) and int(cells[1]) >= 1
    share = "bar => Number(bar.style.getPropertyValue('--share'))"
    bars = chart.locator("[data-figure=requests]").all()
    shares = [bar.evaluate(share) for bar in bars]
    assert shares[2] == min(shares) and 0.5 < max(shares) <= 1


def test_short_polling_asks_more_often_than_long_polling_and_full_duplex_least(server, browser):
    page = browser(server, "ana")
    page.get_by_label("Every").select_option("0.5")
    until(lambda: figure(page, "Short polling", "requests") >= 8)
    assert figure(page, "Long polling", "requests") <= 3
    send(page, "Hello", button="Send ten")
    wait_until_shown(page, *HELLOS)
    _, long, duplex = figures(page, "requests")
    short_empty, long_empty, _ = figures(page, "empty")
    assert short_empty > long_empty and duplex <= 2 < 10 <= long


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
    send(ana, "Hello Luis")
    all_show(luis, "ana: Hello Luis")
    send(luis, "Hello Ana")
    for page in (ana, luis):
        all_show(page, "ana: Hello Luis", "luis: Hello Ana")
    for name in LANES:
        until(lambda name=name: measured(ana, name) == [True, False])
        until(lambda name=name: measured(luis, name) == [False, True])


def test_a_message_is_known_by_its_id_not_its_text(server, browser):
    """The two tabs of one user are two speakers: each has delays for what it said itself."""
    page = ready(browser(server, "ana"))
    other = page.context.new_page()
    other.goto(server.url)
    for tab in (page, ready(other), page):
        send(tab, "the same")
    for name in LANES:
        until(lambda name=name: measured(page, name) == [True, False, True])
        until(lambda name=name: measured(other, name) == [False, True, False])


def test_messages_of_others_enter_no_mean(server, browser):
    page = ready(browser(server, "ana"))
    post(server, "one", "two")
    all_show(page, "luis: one", "luis: two")
    for name in LANES:
        assert delays(page, name) == ["–", "–"]
        expect(cell(page, name, "delay")).to_have_text("–")


def test_speaking_is_counted_over_the_websocket_and_by_post(server, browser):
    page, posts = ready(browser(server, "ana")), []
    page.on("request", lambda request: request.method == "POST" and posts.append(request))
    speaking = page.get_by_role("group", name="Speaking")
    for way, asked in (("Over the WebSocket", 0), ("By POST", 10)):
        speaking.get_by_role("radio", name=way).check()
        send(page, "Hello", button="Send ten")
        until(lambda: page.evaluate("outbox.length === 0 && duplex.heard === 10"))
        expect(cell(page, way, "delay")).to_have_text(DELAY)
        expect(cell(page, way, "requests")).to_have_text(f"{asked}")
        assert len(posts) == asked
        up = float(re.search(r"[\d.]+", cell(page, way, "bytes").inner_text())[0]) * 1000
        press(page, "Reset")
    sizes = [post.sizes() for post in posts]
    sent = sum(size["requestHeadersSize"] + size["requestBodySize"] for size in sizes)
    assert 0.7 < up / sent < 1.4


def test_first_arrivals_are_in_sight_without_scrolling(server, browser):
    page = ready(browser(server, "ana", viewport={"width": 1280, "height": 720}))
    send(page, "Hello", button="Send ten")
    wait_until_shown(page, *HELLOS)
    for name in LANES:
        for row in lane(page, name).get_by_role("row").all()[:5]:
            expect(row).to_be_in_viewport(ratio=1)


def test_a_browser_of_2023_hears_in_all_lanes(server, browser):
    page = browser(server, "ana", "/room")
    page.add_init_script("delete AbortSignal.any")
    page.goto(server.url)
    send(ready(page), "Hello")
    all_show(page, "ana: Hello")


@pytest.mark.parametrize("name", LANES)
def test_a_lane_says_that_older_messages_are_no_longer_kept(server, browser, name):
    page = ready(browser(server, "ana"))
    press(page, f"Pause {name.lower()}")
    page.evaluate("lanes.forEach((lane) => { lane.after = 1; })")  # heard before the server began
    press(page, f"Resume {name.lower()}")
    expect(lane(page, name)).to_contain_text("older ones are no longer kept")


def test_after_send_the_field_has_the_focus_and_no_button_has_moved(server, browser):
    page = ready(browser(server, "ana", viewport={"width": 390, "height": 844}))

    def places():
        return [button.bounding_box() for button in page.get_by_role("button").all()]

    before = places()
    send(page, "   ")
    expect(page.locator("#told")).to_contain_text("1 to 500 characters")
    assert places() == before
    expect(page.get_by_label("Message")).to_be_focused()


def test_a_network_gone_for_a_while_costs_no_lane_a_message(server, browser):
    relay = Relay(server.port)
    page = ready(browser(relay, "ana"))
    relay.open = False
    relay.cut()
    post(server, "one", "two", "three")
    for name in LANES:
        expect(lane(page, name)).to_contain_text("trying again")
    page.wait_for_timeout(1000)  # an interruption shorter than that is not worth a word
    relay.open = True
    all_show(page, "luis: one", "luis: two", "luis: three")
    for name in LANES:
        expect(lane(page, name)).to_contain_text("caught up on 3 messages")
    send(page, "after")
    all_show(page, "luis: one", "luis: two", "luis: three", "ana: after")


def test_a_message_sent_without_a_network_arrives_once_when_it_is_back(server, browser):
    relay = Relay(server.port)
    page = ready(browser(relay, "ana"))
    send(page, "Hello", button="Send ten")
    until(lambda: len(shown(page, "Full duplex")) >= 2)
    relay.open = False
    relay.cut()
    until(lambda: page.evaluate("outbox.length") > 5)
    relay.open = True
    wait_until_shown(page, *HELLOS)


@pytest.mark.parametrize("name", ["Long polling", "Full duplex"])
def test_a_paused_lane_stops_asking_and_catches_up_when_it_resumes(server, browser, name):
    page = ready(browser(server, "ana"))
    press(page, f"Pause {name.lower()}")
    asked = figure(page, name, "requests")
    send(page, "Hello", button="Send ten")
    for other in set(LANES) - {name}:
        until(lambda other=other: len(shown(page, other)) == 10)
    assert shown(page, name) == [] and figure(page, name, "requests") == asked
    press(page, f"Resume {name.lower()}")
    wait_until_shown(page, *HELLOS)
    assert set(delays(page, name)) == {"caught up"}  # the pause is not the lane's fault
    expect(lane(page, name)).to_contain_text("caught up on 10 messages")


def test_with_all_lanes_paused_nothing_is_asked_and_a_message_still_leaves(server, browser):
    page = ready(browser(server, "ana"))
    for name in LANES:
        press(page, f"Pause {name.lower()}")
    asked, luis = figures(page, "requests"), sign_in(server.url, "luis")
    send(page, "over HTTP")
    until(lambda: "over HTTP" in luis.get(f"{server.url}/messages?after=0").text)
    page.wait_for_timeout(2000)  # short polling would have asked twice
    assert asked == figures(page, "requests")
    for name in LANES:
        press(page, f"Resume {name.lower()}")
    all_show(page, "ana: over HTTP")


def test_reset_clears_counts_and_lists_and_all_go_on(server, browser):
    page = ready(browser(server, "ana"))
    send(page, "Hello")
    all_show(page, "ana: Hello")
    press(page, "Reset")
    all_show(page)
    until(lambda: figures(page, "heard") == [0, 0, 0])
    assert figure(page, "Full duplex", "requests") == 0
    send(page, "again")
    all_show(page, "ana: again")


def test_a_tab_that_slept_has_everything_once_when_it_wakes(server, browser):
    page, texts = ready(browser(server, "ana")), [f"meanwhile {n}" for n in range(5)]
    tab = page.context.new_cdp_session(page)
    tab.send("Page.setWebLifecycleState", {"state": "frozen"})
    post(server, *texts, name="ana")
    tab.send("Page.setWebLifecycleState", {"state": "active"})
    wait_until_shown(page, *texts)
    send(page, "awake")
    wait_until_shown(page, *texts, "awake")


# The room page: rooms, and what is under the hood -------------------------------------------------


def join(page, room="python"):
    press(ready(page), f"Join {room}")
    expect(page.get_by_role("button", name=f"Leave {room}")).to_be_visible()


def send_at_once(page, texts):
    ready(page)
    page.evaluate("texts => { for (field.value of texts) find('#send').click(); }", texts)


def wire_of(page):
    return page.get_by_role("list", name="The wire")


def members_of(page):
    return page.get_by_role("list", name="Members")


def alert(page):
    return page.get_by_role("alert")


def heard(page):
    """What the picture says in words."""
    return page.locator("#heard")


def open_tab(page, name):
    page.locator("#tabs").get_by_text(name, exact=True).click()


def packets_of(page):
    """What the wire shows, oldest first: what the packet is, its size and the packet itself."""
    row = "row => ['note', 'size', 'text'].map(name => row.querySelector(`.${name}`).textContent)"
    return wire_of(page).locator("li").evaluate_all(f"rows => rows.map({row})")


def invite(page, name):
    page.get_by_label("Who is invited").fill(name)
    page.get_by_label("Who is invited").press("Enter")


@pytest.fixture
def two(server, browser):
    """ana and luis, both in python."""
    pages = [ready(browser(server, name, ROOM)) for name in ("ana", "luis")]
    expect(members_of(pages[0])).to_contain_text("luis")
    return pages


def luis_has_left(ana, luis, reason):
    """The room says so, and luis no longer hears it."""
    expect(conversation(ana)).to_contain_text(f"luis left{reason}")
    send(ana, "Among ourselves")
    wait_until_said(ana, "Among ourselves")
    expect(wire_of(luis)).not_to_contain_text("ourselves")


def test_two_talk_in_a_room_and_a_third_who_has_not_joined_it_hears_nothing(two, server, browser):
    (ana, luis), eva = two, browser(server, "eva", "/room")
    join(eva, "flask")
    send(ana, "Hello, Luis!")
    wait_until_said(luis, "Hello, Luis!")
    send(luis, "Hello, Ana!")
    wait_until_said(ana, "Hello, Luis!", "Hello, Ana!")
    send(eva, "Alone here")
    wait_until_said(eva, "Alone here")
    expect(wire_of(eva)).not_to_contain_text("Hello")


def test_room_without_a_name_has_joined_nothing_and_with_one_is_in_it(server, browser):
    ana, luis = ready(browser(server, "ana", "/room")), ready(browser(server, "luis", ROOM))
    expect(luis.get_by_role("button", name="Leave python")).to_be_visible()
    expect(ana.get_by_role("button", name=re.compile("^Leave"))).to_have_count(0)
    send(luis, "Is anybody here?")
    wait_until_said(luis, "Is anybody here?")
    expect(wire_of(ana)).not_to_contain_text("anybody")
    join(ana)
    wait_until_said(ana, "Is anybody here?")


def test_the_address_follows_the_room_and_the_back_button_works(server, browser):
    page = ready(browser(server, "ana", "/room"))
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    join(page), join(page, "flask")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    assert page.url.endswith("/room?room=flask")
    page.go_back()
    expect(page.get_by_role("heading", name="python")).to_be_visible()
    page.go_back()
    expect(page.get_by_role("heading", name="No room selected")).to_be_visible()
    page.go_forward()
    page.reload()
    expect(page.get_by_role("heading", name="python")).to_be_visible()
    press(page, "Leave python")
    expect(page.get_by_role("heading", name="No room selected")).to_be_visible()
    assert page.url.endswith("/room")


def test_with_forty_members_the_page_fits_its_window(changed, browser):
    server = changed(after=QUICK_TO_HASH)
    wires, window = crowd(server, 39), {"width": 1280, "height": 720}
    page = ready(browser(server, "ana", ROOM, viewport=window))
    expect(page.get_by_text("40 here")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollHeight") == 720 and wires
    buttons = [page.get_by_role("button", name=name) for name in ("Send", "Pull the cable")]
    picture = page.get_by_role("img", name="Who hears: ana, guest")
    for seen in (page.get_by_label("Message"), picture, wire_of(page).locator("li").last, *buttons):
        expect(seen).to_be_in_viewport(ratio=1)
    assert members_of(page).bounding_box()["height"] < 80  # two lines
    assert conversation(page).bounding_box()["height"] > 200


def test_a_crowd_comes_and_goes_in_two_lines(changed, browser):
    server = changed(after=QUICK_TO_HASH)
    page = ready(browser(server, "ana", ROOM))
    wires = crowd(server, 12)
    expect(page.get_by_text("13 here")).to_be_visible()
    for wire in wires:
        wire.tcp.close()
    expect(page.get_by_text("1 here", exact=True)).to_be_visible()
    came, went = page.locator(".notice").all_inner_texts()
    assert came.startswith("ana, guest") and came.endswith(" and 10 others joined")
    assert " and 9 others left: transport close" in went


def test_only_the_last_five_hundred_lines_are_kept(full, browser):
    page = ready(browser(full, "ana", "/room?room=a"))
    expect(conversation(page).locator("li")).to_have_count(500)
    send(page, "The last one")
    wait_until_said(page, "The last one")
    assert conversation(page).locator("li").count() == 500


def test_locked_rooms_beyond_six_are_folded_with_their_number(changed, browser):
    server = changed(after=QUICK_TO_HASH)
    expect(browser(server, "ana", "/room").locator("#locked li").first).to_be_visible()
    for _ in range(10):
        register(server)
    page = browser(server, "ana", "/room")
    locked = page.locator("#locked li")
    expect(locked).to_have_count(12)
    expect(locked.first).to_be_hidden()
    page.get_by_text("Locked rooms: 12").click()
    expect(locked.last).to_be_visible()


def test_a_room_that_does_not_exist_is_called_so(server, browser):
    page = browser(server, "ana", "/room?room=attic")
    expect(alert(page)).to_have_text("No room has that name.")
    expect(page.get_by_role("heading", name="No room selected")).to_be_visible()


def test_the_page_shows_who_comes_who_is_there_and_who_goes(two):
    ana, luis = two
    expect(conversation(ana)).to_contain_text("luis joined")
    press(luis, "Leave python")
    expect(members_of(ana)).not_to_contain_text("luis")
    luis_has_left(ana, luis, "")


def test_the_page_shows_for_a_while_who_is_typing(two):
    ana, luis = two
    luis.get_by_label("Message").press_sequentially("H")
    expect(ana.get_by_text("is typing…")).to_be_visible()
    expect(luis.get_by_text("is typing…")).to_have_count(0)
    expect(ana.get_by_text("is typing…")).to_be_hidden()


def test_enter_sends_and_shift_enter_makes_a_line(server, browser):
    page = ready(browser(server, "ana", ROOM))
    field = page.get_by_label("Message")
    field.press_sequentially("one")
    field.press("Shift+Enter")
    field.press_sequentially("two")
    field.press("Enter")
    wait_until_said(page, "one\ntwo")
    expect(field).to_have_value("")


def test_a_message_ends_at_500_characters_with_a_count_near_the_end(server, browser):
    page = ready(browser(server, "ana", ROOM))
    field, count = page.get_by_label("Message"), page.get_by_text("of 500 characters")
    field.fill("x" * 449)
    expect(count).to_have_count(0)
    field.press_sequentially("y" * 60)
    expect(count).to_have_text("500 of 500 characters")
    field.press("Enter")
    wait_until_said(page, "x" * 449 + "y" * 51)
    expect(count).to_have_count(0)


def test_a_refusal_is_shown_in_words_and_what_came_after_is_sent(server, browser):
    page = browser(server, "ana", ROOM)
    send_at_once(page, ["x" * 501, "This one fits."])
    expect(conversation(page)).to_contain_text("A message has 1 to 500 characters.")
    wait_until_said(page, "This one fits.")
    press(page, "Join room2")
    expect(alert(page)).to_have_text("room2 belongs to luis, who has not invited you.")


def test_a_page_that_is_told_to_slow_down_waits_and_loses_nothing(arena, browser, connect):
    page, hasty, told = browser(arena, "ana", ROOM), connect(arena, "ana"), threading.Event()

    def hurry():
        while not told.is_set():
            hasty.call("chat", {"message": "hurry"})

    flood, texts = threading.Thread(target=hurry), [f"patient {number}" for number in range(30)]
    flood.start()
    send_at_once(page, texts)
    try:
        expect(wire_of(page)).to_contain_text("retry_after", timeout=60_000)
    finally:
        told.set()
        flood.join()
    wait_until_said(page, *texts)
    expect(conversation(page).get_by_text("waiting")).to_have_count(0)


def test_in_two_rooms_each_has_its_own_conversation(server, browser):
    ana, luis = ready(browser(server, "ana", "/room")), browser(server, "luis", ROOM)
    join(ana, "python"), join(ana, "flask")
    send(ana, "About flask")
    wait_until_said(ana, "About flask")
    send(luis, "About python")
    expect(ana.locator("#rooms li", has_text="python").get_by_text("new")).to_be_visible()
    ana.locator("#rooms .name", has_text="python").click()
    wait_until_said(ana, "About python")
    assert "About flask" not in said_in(luis)


def test_a_locked_room_opens_by_an_invitation_on_all_pages_of_the_guest(fresh, browser):
    server = fresh()
    ana = browser(server, "ana", "/room?room=room1")
    luis, eva = (ready(browser(server, name, "/room")) for name in ("luis", "eva"))
    second = luis.context.new_page()
    second.goto(luis.url)
    ready(second)
    invite(ana, "Luis")
    for page in (luis, second):
        expect(alert(page)).to_have_text("ana invites you to room1")
        expect(page.locator("#open")).to_contain_text("room1")
        join(page, "room1")
    expect(members_of(ana).get_by_role("listitem")).to_have_count(2)  # two pages, one member
    expect(eva.locator("#locked")).to_contain_text("room1")
    expect(wire_of(eva)).not_to_contain_text("invite")


def test_an_invitation_echoes_the_name_as_its_user_writes_it(server, browser):
    page = ready(browser(server, "ana", "/room?room=room1"))
    invite(page, "LUIS")
    expect(alert(page)).to_have_text("luis can now join room1.")
    expect(page.get_by_label("Who is invited")).to_have_value("")


def test_an_expelled_guest_is_out_at_once_and_told_so(fresh, browser):
    server = fresh()
    ana, luis = browser(server, "ana", "/room?room=room1"), ready(browser(server, "luis", "/room"))
    invite(ana, "luis")
    expect(luis.locator("#open")).to_contain_text("room1")
    join(luis, "room1")
    press(ana, "Expel luis")
    expect(alert(luis)).to_have_text("ana has expelled you from room1")
    expect(luis.get_by_role("heading", name="No room selected")).to_be_visible()
    expect(luis.locator("#locked")).to_contain_text("room1")
    luis_has_left(ana, luis, ": expelled")


def test_only_the_owner_of_a_room_sees_invite_and_expel(two):
    ana, luis = two
    expect(luis.get_by_role("button", name="Expel ana")).to_have_count(0)
    expect(ana.get_by_role("button", name="Expel luis")).to_have_count(0)
    expect(ana.get_by_role("button", name="Invite")).to_have_count(0)


def test_with_the_cable_pulled_messages_wait_and_then_arrive_once(two):
    ana, luis = two
    press(ana, "Pull the cable")
    expect(state_of(ana)).to_contain_text("Cable pulled")
    expect(conversation(luis)).to_contain_text("ana left: client disconnect")
    send(ana, "one", "two")
    expect(conversation(ana).get_by_text("waiting")).to_have_count(2)
    send(luis, "three", "four")
    wait_until_said(luis, "three", "four")
    press(ana, "Plug it in")
    expect(conversation(ana)).to_contain_text("Caught up on 2 missed messages")
    for page in two:
        wait_until_said(page, "three", "four", "one", "two")
    expect(conversation(ana).get_by_text("waiting")).to_have_count(0)


def test_a_cable_pulled_without_goodbye_closes_the_connection_and_says_so(two):
    ana, luis = two
    ana.get_by_label("Skip the goodbye").check()
    press(ana, "Pull the cable")
    expect(state_of(ana)).to_contain_text("Cable pulled")
    expect(conversation(luis)).to_contain_text("ana left: transport close (the connection ended")
    expect(wire_of(ana).locator("[data-kind=disconnect]")).to_have_count(0)
    send(luis, "Meanwhile")
    send(ana, "Waited")
    press(ana, "Plug it in")
    for page in two:
        wait_until_said(page, "Meanwhile", "Waited")


def test_a_tab_in_which_something_waits_asks_before_it_goes(server, browser):
    page, asked = ready(browser(server, "ana", ROOM)), []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    press(page, "Pull the cable")
    send(page, "Kept")
    page.evaluate("location.reload()")
    until(lambda: page.title() and asked == ["beforeunload"])
    expect(conversation(page).get_by_text("waiting")).to_be_visible()  # still there
    press(page, "Plug it in")
    wait_until_said(page, "Kept")
    page.reload()
    ready(page)
    assert asked == ["beforeunload"]


def test_ones_own_return_does_not_mark_a_room_as_new(server, browser):
    page, luis = (ready(browser(server, name, "/room?room=flask")) for name in ("ana", "luis"))
    join(page)
    press(page, "Pull the cable"), press(page, "Plug it in")
    send(ready(page), "The rooms are joined again")
    wait_until_said(page, "The rooms are joined again")
    new = page.locator("#rooms li", has_text="flask").get_by_text("new")
    expect(new).to_be_hidden()
    send(luis, "This is new")
    expect(new).to_be_visible()


def test_a_pulled_cable_stays_pulled(server, browser):
    page = ready(browser(server, "ana", "/room"))
    press(page, "Pull the cable")
    packets = wire_of(page).get_by_role("listitem").count()
    page.wait_for_timeout(2000)  # longer than the page waits between two tries
    assert wire_of(page).get_by_role("listitem").count() == packets
    press(page, "Join python")
    expect(alert(page)).to_have_text("Not now: there is no connection.")
    expect(page.get_by_role("button", name="Join python")).to_be_visible()


def test_the_wire_shows_every_packet_as_it_is_newest_last(server, browser):
    page = browser(server, "ana", "/room?room=room1")  # its history leaves the first packet there
    send(page, "Hé")
    expect(wire_of(page)).to_contain_text("answers chat, ")
    packets = packets_of(page)
    assert packets[0][0] == "open" and packets[0][2].startswith('0{"sid":"')
    assert packets[1] == ["connect", "20 B", '40{"username":"ana"}']
    sent, ack = [row for row in packets if re.search('"Hé","key":|{"ok":true,"id":', row[2])]
    assert sent[2].startswith('421["chat",{"room":"room1","message":"Hé","key":"')
    assert ack[2].startswith("431[") and re.fullmatch(r"answers chat, \d+ ms", ack[0])
    for _, size, raw in packets:
        assert size == f"{len(raw.encode())} B"


def test_the_wire_can_be_paused_and_shows_what_it_missed_when_it_resumes(server, browser):
    page = browser(server, "ana", ROOM)
    send(page, "before")
    expect(wire_of(page)).to_contain_text("before")
    page.get_by_label("Pause").check()
    send(page, "meanwhile")
    wait_until_said(page, "meanwhile")
    expect(wire_of(page)).not_to_contain_text("meanwhile")
    page.get_by_label("Pause").uncheck()
    expect(wire_of(page)).to_contain_text("meanwhile")


def test_pings_can_be_hidden(server, browser):
    page = browser(server, "ana", ROOM)
    ping = wire_of(page).locator("[data-kind=ping]").first
    expect(ping).to_be_visible(timeout=60_000)
    page.get_by_label("Hide pings").check()
    expect(ping).to_be_hidden()


def test_the_wire_keeps_two_hundred_packets(server, browser):
    page = ready(browser(server, "ana", "/room"))
    page.evaluate("for (let n = 1; n <= 150; n++) socket.emit('nope', { n }, () => {})")
    expect(wire_of(page).locator("li", has_text="answers nope")).not_to_have_count(0)
    expect(wire_of(page)).to_contain_text('{"n":150}')
    expect(wire_of(page).locator("li")).to_have_count(200)


def test_the_handler_that_ran_last_is_shown_as_it_stands_in_the_program(server, browser):
    page = browser(server, "ana", "/room")
    open_tab(page, "Handler")

    def ran(name):
        source = page.locator(".source.ran")
        expect(source).to_have_attribute("data-event", name)
        expect(source).to_be_in_viewport()
        expect(page.get_by_role("radio", name=name, exact=True)).to_be_checked()
        lines = source.locator("code").inner_text().splitlines()
        first = int(source.locator(".numbers").inner_text().split()[0]) - 1
        program_lines = (HERE / "app.py").read_text("utf-8").splitlines()
        assert lines[0] == program_lines[first] == f'@socketio.on("{name}")'

    ran("connect")
    join(page), ran("join")
    send(page, "Run chat!"), ran("chat")
    press(page, "Pull the cable"), ran("disconnect")
    press(page, "Plug it in"), ran("join")
    press(page, "Leave python"), ran("leave")


def test_the_handler_that_ran_keeps_its_mark_when_another_is_picked(server, browser):
    page = ready(browser(server, "ana", ROOM))
    open_tab(page, "Handler")
    send(page, "Run chat!")
    ran = page.locator(".source.ran")
    expect(ran).to_have_attribute("data-event", "chat")
    page.locator("#handlers").get_by_text("leave", exact=True).click()
    expect(page.locator("[data-event=leave]")).to_be_in_viewport()
    expect(ran).to_have_attribute("data-event", "chat")
    expect(page.locator("#handlers .ran")).to_have_text("chat")


def test_ten_lines_of_source_and_six_packets_are_in_sight_and_large_enough(server, browser):
    page = ready(browser(server, "ana", ROOM, viewport={"width": 1280, "height": 720}))
    send(page, "one", "two", "three")
    expect(wire_of(page).get_by_text("answers chat")).to_have_count(3)
    whole = (
        "row => row.getBoundingClientRect().top >= find('#wire-box').getBoundingClientRect().top"
    )
    rows = wire_of(page).locator("li")
    assert rows.evaluate_all(f"rows => rows.filter({whole}).length") >= 6
    open_tab(page, "Handler")
    code = page.locator(".source.ran code")
    line, size = (
        code.evaluate(f"code => parseFloat(getComputedStyle(code).{name})")
        for name in ("lineHeight", "fontSize")
    )
    assert page.locator("#sources").bounding_box()["height"] >= 10 * line
    assert size >= 0.024 * 720


TICK = '''
@socketio.on("tick")
def tick(data):
    """A client asks for ticks. Everyone hears two, of which one carries nothing."""
    socketio.emit("tick")
    socketio.emit("tick", 7)


'''


def test_an_event_that_a_student_adds_works_from_the_browsers_console(fresh, browser, tmp_path):
    shutil.copytree(HERE / "templates", tmp_path / "templates")
    below_typing, wave = '@socketio.on("invite")\n', python_in_the_readme('@socketio.on("wave")')
    text = (HERE / "app.py").read_text("utf-8")
    text = text.replace(below_typing, f"{wave}\n{TICK}{below_typing}")
    (tmp_path / "app.py").write_text(text, "utf-8")
    server, errors = fresh(str(tmp_path / "app.py")), []
    ana, luis = (ready(browser(server, name, ROOM)) for name in ("ana", "luis"))
    for page in (ana, luis):
        page.on("pageerror", lambda error: errors.append(error))
    expect(members_of(ana)).to_contain_text("luis")
    ack = "new Promise(done => socket.emit('wave', {room: 'python'}, (error, ack) => done(ack)))"
    assert ana.evaluate(ack) == {"ok": True}
    ana.evaluate("() => { socket.emit('tick', {}); }")
    wave = '42["wave",{"room":"python","username":"ana"}]'
    for page in (ana, luis):
        for packet in (wave, '42["tick"]', '42["tick",7]'):
            expect(wire_of(page)).to_contain_text(packet)
    expect(ana.locator("[data-event=wave] code")).to_contain_text("def wave(data)")
    send(luis, "Still here")
    wait_until_said(ana, "Still here")
    assert errors == []


def test_the_page_is_a_chat_without_what_is_under_the_hood(fresh, browser, tmp_path):
    shutil.copytree(HERE / "templates", tmp_path / "templates")
    shutil.copy(HERE / "app.py", tmp_path)
    for name in ("_hood.html", "_who_hears.html"):
        (tmp_path / "templates" / name).unlink()
    server, errors = fresh(str(tmp_path / "app.py")), []
    ana, luis = (browser(server, name, ROOM) for name in ("ana", "luis"))
    ana.on("pageerror", lambda error: errors.append(error))
    send(ready(ana), "Hello")
    wait_until_said(ready(luis), "Hello")
    press(luis, "Leave python")
    expect(conversation(ana)).to_contain_text("luis left")
    assert errors == [] and ana.get_by_text("Under the hood").count() == 0


def test_breaking_in_is_really_tried_and_refused(server, browser):
    page = ready(browser(server, "ana", "/room"))
    open_tab(page, "Try to break in")
    for button, answer in {
        "Speak in room2": "Join the room before you speak in it.",
        "Enter room2 uninvited": "room2 belongs to luis, who has not invited you.",
        "Send an empty message": "A message has 1 to 500 characters.",
        "Expel somebody from python": "Only the owner of a room can invite or expel.",
    }.items():
        press(page, button, exact=False)
        ack = f'{{"ok":false,"error":"{answer}"}}'
        expect(page.locator("#ack")).to_have_text(ack)
        expect(page.locator("#wire")).to_contain_text(f"[{ack}]")
    expect(page.get_by_role("heading", name="No room selected")).to_be_visible()


def test_the_buttons_that_break_in_show_their_own_answers_and_expel_nobody(server, browser):
    window = {"width": 1366, "height": 768}
    page, eva = browser(server, "luis", ROOM, viewport=window), browser(server, "eva", ROOM)
    expect(members_of(page)).to_contain_text("eva")
    open_tab(page, "Try to break in")
    ack, button = page.locator("#ack"), page.get_by_role("button", name="Expel somebody")
    expect(button).to_be_in_viewport(ratio=1)
    send(page, "An ack that is not shown there")
    wait_until_said(page, "An ack that is not shown there")
    expect(ack).to_have_text("The answer appears here.")
    button.click()
    expect(ack).to_contain_text("Only the owner of a room can invite or expel.")
    expect(ack).to_be_in_viewport(ratio=1)
    expect(eva.get_by_role("button", name="Leave python")).to_be_visible()


def test_the_log_keeps_its_place_and_says_that_there_is_something_new(two):
    ana, luis = two
    send_at_once(luis, [f"line {number}" for number in range(25)])
    wait_until_said(ana, "line 24")
    line = conversation(ana).get_by_text("line 9", exact=True).last
    newer = ana.get_by_role("button", name="New messages")
    line.scroll_into_view_if_needed()
    place = line.bounding_box()
    send(luis, "And one more, of several lines" + "\n." * 5)
    expect(newer).to_be_visible()
    assert "And one more" in said_in(ana)[-1] and abs(line.bounding_box()["y"] - place["y"]) < 2
    newer.click()
    expect(conversation(ana).get_by_text("And one more").last).to_be_in_viewport()
    expect(newer).to_be_hidden()


def test_the_picture_shows_who_hears_and_who_does_not(two, server, browser):
    (ana, luis), eva = two, ready(browser(server, "eva", "/room"))
    expect(eva.get_by_role("img", name="Who hears: nobody")).to_be_visible()
    for page in two:
        expect(page.get_by_role("img", name="Who hears: ana, luis")).to_be_visible()
    send(luis, "Who hears me?")
    for page in two:
        words = re.compile("^luis spoke: heard by ana, luis, not by .*eva")
        expect(heard(page)).to_have_text(words)
    ana.get_by_label("Message").press_sequentially("H")
    expect(heard(luis)).to_have_text(re.compile("^ana is typing: heard by luis, not by .*eva"))
    press(luis, "Leave python")
    expect(ana.get_by_role("img", name="Who hears: ana", exact=True)).to_be_visible()
    send(ana, "Alone")
    expect(heard(ana)).to_have_text("ana spoke: heard by nobody else.")


# Keeps of each light how many ways it has: up to the server, and down.
WATCH_LIGHTS = """() => { window.lights = []; new MutationObserver(changes => {
    for (const { addedNodes } of changes) for (const light of addedNodes) {
        const ways = [...light.querySelectorAll('.tail')].map(tail => tail.getAttribute('d'));
        lights.push(ways.map(way => way.match(/M/g).length));
    }
}).observe(find('#lights'), { childList: true }); }"""


def test_a_light_runs_from_the_speaker_to_every_member_and_to_nobody_else(two):
    ana, luis = two
    ana.emulate_media(reduced_motion="no-preference")
    ana.evaluate(WATCH_LIGHTS)
    send(luis, "Look")
    until(lambda: [1, 2] in ana.evaluate("lights"))  # from one of three, to two
    assert max(map(max, ana.evaluate("lights"))) == 2


def test_a_burst_is_drawn_as_one_light_and_told_as_what_it_was(two):
    ana, luis = two
    ana.emulate_media(reduced_motion="no-preference")
    ana.evaluate(WATCH_LIGHTS)
    send_at_once(luis, [f"burst {number}" for number in range(30)])
    expect(heard(ana)).to_have_text(
        re.compile(r"\d+ messages from luis: heard by ana, luis, not by")
    )
    wait_until_said(ana, "burst 29")
    assert len(ana.evaluate("lights")) < 15


def test_a_message_without_a_room_is_drawn_as_what_everyone_hears(two, server):
    ana, _ = two
    post(server, "To all", name="eva")
    words = "eva spoke: without a room, heard by everyone connected."
    expect(heard(ana)).to_have_text(words)


def test_a_bad_state_looks_bad(two):
    ana, _ = two
    colour = "element => getComputedStyle(element).color"
    good = state_of(ana).evaluate(colour)
    member = members_of(ana).get_by_role("listitem").first
    known = member.evaluate(colour)
    press(ana, "Pull the cable")
    expect(state_of(ana)).to_have_text("Cable pulled: messages wait")
    assert state_of(ana).evaluate(colour) != good and member.evaluate(colour) != known
    expect(heard(ana)).to_contain_text("nobody hears you")


def test_a_message_runs_in_its_own_direction_and_the_field_keeps_the_focus(server, browser):
    page = ready(browser(server, "ana", ROOM))
    send(page, "שלום", "Hello")
    wait_until_said(page, "שלום", "Hello")
    for text, direction in (("שלום", "rtl"), ("Hello", "ltr")):
        expect(conversation(page).get_by_text(text).last).to_have_css("direction", direction)
    expect(page.get_by_label("Message")).to_be_focused()


def test_an_invisible_message_is_refused_on_the_spot(server, browser):
    page = ready(browser(server, "ana", ROOM))
    send(page, "\u200b \u2060")
    expect(alert(page)).to_contain_text("an empty message is not sent")


def test_an_alert_about_one_room_goes_when_another_is_shown(server, browser):
    page = ready(browser(server, "ana", "/room?room=room1"))
    join(page)
    page.locator("#rooms .name", has_text="room1").click()
    invite(page, "luis")
    expect(alert(page)).to_have_text("luis can now join room1.")
    page.locator("#rooms .name", has_text="python").click()
    expect(alert(page)).to_have_text("")


def test_pasted_python_keeps_its_indentation(two):
    send(two[1], "\n    for n in range(3):\n        print(n)\n")
    for page in two:
        wait_until_said(page, "    for n in range(3):\n        print(n)")
        code = conversation(page).get_by_text("print(n)").last
        expect(code).to_have_css("white-space-collapse", "preserve")


def test_a_page_that_is_told_to_wait_with_its_join_waits_and_joins(changed, browser):
    server = changed(after="app.BURST, app.RATE = 2, 0.1  # at once, and in a second")
    page = ready(browser(server, "luis", "/room"))
    wire = Wire(server, sign_in(server.url, "luis")).enter("flask")
    assert wire.ask("typing", room="flask")["ok"]
    assert wire.ask("typing", room="flask")["retry_after"]
    press(page, "Join python")
    expect(wire_of(page)).to_contain_text("retry_after")
    expect(page.get_by_role("button", name="Leave python")).to_be_visible()
    send(page, "In at last")
    wait_until_said(page, "In at last")


def test_a_page_follows_a_server_whose_clock_was_set_back(server, browser):
    page = ready(browser(server, "ana", ROOM))
    expect(page.get_by_text("1 here", exact=True)).to_be_visible()
    page.evaluate("rooms.get('python').last_id += 3_600_000")  # an hour ahead of the server
    press(page, "Pull the cable"), press(page, "Plug it in")
    send(ready(page), "Heard in spite of it")
    wait_until_said(page, "Heard in spite of it")


def test_the_lecturer_has_address_and_code_for_latecomers(classroom, browser):
    page = browser(classroom, "lecturer", "/room", password="chalk-and-talk")
    expect(page.get_by_text("Join from your own device").first).to_be_in_viewport()
    press(page, "QR code")
    code = page.get_by_role("img", name="QR code")
    expect(code).to_be_in_viewport(ratio=1)
    assert code.bounding_box()["height"] > 400
    press(page, "Close")
    expect(code).to_be_hidden()


def test_opening_a_room_with_a_long_history_lays_the_page_out_a_few_times(full, browser):
    page = browser(full, "ana", "/room")
    meter = page.context.new_cdp_session(page)
    meter.send("Performance.enable")
    page.goto(f"{full.url}/room?room=a")
    expect(conversation(page).locator("[data-id]").nth(450)).to_be_attached()
    figures = meter.send("Performance.getMetrics")["metrics"]
    layouts = {figure["name"]: figure["value"] for figure in figures}["LayoutCount"]
    assert 0 < layouts < 150  # not one for each line


def test_history_is_not_read_aloud_and_what_follows_is(server, browser):
    luis = ready(browser(server, "luis", ROOM))
    send(luis, "Said before")
    wait_until_said(luis, "Said before")
    page = browser(server, "ana", "/room")
    watch = """() => { window.live = []; new MutationObserver(changes => {
        for (const { target } of changes)
            if (target.matches('.talk')) live.push(target.closest('.log').ariaLive);
    }).observe(find('#views'), { childList: true, subtree: true }); }"""
    page.evaluate(watch)
    join(page)
    wait_until_said(page, "Said before")
    assert set(page.evaluate("live")) == {"off"}
    expect(conversation(page)).not_to_have_attribute("aria-live", "off")


# Everyone: eyes, phones, projectors --------------------------------------------------------------


@pytest.mark.parametrize("path", ["/login", "/room?room=room1", "/"])
def test_axe_finds_nothing_on_any_page_and_nothing_scrolls_sideways(server, browser, path):
    page = browser(server, "ana", path)
    if path != "/login":
        send(ready(page), "hello")
        page.get_by_text("hello").first.wait_for()
    for width, colours in ((1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=colours)
        found = Axe().run(page).response["violations"]
        assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found] == []
        root = "document.documentElement"
        assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"), width


EVERY_PAGE = pytest.mark.parametrize("path", ["/login", "/", ROOM])
CONTRAST = """
(selector) => {
  const shade = (colour) => colour.match(/[\\d.]+/g).slice(0, 3)
    .map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, n) => sum + part * [0.2126, 0.7152, 0.0722][n], 0.05);
  const paper = shade(getComputedStyle(document.body).backgroundColor);
  const edges = [...document.querySelectorAll(selector)].filter((box) => box.offsetWidth)
    .map((box) => shade(getComputedStyle(box).borderTopColor));
  return edges.map((edge) => Math.max(edge, paper) / Math.min(edge, paper));
}"""


@EVERY_PAGE
def test_borders_have_a_contrast_of_three_to_one(server, browser, path):
    page = browser(server, "ana", path)
    for colours in ("light", "dark"):
        page.emulate_media(color_scheme=colours)
        contrasts = page.evaluate(CONTRAST, ".form-control, .form-select, .btn, .lane, .border")
        assert len(contrasts) >= 3 and min(contrasts) >= 3


@EVERY_PAGE
def test_a_button_with_the_focus_shows_it(server, browser, path):
    page = browser(server, "ana", path)
    page.get_by_role("button").first.focus()
    page.keyboard.press("Shift")  # from now on the keyboard is in use
    for button in page.get_by_role("button", disabled=False).all():
        if button.is_visible():
            button.focus()
            assert (
                button.evaluate("button => parseFloat(getComputedStyle(button).outlineWidth)") > 2
            )


OVERLAPS = """
() => {
  const lines = [];
  const nodes = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (nodes.nextNode()) {
    const { data, parentElement } = nodes.currentNode;
    const range = document.createRange();
    range.selectNode(nodes.currentNode);
    if (!data.trim() || parentElement.closest(".visually-hidden, option")) continue;
    for (const { left, right, top, height } of range.getClientRects())
      lines.push({ data, left, right, top: top + height / 4, bottom: top + height * 3 / 4 });
  }
  return lines.flatMap((a) => lines
    .filter((b) => b !== a && a.left < b.right && b.left < a.right)
    .filter((b) => a.top < b.bottom && b.top < a.bottom)
    .map((b) => `${a.data} / ${b.data}`));
}"""


def test_text_of_twice_the_size_does_not_overlap(server, chromium):
    with launch(chromium.browser_type, "--blink-settings=defaultFontSize=32") as large:
        pages = [open_page(large, server, "ana", path) for path in ("/login", "/", ROOM)]
        for page in pages:
            root = "document.documentElement"
            assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
        for page in pages[:2]:  # in a room, much is scrolled out of sight
            assert page.evaluate(OVERLAPS) == []
        send(ready(pages[2]), "Large")  # nothing covers the button
        wait_until_said(pages[2], "Large")


@BOTH_PAGES
def test_nothing_moves_for_those_who_ask_for_less_motion(server, browser, path):
    page = ready(browser(server, "ana", path, reduced_motion="reduce"))
    page.evaluate("addEventListener('animationstart', () => document.body.classList.add('moved'))")
    page.evaluate("addEventListener('transitionrun', () => document.body.classList.add('moved'))")
    send(page, "Nothing moves")
    wait_until_shown(page, "Nothing moves")
    expect(page.locator("body.moved")).to_have_count(0)


def test_forced_colours_keep_the_bars(server, browser):
    page = ready(browser(server, "ana", forced_colors="active"))
    bar = page.locator(".bar [data-figure=requests]").first
    colour = "bar => getComputedStyle(bar, '::after').backgroundColor"
    assert bar.evaluate(colour) != page.evaluate(
        "() => getComputedStyle(document.body).backgroundColor"
    )


def test_a_class_joins_with_enter_and_twice_is_no_error(classroom, chromium):
    with chromium.new_page() as page:
        page.goto(f"{classroom.url}/login")
        expect(page.get_by_role("heading", level=1)).to_have_text("Join the class")
        page.get_by_label("Username").fill("zoe_2 ")  # a phone's keyboard adds the space
        page.get_by_label("Password").fill("8 is enough")
        page.keyboard.press("Enter")
        expect(page.get_by_text("Signed in as zoe_2")).to_be_visible()
        press(page, "Sign out")
        page.get_by_label("Username").fill("zoe_2")
        page.get_by_label("Password").fill("8 is enough")
        page.get_by_role("button", name="Register").dblclick()
        expect(page.get_by_text("Signed in as zoe_2")).to_be_visible()


def test_the_log_in_page_says_that_cookies_are_blocked(server, chromium):
    with chromium.new_page() as page:
        page.goto(f"{server.url}/login")
        expect(page.get_by_role("alert")).to_have_count(0)
        browser = page.context.new_cdp_session(page)
        browser.send("Emulation.setDocumentCookieDisabled", {"disabled": True})
        page.reload()
        expect(page.get_by_role("alert")).to_contain_text("Your browser blocks cookies")


def test_a_refused_registration_stands_under_its_heading(server, chromium):
    with chromium.new_page() as page:
        page.goto(f"{server.url}/login")
        page.get_by_label("Username").fill("ana")
        page.get_by_label("Password").fill("8 is enough")
        press(page, "Register")
        heading = page.get_by_role("heading", name="Or use your own name")
        expect(alert(page)).to_have_text("Not registered. That name is taken.")
        assert heading.bounding_box()["y"] < alert(page).bounding_box()["y"]
        rule = re.compile("1 to 20 letters")
        expect(page.get_by_label("Username")).to_have_accessible_description(rule)


def test_a_class_finds_the_address_large_on_a_projector_and_no_demo_accounts(classroom, chromium):
    with chromium.new_page(viewport={"width": 1280, "height": 720}) as page:
        page.goto(f"{classroom.url}/login")
        code = page.get_by_role("img", name="QR code")
        expect(code).to_be_in_viewport(ratio=1)
        assert code.bounding_box()["height"] > 500
        expect(page.get_by_text("Join from your own device")).to_be_in_viewport(ratio=1)
        expect(page.get_by_text("Demo accounts are off")).to_be_visible()
        expect(page.get_by_role("button", name="Sign in as")).to_have_count(0)
    assert classroom.said("█") and classroom.said("everyone registers")


# Several processes: notebooks/shared.py -----------------------------------------------------------

REDIS = """import os
settings = ["--port", os.environ["PORT"], "--dir", os.environ["DIR"], "--appendonly", "yes"]
os.execlp("redis-server", "redis-server", *settings)
"""
no_redis = not shutil.which("redis-server") and not os.environ.get("CI")
needs_redis = pytest.mark.skipif(no_redis, reason="needs Redis: install redis-server")
SHARED = str(HERE / "notebooks" / "shared.py")


@contextmanager
def sharing(folder):
    """Yield Redis, and a function that starts one more process beside it."""
    with ExitStack() as stack:
        engine = stack.enter_context(Server("-c", REDIS, DIR=str(folder)))
        settings = {"REDIS_URL": f"redis://{ME}:{engine.port}", "SECRET_KEY": "the same"}
        yield engine, lambda: stack.enter_context(Server(SHARED, **settings))


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Two processes that serve one chat, for tests that leave them as they were."""
    with sharing(tmp_path_factory.mktemp("redis")) as (_, start):
        yield start(), start()


@pytest.fixture
def processes(tmp_path):
    """(Redis, start): a Redis of the test's own, and what starts a process beside it."""
    with sharing(tmp_path) as both:
        yield both


@pytest.mark.live
def test_without_redis_a_shared_server_says_so_in_one_line_and_ends():
    settings = os.environ | {"REDIS_URL": f"redis://{ME}:1"}
    run = subprocess.run([sys.executable, SHARED], env=settings, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert re.fullmatch(
        r"No Redis at REDIS_URL=redis://127.0.0.1:1: .*redis-server\.\n", run.stderr
    )


@needs_redis
def test_two_processes_have_one_order(pair):
    wires = [Wire(server, register(server)).enter("python") for server in pair for _ in "xx"]
    for wire in wires:
        wire.send(*burst(20, "order"))
    heard = [[said["id"] for said in wire.hear(80)] for wire in wires]
    assert heard == [sorted(set(heard[0]))] * 4


@needs_redis
def test_two_processes_have_the_same_accounts_and_members(pair):
    one, two = pair
    session = register(one, "noor")
    assert sign_in(two.url, "noor", "password")
    at_one, at_two = Wire(one, session).enter(), Wire(two, session).enter()
    assert at_one.ask("join", room="flask")["members"] == ["noor"]
    assert at_two.ask("join", room="flask")["members"] == ["noor"]
    ana = Wire(two, sign_in(two.url, "ana")).enter()
    assert ana.ask("join", room="flask")["members"] == ["ana", "noor"]
    at_one.ask("leave", room="flask")  # noor is still there, at the second
    at_two.ask("leave", room="flask")
    *_, left = ana.until('42["leave"')
    assert json.loads(left[2:])[1]["members"] == ["ana"] == ana.ask("join", room="flask")["members"]


@needs_redis
def test_a_key_that_comes_through_both_processes_at_once_is_heard_once(pair):
    listener, session = Wire(pair[0], register(pair[0])).enter("python"), register(pair[0])
    wires = [Wire(server, session).enter("python") for server in pair * 3]
    once = {"room": "python", "message": "once", "key": "k"}
    for wire in wires:
        wire.send("420" + json.dumps(["chat", once]))
    assert len({wire.until("430")[-1] for wire in wires}) == 1
    wires[1].ask("chat", room="python", message="end")
    assert [said["message"] for said in listener.hear(2)] == ["once", "end"]


@needs_redis
def test_an_invitation_counts_at_both_processes_and_so_does_an_expulsion(pair):
    ana, luis = (
        Wire(server, sign_in(server.url, name)).enter()
        for server, name in zip(pair, ("ana", "luis"), strict=True)
    )
    assert refusal(luis.ask("join", room="room1"))
    assert ana.ask("invite", room="room1", username="luis")["ok"]
    assert json.loads(luis.until('42["invite"')[-1][2:])[1] == {"room": "room1", "by": "ana"}
    assert luis.ask("join", room="room1")["members"] == ["luis"]
    ana.ask("expel", room="room1", username="luis")
    luis.until('42["expel"')
    assert refusal(luis.ask("chat", room="room1", message="Still here?"))
    assert refusal(luis.ask("join", room="room1"))


@needs_redis
def test_a_logout_at_one_process_ends_the_connections_at_the_other(pair):
    one, two = pair
    session = register(one)
    wire = Wire(two, session).enter("python")
    assert session.post(f"{one.url}/logout").status_code == 200
    assert wire.ended()
    session = register(one)
    copied = cookie_of(session)
    session.post(f"{one.url}/logout")
    headers = {"Cookie": copied}
    assert requests.get(f"{two.url}/messages", headers=headers).status_code == 401


@needs_redis
def test_the_room_hears_leave_when_a_process_is_killed(processes):
    _, start = processes
    one, two = start(), start()
    ana = Wire(one, sign_in(one.url, "ana")).enter("python")
    luis = Wire(two, sign_in(two.url, "luis")).enter("python")
    two.stop()
    assert luis.ended()
    lab.attend([ana], lambda: '42["leave"' in str(ana.inbox))
    left = json.loads(ana.until('42["leave"')[-1][2:])[1]
    assert (left["username"], left["reason"]) == ("luis", "connection lost")
    assert left["members"] == ["ana"]


@needs_redis
def test_a_new_process_knows_from_a_snapshot_what_the_log_no_longer_holds(processes):
    engine, start = processes
    database, one = redis.Redis(ME, engine.port), start()
    ana = Wire(one, sign_in(one.url, "ana")).enter("python")
    ana.ask("chat", room="python", message="from long ago", key="k")
    for _ in range(11):
        ana.send(*['42["join",{"room":"python"}]'] * 100)
    until(lambda: database.exists("snapshot"))
    database.xtrim("log", maxlen=500, approximate=False)
    ana.ask("chat", room="python", message="since then")
    two = start()
    wire = Wire(two, sign_in(two.url, "ana")).enter()
    assert wire.ask("join", room="python", last_id=0)["members"] == ["ana"]
    assert [said["message"] for said in chats(wire.heard)] == ["from long ago", "since then"]
    first = chats(wire.heard)[0]["id"]
    assert wire.ask("chat", room="python", message="again", key="k")["id"] == first


@needs_redis
def test_while_redis_is_away_nothing_changes_and_everybody_is_told(processes):
    engine, start = processes
    server = start()
    ana = Wire(server, sign_in(server.url, "ana")).enter("python")
    engine.stop()
    assert "Redis" in ana.ask("chat", room="python", message="Redis?")["error"]
    answer = requests.post(f"{server.url}/login", data=form(password="wrong"))
    assert answer.status_code == 503 and "Redis" in answer.text
    engine.start()
    until(lambda: ana.ask("chat", room="python", message="Redis!")["ok"])
    assert [said["message"] for said in chats(ana.heard)] == ["Redis!"]
    assert not server.said("Traceback")


# The judge ----------------------------------------------------------------------------------------


@pytest.fixture
def chat(tmp_path):
    """chat(old, new): the chat that notebook 6 builds, with a fault in it."""
    notebook = nbformat.read(HERE / "notebooks/06_build_your_own.ipynb", 4)
    shown = [output.get("text", "") for cell in code(notebook) for output in cell.outputs]
    (source,) = [text for text in shown if 'if __name__ == "__main__":' in text]

    def chat(old, new):
        assert source.count(old) == 1
        (tmp_path / "chat.py").write_text(source.replace(old, new), "utf-8")
        return tmp_path / "chat.py"

    return chat


EMIT = '        emit("chat", said, to=room)\n'
SWAP = """        late = history.pop("late", None)
        if sent[key] % 20 == 0 and room == "python":
            history["late"] = [said, request.sid]
        emit("chat", said, to=room, skip_sid=request.sid if "late" in history else None)
        if late:
            emit("chat", late[0], to=late[1])
"""
TRACEBACK = "        except ValueError as reason:\n            app.logger.exception(reason)\n"
# fmt: off
PLANTED = [
    (1, "lost", EMIT, '        if sent[key] % 100:\n            emit("chat", said, to=room)\n'),
    (2, "overheard", EMIT, '        emit("chat", said, broadcast=True)\n'),
    (2, "overheard", "require(room in rooms(),", "require(room in owners,"),
    (2, "overheard", "require(room in rooms(),", "require(room in rooms() or not time.sleep(1),"),
    (3, "without ok", 'return {"ok": False, "error": "Send join, leave or chat."}', "return"),
    (3, "tracebacks", "        except ValueError as reason:\n", TRACEBACK),
    (4, "ways in", '"username": name, "m', '"username": data.get("username", name), "m'),
    (4, "ways in", 'disconnect(sid, "/")', "pass"),
    (4, "ways in", "name not in passwords or passwords[name] !=", "passwords.get(name) !="),
    (5, "doubled", '["id"] > last_id', '["id"] >= last_id'),
    (5, "out of order", EMIT, SWAP),
]
# fmt: on


@pytest.mark.live
@pytest.mark.parametrize("level, kind, old, new", PLANTED)
def test_the_judge_finds_a_planted_fault_and_shows_it(chat, level, kind, old, new):
    verdict = judge.judge(chat(old, new), level)
    assert verdict.holds == level - 1 and verdict.counts[kind] > 0
    assert len(verdict.moments) > 1 and len(record.as_text(verdict.moments).splitlines()) > 2


@pytest.mark.live
def test_a_sound_chat_passes_all_levels_though_it_prints_without_end(chat):
    noise = "def noise():\n    while True:\n        print(secrets.token_hex())\n\n\n"
    start = "threading.Thread(target=noise, daemon=True).start()\nif True:"
    verdict = judge.judge(chat('if __name__ == "__main__":', noise + start))
    assert verdict.holds == 5 and not verdict.faults


@pytest.mark.live
def test_app_passes_all_levels_of_the_judge():
    assert judge.judge(HERE / "app.py").holds == 5


@pytest.mark.live
@pytest.mark.parametrize("accident", ["time.sleep(1000)", "os._exit(1)"])
def test_a_chat_that_hangs_or_ends_is_judged_and_nothing_stays_behind(chat, accident, monkeypatch):
    monkeypatch.setattr(record, "PATIENCE", (1, 2))
    threads = set(threading.enumerate())
    thirtieth = f"        if sent[key] % 30 == 0:\n            {accident}\n"
    assert judge.judge(chat(EMIT, EMIT + thirtieth), level=1).holds == 0
    until(lambda: set(threading.enumerate()) <= threads)


@pytest.mark.live
def test_the_judge_says_with_its_exit_status_what_it_found(arena, tmp_path):
    def run(*arguments):
        command = [sys.executable, HERE / "notebooks/judge.py", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        return done.returncode, done.stdout + done.stderr

    (tmp_path / "chat.py").write_text(python_in_the_readme("from flask "))
    (tmp_path / "broken.py").write_text("1 / 0")
    holds = "level 1 heard: holds (0 lost, 0 doubled)\n"
    assert run("--url", arena.url, "--level", "1") == (0, holds)
    status, text = run("chat.py")
    assert status == 1 and text.startswith(holds)
    assert re.search(r'(?s)level 2 rooms: fails .*hears "eva \d+"', text)
    status, text = run("broken.py")
    assert status == 2 and "ZeroDivisionError" in text
    assert run("--url", f"http://{ME}:9")[0] == 2


# The notebooks ------------------------------------------------------------------------------------

NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))
EACH_NOTEBOOK = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def execute():
    """execute(notebook): run its cells from top to bottom in a kernel of its own."""
    options = {"timeout": 120, "record_timing": False, "coalesce_streams": True}
    options["resources"] = {"metadata": {"path": HERE / "notebooks"}}
    return lambda notebook: NotebookClient(notebook, **options).execute()


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def masked(text):
    """The text without what differs: dates, tokens, numbers, the width of columns."""
    different = r"(Date|Accept-Encoding): .*|[\w.=-]{16,}|\d[\d.,]*"
    return re.sub(r" +", " ", re.sub(different, "#", text))


def outputs(notebook):
    """What each cell shows: its text, masked, and of all else only that it is there."""

    def shows(output):
        return masked(output["text"]) if "text" in output else sorted(output["data"])

    return [[shows(output) for output in cell.outputs] for cell in code(notebook)]


@EACH_NOTEBOOK
def test_a_notebook_shows_what_is_committed(execute, path):
    committed = nbformat.read(path, 4)
    if no_redis and "redis-server" in str(committed):
        missing("Redis: install redis-server")
    assert outputs(execute(nbformat.read(path, 4))) == outputs(committed)


@EACH_NOTEBOOK
def test_a_notebook_goes_in_small_steps_and_shows_its_evidence_first(path):
    notebook, lines, evidence, pictures = nbformat.read(path, 4), 0, [], []
    nbformat.validate(notebook)
    for cell in code(notebook):
        skipped = cell.metadata.slideshow.slide_type == "skip"
        assert len(cell.source.splitlines()) <= (20 if skipped else 12), cell.source  # on a slide
        lines += len([line for line in cell.source.splitlines() if not re.match(r"\s*(#|$)", line)])
        evidence += [lines] * bool(cell.outputs)
        pictures += [lines for output in cell.outputs if "image/png" in output.get("data", {})]
    assert evidence[0] <= 20 and pictures[0] <= 60


@EACH_NOTEBOOK
def test_a_notebook_is_committed_as_one_run_from_top_to_bottom_made_it(path):
    cells = code(nbformat.read(path, 4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any("execution" in cell.metadata for cell in cells)
    for output in [output for cell in cells for output in cell.outputs]:
        assert output.output_type != "error" and output.get("name") != "stderr"


@pytest.mark.parametrize(
    "guess, truth, unit, words",
    [
        (None, 6204, "bytes", "You made no guess. It was 6,204 bytes."),
        (500, 6204.125, "bytes", "You said 500 bytes. It was 6,204.12 bytes."),
        ({"luis"}, {"luis", "ana"}, "", "You said luis. It was ana, luis."),
        (set(), set(), "", "You said nobody. It was nobody."),
        ("many", 3, "times", "You said many. It was 3 times."),
    ],
)
def test_a_guess_is_set_beside_what_was_seen(capsys, guess, truth, unit, words):
    lab.score(guess, truth, unit)
    assert capsys.readouterr().out == words + "\n"


@pytest.mark.live
def test_a_notebook_reaches_its_server_past_a_proxy_and_from_any_folder(tmp_path):
    program = """import lab, socketio
server = lab.Server()
session = lab.sign_in(server.url, "ana")
for transport in ("polling", "websocket"):
    with socketio.SimpleClient(http_session=session) as client:
        client.connect(server.url, transports=[transport])
        print(client.transport, client.call("join", {"room": "python"})["ok"])
"""
    nowhere = {f"{name}_proxy": f"http://{ME}:9" for name in ("http", "https", "all")}
    folder = tmp_path / "a folder with spaces"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(".*"))
    environ = os.environ | nowhere | {"PYTHONPATH": str(folder / "notebooks"), "NO_PROXY": "intra"}
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert answer.stdout.split() == ["polling", "True", "websocket", "True"], answer.stderr


SAY = "def say(message): return luis.post(f'{server.url}/messages', json={'message': message})"
TWICE = (
    "def twice(client, message):\n    fields = {'room': 'python', 'message': message, 'key': 'k'}\n"
)
INVITE = "'invite', {'room': 'staff', 'username': 'eva'}"
EXERCISES = [  # notebook; how many cells to run before; right answers; wrong answers
    (
        "01_polling_vs_full_duplex",
        1,
        [
            """packet = '427["chat",{"message":"bonjour"}]'""",
            """packet = '427["chat", {"message": "bonjour", "key": "k"}]'""",
            f"{SAY}.json()['id']",
            "next_pause = lambda pause, news: max(pause / 2, 0.5) if news else min(pause * 2, 8)",
            "next_pause = lambda pause, news: 0.5 if news else min(pause * 2, 8)",
        ],
        [
            """packet = '42["chat",{"message":"bonjour"}]'""",
            """packet = '427["chat",{"message":"bonjour","room":"python"}]'""",
            "packet = 'bonjour'",
            SAY,
            "say = lambda message: 1",
            "next_pause = lambda pause, news: 0",
            "next_pause = lambda pause, news: 1",
            "next_pause = lambda pause, news: 4.5",
            "next_pause = lambda pause, news: 0.5 if news else 8",
        ],
    ),
    (
        "02_rooms_and_broadcasts",
        5,
        [
            "hearers = {'ana laptop', 'ana phone'}",
            f"let_in = lambda: clients['ana phone'].call({INVITE})",
            f"{TWICE}    return [client.call('chat', fields)['id'] for _ in range(2)]",
        ],
        [
            "hearers = {'ana laptop'}",
            "hearers = {'ana laptop', 'ana phone', 'luis'}",
            f"let_in = lambda: clients['luis'].call({INVITE})",
            "twice = lambda client, message: [1, 1]",
            f"{TWICE}    return [client.call('chat', fields)['id']] * 2",
            f"{TWICE}    return [client.call('chat', fields | {{'key': k}})['id'] for k in 'ab']",
        ],
    ),
]


@pytest.mark.parametrize("stem, before, right, wrong", EXERCISES, ids=lambda value: str(value)[:2])
def test_an_exercise_takes_every_right_answer_and_refuses_wrong_ones(
    execute, stem, before, right, wrong
):
    notebook = nbformat.read(HERE / "notebooks" / f"{stem}.ipynb", 4)
    cells = code(notebook)
    checks = [cell for cell in cells if cell.metadata.slideshow.slide_type == "skip"]
    notebook.cells = cells[:before]
    for answer in [*right, *wrong]:
        notebook.cells += [nbformat.v4.new_code_cell(answer), *copy.deepcopy(checks)]
    execute(notebook)
    verdicts = [
        cell.outputs[0]["text"] for cell in notebook.cells[before + len(checks) :: 1 + len(checks)]
    ]
    for answer, verdict in zip([*right, *wrong], verdicts, strict=True):
        name = re.search(r"(\w+)( =|\()", answer)[1]
        assert (f"{name} is right." in verdict) == (answer in right), verdict


ANSWERS = [  # notebook; exercise; right answers; wrong answers
    (2, "pings", [lambda i, p: 60 / i * p], [lambda i, p: i * p, lambda i, p: 60 / i]),
    (
        2,
        "once",
        [lambda said: [*{m["id"]: m for m in sorted(said, key=lambda m: m["id"])}.values()]],
        [lambda said: said, lambda said: [], lambda said: sorted(said, key=lambda m: m["id"])],
    ),
    (
        2,
        "pause",
        [
            lambda n: min(30, 2**n) * random.uniform(0.6, 1),
            lambda n: random.uniform(0.9, 1.1) * 2**n if n < 4 else 30,
        ],
        [
            lambda n: min(30, 2**n),
            lambda n: 2**n * random.uniform(0.6, 1),
            lambda n: min(30, 2**n) * random.uniform(0.6, 1.2),
        ],
    ),
    (3, "deliveries", [lambda n, s: n * n / s], [lambda n, s: n * (n - 1) / s, lambda n, s: n / s]),
    (3, "share", [lambda c, n, s: c * n * n / s / 1e6], [lambda c, n, s: c * n / s / 1e6]),
    (3, "saved", [lambda rate: max(0, 1 - 5 / rate)], [lambda rate: 1 - 5 / rate]),
]


@pytest.mark.parametrize("number, name, right, wrong", ANSWERS, ids=lambda value: str(value)[:9])
def test_a_check_takes_each_right_answer_and_says_what_a_wrong_one_does(
    capsys, number, name, right, wrong
):
    cells = code(nbformat.read(NOTEBOOKS[number], 4))
    checks = "\n".join(cell.source for cell in cells if "def try_" in cell.source)
    for answer in right:
        exec(checks, {"lab": lab, name: answer})
        assert f"{name} is right." in capsys.readouterr().out
    for answer in wrong:
        exec(checks, {"lab": lab, name: answer})
        assert re.search(rf"^{name} is not right yet\. .{{15,}}", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    "path, accident",
    [(NOTEBOOKS[0], "1 / 0"), (NOTEBOOKS[2], "import os; os._exit(1)")],
    ids=["an error", "a crash"],
)
def test_the_server_ends_with_the_notebook_that_started_it(execute, path, accident):
    notebook = nbformat.read(path, 4)
    starts = ["Server(" in cell.source and cell.cell_type == "code" for cell in notebook.cells]
    start = starts.index(True)
    notebook.cells[start + 1 :] = [nbformat.v4.new_code_cell(accident)]
    with pytest.raises((CellExecutionError, DeadKernelError)):
        execute(notebook)
    port = int(re.search(r"http://[\d.]+:(\d+)", str(notebook.cells[start].outputs))[1])
    until(lambda: socket.socket().connect_ex((ME, port)))


# The README ---------------------------------------------------------------------------------------


def python_in_the_readme(start):
    """The block of Python that begins so."""
    readme = (HERE / "README.md").read_text("utf-8")
    return re.search(rf"```python\n({re.escape(start)}.*?)```", readme, re.DOTALL)[1]


def test_the_smallest_chat_of_the_readme_runs_and_keeps_its_rooms_apart(fresh, tmp_path):
    (tmp_path / "chat.py").write_text(python_in_the_readme("from flask "))
    server = fresh("-m", "flask", "--app", tmp_path / "chat.py", "run")
    people = [socketio.SimpleClient(reconnection=False) for _ in range(3)]
    for client, room in zip(people, ("python", "python", "flask"), strict=True):
        client.connect(server.url)
        client.call("join", {"room": room})
    people[0].call("chat", {"room": "python", "message": "Hello"})
    people[2].call("chat", {"room": "flask", "message": "Alone here"})
    for client, message in zip(people, ("Hello", "Hello", "Alone here"), strict=True):
        event, said = client.receive(timeout=20)
        assert (event, said["message"]) == ("chat", message)


def test_uv_installs_the_versions_that_requirements_has():
    script = re.search(
        r"^# /// script\n(.+?)^# ///$", (HERE / "app.py").read_text("utf-8"), re.M | re.S
    )
    metadata = tomllib.loads(re.sub("^# ?", "", script[1], flags=re.M))
    requirements = (HERE / "requirements.txt").read_text("utf-8").partition("\n\n")[0]
    pinned = [line.split()[0] for line in requirements.splitlines() if "==" in line]
    assert metadata["dependencies"] == pinned and metadata["requires-python"] == ">=3.11"
    (carrier,) = metadata["tool"]["uv"]["dependency-metadata"]
    assert f"{carrier['name']}=={carrier['version']}" in pinned
