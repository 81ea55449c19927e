"""Full duplex and rooms: a chat to watch, to count and to break, in one file.

    python app.py            then open http://127.0.0.1:5000 in two browsers

Every event from a client carries one JSON object and gets an ack: {"ok": true, ...} or {"ok": false, "error": "..."}.

    event    a client sends           the ack adds                   who hears it
    join     room, last_id?           room, members, missed, gap     the room, the joiner included
    leave    room                                                    the room, not the leaver
    chat     message, room?, key?     id                             the room; without a room everyone connected
    typing   room                                                    the room, but no connection of the sender
    invite   room, username                                          that user, on all connections
    expel    room, username                                          that user, and the room as a `leave`

Read sections 2 to 6 from top to bottom: set-up, state, users, pages, events. They are the lesson, and a beginner may
stop there. Sections 7 and 8 are what makes it hold when a member is slow, a cable is pulled, or somebody means harm.
"""

import os

if (ASYNC_MODE := os.environ.get("ASYNC_MODE", "threading")) == "gevent":
    from gevent import monkey

    monkey.patch_all()  # before anything else is imported

import errno
import inspect
import math
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections import defaultdict, deque
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import distribution
from itertools import takewhile
from types import SimpleNamespace
from urllib.parse import parse_qs

import engineio
import segno
import simple_websocket
from engineio.exceptions import EngineIOError, UnknownPacketError
from flask import Flask, g, jsonify, redirect, render_template, request, send_file, url_for
from flask.sessions import SecureCookieSessionInterface
from flask_bootstrap import Bootstrap5
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user, logout_user
from flask_socketio import ConnectionRefusedError, SocketIO, emit, join_room, leave_room
from limits import RateLimitItemPerMinute, storage, strategies
from werkzeug.exceptions import HTTPException
from werkzeug.security import check_password_hash, generate_password_hash
from werkzeug.serving import WSGIRequestHandler, make_server
from wsproto.frame_protocol import CloseReason, FrameProtocol
from wsproto.utilities import ProtocolError

# 2. Set-up -----------------------------------------------------------------------------------------------------------

HOST, PORT = os.environ.get("HOST", "127.0.0.1"), os.environ.get("PORT", "5000")
HISTORY = 500  # messages that a room remembers, keys that a user's
RATE, BURST = 20, 60  # messages that a user may say in a second, and at once
MAX_BYTES = 64 * 1024  # of one packet, one form

app = Flask(__name__)
app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(),
    SESSION_COOKIE_NAME=f"session-{PORT}",  # two apps on one machine do not sign each other out
    SESSION_COOKIE_SAMESITE="Lax",
    MAX_CONTENT_LENGTH=MAX_BYTES,
    BOOTSTRAP_SERVE_LOCAL=True,
    DEMO_ACCOUNTS=[],
)
Bootstrap5(app)
login_manager = LoginManager(app)
socketio = SocketIO(
    app,
    async_mode=ASYNC_MODE,
    async_handlers=False,  # the events of a connection are handled in the order in which they were sent
    cors_allowed_origins=[],  # section 8 asks where a request comes from
    max_http_buffer_size=MAX_BYTES,
    ping_interval=8,  # seconds between two pings; who does not answer one
    ping_timeout=5,  # within these is gone
)

# 3. State: who has an account, who may enter which room, who is there, what was said ---------------------------------

lock = threading.RLock()  # held from the moment something changes until all who shall hear of it have been told
news = threading.Condition(lock)  # wakes those who poll and wait


class Refused(HTTPException):
    """What the rules forbid: the reason, in words for a person, and the HTTP status that means the same."""

    def __init__(self, reason, code, **more):
        super().__init__(reason)
        self.code, self.answer = code, {"ok": False, "error": reason, **more}


def require(condition, reason, code=400, **more):
    if not condition:
        raise Refused(reason, code, **more)


def text(data, name):
    """The text that a client sent as data[name]; else Refused."""
    value = data.get(name)
    whole = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # half a character is no text
    require(whole, f'Send one JSON object in which "{name}" is text.')
    return value


class User(UserMixin):
    """An account. Its token stands for it in cookies and is renewed at log-out: an old cookie opens nothing."""

    def __init__(self, id, name, password_hash):
        self.id, self.name, self.password_hash, self.token = id, name, password_hash, secrets.token_urlsafe()
        self.said = {}  # key -> id of the message that it was sent with
        self.allowance, self.counted_at = BURST, 0

    def get_id(self):
        return self.token

    def spend(self, now):
        """Take one message from the allowance at `now` (seconds); Refused when it is used up."""
        self.allowance = min(BURST, self.allowance + (now - self.counted_at) * RATE)
        self.counted_at = now
        wait = math.ceil(1000 * (1 - self.allowance) / RATE) / 1000
        require(self.allowance >= 1, f"Slow down: {RATE} messages a second are enough.", 429, retry_after=wait)
        self.allowance -= 1


class State:
    def __init__(self):
        self.users, self.tokens = {}, {}  # name in small letters -> User, token -> User
        self.owners = {"python": None, "flask": None, "staff": "ana"}  # room -> its owner's name
        self.guests = defaultdict(set)  # room -> names of those invited
        self.here = defaultdict(dict)  # room -> {connection: name}; all who are connected are in the room None
        self.history = defaultdict(lambda: deque(maxlen=HISTORY + 1))  # room -> messages, one more than is given out
        self.started = self.last_id = int(time.time() * 1000)  # by the clock: so ids rise over a restart, too

    def register(self, name, password_hash):
        """Open an account with a room of its own; Refused if there is such a name, whatever the case."""
        require(name.lower() not in self.users, "That name is taken.", 409)
        user = User(len(self.users) + 1, name, password_hash)
        self.users[name.lower()] = self.tokens[user.token] = user
        self.owners[f"room{user.id}"] = name
        return user

    def renew(self, user):
        """Give the user a new token and return the old one."""
        old, user.token = user.token, secrets.token_urlsafe()
        self.tokens[user.token] = self.tokens.pop(old)
        return old

    def may_enter(self, name, room):
        return self.owners[room] in (None, name) or name in self.guests[room]

    def guest(self, host, room, name):
        """The name as that user writes it; Refused unless `host` owns the room and the guest is somebody else."""
        require(self.owners.get(room) == host, "Only the owner of a room invites and expels.", 403)
        require(name.lower() in self.users, "There is no user of that name.", 404)
        require(name.lower() != host.lower(), "You are the owner: nobody invites or expels you.")
        return self.users[name.lower()].name

    def members(self, room):
        """The names of those in a room, each once, sorted."""
        return sorted(set(self.here[room].values()))

    def connections(self, name, room=None):
        """The user's connections that are in the room, by default all."""
        return [connection for connection, owner in self.here[room].items() if owner == name]

    def say(self, user, data, connection=None):
        """Number and keep data["message"], said in data["room"] or, without a room, to all.

        Returns its id and the message as those who hear it get it, or None in its place if its key was heard before.
        """
        key, room = data.get("key"), data.get("room")
        require(key is None or 1 <= len(text(data, "key")) <= 64, "A key has 1 to 64 characters.")
        if key in user.said:
            return user.said[key], None
        message = text(data, "message").strip()
        require(1 <= len(message) <= 500, "A message has 1 to 500 characters.")
        joined = room is None or connection in self.here.get(text(data, "room"), ())
        require(joined, "Only those who have joined a room may speak in it.", 403)
        user.spend(time.monotonic())
        self.last_id += 1
        said = {"id": self.last_id, "room": room, "username": user.name, "message": message}
        said["created_at"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.history[room].append(said)
        if key is not None:
            user.said[key] = said["id"]
            if len(user.said) > HISTORY:
                del user.said[next(iter(user.said))]
        return said["id"], said

    def since(self, room, last_id):
        """A room's messages newer than `last_id`, oldest first, and whether some of them are no longer kept."""
        newer = [*takewhile(lambda message: message["id"] > last_id, reversed(self.history[room]))]
        return newer[:HISTORY][::-1], len(newer) > HISTORY or 0 < last_id < self.started


state = State()

# 4. Users ------------------------------------------------------------------------------------------------------------

hashing = threading.Lock()  # one password at a time: each takes 32 MB while it is hashed
wrong, TEN_A_MINUTE = strategies.FixedWindowRateLimiter(storage.MemoryStorage()), RateLimitItemPerMinute(10)
NO_HASH = generate_password_hash(secrets.token_hex())  # an unknown name takes as long as a wrong password


@login_manager.user_loader
def load_user(token):
    return state.tokens.get(token)


@login_manager.unauthorized_handler
def sign_in_first():
    require(request.path != "/messages", "Sign in first.", 401)
    return redirect(url_for("login", next=request.full_path.rstrip("?") if request.method == "GET" else None))


def enter(user):
    """Sign the user in and go on to `next`, if that is a path of this site."""
    login_user(user)
    path = request.values.get("next", "")
    return redirect(path if re.fullmatch(r"/(?![/\\])[^\x00-\x1f\x7f]*", path) else url_for("index"))


@app.route("/login", methods=["GET", "POST"])
def login():
    if request.method == "GET":
        return render_template("login.html")
    name = g.username = request.form.get("username", "")
    password = request.form.get("password", "")
    pair = name.lower()[:20], request.remote_addr
    with hashing:
        require(wrong.test(TEN_A_MINUTE, *pair), "Ten wrong passwords for this name: wait a minute.", 429)
        user = state.users.get(name.lower())
        right = check_password_hash(user.password_hash if user else NO_HASH, password) and user
        require(right or not wrong.hit(TEN_A_MINUTE, *pair), "Name or password is wrong.", 401)
    return enter(user)


@app.post("/register")
def register():
    name = g.username = request.form.get("username", "")
    password = request.form.get("password", "")
    require(re.fullmatch("[A-Za-z0-9_-]{1,20}", name), "A name has 1 to 20 letters (a to z), digits, _ or -.")
    require(len(password) >= 8, "A password has 8 characters or more.")
    with hashing:
        password_hash = generate_password_hash(password)
    with lock:
        return enter(state.register(name, password_hash))


@app.post("/logout")
@login_required
def logout():
    """End every session, socket and waiting poll of the user, on all devices."""
    with lock:
        for connection in state.connections(current_user.name):
            socketio.server.disconnect(connection)
        hang_up(state.renew(current_user))
        news.notify_all()
    logout_user()
    return redirect(url_for("login"))


# 5. Pages ------------------------------------------------------------------------------------------------------------


@app.get("/")
@login_required
def index():
    return render_template("index.html", last_id=state.last_id)


@app.get("/room")
@login_required
def room_page():
    with lock:
        rooms = [(room, owner, state.may_enter(current_user.name, room)) for room, owner in state.owners.items()]
    handlers = {handler.__name__: inspect.getsourcelines(handler) for handler in HANDLERS}
    return render_template("room.html", rooms=rooms, handlers=handlers)


@app.get("/socket.io.js")
def socket_io_client():
    """The browser's Socket.IO client, out of an installed package: a lecture hall may have no network."""
    return send_file(distribution("nicegui").locate_file("nicegui/static/socket.io.min.js"), max_age=3600)


@app.get("/messages")
@login_required
def messages():
    """The open channel for those who poll: at once or, as a long poll, when there is news within `wait` seconds."""
    try:
        after, wait = int(request.args.get("after", 0)), float(request.args.get("wait", 0))
    except ValueError:
        raise Refused('"after" and "wait" are numbers.', 400) from None
    require(not math.isnan(wait), '"wait" is a number of seconds.')
    token = current_user.token
    with news:
        news.wait_for(lambda: token not in state.tokens or state.since(None, after)[0], min(25, wait))
        found, _ = state.since(None, after)
    require(token in state.tokens, "You have signed out.", 401)
    return jsonify(messages=found, last_id=found[-1]["id"] if found else after)


@app.post("/messages")
@login_required
def post_message():
    """Somebody who holds no socket says something to all; those on sockets hear it like any other message."""
    try:
        data = request.get_json(force=True, silent=True)
    except RecursionError:
        data = None
    return jsonify(id=say(data if isinstance(data, dict) else {})), 201


@app.errorhandler(HTTPException)
def say_why(error):
    """What went wrong, in the form of the page: the log-in form once more, or JSON for those who poll."""
    if request.path in ("/login", "/register"):
        return render_template("login.html", error=error.description), error.code
    if request.path == "/messages":
        return getattr(error, "answer", {"ok": False, "error": error.description}), error.code
    return error


@app.before_request
def own_pages_only():
    g.nonce = secrets.token_urlsafe()
    require(request.method != "POST" or from_here(request.environ), "This was sent from another site.", 403)


@app.after_request
def protect(response):
    """Nothing runs or loads but what the templates name; no other site frames a page, no disk keeps a copy."""
    response.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'nonce-{g.nonce}'; style-src 'self' 'nonce-{g.nonce}'; connect-src 'self'; "
        "img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


# 6. Events -----------------------------------------------------------------------------------------------------------


@socketio.server.eio.on("message")
def one_at_a_time(session, data):
    """All that clients send passes here: the lock is held until the event is handled and its ack is sent."""
    with lock:
        if session in socketio.server.environ:  # else it came after the farewell
            socketio.server._handle_eio_message(session, data)


def channel(room):
    """Socket.IO's name for a room. The prefix keeps it apart from connection ids, which are rooms there, too."""
    return f"room:{room}" if room else None


def say(data, connection=None):
    """Number a message, keep it and let it be heard, without letting go of the lock: so all hear the same order."""
    with lock:
        message_id, message = state.say(current_user, data, connection)
        if message:
            socketio.emit("chat", message, to=channel(message["room"]))  # to=None: everyone who is connected
            news.notify_all()
    return message_id


def my_room(data):
    """The room that an event names; Refused unless this connection has joined it."""
    room = text(data, "room")
    require(request.sid in state.here.get(room, ()), "You are not in that room.")
    return room


def take_out(connection, room, reason):
    """Take a connection out of a room. When it was the user's last one there, the room hears `leave`."""
    name = state.here[room].pop(connection)
    leave_room(channel(room), sid=connection, namespace="/")
    if not state.connections(name, room):
        left = {"room": room, "username": name, "members": state.members(room), "reason": reason}
        emit("leave", left, to=channel(room))


@socketio.on("connect")
def connect(auth=None):
    """A page opens its connection; nobody hears it. Refused: who is not signed in, or not the one the page shows."""
    if not current_user.is_authenticated:
        raise ConnectionRefusedError("Sign in first.")
    name = current_user.name
    if isinstance(auth, dict) and auth.get("username", name) != name:
        raise ConnectionRefusedError(f"You are signed in as {name} now: load the page again.")
    state.here[None][request.sid] = name
    join_room(f"user:{name}")  # a private channel of all the user's connections
    print(f"connected: {name}", flush=True)


@socketio.on("disconnect")
def disconnect(reason):
    """A connection ended, politely or not. Each of its rooms hears `leave`."""
    with lock:
        for room in [room for room, there in state.here.items() if room and request.sid in there]:
            take_out(request.sid, room, reason)
        name = state.here[None].pop(request.sid)
    print(f"disconnected: {name} ({reason})", flush=True)


@socketio.on("join")
def join(data):
    """A connection enters a room. It alone hears what it missed, as ordinary `chat`; then the room hears `join`."""
    name, room, last_id = current_user.name, text(data, "room"), data.get("last_id") or 0
    require(type(last_id) is int and last_id >= 0, '"last_id" is the id of the last message that you heard.')
    require(room in state.owners, "There is no room of that name.", 404)
    require(state.may_enter(name, room), f"{room} is {state.owners[room]}'s, who has not invited you.", 403)
    missed, gap = state.since(room, last_id)
    for message in missed:
        emit("chat", message)  # without `to`: to this connection alone
    new = not state.connections(name, room)
    state.here[room][request.sid] = name
    join_room(channel(room))
    if new:
        emit("join", {"room": room, "username": name, "members": state.members(room)}, to=channel(room))
    return {"ok": True, "room": room, "members": state.members(room), "missed": len(missed), "gap": gap}


@socketio.on("leave")
def leave(data):
    """A connection leaves a room; those who stay hear it."""
    take_out(request.sid, my_room(data), "left")
    return {"ok": True}


@socketio.on("chat")
def chat(data):
    """A member says something: the room hears it, the sender included. Without a room everyone connected does."""
    return {"ok": True, "id": say(data, request.sid)}


@socketio.on("typing")
def typing(data):
    """A member is typing: the room hears it, but none of the sender's own connections."""
    name, room = current_user.name, my_room(data)
    emit("typing", {"room": room, "username": name}, to=channel(room), skip_sid=state.connections(name, room))
    return {"ok": True}


@socketio.on("invite")
def invite(data):
    """The owner of a room lets somebody in, who hears it on every connection."""
    host, room = current_user.name, text(data, "room")
    guest = state.guest(host, room, text(data, "username"))
    state.guests[room].add(guest)
    emit("invite", {"room": room, "by": host}, to=f"user:{guest}")
    return {"ok": True}


@socketio.on("expel")
def expel(data):
    """The owner shows somebody the door, who hears it on every connection; the room hears `leave`."""
    host, room = current_user.name, text(data, "room")
    guest = state.guest(host, room, text(data, "username"))
    state.guests[room].discard(guest)
    emit("expel", {"room": room, "by": host}, to=f"user:{guest}")
    for connection in state.connections(guest, room):
        take_out(connection, room, "expelled")
    return {"ok": True}


HANDLERS = connect, disconnect, join, leave, chat, typing, invite, expel


@socketio.on("*")
def unknown(event, data):
    """Any other event: nobody hears it."""
    raise Refused("There is no such event. There are join, leave, chat, typing, invite and expel.", 404)


@socketio.on_error_default
def refuse(error):
    """What a handler refuses becomes the ack that says why."""
    if isinstance(error, Refused):
        return error.answer
    raise error


# 7. One frame for a room ---------------------------------------------------------------------------------------------
#
# A broadcast is one message written many times. The library puts it into a queue for each member and wakes a thread for
# each, which frames it anew. Here it is framed once, and for each member of the room: written, by whoever sends it. Who
# does not keep up is cut, and comes back with `last_id`. Replaced here, and read in: `Packet`, `Socket`, its
# `_upgrade_websocket` and the server's `_service_task` of engineio 4.15; `_send_eio_packet` of socketio 5.18; `_thread`
# and `_handle_events` of simple-websocket 1.1; Flask-SocketIO 5.7 keeps `saved_session`.

writing = nullcontext() if ASYNC_MODE == "gevent" else lock  # gevent interrupts nobody who does not wait


class EnginePacket(engineio.packet.Packet):
    @cached_property
    def frame(self):
        """This packet as a WebSocket frame: one, however many hear it."""
        return bytes(FrameProtocol(client=False, extensions=[]).send_data(self.encode()))


PING, PONG, NOOP = EnginePacket(2), EnginePacket(3, "probe"), EnginePacket(6)
GOODBYE = FrameProtocol(client=False, extensions=[]).close(CloseReason.GOING_AWAY)


class WebSocket(simple_websocket.Server):
    """The server's end of a WebSocket: whole frames, one writer at a time, and nobody waits for another's line."""

    def __init__(self, environ):
        self.tcp = environ.get("werkzeug.socket") or environ["wsgi.input"].raw._sock  # the latter: gevent
        self.reader, self.waiting, self.busy_until = threading.get_ident(), deque(), 0
        no_deflate = {"HTTP_SEC_WEBSOCKET_EXTENSIONS": ""}  # a bomb of 0.5 MB would inflate to 500
        super().__init__(environ | no_deflate | {"werkzeug.socket": self}, max_message_size=MAX_BYTES)
        self.flush()
        time.sleep(0.02)  # the answer leaves alone: simple_websocket.Client overlooks what comes with it
        self.at_once = socket.socket(fileno=self.tcp.fileno())  # the same connection, for those who cannot wait
        self.at_once.setblocking(False)

    def _thread(self):
        """The library would read in a second thread: the one that serves the request does, in `wait`."""

    def send(self, frame):
        """Write a frame at once, or cut the line. What the reading thread sends waits until it reads again."""
        try:
            if self.waiting or threading.get_ident() == self.reader:
                self.waiting.append(frame)
                fits = len(self.waiting) <= 2 * HISTORY
            else:
                fits = self.at_once.send(frame) == len(frame)
        except OSError:
            fits = False
        if not fits:
            self.cut()

    def wait(self):
        """Write what waits, at the pace of this line, then read the next packet; None when there is none to come."""
        with suppress(OSError, ProtocolError):
            self.flush()
            while self.connected and not self.input_buffer:
                received = self.tcp.recv(self.receive_bytes)
                with lock:
                    self.ws.receive_data(received or None)
                    self.connected = self._handle_events()
                self.flush()
            return self.input_buffer.pop(0) if self.input_buffer else None

    def flush(self):
        while self.waiting:
            self.tcp.sendall(frame := self.waiting[0])
            with lock:
                self.waiting.popleft()
            now = time.time()  # 10 KB a second are slow, but not silent: history may take its time
            self.busy_until = min(now + 30, max(now, self.busy_until) + len(frame) / 10_000)

    def end(self):
        """Say goodbye, if the line still takes it, and close: whichever thread reads or writes it wakes up."""
        with lock:
            with suppress(OSError):
                if self.connected and not self.waiting:
                    self.at_once.send(GOODBYE)
            self.at_once.detach()
        self.cut()

    def cut(self):
        with suppress(OSError):
            self.tcp.shutdown(socket.SHUT_RDWR)


class Connection(engineio.socket.Socket):
    """A client's connection. Once it has a WebSocket, what is sent is not queued but written."""

    websocket = None

    def send(self, packet):
        with writing:
            if self.websocket:
                self.websocket.send(packet.frame)
            else:
                self.queue.put(packet)

    def close(self, wait=True, abort=False, reason=None):
        with lock:
            super().close(wait=False, abort=abort, reason=reason)  # nobody waits for a client that may never fetch
            if self.websocket:
                self.websocket.end()  # a ping time-out alone would leave it open

    def take(self, data):
        """Handle one packet that the client sent: a message, the answer to a ping, or its goodbye."""
        if data[:1] == "4" and len(data) > 1:
            self.server._trigger_event("message", self.sid, data[1:])
        elif data == "3":
            self.schedule_ping()
        elif data == "1":
            self.close(abort=True, reason=self.server.reason.CLIENT_DISCONNECT)
        elif isinstance(data, str) and data[:1] != "b":  # else an attachment: no event has any
            raise UnknownPacketError

    def poll(self):
        """What the next poll fetches: 16 packets at most, for the Python client takes no more at a time."""
        packets = [self.queue.get()]
        while packets[-1] and len(packets) < 16 and not self.queue.empty():
            packets.append(self.queue.get())
        if packets[-1] is None:  # closed: whoever else polls wakes up, too
            self.queue.put(packets.pop())
        return packets

    def handle_post_request(self, environ):
        """Take the packets of one POST."""
        body = b""
        with suppress(OSError):  # nobody any more
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        for data in body.decode(errors="surrogateescape").split("\x1e"):  # `text` refuses what was no UTF-8
            self.take(data)

    def _upgrade_websocket(self, environ, start_response):
        """Serve a WebSocket until it ends, in the thread of the request that asked for it."""
        try:
            websocket = WebSocket(environ)
        except (ProtocolError, UnicodeError, OSError):
            return self.server._bad_request()
        try:
            if not self.connected or self.moves_to(websocket):
                self.serve(websocket)
        finally:
            websocket.end()
        raise BrokenPipeError(errno.EPIPE, "done")  # tells the web server that there is nothing left to answer

    def moves_to(self, websocket):
        """Whether a polling client upgrades: it sends a probe, gets an answer, ends its poll, and says so."""
        with lock:
            if self.upgrading:
                return False
            self.upgrading = True  # from here on its polls are answered with nothing
        if websocket.wait() == "2probe":
            websocket.send(PONG.frame)
            self.send(NOOP)  # for the poll that waits
            self.upgraded = websocket.wait() == "5"
        self.upgrading = False
        return self.upgraded

    def serve(self, websocket):
        with lock:
            while not self.queue.empty() and (packet := self.queue.get()):
                websocket.send(packet.frame)
            self.websocket, self.connected, self.upgraded = websocket, True, True
        with suppress(EngineIOError):  # what is no packet ends the connection
            while not self.closed and (data := websocket.wait()) is not None:
                self.take(data)
        self.close(abort=True, reason=self.server.reason.TRANSPORT_CLOSE)

    def schedule_ping(self):
        """The first packet, or an answer to a ping: `heartbeat` pings again in a while."""
        self.last_ping, self.ping_at = None, time.time() + self.server.ping_interval

    def beat(self, now):
        """Ping the client when it is time to; end the connection of one that did not answer, or does not fetch."""
        if self.closed:
            self.server.sockets.pop(self.sid, None)
        elif self.queue.qsize() > 10 * HISTORY:
            self.close()
        elif not self.last_ping and now > self.ping_at:
            self.last_ping = now
            self.send(PING)
        elif not self.websocket or now > self.websocket.busy_until:
            self.check_ping_timeout()


def heartbeat():
    """Once a second, for all connections: one thread, where the library has one for each that waits to ping."""
    while True:
        socketio.sleep(1)
        for connection in [*socketio.server.eio.sockets.values()]:
            with lock:
                connection.beat(time.time())


def write(session, packet):
    """For each member of a room the library calls this."""
    if connection := socketio.server.eio.sockets.get(session):
        connection.send(packet)


class Sessions(SecureCookieSessionInterface):
    """An event has the session that its connection was opened with: no cookie is read again."""

    def open_session(self, app, request):
        return request.environ.get("saved_session") or super().open_session(app, request)


app.session_interface = Sessions()
if hasattr(engineio.socket.Socket, "_upgrade_websocket") and hasattr(simple_websocket.Server, "_handle_events"):
    engineio.packet.Packet, engineio.socket.Socket = EnginePacket, Connection
    socketio.server.eio._service_task, socketio.server._send_eio_packet = heartbeat, write
else:
    print("engineio or simple-websocket has changed: each member's frame is made and queued by the library.")
    engineio.payload.Payload.max_decode_packets = MAX_BYTES  # by default more than 16 in one POST are thrown away

# 8. The door: who may open a connection, decided before a byte of a body is read; what may come through it -----------


def from_here(environ):
    """Whether no other site's page sent this. X-Forwarded-Host is not asked: anybody can forge it."""
    site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
    if site:
        return site in ("same-origin", "none")
    return origin is None or origin.partition("://")[2] == environ.get("HTTP_HOST")


def door(environ, start_response, inside=app.wsgi_app):
    """Let a request to Socket.IO in if a signed-in user's own page sent it, and to a session only who opened it."""
    try:
        # Another site may have had its own name resolved to this machine.
        name = environ.get("HTTP_HOST", HOST).split(":")[0].lower()
        require(name in app.config.get("NAMES", [name]), "That is not the name of this server.", 421)
        length = environ.get("CONTENT_LENGTH", "")
        sized = re.fullmatch("[0-9]{0,5}", length) and "HTTP_TRANSFER_ENCODING" not in environ
        if environ["PATH_INFO"].startswith("/socket.io/"):
            require(from_here(environ), "This was sent from another site.", 403)
            with app.request_context(environ):
                environ["REMOTE_USER"] = token = current_user.get_id()
            require(token, "Sign in first.", 401)
            if "HTTP_UPGRADE" in environ:
                environ["HTTP_CONNECTION"] = "Upgrade"  # not to be half asked for
            session = parse_qs(environ["QUERY_STRING"]).get("sid", [None])[0]
            opened_by = socketio.server.environ.get(session, {}).get("REMOTE_USER")
            require(session is None or opened_by == token, "This session is not yours, or has ended.", 403)
            if session and not sized:
                socketio.server.eio.disconnect(session)
        require(sized, "Say how long the body is, and send 64 KB at most.", 413)  # -1 would be read for ever
    except Refused as refused:
        return refused(environ, start_response)
    return inside(environ, start_response)


def hang_up(token):
    """Close every connection that came in with this token, even one that never got as far as `connect`."""
    for session, environ in list(socketio.server.environ.items()):
        if environ.get("REMOTE_USER") == token:
            socketio.server.eio.disconnect(session)


class Packet(socketio.server.packet_class):
    """A Socket.IO packet. Its event has a name that clients may use and one JSON object, whatever was sent."""

    def decode(self, encoded):
        name, values = "", []
        with suppress(TypeError, ValueError, RecursionError):  # no JSON, or 10,000 lists, each in the next
            super().decode(encoded)
            if self.packet_type in (0, 1, 3):  # CONNECT, DISCONNECT, ACK
                return
            name, *values = self.data
        known = isinstance(name, str) and name not in ("connect", "disconnect", "*")
        one_object = len(values) == 1 and isinstance(values[0], dict)
        self.packet_type, self.data = 2, [name if known else "", values[0] if one_object else {}]


socketio.server.packet_class = Packet
app.wsgi_app = door

# 9. Run --------------------------------------------------------------------------------------------------------------


class Handler(WSGIRequestHandler):
    timeout = 30  # seconds that a client may take to send its request
    disable_nagle_algorithm = True  # small frames leave at once

    def make_environ(self):
        """What nobody has read is thrown away in small pieces: Werkzeug would take 10 MB of it at a time."""
        environ, body = super().make_environ(), self.rfile
        self.rfile = SimpleNamespace(read=lambda size: body.read1(MAX_BYTES), close=body.close)
        return environ

    def run_wsgi(self):
        with suppress(ValueError):  # a URL that is none
            super().run_wsgi()
        self.close_connection = True  # the last frame of a WebSocket is not the next request

    def log_request(self, code="-", size="-"):
        """No access lines: the events print who comes and goes."""


def serve_with_gevent(listener):
    """The same on gevent: a request, a connection or a poll that waits takes no thread, all take turns in one."""
    from gevent import pywsgi

    class GeventHandler(pywsgi.WSGIHandler):
        def handle(self):
            self.socket.settimeout(Handler.timeout)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(OSError):  # nobody any more
                super().handle()

        def _handle_client_error(self, error):
            return super()._handle_client_error(ValueError(error))  # of any other kind it prints a traceback

    pywsgi.WSGIServer(listener, app, log=None, error_log=None, handler_class=GeventHandler).serve_forever()


def own_address():
    """This machine's address in the local network; asking for the way to another sends nothing there."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect(("192.0.2.1", 9))
        return way.getsockname()[0]
    return "127.0.0.1"


def welcome():
    """Say where the server is. Demo accounts have a password that everybody knows: only this machine gets them."""
    address = own_address() if HOST == "0.0.0.0" else HOST
    url = f"http://{address}:{PORT}"
    print(f"Full duplex and rooms: open {url}")
    if re.fullmatch(r"localhost|127(\.\d+){3}", HOST):
        app.config.update(NAMES=["localhost", "127.0.0.1", HOST], DEMO_ACCOUNTS=["ana", "luis", "eva"])
        for name in app.config["DEMO_ACCOUNTS"]:
            state.register(name, generate_password_hash("demo"))
        print("Sign in as ana, luis or eva, password demo: two people, two browsers.")
    else:
        app.config.update(ADDRESS=address, QR_CODE=segno.make(url))
        app.config["QR_CODE"].terminal(compact=True)
        print("Others can reach this address, so there are no demo accounts: everybody registers.")
    print("Stop with Ctrl+C.", flush=True)


def main():
    sys.stdout.reconfigure(errors="replace")  # a console that cannot show a QR code shows something else
    if not re.fullmatch("[0-9]{1,5}", PORT):
        sys.exit(f"PORT is a number, not {PORT!r}.")
    try:
        listener = socket.create_server((HOST, int(PORT)), backlog=1024)
    except (OSError, OverflowError) as error:
        sys.exit(f"Cannot listen on {HOST}, port {PORT}: {error}. Set PORT to another number, 5001 for example.")
    welcome()
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))  # at once, whoever is connected
    if ASYNC_MODE == "gevent":
        serve_with_gevent(listener)
    make_server(HOST, int(PORT), app, threaded=True, request_handler=Handler, fd=listener.fileno()).serve_forever()


if __name__ == "__main__":
    main()
