"""A chat server that shows what WebSockets and rooms are, in one file.

    python app.py            then open http://127.0.0.1:5000 in two browsers

A client sends events. Each event carries one JSON object and is answered by an ack:
{"ok": true, ...} or {"ok": false, "error": "..."}.

    event    a client sends         the ack adds                 who hears it
    join     room, last_id?         room, members, missed, gap   the room, including the joiner
    leave    room                                                the room, except the leaver
    chat     message, room?, key?   id                           the room; without one, everyone
    typing   room                                                the room, except the sender
    invite   room, username         username                     that user, on all connections
    expel    room, username                                      that user; the room, as a `leave`

Words you will meet:

    connection   the line between one client and the server; Socket.IO identifies it by its sid
    room         a group of connections: what is sent to a room reaches all of them
    ack          the answer to an event, sent only to the connection the event came from
    key          a text the client chooses for a message, so that it can safely send it twice
    last_id      the id of the last message the client has heard in a room

Sections 2 to 6 are the lesson; start with the events in section 3. Sections 7 to 9 keep the chat
going when a client is slow, a cable is unplugged, or somebody means harm.
"""

import threading

from flask import Flask, request
from flask_login import current_user
from flask_socketio import ConnectionRefusedError, SocketIO, emit, join_room, leave_room

# What the rest of the file needs.
# isort: split
import inspect
import logging
import math
import os
import re
import secrets
import socket
import sys
import time
from collections import defaultdict, deque
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import distribution
from queue import SimpleQueue
from types import SimpleNamespace

import engineio
import segno
import simple_websocket
from engineio.packet import CLOSE, MESSAGE, PING
from flask import g, jsonify, redirect, render_template, send_file, url_for
from flask_bootstrap import Bootstrap5
from flask_login import LoginManager, UserMixin, login_required, login_user, logout_user
from limits import RateLimitItemPerMinute, storage, strategies
from socketio.packet import ACK, CONNECT, DISCONNECT, EVENT
from socketio.packet import Packet as SocketIOPacket
from werkzeug.exceptions import HTTPException
from werkzeug.security import check_password_hash, generate_password_hash
from werkzeug.serving import WSGIRequestHandler, get_interface_ip, make_server
from wsproto.frame_protocol import FrameProtocol
from wsproto.utilities import ProtocolError

# 2. Set-up ----------------------------------------------------------------------------------------

HOST = os.environ.get("HOST") or "127.0.0.1"
PORT = os.environ.get("PORT") or "5000"
LOCAL = re.fullmatch(r"localhost|127(\.\d+){3}", HOST)  # only this machine can connect

app = Flask(__name__)
socketio = SocketIO()  # set up in section 8, when all handlers are registered
lock = threading.RLock()  # held while anything changes, until everyone who hears it has been told
news = threading.Condition(lock)  # notified when a message is said or a user logs out
log = SimpleQueue()  # lines to print: a blocked terminal must not block the chat

# 3. Events ----------------------------------------------------------------------------------------
#
# How one message travels from socket to socket, with the section of each function:
#
#     WebSocket.wait      reads a frame, in the thread that serves the connection (7)
#     Connection.receive  handles one packet after the other (7)
#     handle_message      takes the lock, if the handler is marked @one_at_a_time (8)
#     Packet.decode       makes sure that it is an event with one JSON object (8)
#     chat, say           run with `current_user` and `request.sid` set (3)
#     State.say           checks the rules, numbers the message and keeps it (4)
#     socketio.emit       hands one packet to each connection in the room (the library)
#     Connection.send     writes it at once, or queues it if the client is slow (7)
#
# What `chat` returns goes back to the sender as the ack. `emit` sends to the current connection
# only; `socketio.emit` sends to a room (`to=`) or, without one, to everyone.

HANDLERS = {}


def one_at_a_time(handler):
    """Run the handler alone, from its first line until its ack is on its way.

    Mark every handler that uses `state`. Others run in parallel, so they may be slow.
    """
    HANDLERS[handler.__name__] = handler
    return handler


@socketio.on("connect")
@one_at_a_time
def connect(auth=None):
    """A page connects. Nobody hears it."""
    require(current_user.is_authenticated, "Sign in first.")
    name = current_user.name
    shown = auth.get("username", name) if isinstance(auth, dict) else name
    require(shown == name, f"You are signed in as {name} now: load the page again.")
    request.environ.pop("HTTP_COOKIE", None)  # the user is known now; events need no cookie
    state.enter(request.sid, name)
    join_room(f"user:{name}")  # a private channel for all connections of this user
    log.put(f"connected: {name}")


@socketio.on("disconnect")
@one_at_a_time
def disconnect(reason):
    """A connection has ended, politely or not. Its rooms hear `leave`."""
    for room in state.joined(request.sid):
        take_out(request.sid, room, reason)
    name, _ = state.exit(request.sid)
    log.put(f"disconnected: {name} ({reason})")


@socketio.on("join")
@one_at_a_time
def join(data):
    """A connection enters a room. It hears what it missed; then the room hears `join`."""
    name = current_user.name
    room = text(data, "room")
    last_id = data.get("last_id") or 0
    is_id = type(last_id) is int and last_id >= 0
    require(is_id, '"last_id" must be the id of the last message you heard.')
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
@one_at_a_time
def leave(data):
    """A connection leaves a room. The remaining members hear it."""
    take_out(request.sid, my_room(data), "left")
    return {"ok": True}


@socketio.on("chat")
@one_at_a_time
def chat(data):
    """A user says something. The room hears it, including the user; without a room, everyone."""
    return {"ok": True, "id": say(data, request.sid)}


@socketio.on("typing")
@one_at_a_time
def typing(data):
    """A member is typing. The room hears it, except the member's own connections."""
    name = current_user.name
    room = my_room(data)
    own = state.connections(name, room)
    socketio.emit("typing", {"room": room, "username": name}, to=channel(room), skip_sid=own)
    return {"ok": True}


@socketio.on("invite")
@one_at_a_time
def invite(data):
    """The owner of a room invites a user, who hears it on all connections."""
    host = current_user.name
    room = text(data, "room")
    guest = state.invite(host, room, text(data, "username"))
    socketio.emit("invite", {"room": room, "by": host}, to=f"user:{guest}")
    return {"ok": True, "username": guest}


@socketio.on("expel")
@one_at_a_time
def expel(data):
    """The owner of a room expels a user, who hears it everywhere. The room hears `leave`."""
    host = current_user.name
    room = text(data, "room")
    guest = state.expel(host, room, text(data, "username"))
    socketio.emit("expel", {"room": room, "by": host}, to=f"user:{guest}")
    for sid in state.connections(guest, room):
        take_out(sid, room, "expelled")
    return {"ok": True}


@socketio.on("*")
def unknown(event, data):
    """A client sends any other event. Nobody hears it."""
    events = "join, leave, chat, typing, invite or expel"
    raise Refused(f"Send one of the events {events}, with one JSON object.", 400)


@socketio.on_error_default
def refuse(error):
    """Turn a Refused into the ack that says why; in `connect`, refuse the connection."""
    if not isinstance(error, Refused):
        raise error
    if request.event["message"] == "connect":
        raise ConnectionRefusedError(error.description)
    return error.answer


def channel(room):
    """Return Socket.IO's name for a room. The prefix keeps it apart from sids."""
    return f"room:{room}" if room else None


def my_room(data):
    """Return the room that an event names. Refuse if this connection has not joined it."""
    room = text(data, "room")
    require(room in state.joined(request.sid), "You are not in that room.")
    return room


def say(data, sid=None):
    """Send a message to its room, or to everyone, and return its id."""
    with lock:  # everyone hears all messages in the order of their ids
        message_id, message = state.say(current_user, data, sid)
        if message:
            socketio.emit("chat", message, to=channel(message["room"]))
            news.notify_all()
    return message_id


def take_out(sid, room, reason):
    """Take a connection out of a room. The room hears `leave` if it was the user's last one."""
    name, gone = state.exit(sid, room)
    leave_room(channel(room), sid=sid, namespace="/")
    if gone:
        left = {"room": room, "username": name, "members": state.members(room), "reason": reason}
        socketio.emit("leave", left, to=channel(room))


# 4. Rules and state: accounts, rooms, who is connected, what was said -----------------------------

HISTORY = 500  # messages kept for each room, and keys for each user
RATE = 20  # messages a user may say in a second
BURST = 60  # messages a user may say at once
DEMO_ACCOUNTS = ["ana", "luis", "eva"]  # with a well-known password: for this machine only
TEACHER = "ana" if LOCAL else "lecturer"

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON allows it, UTF-8 does not


class Refused(HTTPException):
    """Something the rules forbid, with the reason in plain words and an HTTP status."""

    def __init__(self, reason, code, **more):
        super().__init__(reason)
        self.code = code
        self.answer = {"ok": False, "error": reason, **more}


def require(condition, reason, code=400):
    """Raise Refused with the given reason and HTTP status unless the condition is true."""
    if not condition:
        raise Refused(reason, code)


def text(data, name):
    """Return data[name] if it is valid text, else raise Refused."""
    value = data.get(name)
    require(isinstance(value, str), f'Send a JSON object with a string in "{name}".')
    require(not SURROGATE.search(value), f'"{name}" contains half of a character.')
    return value


class User(UserMixin):
    """An account. Cookies hold its token, which is renewed when the user logs out."""

    def __init__(self, id, name, password_hash):
        self.id = id
        self.name = name
        self.password_hash = password_hash
        self.token = secrets.token_urlsafe()
        self.keys = {}  # key -> id of the message that was sent with it
        self.allowance = BURST  # messages the user may say now
        self.counted_at = 0  # when the allowance was last counted, in seconds

    def get_id(self):
        """Return what Flask-Login keeps in the cookie."""
        return self.token

    def spend(self, now):
        """Use up one message of the allowance. Refuse if none is left."""
        earned = (now - self.counted_at) * RATE
        self.allowance = min(BURST, self.allowance + earned)
        self.counted_at = now
        if self.allowance < 1:
            wait = math.ceil(1000 * (1 - self.allowance) / RATE) / 1000
            reason = f"Slow down: the limit is {RATE} messages a second."
            raise Refused(reason, 429, retry_after=wait)
        self.allowance -= 1


class State:
    """Everything the server remembers. Hold the lock when you call its methods."""

    def __init__(self):
        self.users = {}  # name in lower case -> User
        self.tokens = {}  # token -> User
        self.owners = {"python": None, "flask": None, "staff": TEACHER}  # room -> owner's name
        self.guests = defaultdict(set)  # room -> names of invited users
        self.here = defaultdict(dict)  # room -> {sid: name}; here[None] has all connections
        # One message more than is given out, to tell whether there were older ones.
        self.history = defaultdict(lambda: deque(maxlen=HISTORY + 1))
        self.started = int(time.time() * 1000)  # ids start at the clock: they rise over a restart
        self.last_id = self.started

    def register(self, name, password_hash):
        """Create an account and its own room. Refuse if the name is taken, in any case."""
        require(not self.user(name), "That name is taken.", 409)
        user = User(len(self.users) + 1, name, password_hash)
        self.users[name.lower()] = user
        self.tokens[user.token] = user
        self.owners[f"room{user.id}"] = name
        return user

    def user(self, name):
        """Return the User with that name, in any case, or None."""
        return self.users.get(name.lower())

    def holder(self, token):
        """Return the User the token belongs to, or None."""
        return self.tokens.get(token)

    def renew(self, user):
        """Give the user a new token and return the old one, which is no longer valid."""
        old = user.token
        user.token = secrets.token_urlsafe()
        self.tokens[user.token] = self.tokens.pop(old)
        return old

    def rooms(self, name):
        """Return each room with its owner (or None) and whether it is open to the user."""
        return [
            {"room": room, "owner": owner, "open": self.may_enter(name, room)}
            for room, owner in self.owners.items()
        ]

    def may_enter(self, name, room):
        """Return whether the user may enter an existing room."""
        return self.owners[room] in (None, name) or name in self.guests[room]

    def admit(self, name, room):
        """Refuse unless the room exists and the user may enter it."""
        require(room in self.owners, "There is no room with that name.")
        reason = f"{room} belongs to {self.owners[room]}, who has not invited you."
        require(self.may_enter(name, room), reason)

    def guest(self, host, room, name):
        """Return the guest's name as registered. Refuse unless the host owns the room."""
        require(self.owners.get(room) == host, "Only the owner of a room can invite or expel.")
        user = self.user(name)
        require(user, "There is no user with that name.")
        require(user.name != host, "You own this room: you cannot invite or expel yourself.")
        return user.name

    def invite(self, host, room, name):
        """Let a user enter the host's room from now on, and return the user's name."""
        guest = self.guest(host, room, name)
        self.guests[room].add(guest)
        return guest

    def expel(self, host, room, name):
        """Withdraw an invitation, and return the user's name."""
        guest = self.guest(host, room, name)
        self.guests[room].discard(guest)
        return guest

    def enter(self, sid, name, room=None):
        """Add a connection to a room (None: to all connected). Return whether its user is new."""
        new = not self.connections(name, room)
        self.here[room][sid] = name
        return new

    def exit(self, sid, room=None):
        """Remove a connection from a room. Return its user's name and whether it was the last."""
        name = self.here[room].pop(sid)
        return name, not self.connections(name, room)

    def joined(self, sid):
        """Return the rooms that a connection has joined."""
        return [room for room, sids in self.here.items() if room and sid in sids]

    def members(self, room):
        """Return the sorted names of the users in a room."""
        return sorted(set(self.here[room].values()))

    def connections(self, name, room=None):
        """Return the sids of the user's connections in a room, or of all of them."""
        return [sid for sid, owner in self.here[room].items() if owner == name]

    def say(self, user, data, sid=None):
        """Check and keep data["message"], said in data["room"] or, without one, to everyone.

        Return its id and the message to send; None instead of the message if it was sent before
        with the same key.
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
            require(joined, "Join the room before you speak in it.", 403)
        user.spend(time.monotonic())
        return self.keep(user, room, message, key)

    def sent_with(self, user, key):
        """Return the id of the message the user sent with this key, or None."""
        return user.keys.get(key)

    def keep(self, user, room, message, key):
        """Number a message and keep it with its key. Return its id and the message to send."""
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
        """Return the id of the last message said anywhere."""
        return self.last_id

    def since(self, room, last_id):
        """Return a room's messages after an id, oldest first, and whether some are lost."""
        newer = [message for message in self.history[room] if message["id"] > last_id]
        gap = len(newer) > HISTORY or 0 < last_id < self.started
        return newer[-HISTORY:], gap


state = State()

# 5. Users -----------------------------------------------------------------------------------------

MAX_BYTES = 64 * 1024  # in the body of a request, or in a message over a WebSocket
OWN_PATH = re.compile(r"/(?![/\\])[^\x00-\x1f\x7f]*")  # //host and /\host lead to other sites
NAME = re.compile("[A-Za-z0-9_-]{1,20}")
NO_HASH = generate_password_hash(secrets.token_hex())  # checking an unknown name takes as long
TEN_A_MINUTE = RateLimitItemPerMinute(10)
wrong = strategies.FixedWindowRateLimiter(storage.MemoryStorage())  # counts wrong passwords
hashing = threading.Lock()  # hashing takes 32 MB of memory: one password at a time

app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(),
    SESSION_COOKIE_NAME=f"session-{PORT}",  # keeps two servers on one machine apart
    SESSION_COOKIE_SAMESITE="Lax",
    MAX_CONTENT_LENGTH=MAX_BYTES,
    TRUSTED_HOSTS=["localhost", "127.0.0.1", HOST] if LOCAL else None,  # against DNS rebinding
    BOOTSTRAP_SERVE_LOCAL=True,
    DEMO_ACCOUNTS=[],
)
Bootstrap5(app)
login_manager = LoginManager(app)


@login_manager.user_loader
def load_user(token):
    """Return the User whose token is in the cookie, or None."""
    return state.holder(token)


@login_manager.unauthorized_handler
def sign_in_first():
    """Redirect to the login form, and from there back to the page that was asked for."""
    require(request.path != "/messages", "Sign in first.", 401)
    came_for = None
    if request.method == "GET":
        came_for = request.full_path.rstrip("?")
    return redirect(url_for("login", next=came_for))


def sign_in(user):
    """Log the user in and redirect to `next` if it is a path on this site."""
    login_user(user)
    path = request.values.get("next", "")
    if not OWN_PATH.fullmatch(path):
        path = url_for("index")
    return redirect(path)


@app.get("/login")
def login():
    """Show the login form."""
    return render_template("login.html")


@app.post("/login")
def check_password():
    """Log the user in. Ten wrong passwords lock the name for the rest of the minute."""
    name = request.form.get("username", "")
    password = request.form.get("password", "")
    g.username = name  # stays in the form if the login fails
    attempts = name.lower()[:20], request.remote_addr
    with hashing:  # nobody else can try between the test and the count
        allowed = wrong.test(TEN_A_MINUTE, *attempts)
        require(allowed, "Too many wrong passwords for this name: wait a minute.", 429)
        user = state.user(name)
        password_hash = user.password_hash if user else NO_HASH
        right = check_password_hash(password_hash, password)
        if not right:
            wrong.hit(TEN_A_MINUTE, *attempts)
            raise Refused("Wrong name or password.", 401)
    return sign_in(user)


@app.post("/register")
def register():
    """Create an account and log the new user in."""
    name = request.form.get("username", "")
    password = request.form.get("password", "")
    g.username = name  # stays in the form if the name is refused
    require(NAME.fullmatch(name), "A name has 1 to 20 letters (a to z), digits, _ or -.")
    require(len(password) >= 8, "A password must have at least 8 characters.")
    require(name.lower() not in [*DEMO_ACCOUNTS, TEACHER], "That name is taken.", 409)
    with hashing:
        password_hash = generate_password_hash(password)
    with lock:
        user = state.register(name, password_hash)
    return sign_in(user)


@app.post("/logout")
@login_required
def logout():
    """End all sessions, connections and waiting polls of the user, on all devices."""
    with lock:
        sids = state.connections(current_user.name)
        old_token = state.renew(current_user)
        hang_up(sids, old_token)
    logout_user()
    return redirect(url_for("login"))


# 6. Pages -----------------------------------------------------------------------------------------


@app.get("/")
@login_required
def index():
    """Show polling beside full duplex."""
    return render_template("index.html", last_id=state.newest())


@cache
def sources():
    """Return the source of each handler, read once."""
    found = {name: inspect.getsourcelines(handler) for name, handler in HANDLERS.items()}
    return {name: {"lines": lines, "first": first} for name, (lines, first) in found.items()}


@app.get("/room")
@login_required
def room_page():
    """Show the rooms, and the handlers behind them."""
    rooms = state.rooms(current_user.name)
    return render_template("room.html", rooms=rooms, handlers=sources())


@app.get("/socket.io.js")
def socket_io_client():
    """Serve Socket.IO's browser client from an installed package, so no network is needed."""
    file = distribution("nicegui").locate_file("nicegui/static/socket.io.min.js")
    return send_file(file, max_age=3600)


@app.get("/messages")
@login_required
def messages():
    """Answer a poll of the open channel: at once, or when there is news within `wait` seconds."""
    try:
        after = int(request.args.get("after", 0))
        wait = float(request.args.get("wait", 0))
    except ValueError:
        raise Refused('"after" and "wait" must be numbers.', 400) from None
    require(not math.isnan(wait), '"wait" must be a number of seconds.')
    token = current_user.token

    def something_to_tell():
        newer, _ = state.since(None, after)
        return newer or not state.holder(token)

    with news:
        news.wait_for(something_to_tell, timeout=min(25, wait))
        newer, _ = state.since(None, after)
    require(state.holder(token), "You have logged out.", 401)
    last_id = newer[-1]["id"] if newer else after
    return jsonify(messages=newer, last_id=last_id)


@app.post("/messages")
@login_required
def post_message():
    """Say something to everyone over HTTP, without a connection."""
    try:
        data = request.get_json(force=True, silent=True)
    except RecursionError:  # thousands of nested lists
        data = None
    require(isinstance(data, dict), "Send one JSON object.")
    return jsonify(id=say(data)), 201


@app.errorhandler(HTTPException)
def say_why(error):
    """Show an error in the login form, as JSON to pollers, or as a plain page."""
    if request.path in ("/login", "/register"):
        return render_template("login.html", error=error.description), error.code
    if request.path == "/messages":
        answer = {"ok": False, "error": error.description}
        return getattr(error, "answer", answer), error.code
    return error


@app.before_request
def own_pages_only():
    """Refuse a form sent by a page of another site."""
    g.nonce = secrets.token_urlsafe()
    require(request.method != "POST" or from_here(), "This came from another site.", 403)


@app.after_request
def protect(response):
    """Allow only our own scripts, no frames on other sites, and no copies on disk."""
    response.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'nonce-{g.nonce}'; style-src 'self' 'nonce-{g.nonce}'; "
        "connect-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


# 7. Connections -----------------------------------------------------------------------------------
#
# For each message, the library queues a packet for each member and wakes a thread that frames it
# again. Here it is framed once, and the sender's thread writes it at once to each WebSocket that
# is idle. Everything else (slow clients, polling, upgrades) takes the library's queue and writer.
# This relies on the internals of engineio 4.15 and simple-websocket 1.1.

MAX_WAITING = 6 * HISTORY  # packets that may wait for a client
PATIENCE = 10  # seconds without a sign of life

writing = threading.Lock()  # held for moments, never while waiting for a client


@lru_cache(maxsize=1)
def frame(data):
    """Return the WebSocket frame for a packet (text). Bytes are returned as they are."""
    if isinstance(data, bytes):
        return data
    return bytes(FrameProtocol(client=False, extensions=[]).send_data(data))


class EnginePacket(engineio.packet.Packet):
    """An Engine.IO packet. Anything malformed counts as a request to close."""

    def decode(self, encoded_packet):
        """Decode a packet from a client."""
        try:
            super().decode(encoded_packet)
            if self.packet_type == MESSAGE and not self.data:
                raise ValueError("empty message")
        except (ValueError, RecursionError):
            self.packet_type = CLOSE


class WebSocket(simple_websocket.Server):
    """The server's end of a WebSocket, read in the thread of the request that opened it."""

    def __init__(self, environ, connection):
        environ["HTTP_SEC_WEBSOCKET_EXTENSIONS"] = ""  # no compression: 0.5 MB can become 500
        super().__init__(environ, max_message_size=MAX_BYTES)
        self.connection = connection
        self.tcp = self.sock
        # Keep what a slow client has not taken in our queue, where it is counted.
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_BYTES)
        self.at_once = socket.socket(fileno=self.tcp.fileno())  # the same line, but never waits
        self.at_once.setblocking(False)
        self.sock = SimpleNamespace(send=self.answer)

    def _thread(self):
        """Do nothing: the library would read in a second thread."""

    def wait(self):
        """Return the next message, or None after the last one."""
        with suppress(OSError, ProtocolError):
            while self.connected and not self.input_buffer:
                received = self.tcp.recv(self.receive_bytes)
                self.ws.receive_data(received or None)
                self.connected = self._handle_events()
        return self.input_buffer.pop(0) if self.input_buffer else None

    def answer(self, frames):
        """Send the answer to a WebSocket ping, unless the client does not keep up."""
        if self.connection.upgraded and self.connection.idle:
            self.connection.send(EnginePacket(MESSAGE, bytes(frames)))

    def send(self, data):
        """Write a packet (text) or the rest of a frame (bytes), however long it takes."""
        self.tcp.sendall(frame(data))

    def close(self):
        """Shut the TCP connection down, which wakes up its reader and writer."""
        with suppress(OSError):
            self.tcp.shutdown(socket.SHUT_RDWR)


class Connection(engineio.socket.Socket):
    """The connection of one client."""

    websocket = None
    idle = False  # the queue is empty and everything has been written
    busy = False  # one of its packets is being handled
    alive_at = math.inf  # the last sign of life: the client sent something, or took what waited

    def receive(self, packet):
        """Handle a packet. Close the connection if too many answers wait for the client."""
        self.busy = True
        try:
            super().receive(packet)
        finally:
            self.alive_at = time.monotonic()
            self.busy = False
        if self.queue.qsize() > MAX_WAITING:
            self.close()

    def send(self, packet):
        """Write a packet at once if possible, else queue it."""
        with writing:
            if self.upgraded and self.idle:
                data = frame(packet.encode())
                try:
                    sent = self.websocket.at_once.send(data)
                except OSError:  # the client takes nothing now, or is gone
                    sent = 0
                if sent == len(data):
                    return
                packet = EnginePacket(MESSAGE, data[sent:])
            self.idle = False
            self.queue.put(packet)

    def poll(self):
        """Return the next packets, at most 16: Python clients refuse more."""
        self.alive_at = time.monotonic()
        with writing:
            self.idle = self.queue.empty()
        packets = [self.queue.get()]
        while packets[-1] and len(packets) < 16 and not self.queue.empty():
            packets.append(self.queue.get())
        if packets[-1] is None:  # closed: wake up any other poll
            self.queue.put(packets.pop())
        return packets

    def handle_get_request(self, environ, start_response):
        """Answer a poll, even during an upgrade, or serve a WebSocket until it ends."""
        if environ.get("HTTP_UPGRADE", "").lower() != "websocket":
            return self.poll()
        with lock:
            if self.websocket:  # a second one must not take the connection over
                return self.server._bad_request()
            try:
                self.websocket = WebSocket(environ, self)
            except (ProtocolError, OSError, ValueError):  # not a valid handshake
                return self.server._bad_request()
        try:
            self._websocket_handler(self.websocket)
        finally:
            with writing:
                self.websocket.at_once.detach()
        raise ConnectionError  # tells Werkzeug that there is nothing left to answer

    def handle_post_request(self, environ):
        """Handle all packets of a POST; the library drops a POST with more than 16."""
        for packet in environ["body"].split("\x1e"):
            self.receive(EnginePacket(encoded_packet=packet))

    def schedule_ping(self):
        """Do nothing: the library would start a thread for the next ping."""

    def check_ping_timeout(self):
        """Ping the client, or close the connection; engineio's service task calls this."""
        silent = time.monotonic() - self.alive_at > PATIENCE and not self.busy
        if silent or self.queue.qsize() > MAX_WAITING:
            reason = self.server.reason.PING_TIMEOUT
            self.server.start_background_task(self.close, reason=reason)  # may wait for the lock
        else:
            self.send(EnginePacket(PING))

    def close(self, wait=True, **how):
        """Close without waiting for the client, and close TCP as well."""
        with lock:
            super().close(wait=False, **how)
        if self.websocket:
            self.websocket.close()


engineio.packet.Packet = EnginePacket
engineio.socket.Socket = Connection

# 8. The door: who may open a connection, and what may come through it -----------------------------


class Packet(SocketIOPacket):
    """A Socket.IO packet. An event has a name that clients may use, and one JSON object."""

    def decode(self, encoded_packet):
        """Decode a packet from a client. An invalid event gets a name that is refused."""
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


socketio.init_app(
    app,
    async_mode="threading",
    async_handlers=False,  # handle the events of a connection in the order they were sent
    serializer=Packet,
    cors_allowed_origins=[],  # `door` checks the origin
    max_http_buffer_size=MAX_BYTES,
    ping_timeout=6,  # seconds for a round of engineio's service task over all connections
    ping_interval=12,  # a client gives up when it hears no ping for the sum of both
)
engine = socketio.server.eio


@engine.on("connect")
def open_connection(eio_sid, environ):
    """Open a connection, unless its user has logged out since `door` let the request in."""
    with lock:
        if not state.holder(environ["REMOTE_USER"]):
            return False
        return socketio.server._handle_eio_connect(eio_sid, environ)


@engine.on("message")
def handle_message(eio_sid, data):
    """Handle a Socket.IO packet alone, unless it is for a handler that runs in parallel."""
    packet = Packet(encoded_packet=data)
    parallel = packet.packet_type == EVENT and packet.data[0] not in HANDLERS
    with nullcontext() if parallel else lock:
        if eio_sid in socketio.server.environ:  # it may have ended while we waited for the lock
            socketio.server._handle_eio_message(eio_sid, data)


def hang_up(sids, token):
    """End these connections of a user, all others opened with the token, and waiting polls."""
    with lock:
        for sid in sids:
            socketio.server.disconnect(sid)
        for eio_sid, environ in list(socketio.server.environ.items()):
            if environ.get("REMOTE_USER") == token:  # some never got as far as `connect`
                engine.disconnect(eio_sid)
        news.notify_all()


def from_here():
    """Return whether the request was not sent by a page of another site."""
    site = request.headers.get("Sec-Fetch-Site")
    if site:
        return site in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is None or origin.partition("://")[2] == request.host


def check_request(environ):
    """Refuse a request unless a signed-in user sent it to a connection of their own."""
    require(from_here(), "This came from another site.", 403)
    require(current_user.is_authenticated, "Sign in first.", 401)
    environ["REMOTE_USER"] = current_user.token
    eio_sid = request.args.get("sid")
    if eio_sid is not None:
        opened_by = socketio.server.environ.get(eio_sid, {}).get("REMOTE_USER")
        own = opened_by == current_user.token
        require(own, "This connection is not yours, or has ended.", 403)
        environ["body"] = request.get_data(as_text=True)  # refused if over MAX_CONTENT_LENGTH


def door(environ, start_response, inside=app.wsgi_app):
    """Let a request in, or refuse it before a byte of its body is read."""
    try:
        with app.request_context(environ):
            require(request.host, "Which host?")  # refused unless it is in TRUSTED_HOSTS
            if request.path.startswith("/socket.io/"):
                check_request(environ)
    except HTTPException as refusal:
        return refusal(environ, start_response)
    return inside(environ, start_response)


app.wsgi_app = door

# 9. Run -------------------------------------------------------------------------------------------


class Handler(WSGIRequestHandler):
    """A request to the web server."""

    protocol_version = "HTTP/1.0"  # one request per connection: a WebSocket's end is not another
    timeout = 30  # seconds a client may be silent in the middle of a request
    disable_nagle_algorithm = True  # send small frames at once
    rbufsize = 2048  # bytes, kept as long as a WebSocket lives

    def make_environ(self):
        """Read the head. Discard a body that nobody reads in small pieces, not 10 MB each."""
        try:
            environ = super().make_environ()
        except ValueError:  # not a valid URL
            raise ConnectionError from None
        body = self.rfile
        self.rfile = SimpleNamespace(read=lambda size: body.read1(MAX_BYTES), close=body.close)
        return environ


def print_log():
    """Print who comes and goes, in a thread of its own."""
    while True:
        print(log.get(), flush=True)


def open_accounts():
    """Create the first accounts, and say who can sign in."""
    threading.Thread(target=print_log, daemon=True).start()
    accounts, password = DEMO_ACCOUNTS, "demo"
    if LOCAL:
        app.config.update(DEMO_ACCOUNTS=DEMO_ACCOUNTS)
        print("Sign in as ana, luis or eva, password demo: two people, two browsers.")
    else:
        accounts = [TEACHER]
        password = os.environ.get("LECTURER_PASSWORD") or secrets.token_urlsafe(6)
        print("Others can reach this address, so there are no demo accounts: everyone registers.")
        print(f"You are {TEACHER}, password {password}; the room staff is yours.")
    for name in accounts:
        with suppress(Refused):  # a State may outlive the process
            state.register(name, generate_password_hash(password))


def show_address():
    """Print where the server is, for a class as a QR code as well."""
    address = get_interface_ip(socket.AF_INET) if HOST == "0.0.0.0" else HOST
    url = f"http://{address}:{PORT}"
    print(f"Full duplex and rooms: open {url}")
    if not LOCAL:
        join_url = f"{url}/room?room=python"
        app.config.update(ADDRESS=address, JOIN_URL=join_url, QR_CODE=segno.make(join_url))
        app.config["QR_CODE"].terminal(compact=True)


def main():
    """Open the port, say so, and serve until Ctrl+C."""
    sys.stdout.reconfigure(errors="replace")  # some consoles cannot show a QR code
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no access lines
    try:
        listener = socket.create_server((HOST, int(PORT)), backlog=1024)
    except (OSError, ValueError, OverflowError) as error:
        sys.exit(f"Cannot listen on HOST={HOST} and PORT={PORT}: {error}. Set HOST or PORT.")
    show_address()
    open_accounts()
    print("Stop with Ctrl+C.", flush=True)
    server = make_server(
        HOST, int(PORT), app, threaded=True, request_handler=Handler, fd=listener.fileno()
    )
    server.serve_forever()


if __name__ == "__main__":
    main()
elif os.environ.get("FLASK_RUN_FROM_CLI"):
    open_accounts()
