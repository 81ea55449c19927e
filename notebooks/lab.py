"""What notebooks and tests both need: a server, a log-in, a cable, a light client."""

import os
import selectors
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, cycle
from pathlib import Path
from threading import Thread

import psutil
import requests
import socketio
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import TextMessage
from wsproto.extensions import PerMessageDeflate

ROOT, ME = Path(__file__).resolve().parent.parent, "127.0.0.1"
# Even behind a company's proxy, this machine is reached directly.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{ME},localhost"
# A program may have started others: Linux and macOS kill the whole group.
GUARD = "import os, sys; sys.stdin.read(); getattr(os, 'killpg', os.kill)(int(sys.argv[1]), 9)"


def until(condition, seconds=60):
    """Wait until condition() holds, and return its value; AssertionError if it never does."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


ports = count(97 * os.getpid())  # so that programs beside this one choose others


def free_port():
    """Return a free port; below 32768, where outgoing connections do not take it meanwhile."""
    while True:
        port = 10_000 + next(ports) % 22_768
        with suppress(OSError), socket.create_server((ME, port)):
            return port


class Server:
    """`python app.py`, or another command, on a free port; it stops however this program ends."""

    def __init__(self, *command, folder=ROOT, **settings):
        self.port = int(settings.get("PORT") or free_port())
        self.url, self.command = f"http://{ME}:{self.port}", command or ["app.py"]
        self.folder, port = folder, str(self.port)
        self.environ = os.environ | settings | {"PORT": port, "FLASK_RUN_PORT": port}
        self.start()

    def start(self):
        """Start it (again, after `stop`) and wait until it listens; `log` holds what it prints."""
        own = {"cwd": self.folder, "env": self.environ, "text": True, "errors": "replace"}
        out = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        out["start_new_session"] = True
        self.process = subprocess.Popen([sys.executable, *self.command], **own, **out)
        # The guard's input ends when this program does, even by a crash: then it kills the server.
        guard = [sys.executable, "-IS", "-c", GUARD, str(self.process.pid)]
        own = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.guard = subprocess.Popen(guard, **own)
        self.log = []
        self.reader = Thread(target=self.read, daemon=True)
        self.reader.start()
        try:
            until(lambda: self.process.poll() is not None or self.listens())
        except AssertionError:
            self.stop()
            raise

    def read(self):
        """Keep the last ten thousand lines: some programs print without end."""
        for line in iter(lambda: self.process.stdout.readline(10_000), ""):
            self.log.append(line.rstrip())
            del self.log[:-10_000]

    def listens(self):
        with socket.socket() as probe:
            return not probe.connect_ex((ME, self.port))

    def said(self, words):
        """The lines of the log with these words in them."""
        return [line for line in list(self.log) if words in line]

    @property
    def usage(self):
        """The program as `psutil` sees it: its memory, processor time and threads."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children()][-1]  # Windows: an environment's python starts another

    def stop(self):
        """Kill the program; a second time it does nothing."""
        self.guard.communicate()
        self.process.wait()
        self.reader.join(2)  # what it printed last is in `log` now

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()


def servers(*commands, **settings):
    """Start a server for each list of arguments, side by side, which takes less time."""
    with ThreadPoolExecutor() as pool:
        return [*pool.map(lambda command: Server(*command, **settings), commands)]


def sign_in(url, name, password="demo", form="login"):
    """A session with a user's cookie, as a browser has it; form="register" opens an account."""
    session, data = requests.Session(), {"username": name, "password": password}
    answer = session.post(f"{url}/{form}", data=data, allow_redirects=False, timeout=20)
    assert answer.status_code == 302, answer.text
    return session


class Relay:
    """A cable to a server. It keeps what passed, and can be slow, cut, silent, or not `open`.

    With several ports each new line leads to the next of them; `target` is the newest's.
    """

    def __init__(self, *ports, delay=0):
        self.targets, self.target = cycle(ports), ports[0]
        self.delay, self.open, self.silent, self.closed = delay, True, False, False
        self.lines, self.ends = 0, []  # how many lines there were; what is connected
        self.passed = []  # in order: (number of the line, "up" or "down", bytes)
        self.listener = socket.create_server((ME, 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://{ME}:{self.port}"
        Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            near, far = self.listener.accept()[0], socket.socket()
            if self.closed:
                return hang_up(near, far, self.listener)
            self.target = next(self.targets)
            if not self.open or far.connect_ex((ME, self.target)):
                hang_up(near)
                continue
            self.ends += near, far
            for line in (near, far, self.lines, "up"), (far, near, self.lines, "down"):
                Thread(target=self.carry, args=line, daemon=True).start()
            self.lines += 1

    def carry(self, one, other, number, way):
        if way == "up":  # TCP greets first: a round trip before anything is carried
            time.sleep(2 * self.delay)
        with suppress(OSError):
            while data := one.recv(65536):
                time.sleep(self.delay)
                until(lambda: not self.silent, float("inf"))
                self.passed.append((number, way, data))
                other.sendall(data)
        hang_up(one, other)

    def cut(self):
        """Cut every line there is. What is on its way is lost."""
        ends, self.ends = self.ends, []
        hang_up(*ends)

    def close(self):
        """Cut every line, and give the port back."""
        self.cut()
        self.closed = True
        socket.create_connection((ME, self.port)).close()


def hang_up(*ends):
    """Close TCP connections at once, whoever is reading them."""
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


class Wire:
    """A WebSocket that costs little, so that one program can be hundreds of listeners."""

    def __init__(self, port, session=None, query="", compress=False, **headers):
        cookies = session.cookies.items() if session else []
        headers = {
            "Host": f"{ME}:{port}",
            "Cookie": "; ".join(f"{name}={value}" for name, value in cookies),
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Key": "MDEyMzQ1Njc4OTAxMjM0NQ==",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Extensions": "permessage-deflate" if compress else None,
        } | headers
        lines = [f"GET /socket.io/?EIO=4&transport=websocket{query} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
        self.tcp, head = socket.create_connection((ME, port), 20), b""
        self.tcp.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        while not head.endswith(b"\r\n\r\n"):
            byte = self.tcp.recv(1)
            assert byte, "the server has hung up"
            head += byte
        self.status, self.inbox, self.part, self.bytes = int(head.split()[1]), [], "", 0
        deflate = PerMessageDeflate()
        deflate.finalize("permessage-deflate")
        extensions = [deflate] if b"permessage-deflate" in head else []
        self.frames = Connection(ConnectionType.CLIENT, extensions)

    def take(self):
        """Wait until bytes arrive: whole packets are in `inbox` then. False: it has hung up."""
        data = b""
        with suppress(ConnectionError):
            data = self.tcp.recv(65536)
        self.bytes += len(data)
        self.frames.receive_data(data)
        for event in self.frames.events() if data else ():
            if isinstance(event, TextMessage):
                self.part += event.data
                if event.message_finished:
                    self.inbox.append(self.part)
                    self.part = ""
        return bool(data)

    def send(self, *packets):
        """Send these packets in one write."""
        frames = [self.frames.send(TextMessage(packet)) for packet in packets]
        self.tcp.sendall(b"".join(frames))

    def read(self):
        """The next packet; None when the server has hung up."""
        while not self.inbox:
            if not self.take():
                return None
        return self.inbox.pop(0)

    def until(self, start):
        """Read up to the packet that begins so; after four pings in a row it never will come."""
        packets = []
        while not (packets and packets[-1].startswith(start)):
            packets.append(self.read())
            assert packets[-1] is not None and packets[-4:] != ["2"] * 4, packets[-9:]
            if packets[-1] == "2":
                self.send("3")
        return packets


def attend(wires, done, seconds=60):
    """Read what comes to any of the wires, and answer pings, until done()."""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as ears:
        for wire in wires:
            ears.register(wire.tcp, selectors.EVENT_READ, wire)
        while not done():
            assert time.monotonic() < deadline, "waited in vain"
            for ear, _ in ears.select(0.01):
                assert ear.data.take(), "the server has hung up"
                if "2" in ear.data.inbox:
                    ear.data.send("3")
                    ear.data.inbox.remove("2")


def listen(client, quiet=0.2):
    """Return the events that came to a SimpleClient, when it has been quiet for so many seconds."""
    events = []
    with suppress(socketio.exceptions.TimeoutError):
        while True:
            events.append(client.receive(timeout=quiet))
    return events


def tell(clients, who, event, **data):
    """Send an event, show its ack and what each client heard. Return who heard anything."""
    print("ack  ", clients[who].call(event, data))
    for client in clients.values():
        client.call("unknown", {})  # answered after all that was sent to the client before
    heard = {name: [event for event, _ in listen(client, 0.1)] for name, client in clients.items()}
    print("heard", heard)
    return {name for name in heard if heard[name]}


def score(guess, truth, unit=""):
    """Say what the reader guessed (None: nothing) and what it was: a number, a set or a text."""
    said = "You made no guess." if guess is None else f"You said {in_words(guess, unit)}."
    print(said, f"It was {in_words(truth, unit)}.")


def in_words(value, unit):
    if isinstance(value, int | float):
        return f"{round(value, 2):,} {unit}".rstrip()
    return (", ".join(sorted(value)) or "nobody") if isinstance(value, set) else str(value)


def check(answers, **tasks):
    """Try the answers, a notebook's globals(). A task returns True, or says what is wrong."""
    for name, task in tasks.items():
        try:
            wrong = task(answers[name])
            print(name, "is right." if wrong is True else f"is not right yet. {wrong or ''}")
        except Exception as error:
            print(name, f"fails: {error!r}" if name in answers else "is still missing.")
