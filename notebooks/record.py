"""What is said and heard on a chat: three clients note it for the judge; two functions draw it."""

import json
import socket
import time
from collections import defaultdict, namedtuple
from contextlib import suppress
from functools import partial
from itertools import count
from threading import Condition, Thread

import lab
import requests
import socketio
from engineio.payload import Payload
from socketio.exceptions import SocketIOError

NAMES = "ana", "luis", "eva"
EVENTS = {"join": "join", "leave": "leave", "chat": "chat", "heard": "chat", "message": "message"}
PATIENCE = 3, 10  # seconds without news, at least and at most, before one stops waiting for more
LIMIT = 90  # seconds for everything

# What happened. Moments belong together if `about` is the same: a message, an event or a name.
Moment = namedtuple("Moment", "second who what about")


class Client(socketio.Client):
    """A connection of a user. What is said and heard on it is noted, in order."""

    def __init__(self, record, name, session, port=None, heard=None, auth=None, **headers):
        options = {"reconnection": False, "handle_sigint": False, "request_timeout": 10}
        own = {"suppress_origin": True}  # the library adds one, even if there is one in `headers`
        Payload.max_decode_packets = 1000  # else it hangs up when a poll brings more than 16
        super().__init__(http_session=session, websocket_extra_options=own, **options)
        self.record, self.name, self.session = record, name, session
        self.open = None  # whether the chat has let it in: not known yet
        self.heard = {} if heard is None else heard  # text -> the messages with this text
        self.deaf, self.missed = False, {}  # what comes while it is deaf
        self.acks = {}  # event, as JSON -> its ack
        self.on("connect", lambda: self.turn(True))
        self.on("connect_error", lambda reason: self.turn(False))
        self.on("disconnect", lambda reason: self.turn(False))
        self.on("*", self.hear)
        self.handle, self.eio._trigger_event = self.eio._trigger_event, self.in_order
        record.clients.append(self)
        url, transports = record.url(port), [headers.pop("transport", "websocket")]
        with suppress(SocketIOError):
            self.connect(url, headers, auth, transports, wait=False)
            record.wait(lambda: self.open is not None)

    def in_order(self, event, *data, **options):
        """Handle packets one after another; the library uses a thread for each: they overtake."""
        farewell = data == ("1",)  # the library would wait for the connection to end
        if farewell or event == "disconnect":
            self.turn(False)
        return farewell or self.handle(event, *data, run_async=False)

    def turn(self, is_open):
        self.open = is_open
        self.record.note()

    def hear(self, event, message=None, *more):
        field = self.record.events["message"]
        message = message if isinstance(message, dict) else {field: message}
        text = message.get(field)
        with self.record.news:
            is_chat = event == self.record.events["heard"] and isinstance(text, str)
            if not is_chat or text not in self.record.said:
                return  # or it was said before this level
            heard = self.missed if self.deaf else self.heard
            heard.setdefault(text, []).append(message)
            name = message.get("username")
            by = f" by {name}" if name and name not in text else ""
            self.record.note(self.name, f'hears "{text}"{by}', None if self.deaf else text)

    def ask(self, *event):
        """Send an event: its name and what goes with it. Return it as JSON."""
        about, (name, *data) = json.dumps(event), event
        self.record.note(self.name, f"sends {about}", about)
        with suppress(SocketIOError):  # no longer connected
            take = partial(self.take, about)
            self.emit(self.record.events.get(name, name), tuple(data), callback=take)
        return about

    def take(self, about, *ack):
        answer = ack[0] if ack and isinstance(ack[0], dict) else {"ok": ack}
        if pause := answer.get("retry_after"):  # told to slow down
            time.sleep(min(pause, PATIENCE[0]))
            self.ask(*json.loads(about))
        elif not self.deaf:
            self.acks[about] = answer
            told = ", ".join(map(json.dumps, ack)) or "nothing"
            self.record.note(self.name, f"is told {told}", about)

    def answered(self, about):
        return about in self.acks or not self.open

    def ack(self, *event):
        """Send an event, and return its ack: an empty one if none comes."""
        about = self.ask(*event)
        self.record.wait(lambda: self.answered(about))
        return self.acks.get(about, {})

    def close(self):
        """Close it at once: the library waits for the server to close a WebSocket."""
        if self.eio.current_transport == "polling":
            Thread(target=self.disconnect, daemon=True).start()
        elif self.eio.ws and self.eio.ws.sock:
            with suppress(OSError):
                self.eio.ws.sock.shutdown(socket.SHUT_RDWR)
            self.eio.queue.put(None)  # ends the library's writer, which may miss the end


class Record:
    """All that happens on a chat, in order; who said what, and who should hear it."""

    def __init__(self, port, events=()):
        self.port, self.events, self.sessions = port, EVENTS | dict(events), {}
        self.news, self.numbers, self.end = Condition(), count(1), time.monotonic() + LIMIT
        self.clients, self.slowest = [], 0  # seconds that news took at most
        self.begin()

    def begin(self):
        """Begin anew, with nobody connected and nothing said."""
        for client in self.clients:
            client.close()
        self.clients, self.history, self.said, self.members = [], [], {}, defaultdict(set)
        self.asked = []  # (client, event): what was said, and should be answered

    def url(self, port=None):
        return f"http://{lab.ME}:{port or self.port}"

    def note(self, who="", what="", about=None):
        with self.news:
            self.history.append(Moment(time.monotonic(), who, what, about))
            self.news.notify_all()

    def wait(self, condition):
        """Wait until the condition holds, and return whether it does.

        Give up when nothing new has happened for some seconds: more where news has been slow.
        """
        with self.news:
            while not condition():
                began = time.monotonic()
                if began > self.end:
                    raise TimeoutError(f"It is not done after {LIMIT} seconds.")
                least, most = PATIENCE
                if not self.news.wait(min(least + 20 * self.slowest, most)):
                    return condition()
                self.slowest = max(self.slowest, time.monotonic() - began)
            return True

    def sign_in(self, name, password="demo"):
        """A session with a cookie; without one where there is no log-in, or it fails."""
        with suppress(AssertionError):
            return lab.sign_in(self.url(), name, password)
        return requests.Session()

    def gather(self, ports=(None, None, None), **transports):
        """Ana, luis and eva connect and join python."""
        self.begin()
        for name, port in zip(NAMES, ports, strict=True):
            session = self.sessions[name] = self.sessions.get(name) or self.sign_in(name)
            transport = transports.get(name, "websocket")
            if not Client(self, name, session, port, transport=transport).open:
                raise TimeoutError(f"{name} cannot connect.")
        people = self.clients[:]
        for one in people:
            self.join([one], "python")
        self.settle(people)
        return people

    def join(self, people, room):
        asked = [(one, one.ask("join", {"room": room})) for one in people]
        self.wait(lambda: all(one.answered(about) for one, about in asked))
        self.members[room] |= {one.name for one in people}

    def say(self, client, room="python", text=None, **more):
        """Say something in a room. Its members should hear it, if the speaker is one of them."""
        text, members = text or f"{client.name} {next(self.numbers)}", self.members[room]
        self.said[text] = {*members} if client.name in members else set()
        self.note(client.name, f'says "{text}" in {room}', text)
        data = {"room": room, self.events["message"]: text, "key": text} | more
        about = client.ask("chat", data if self.events["message"] else text)
        self.asked.append((client, about))
        return text, about

    def speak(self, people, rounds):
        """All speak at once, but at most 16 messages: some servers lose those of a larger POST."""
        for _ in range(rounds):
            for one in people * 5:
                self.say(one)
            if not self.wait(lambda: not (self.lost(people) and self.unanswered())):
                break

    def unanswered(self):
        """What was said and is not acknowledged, over connections that have not ended."""
        return [about for client, about in self.asked if not client.answered(about)]

    def lost(self, people):
        """Who has not heard what."""
        said = [*self.said.items()]
        return [
            (one, text)
            for one in people
            for text, hearers in said
            if one.name in hearers and text not in one.heard
        ]

    def settle(self, people, until=lambda: True):
        """Wait until nothing more can come.

        What is acknowledged is on its way to everyone, and a connection keeps its order: a client
        that hears what is said later has heard all that was said before.
        """
        self.wait(lambda: until() and not self.unanswered())
        if (waiting := self.unanswered()) and any(client.acks for client in self.clients):
            raise TimeoutError("The chat has stopped answering.", waiting[0])
        later = {self.say(one)[0] for one in people}
        self.wait(lambda: all(later <= one.heard.keys() or not one.open for one in people))
        with self.news:  # they have served, whether all are heard or not
            for text in later:
                del self.said[text]
                for client in self.clients:
                    client.heard.pop(text, None)


def come_back(client, relay, ready=lambda: True, again=False):
    """Cut a client off, and join over a new connection with the id of the last message heard."""
    record = client.record
    with record.news:
        client.deaf, size = True, len(client.heard)
        last_id = max(messages[0].get("id") or 0 for messages in client.heard.values())
        record.note(client.name, "is cut off", client.name)
    relay.cut()
    record.wait(ready)
    client = Client(record, client.name, client.session, relay.port, client.heard)
    about = client.ask("join", {"room": "python", "last_id": last_id})
    if again:
        record.wait(lambda: client.answered(about) or len(client.heard) > size)
        return come_back(client, relay)
    record.wait(lambda: client.answered(about))
    record.note(client.name, "is back", client.name)
    return client


def smallest(history, about):
    """The moments that show a fault. The last one is somebody's whom it is about."""
    shown = [moment for moment in history if moment.about in about]
    core = [place for place, moment in enumerate(shown) if moment.about not in NAMES] or [0]
    last = [place for place in core if shown and shown[place].who in about] or core
    return shown[max(core[0] - 1, 0) : last[-1] + 1]


def as_text(history):
    """Draw moments for a terminal: a column for each person, and time goes down."""
    people, cells = parts(history)
    width = max(map(len, cells), default=0) + 2
    lines = ["       ms  " + "".join(who.ljust(width) for who in people).rstrip()]
    for moment, cell in zip(history, cells, strict=True):
        ms = 1000 * (moment.second - history[0].second)
        lines += [f"{ms:9.1f}  {' ' * width * people.index(moment.who)}{cell}"]
    return "\n".join(lines)


def as_picture(history, title):
    """Draw moments in a notebook: a line for each person, and time goes to the right."""
    import matplotlib.pyplot as plt  # slow to load: only where there are pictures

    people, cells = parts(history)
    size = (12, 1.8 + 0.8 * len(people))
    axes, spoken = plt.subplots(figsize=size, layout="constrained")[1], {}
    for place, (moment, cell) in enumerate(zip(history, cells, strict=True)):
        here = place, people.index(moment.who)
        axes.plot(*here, "C0o", markersize=10)
        axes.annotate(cell, here, (4, 8), textcoords="offset points", rotation=12)
        if moment.what.startswith("says"):
            spoken[moment.about] = here
        elif moment.what.startswith("hears") and moment.about in spoken:
            axes.annotate("", here, spoken[moment.about], arrowprops={"arrowstyle": "->"})
    ms = [f"{1000 * (moment.second - history[0].second):.0f}" for moment in history]
    axes.set(title=title, xlabel="milliseconds (not to scale)", xlim=(-0.5, len(history) + 0.3))
    axes.set(xticks=range(len(history)), xticklabels=ms, yticks=range(len(people)))
    axes.set(yticklabels=people, ylim=(len(people) - 0.5, -1))
    axes.grid(axis="y")
    plt.show()


def parts(history):
    """Who is there, and what happens, in a few words."""
    short = [what if len(what) <= 44 else f"{what[:41]}..." for _, _, what, _ in history]
    return [*dict.fromkeys(moment.who for moment in history)], short
