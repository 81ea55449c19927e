"""Full duplex and rooms: a chat to watch, to count and to break, in one file.

    python app.py            then open http://127.0.0.1:5000 in two browsers

Every event from a client carries one JSON object and gets an ack:
{"ok": true, ...} or {"ok": false, "error": "..."}.

    event    a client sends         the ack adds                 who hears it
    join     room, last_id?         room, members, missed, gap   the room, the joiner included
    leave    room                                                the room, not the leaver
    chat     message, room?, key?   id                           the room; without one, everybody
    typing   room                                                the room, none of the sender's own
    invite   room, username         username                     that user, on all connections
    expel    room, username                                      that user; the room, as a `leave`

Read sections 2 to 6 from top to bottom: set-up, state, users, pages, events. They are the lesson,
and a beginner may stop there. Sections 7 and 8 are what makes it hold when a member is slow, a
cable is pulled, or somebody means harm.
"""

import inspect
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections import defaultdict, deque
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import distribution
from types import SimpleNamespace

import engineio
import segno
import simple_websocket
from engineio.exceptions import SocketIsClosedError
from engineio.packet import CLOSE, MESSAGE, PING
from flask import Flask, g, jsonify, redirect, render_template, request, send_file, url_for
from flask_bootstrap import Bootstrap5
from flask_login import (
    LoginManager,
    UserMixin,
    current_user,
    login_required,
    login_user,
    logout_user,
)
from flask_socketio import ConnectionRefusedError, SocketIO, emit, join_room, leave_room
from limits import RateLimitItemPerMinute, storage, strategies
from socketio.packet import ACK, CONNECT, DISCONNECT, EVENT
from werkzeug.exceptions import HTTPException
from werkzeug.security import check_password_hash, generate_password_hash
from werkzeug.serving import WSGIRequestHandler, get_interface_ip, make_server
from wsproto.frame_protocol import FrameProtocol
from wsproto.utilities import ProtocolError

# 2. Set-up ----------------------------------------------------------------------------------------

HOST = os.environ.get("HOST") or "127.0.0.1"
PORT = os.environ.get("PORT") or "5000"
ALONE = re.fullmatch(r"localhost|127(\.\d+){3}", HOST)  # nobody but this machine can connect
DEMO_ACCOUNTS = ["ana", "luis", "eva"]  # everybody knows their password: only for this machine
TEACHER = "ana" if ALONE else "lecturer"

HISTORY = 500  # messages that a room remembers, keys that a user's
RATE = 20  # messages that a user may say in a second
BURST = 60  # messages that a user may say at once
MAX_BYTES = 64 * 1024  # of one packet, one form
MAX_WAITING = 6 * HISTORY  # packets that wait for a client to take them
PING_EVERY = 8  # seconds, at least
PATIENCE = 4  # seconds that the answer to a ping may take, at least

app = Flask(__name__)
app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(),
    SESSION_COOKIE_NAME=f"session-{PORT}",  # two apps on one machine do not sign each other out
    SESSION_COOKIE_SAMESITE="Lax",
    MAX_CONTENT_LENGTH=MAX_BYTES,
    # Another site may have had its own name resolved to this machine.
    TRUSTED_HOSTS=["localhost", "127.0.0.1", HOST] if ALONE else None,
    BOOTSTRAP_SERVE_LOCAL=True,
    DEMO_ACCOUNTS=[],
)
Bootstrap5(app)
login_manager = LoginManager(app)
socketio = SocketIO(
    app,
    async_mode="threading",
    async_handlers=False,  # the events of a connection are handled in the order they were sent in
    cors_allowed_origins=[],  # section 8 asks where a request comes from
    max_http_buffer_size=MAX_BYTES,
    ping_timeout=5,  # seconds between two visits of engineio's service task: see section 7
    ping_interval=12,  # seconds; a client that hears no ping for the sum of both gives us up
)

# 3. State: who has an account, who may enter which room, who is there, what was said -------------

lock = threading.RLock()  # held from the moment something changes until all who hear it are told
news = threading.Condition(lock)  # wakes those who poll and wait

HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can write one, no text can hold it


class Refused(HTTPException):
    """What the rules forbid: the reason, in words for a person, and the HTTP status for it."""

    def __init__(self, reason, code, **more):
        super().__init__(reason)
        self.code = code
        self.answer = {"ok": False, "error": reason, **more}


def require(condition, reason, code=400):
    """Raise Refused with the reason and the HTTP status, unless the condition holds."""
    if not condition:
        raise Refused(reason, code)


def text(data, name):
    """Return the text that a client sent as data[name]; Refused if that is no text."""
    value = data.get(name)
    require(isinstance(value, str), f'Send one JSON object in which "{name}" is text.')
    require(not HALF_A_CHARACTER.search(value), f'Send whole characters in "{name}".')
    return value


class User(UserMixin):
    """An account. Its token stands for it in cookies, and is renewed at log-out."""

    def __init__(self, id, name, password_hash):
        self.id = id
        self.name = name
        self.password_hash = password_hash
        self.token = secrets.token_urlsafe()
        self.keys = {}  # key -> id of the message that was sent with it
        self.allowance = BURST  # messages that the user may say now
        self.counted_at = 0  # seconds, on the clock of `spend`

    def get_id(self):
        """Return what Flask-Login keeps in the cookie."""
        return self.token

    def spend(self, now):
        """Take one message from the allowance at `now` (seconds); Refused if none is left."""
        earned = (now - self.counted_at) * RATE
        self.allowance = min(BURST, self.allowance + earned)
        self.counted_at = now
        if self.allowance < 1:
            wait = math.ceil(1000 * (1 - self.allowance) / RATE) / 1000
            reason = f"Slow down: {RATE} messages a second are enough."
            raise Refused(reason, 429, retry_after=wait)
        self.allowance -= 1


class State:
    """All that the program knows. Nobody else keeps any of it; call the methods under the lock."""

    def __init__(self):
        self.users = {}  # name in small letters -> User
        self.tokens = {}  # token -> User
        self.owners = {"python": None, "flask": None, "staff": TEACHER}  # room -> name
        self.guests = defaultdict(set)  # room -> names of those invited
        self.here = defaultdict(dict)  # room -> {sid: name}; all who are connected are in None
        # One message more than is given out: so it is known whether there were older ones.
        self.history = defaultdict(lambda: deque(maxlen=HISTORY + 1))
        self.started = int(time.time() * 1000)  # by the clock: so ids rise over a restart, too
        self.last_id = self.started

    def register(self, name, password_hash):
        """Open an account with a room of its own; Refused if the name is taken, in any case."""
        require(not self.user(name), "That name is taken.", 409)
        user = User(len(self.users) + 1, name, password_hash)
        self.users[name.lower()] = user
        self.tokens[user.token] = user
        self.owners[f"room{user.id}"] = name
        return user

    def user(self, name):
        """Return the User of that name, in capitals or small letters, or None."""
        return self.users.get(name.lower())

    def holder(self, token):
        """Return the User whom the token stands for, or None."""
        return self.tokens.get(token)

    def renew(self, user):
        """Give the user a new token, so that the old one opens nothing; return the old one."""
        old = user.token
        user.token = secrets.token_urlsafe()
        self.tokens[user.token] = self.tokens.pop(old)
        return old

    def rooms(self, name):
        """Return (room, its owner or None, whether the user may enter) for each room."""
        return [(room, owner, self.may_enter(name, room)) for room, owner in self.owners.items()]

    def may_enter(self, name, room):
        """Return whether a user may enter a room that there is."""
        return self.owners[room] in (None, name) or name in self.guests[room]

    def admit(self, name, room):
        """Refused unless there is such a room and the user may enter it."""
        require(room in self.owners, "There is no room of that name.")
        reason = f"{room} is {self.owners[room]}'s, who has not invited you."
        require(self.may_enter(name, room), reason)

    def guest(self, host, room, name):
        """Return a guest's name as he writes it; Refused unless host owns the room, not he."""
        require(self.owners.get(room) == host, "Only the owner of a room invites and expels.")
        user = self.user(name)
        require(user, "There is no user of that name.")
        require(user.name != host, "You are the owner: nobody invites or expels you.")
        return user.name

    def invite(self, host, room, name):
        """Let a user enter the host's room from now on; return his name as he writes it."""
        guest = self.guest(host, room, name)
        self.guests[room].add(guest)
        return guest

    def expel(self, host, room, name):
        """Withdraw an invitation; return the name of who had it as he writes it."""
        guest = self.guest(host, room, name)
        self.guests[room].discard(guest)
        return guest

    def enter(self, sid, name, room=None):
        """Note a connection in a room (None: as connected); return whether its user is new."""
        new = not self.connections(name, room)
        self.here[room][sid] = name
        return new

    def exit(self, sid, room=None):
        """Forget a connection in a room; return its user's name, and whether he is gone."""
        name = self.here[room].pop(sid)
        return name, not self.connections(name, room)

    def joined(self, sid):
        """Return the rooms that a connection has joined."""
        return [room for room, sids in self.here.items() if room and sid in sids]

    def members(self, room):
        """Return the names of those in a room, each once, sorted."""
        return sorted(set(self.here[room].values()))

    def connections(self, name, room=None):
        """Return the user's connections (sids) that are in the room, by default all."""
        return [sid for sid, owner in self.here[room].items() if owner == name]

    def say(self, user, data, sid=None):
        """Check data["message"], said in data["room"] or, without a room, to all, and keep it.

        Return its id and the message as its hearers get it; None in its place if all have heard
        it before, with the same key. Refused if it may not be said.
        """
        key = data.get("key")
        if key is not None:
            require(1 <= len(text(data, "key")) <= 64, "A key has 1 to 64 characters.")
            known = self.sent_with(user, key)
            if known:
                return known, None
        message = text(data, "message").strip()
        require(1 <= len(message) <= 500, "A message has 1 to 500 characters.")
        room = data.get("room")
        if room is not None:
            joined = text(data, "room") in self.joined(sid)
            require(joined, "Only those who have joined a room may speak in it.", 403)
        user.spend(time.monotonic())
        return self.keep(user, room, message, key)

    def sent_with(self, user, key):
        """Return the id of the message that a user has sent with this key, or None."""
        return user.keys.get(key)

    def keep(self, user, room, message, key):
        """Number a message and keep it and its key; return its id and what its hearers get."""
        self.last_id += 1
        said = {
            "id": self.last_id,
            "room": room,
            "username": user.name,
            "message": message,
            "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        self.history[room].append(said)
        if key is not None:
            user.keys[key] = self.last_id
            if len(user.keys) > HISTORY:
                oldest = next(iter(user.keys))
                del user.keys[oldest]
        return self.last_id, said

    def newest(self):
        """Return the id of the last message that was said anywhere."""
        return self.last_id

    def since(self, room, last_id):
        """Return a room's messages newer than an id, oldest first, and whether some are gone."""
        newer = [message for message in self.history[room] if message["id"] > last_id]
        gap = len(newer) > HISTORY or 0 < last_id < self.started
        return newer[-HISTORY:], gap


state = State()

# 4. Users -----------------------------------------------------------------------------------------

OWN_PATH = re.compile(r"/(?![/\\])[^\x00-\x1f\x7f]*")  # //elsewhere and /\elsewhere lead away
NAME = re.compile("[A-Za-z0-9_-]{1,20}")
NO_HASH = generate_password_hash(secrets.token_hex())  # a name unknown takes as long as one known
TEN_A_MINUTE = RateLimitItemPerMinute(10)
wrong = strategies.FixedWindowRateLimiter(storage.MemoryStorage())  # passwords, counted
hashing = threading.Lock()  # one password at a time: each takes 32 MB while it is hashed


@login_manager.user_loader
def load_user(token):
    """Return the User whose token the cookie holds, or None."""
    return state.holder(token)


@login_manager.unauthorized_handler
def sign_in_first():
    """Send a page's browser to the log-in, and back to the page after it."""
    require(request.path != "/messages", "Sign in first.", 401)
    came_for = None
    if request.method == "GET":
        came_for = request.full_path.rstrip("?")
    return redirect(url_for("login", next=came_for))


def sign_in(user):
    """Sign the user in and go on to `next`, if that is a path of this site."""
    login_user(user)
    path = request.values.get("next", "")
    if not OWN_PATH.fullmatch(path):
        path = url_for("index")
    return redirect(path)


@app.get("/login")
def login():
    """Show the form."""
    return render_template("login.html")


@app.post("/login")
def check_password():
    """Sign a user in who knows the password; ten wrong ones close the name for the minute."""
    name = request.form.get("username", "")
    password = request.form.get("password", "")
    g.username = name  # stays in the form if this is refused
    attempts = name.lower()[:20], request.remote_addr
    with hashing:  # nobody else guesses between the question and the count
        allowed = wrong.test(TEN_A_MINUTE, *attempts)
        require(allowed, "Ten wrong passwords for this name: wait a minute.", 429)
        user = state.user(name)
        password_hash = user.password_hash if user else NO_HASH
        right = check_password_hash(password_hash, password)
        if not right:
            wrong.hit(TEN_A_MINUTE, *attempts)
            raise Refused("Name or password is wrong.", 401)
    return sign_in(user)


@app.post("/register")
def register():
    """Open an account for who comes with a new name, and sign him in."""
    name = request.form.get("username", "")
    password = request.form.get("password", "")
    g.username = name  # stays in the form if this is refused
    require(NAME.fullmatch(name), "A name has 1 to 20 letters (a to z), digits, _ or -.")
    require(len(password) >= 8, "A password has 8 characters or more.")
    require(name.lower() not in [*DEMO_ACCOUNTS, TEACHER], "That name is taken.", 409)
    with hashing:
        password_hash = generate_password_hash(password)
    with lock:
        user = state.register(name, password_hash)
    return sign_in(user)


@app.post("/logout")
@login_required
def logout():
    """End every session, connection and waiting poll of the user, on all devices."""
    with lock:
        sids = state.connections(current_user.name)
        old_token = state.renew(current_user)
        hang_up(sids, old_token)
    logout_user()
    return redirect(url_for("login"))


# 5. Pages -----------------------------------------------------------------------------------------


@app.get("/")
@login_required
def index():
    """Show polling beside full duplex."""
    return render_template("index.html", last_id=state.newest())


@app.get("/room")
@login_required
def room_page():
    """Show the rooms, and the handlers that run when somebody uses them."""
    with lock:
        rooms = state.rooms(current_user.name)
    handlers = {handler.__name__: inspect.getsourcelines(handler) for handler in HANDLERS}
    return render_template("room.html", rooms=rooms, handlers=handlers)


@app.get("/socket.io.js")
def socket_io_client():
    """Serve Socket.IO's browser client from an installed package: there may be no network."""
    file = distribution("nicegui").locate_file("nicegui/static/socket.io.min.js")
    return send_file(file, max_age=3600)


@app.get("/messages")
@login_required
def messages():
    """Answer who polls the open channel, at once or when there is news within `wait` seconds."""
    try:
        after = int(request.args.get("after", 0))
        wait = float(request.args.get("wait", 0))
    except ValueError:
        raise Refused('"after" and "wait" are numbers.', 400) from None
    require(not math.isnan(wait), '"wait" is a number of seconds.')
    token = current_user.token

    def something_to_tell():
        newer, _ = state.since(None, after)
        return newer or not state.holder(token)

    with news:
        news.wait_for(something_to_tell, timeout=min(25, wait))
        newer, _ = state.since(None, after)
    require(state.holder(token), "You have signed out.", 401)
    last_id = newer[-1]["id"] if newer else after
    return jsonify(messages=newer, last_id=last_id)


@app.post("/messages")
@login_required
def post_message():
    """Let somebody who holds no connection say something to all."""
    try:
        data = request.get_json(force=True, silent=True)
    except RecursionError:  # ten thousand lists, each in the next
        data = None
    require(isinstance(data, dict), "Send one JSON object.")
    return jsonify(id=say(data)), 201


@app.errorhandler(HTTPException)
def say_why(error):
    """Say what went wrong in the form of the page: the log-in's, or JSON for those who poll."""
    if request.path in ("/login", "/register"):
        return render_template("login.html", error=error.description), error.code
    if request.path == "/messages":
        answer = {"ok": False, "error": error.description}
        return getattr(error, "answer", answer), error.code
    return error


@app.before_request
def own_pages_only():
    """Refuse a form that another site's page sent."""
    g.nonce = secrets.token_urlsafe()
    require(request.method != "POST" or from_here(), "This was sent from another site.", 403)


@app.after_request
def protect(response):
    """Let run only what the templates name; no site may frame a page, no disk keep a copy."""
    response.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'nonce-{g.nonce}'; style-src 'self' 'nonce-{g.nonce}'; "
        "connect-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


# 6. Events ----------------------------------------------------------------------------------------
#
# The way of one message, from socket to socket (the number of the section behind each name):
#
#     WebSocket.wait      reads a frame, in the thread of the request that opened the line (7)
#     Connection.receive  takes the lock: one event at a time, until its ack is on its way (7)
#     Packet.decode       makes sure that it is an event with one JSON object (8)
#     chat, say           run, as `current_user` and `request.sid` (6)
#     State.say           asks the rules, numbers the message and keeps it (3)
#     socketio.emit       hands one packet to each connection in the room (the library)
#     Connection.send     writes it at once or, to who is slow, leaves it to a writer (7)
#
# and what `chat` returns goes back to the speaker as the ack. So a handler may rely on this: no
# other event is handled meanwhile, and `data` is a dict. `emit` speaks to the connection whose
# event is handled, alone; `socketio.emit` to a room (`to=`) or, without one, to all.


def channel(room):
    """Return Socket.IO's name for a room: the prefix keeps it apart from sids, rooms there, too."""
    return f"room:{room}" if room else None


def my_room(data):
    """Return the room that an event names; Refused unless this connection has joined it."""
    room = text(data, "room")
    require(room in state.joined(request.sid), "You are not in that room.")
    return room


def say(data, sid=None):
    """Let a message be heard, and return its id; Refused if it may not be said."""
    with lock:  # from its number until all are told: so everybody hears the same order
        message_id, message = state.say(current_user, data, sid)
        if message:
            socketio.emit("chat", message, to=channel(message["room"]))
            news.notify_all()
    return message_id


def take_out(sid, room, reason):
    """Take a connection out of a room; the room hears `leave` if its user is gone from there."""
    name, gone = state.exit(sid, room)
    leave_room(channel(room), sid=sid, namespace="/")
    if gone:
        left = {"room": room, "username": name, "members": state.members(room), "reason": reason}
        socketio.emit("leave", left, to=channel(room))


@socketio.on("connect")
def connect(auth=None):
    """A page connects; nobody hears it. Refused: who is not signed in, or not whom it shows."""
    require(current_user.is_authenticated, "Sign in first.")
    name = current_user.name
    shown = auth.get("username", name) if isinstance(auth, dict) else name
    require(shown == name, f"You are signed in as {name} now: load the page again.")
    request.environ.pop("HTTP_COOKIE", None)  # the session is kept: no event opens it again
    state.enter(request.sid, name)
    join_room(f"user:{name}")  # a private channel of all the user's connections
    print(f"connected: {name}", flush=True)


@socketio.on("disconnect")
def disconnect(reason):
    """A connection ended, politely or not. Each of its rooms hears `leave`."""
    for room in state.joined(request.sid):
        take_out(request.sid, room, reason)
    name, _ = state.exit(request.sid)
    print(f"disconnected: {name} ({reason})", flush=True)


@socketio.on("join")
def join(data):
    """A connection enters a room. It alone hears what it missed; then the room hears `join`."""
    name = current_user.name
    room = text(data, "room")
    last_id = data.get("last_id") or 0
    is_id = type(last_id) is int and last_id >= 0
    require(is_id, '"last_id" is the id of the last message that you heard.')
    state.admit(name, room)
    new = state.enter(request.sid, name, room)
    missed, gap = state.since(room, last_id)
    for message in missed:
        emit("chat", message)
    join_room(channel(room))
    members = state.members(room)
    if new:
        joined = {"room": room, "username": name, "members": members}
        socketio.emit("join", joined, to=channel(room))
    return {"ok": True, "room": room, "members": members, "missed": len(missed), "gap": gap}


@socketio.on("leave")
def leave(data):
    """A connection leaves a room; those who stay hear it."""
    take_out(request.sid, my_room(data), "left")
    return {"ok": True}


@socketio.on("chat")
def chat(data):
    """A member says something: the room hears it, he too. Without a room all connected do."""
    return {"ok": True, "id": say(data, request.sid)}


@socketio.on("typing")
def typing(data):
    """A member is typing: the room hears it, but none of his own connections."""
    name = current_user.name
    room = my_room(data)
    own = state.connections(name, room)
    socketio.emit("typing", {"room": room, "username": name}, to=channel(room), skip_sid=own)
    return {"ok": True}


@socketio.on("invite")
def invite(data):
    """The owner of a room lets somebody in, who hears it on every connection."""
    host = current_user.name
    room = text(data, "room")
    guest = state.invite(host, room, text(data, "username"))
    socketio.emit("invite", {"room": room, "by": host}, to=f"user:{guest}")
    return {"ok": True, "username": guest}


@socketio.on("expel")
def expel(data):
    """The owner shows somebody the door, who hears it everywhere; the room hears `leave`."""
    host = current_user.name
    room = text(data, "room")
    guest = state.expel(host, room, text(data, "username"))
    socketio.emit("expel", {"room": room, "by": host}, to=f"user:{guest}")
    for sid in state.connections(guest, room):
        take_out(sid, room, "expelled")
    return {"ok": True}


HANDLERS = connect, disconnect, join, leave, chat, typing, invite, expel


@socketio.on("*")
def unknown(event, data):
    """Somebody sends anything else: nobody hears it."""
    events = "join, leave, chat, typing, invite or expel"
    raise Refused(f"Send one of the events {events}, with one JSON object.", 400)


@socketio.on_error_default
def refuse(error):
    """Turn what a handler refuses into the ack that says why; `connect` refuses the connection."""
    if not isinstance(error, Refused):
        raise error
    if request.event["message"] == "connect":
        raise ConnectionRefusedError(error.description)
    return error.answer


# 7. One frame for a room --------------------------------------------------------------------------
#
# The library queues a message for each member and wakes a thread for each, which frames it anew.
# Here its frame is made once and written at once, by whoever sends it, to each WebSocket to which
# nothing else is under way. All the rest (what did not fit, who polls, who is about to upgrade)
# takes the library's queue and writer. Read for this: engineio 4.15 and simple-websocket 1.1.


@lru_cache(maxsize=1)
def frame(data):
    """Return the WebSocket frame of a packet (text), made once for all; bytes are one already."""
    if isinstance(data, bytes):
        return data
    return bytes(FrameProtocol(client=False, extensions=[]).send_data(data))


class EnginePacket(engineio.packet.Packet):
    """A packet of Engine.IO. What is none counts as a goodbye: else it is a traceback."""

    def decode(self, encoded_packet):
        """Read a packet that came over a transport."""
        try:
            super().decode(encoded_packet)
            if self.packet_type == MESSAGE and not self.data:
                raise ValueError("nothing in it")
        except (ValueError, RecursionError):
            self.packet_type = CLOSE


class WebSocket(simple_websocket.Server):
    """The server's end of a WebSocket, read in the thread of the request that opened it."""

    def __init__(self, environ, connection):
        environ["HTTP_SEC_WEBSOCKET_EXTENSIONS"] = ""  # no deflate: 0.5 MB would inflate to 500
        super().__init__(environ, max_message_size=MAX_BYTES)
        self.connection = connection
        self.tcp = self.sock
        # What a slow client has not taken waits in its queue, not in the kernel: so we know of it.
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_BYTES)
        self.at_once = socket.socket(fileno=self.tcp.fileno())  # the same, for who cannot wait
        self.at_once.setblocking(False)
        self.sock = SimpleNamespace(send=self.answer)

    def _thread(self):
        """Do not read in a second thread, as the library would: `wait` does it."""

    def wait(self):
        """Return the next packet that arrived, even if the line is gone; None after the last."""
        with suppress(OSError, ProtocolError):
            while self.connected and not self.input_buffer:
                received = self.tcp.recv(self.receive_bytes)
                self.ws.receive_data(received or None)
                self.connected = self._handle_events()
        return self.input_buffer.pop(0) if self.input_buffer else None

    def answer(self, frames):
        """Send the library's answer to a ping between two frames; who takes nothing gets none."""
        if self.connection.upgraded and self.connection.idle:
            self.connection.send(EnginePacket(MESSAGE, bytes(frames)))

    def send(self, data):
        """Write a packet (text) or the rest of a frame (bytes), however slowly it is taken."""
        self.tcp.sendall(frame(data))

    def close(self):
        """Shut the TCP connection down: whoever reads or writes it wakes up."""
        with suppress(OSError):
            self.tcp.shutdown(socket.SHUT_RDWR)


class Connection(engineio.socket.Socket):
    """A client's connection. Each method says what fails with the one that it replaces."""

    def __init__(self, server, sid):
        super().__init__(server, sid)
        self.websocket = None
        self.ping_at = 0  # the time of the next ping
        self.idle = False  # nothing waits in the queue, and the writer has written all it took

    def receive(self, packet):
        """Handle one packet at a time; without the lock who joins in a storm misses messages."""
        with lock:
            if self.closed:
                raise SocketIsClosedError
            super().receive(packet)
            if self.queue.qsize() > MAX_WAITING:  # one POST of 2,000 joins would fill gigabytes
                self.close()

    def send(self, packet):
        """Write a packet at once, or queue it; the library wakes a thread for each."""
        with lock:
            if self.upgraded and self.idle:
                data = frame(packet.encode())
                try:
                    sent = self.websocket.at_once.send(data)
                except OSError:  # it takes nothing now, or never again
                    sent = 0
                if sent == len(data):
                    return
                packet = EnginePacket(MESSAGE, data[sent:])
            self.idle = False
            self.queue.put(packet)

    def poll(self):
        """Return the next packets: 16 at most, for a Python client that polls hangs up at more."""
        with lock:
            self.idle = self.queue.empty()
        packets = [self.queue.get()]
        while packets[-1] and len(packets) < 16 and not self.queue.empty():
            packets.append(self.queue.get())
        if packets[-1] is None:  # closed: whoever else polls wakes up, too
            self.queue.put(packets.pop())
        if self.last_ping:
            self.last_ping = time.time()  # who takes what waits for him is slow, but not silent
        return packets

    def handle_get_request(self, environ, start_response):
        """Answer a poll, also during an upgrade: the library answers with nothing, at once.

        Or serve a WebSocket until it ends; a second one would take the connection over.
        """
        if environ.get("HTTP_UPGRADE", "").lower() != "websocket":
            return self.poll()
        with lock:
            if self.websocket:
                return self.server._bad_request()
            try:
                self.websocket = WebSocket(environ, self)
            except (ProtocolError, OSError):  # half a handshake
                return self.server._bad_request()
        try:
            self._websocket_handler(self.websocket)
        finally:
            with lock:
                self.websocket.at_once.detach()
        raise ConnectionError  # tells the web server that there is nothing left to answer

    def handle_post_request(self, environ):
        """Take all packets of a POST; the library throws away a POST of more than 16."""
        body = b""
        with suppress(OSError):  # the client has vanished
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        for packet in body.decode(errors="surrogateescape").split("\x1e"):
            self.receive(EnginePacket(encoded_packet=packet))

    def schedule_ping(self):
        """Note an answer to a ping; the library starts a thread for the next one."""
        self.last_ping = None

    def check_ping_timeout(self):
        """Ping if it is time to, end who has not answered: engineio's service task asks this."""
        now = time.time()
        with lock:
            if self.closed:
                return
            if self.last_ping and now - self.last_ping > PATIENCE:
                self.close(reason=self.server.reason.PING_TIMEOUT)
            elif not self.last_ping and now > self.ping_at:
                self.last_ping = now
                self.ping_at = now + PING_EVERY
                self.send(EnginePacket(PING))

    def close(self, wait=True, abort=False, reason=None):
        """Close without waiting for the client, TCP too; the library leaves it open."""
        with lock:
            super().close(wait=False, abort=abort, reason=reason)
            if self.websocket:
                self.websocket.close()


engineio.packet.Packet = EnginePacket
engineio.socket.Socket = Connection

# 8. The door: who may open a connection, and what may come through it -----------------------------

SIZE = re.compile("[0-9]{0,9}")  # -1 would be read for ever


def from_here():
    """Return whether no other site's page sent this request."""
    site = request.headers.get("Sec-Fetch-Site")
    if site:
        return site in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is None or origin.partition("://")[2] == request.host


def check_connection(environ):
    """Refused unless a signed-in user's own page sent it, to a connection that he opened."""
    require(from_here(), "This was sent from another site.", 403)
    require(current_user.is_authenticated, "Sign in first.", 401)
    require((request.content_length or 0) <= MAX_BYTES, "Send 64 KB at most.", 413)
    environ["REMOTE_USER"] = current_user.token
    eio_sid = request.args.get("sid")
    if eio_sid is not None:
        opened_by = socketio.server.environ.get(eio_sid, {}).get("REMOTE_USER")
        own = opened_by == current_user.token
        require(own, "This connection is not yours, or has ended.", 403)


def door(environ, start_response, inside=app.wsgi_app):
    """Let a request in or refuse it, before a byte of its body is read."""
    try:
        with app.request_context(environ):
            require(request.host, "Say which host you want.")  # Refused if not in TRUSTED_HOSTS
            sized = SIZE.fullmatch(environ.get("CONTENT_LENGTH", ""))
            chunked = "HTTP_TRANSFER_ENCODING" in environ
            require(sized and not chunked, "Say how long the body is.", 413)
            if request.path.startswith("/socket.io/"):
                check_connection(environ)
    except HTTPException as refusal:
        return refusal(environ, start_response)
    return inside(environ, start_response)


@socketio.server.eio.on("connect")
def opened(eio_sid, environ):
    """A connection opens; not if its user has signed out since the door let it in."""
    with lock:
        if not state.holder(environ["REMOTE_USER"]):
            return False
        return socketio.server._handle_eio_connect(eio_sid, environ)


def hang_up(sids, token):
    """End these connections of a user, all others that came in with the token, and his polls."""
    with lock:
        for sid in sids:
            socketio.server.disconnect(sid)
        for eio_sid, environ in list(socketio.server.environ.items()):
            if environ.get("REMOTE_USER") == token:  # perhaps it never got as far as `connect`
                socketio.server.eio.disconnect(eio_sid)
        news.notify_all()


class Packet(socketio.server.packet_class):
    """A packet of Socket.IO. Its event has a name that clients may use, and one JSON object."""

    def decode(self, encoded_packet):
        """Read a packet that a client sent; what is no good event becomes one that is refused."""
        with suppress(TypeError, ValueError, LookupError, RecursionError):
            super().decode(encoded_packet)
        if self.packet_type in (CONNECT, DISCONNECT, ACK):
            return
        self.packet_type = EVENT
        match self.data:
            case [str(name), dict()] if name not in ("connect", "disconnect", "*"):
                return
            case _:
                self.data = ["", {}]


socketio.server.packet_class = Packet
app.wsgi_app = door

# 9. Run -------------------------------------------------------------------------------------------


class Handler(WSGIRequestHandler):
    """A request to the web server."""

    timeout = 30  # seconds that a client may be silent in the midst of a request
    disable_nagle_algorithm = True  # small frames leave at once
    rbufsize = 2048  # bytes; a head is no longer, and each connection keeps its buffer

    def make_environ(self):
        """Read the head; what nobody reads of a body is thrown away in pieces, not 10 MB each."""
        environ, body = super().make_environ(), self.rfile
        self.rfile = SimpleNamespace(read=lambda size: body.read1(MAX_BYTES), close=body.close)
        return environ

    def run_wsgi(self):
        """Answer; the last frame of a WebSocket is not the next request."""
        with suppress(ValueError):  # a URL that is none
            super().run_wsgi()
        self.close_connection = True

    def log_request(self, code="-", size="-"):
        """Print no access lines: the events print who comes and goes."""


def welcome():
    """Make the accounts there are from the start, and print where the server is."""
    address = get_interface_ip(socket.AF_INET) if HOST == "0.0.0.0" else HOST
    url = f"http://{address}:{PORT}"
    print(f"Full duplex and rooms: open {url}")
    if ALONE:
        app.config.update(DEMO_ACCOUNTS=DEMO_ACCOUNTS)
        for name in DEMO_ACCOUNTS:
            with suppress(Refused):  # a State may outlive the process
                state.register(name, generate_password_hash("demo"))
        print("Sign in as ana, luis or eva, password demo: two people, two browsers.")
    else:
        join_url = f"{url}/room?room=python"
        app.config.update(ADDRESS=address, JOIN_URL=join_url, QR_CODE=segno.make(join_url))
        app.config["QR_CODE"].terminal(compact=True)
        password = os.environ.get("LECTURER_PASSWORD") or secrets.token_urlsafe(6)
        with suppress(Refused):
            state.register(TEACHER, generate_password_hash(password))
        print("Others can reach this address, so there are no demo accounts: everybody registers.")
        print(f"You are {TEACHER}, password {password}; the room staff is yours.")
    print("Stop with Ctrl+C.", flush=True)


def main():
    """Open the port, say so, and serve until Ctrl+C."""
    sys.stdout.reconfigure(errors="replace")  # a console that cannot show a QR code
    try:
        listener = socket.create_server((HOST, int(PORT)), backlog=1024)
    except (OSError, ValueError, OverflowError) as error:
        reason = f"Cannot listen on {HOST}, port {PORT}: {error}."
        sys.exit(f"{reason} Set PORT to another number, 5001 for example.")
    welcome()
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))  # at once, whoever is connected
    server = make_server(
        HOST, int(PORT), app, threaded=True, request_handler=Handler, fd=listener.fileno()
    )
    server.serve_forever()


if __name__ == "__main__":
    main()
