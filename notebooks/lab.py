"""What notebooks and tests both need: a server, a log-in, a cable, a light client."""

import os
import selectors
import socket
import subprocess
import sys
import time
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from threading import Thread

import psutil
import requests
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import TextMessage
from wsproto.extensions import PerMessageDeflate

ROOT, ME = Path(__file__).resolve().parent.parent, "127.0.0.1"
# Even behind a company's proxy, this machine is reached directly.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{ME},localhost"
GUARD = "import os, sys; sys.stdin.read(); os.kill(int(sys.argv[1]), 9)"


def until(condition, seconds=20):
    """Wait until condition() holds, and return its value; AssertionError if it never does."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


class Server:
    """`python app.py`, or another command, on a free port; it stops however this program ends."""

    def __init__(self, *command, **settings):
        with socket.create_server((ME, int(settings.get("PORT", 0)))) as free:
            self.port = free.getsockname()[1]
        self.url, self.command = f"http://{ME}:{self.port}", command or ["app.py"]
        self.environ = os.environ | settings | {"PORT": str(self.port)}
        self.start()

    def start(self):
        """Start it (again, after `stop`) and wait until it listens; `log` holds what it prints."""
        own = {"cwd": ROOT, "env": self.environ, "text": True, "start_new_session": True}
        out = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen([sys.executable, *self.command], **own, **out)
        # The guard's input ends when this program does, even by a crash: then it kills the server.
        guard = [sys.executable, "-c", GUARD, str(self.process.pid)]
        self.guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        self.log, lines = [], (line.rstrip() for line in self.process.stdout)
        Thread(target=self.log.extend, args=[lines], daemon=True).start()
        until(lambda: self.process.poll() is not None or self.listens())

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

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()


def sign_in(url, name, password="demo", form="login"):
    """A session with a user's cookie, as a browser has it; form="register" opens an account."""
    session, data = requests.Session(), {"username": name, "password": password}
    answer = session.post(f"{url}/{form}", data=data, allow_redirects=False)
    assert answer.status_code == 302, answer.text
    return session


class Relay:
    """A cable to a server. It keeps what passed, and can be slow, cut, silent, or not `open`.

    With several ports each new line leads to the next of them; `target` is the newest's.
    """

    def __init__(self, *ports, delay=0):
        self.targets, self.target = cycle(ports), ports[0]
        self.delay, self.open, self.silent = delay, True, False
        self.lines, self.ends = [], []  # what passed on each line: (up, down); what is connected
        self.listener = socket.create_server((ME, 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://{ME}:{self.port}"
        Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            near, far = self.listener.accept()[0], socket.socket()
            self.target = next(self.targets)
            if not self.open or far.connect_ex((ME, self.target)):
                hang_up(near)
                continue
            self.lines.append((up := bytearray(), down := bytearray()))
            self.ends += near, far
            for line in (near, far, up), (far, near, down):
                Thread(target=self.carry, args=line, daemon=True).start()

    def carry(self, one, other, passed):
        with suppress(OSError):
            while data := one.recv(65536):
                time.sleep(self.delay)
                until(lambda: not self.silent, float("inf"))
                passed += data
                other.sendall(data)
        hang_up(one, other)

    def first_line(self):
        """The first line of text that went up to the server."""
        lines = until(lambda: [up for up, down in self.lines if up])
        return lines[0].partition(b"\r\n")[0].decode()

    def cut(self):
        """Cut every line there is. What is on its way is lost."""
        ends, self.ends = self.ends, []
        hang_up(*ends)


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
        """Read up to the packet that begins so; what has not come four pings later never will."""
        packets = []
        while not (packets and packets[-1].startswith(start)):
            packets.append(self.read())
            assert packets[-1] is not None and packets.count("2") < 4, packets[:9] + packets[-9:]
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
                if ear.data.inbox[-1:] == ["2"]:
                    ear.data.send("3")
                    ear.data.inbox.pop()


def score(guess, truth, unit=""):
    """Compare the guess (None: there is none) with what was seen: a number, a set, a text."""
    if isinstance(truth, set) and isinstance(guess, str):
        guess = {guess}
    said, was = in_words(guess, unit), in_words(truth, unit)
    numbers = isinstance(guess, int | float) and isinstance(truth, int | float)
    if guess is None:
        print(f"You made no guess. It was {was}.")
    elif said == was:
        print(f"You said {said}, and it was.")
    elif numbers and min(guess, truth) > 0:
        factor = max(guess, truth) / min(guess, truth)
        print(f"You said {said}, it was {was}: off by a factor of {factor:.2g}.")
    else:
        print(f"You said {said}, it was {was}.")


def in_words(value, unit):
    """Return a value as a person writes it: 6,204 bytes; ana, luis; nobody."""
    if isinstance(value, int | float):
        return f"{value:,.0f} {unit}".strip() if value >= 100 else f"{value:.3g} {unit}".strip()
    if isinstance(value, set):
        return ", ".join(sorted(map(str, value))) or "nobody"
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)


def check(answers, **tasks):
    """Try the answers, a notebook's globals(). A task returns True, or says what is wrong."""
    for name, task in tasks.items():
        try:
            verdict = task(answers[name])
        except Exception as error:
            verdict = f"It fails: {error!r}"
        if name not in answers:
            print(f"{name} is still missing.")
        else:
            print(
                f"{name} is right."
                if verdict is True
                else f"{name} is not right yet. {verdict or ''}"
            )
