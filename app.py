"""A chat server that shows what full duplex and rooms are, in one file.

    python app.py            then open http://127.0.0.1:5000 in two browsers

A client sends events. Each event carries one JSON object and is answered by an ack:
{"ok": true, ...} or {"ok": false, "error": "..."}.

    event    a client sends         the ack adds                      who hears it
    join     room, last_id?         room, members, missed, gap, ...   the room, joiner included
    leave    room                                                     the room, except the leaver
    chat     message, room?, key?   id                                the room; without, everyone
    typing   room                                                     the room, except the sender
    invite   room, username         username                          that user, on all connections
    expel    room, username                                           that user; the room: `leave`

Words you will meet:

    connection   the link between one client and the server; Socket.IO knows it by its sid
    room         a group of connections: what is sent to a room reaches all of them
    ack          the answer to one event, sent only to the connection that the event came from
    key          a text that a client chooses for a message, so that sending it again does no harm
    last_id      the id of the last message that a client has heard, 1795809540921 for example

Sections 2 to 6 are the lesson; start with the events in section 3. Sections 7 to 9 keep the chat
going when a client is slow, a cable is unplugged, or somebody attacks.
"""

import sys
import threading
from importlib.util import find_spec

if sys.version_info < (3, 11) or not find_spec("nicegui"):
    sys.exit("This needs Python 3.11 or newer, and: python -m pip install -r requirements.txt")

from flask import Flask, request
from flask_login import current_user
from flask_socketio import ConnectionRefusedError, SocketIO, emit, join_room, leave_room

# What the rest of the file needs.
import errno
import http.client
import inspect
import io
import logging
import math
import mimetypes
import os
import re
import secrets
import signal
import socket
import time
import unicodedata
from base64 import b64encode
from collections import OrderedDict, defaultdict, deque
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import distribution
from ipaddress import ip_address
from queue import SimpleQueue
from types import SimpleNamespace

import engineio
import psutil
import segno
import simple_websocket
from engineio.packet import CLOSE, MESSAGE, PING
from flask import g, jsonify, redirect, render_template, send_file, url_for
from flask_bootstrap import Bootstrap5
from flask_login import LoginManager, UserMixin, login_required, login_user, logout_user
from itsdangerous import TimestampSigner
from limits import RateLimitItemPerMinute, storage, strategies
from socketio import Manager, packet
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.security import check_password_hash, generate_password_hash
from werkzeug.serving import WSGIRequestHandler, get_interface_ip, make_server
from wsproto.frame_protocol import FrameProtocol
from wsproto.utilities import ProtocolError

# 2. Set-up ----------------------------------------------------------------------------------------

app = Flask(__name__)
socketio = SocketIO()  # gets its application in section 8, when all handlers are registered
# Requests and WebSockets are served in parallel threads, so what they share needs a lock.
lock = threading.RLock()  # held while `state` changes, until everyone who hears it has been told
said = threading.Condition(lock)  # notified when long polls have something to answer
log = SimpleQueue()  # lines to print: a stopped terminal must not block the chat

# 3. Events ----------------------------------------------------------------------------------------
# The way of one message from WebSocket to WebSocket, with the section of each step:
#     WebSocket.wait      reads a frame, in the thread that serves the connection (7)
#     Connection.receive  handles one packet after another (7)
#     handle_message      takes the lock if the handler is marked @one_at_a_time (8)
#     chat, announce      run with `current_user` and `request.sid` set (3)
#     State.say           checks the rules, numbers the message and keeps it (4)
#     socketio.emit       hands one packet to each connection in the room (the library)
#     Connection.send     writes it at once, or queues it if the client is slow (7)
# Handlers return the ack. `emit` sends to the sender only, `socketio.emit` to a room or everyone.


def one_at_a_time(handler):
    """Mark a handler that uses `state`. All others run in parallel, and may be slow."""
    handler.one_at_a_time = True
    return handler


@socketio.on("connect")
@one_at_a_time
def connect(auth=None):
    """A client connects. Nobody hears it. Refused unless it shows the user who is signed in."""
    require(current_user.is_authenticated, "Sign in first.")
    name = current_user.name
    shown = auth.get("username", name) if isinstance(auth, dict) else name
    require(shown == name, f"You are now signed in as {name}.")
    request.environ.pop("HTTP_COOKIE", None)  # else it is decoded again for each event
    state.add(request.sid, name)
    join_room(f"user:{name}")  # a private channel for all connections of this user
    log.put(f"connected: {name}")


@socketio.on("disconnect")
@one_at_a_time
def disconnect(reason):
    """A connection has ended. Each room hears `leave` if it was the user's last one there."""
    for room in state.rooms_of(request.sid):
        remove_from_room(request.sid, room, reason)
    name, _ = state.remove(request.sid)
    log.put(f"disconnected: {name} ({reason})")


@socketio.on("join")
@one_at_a_time
def join(data):
    """A connection enters a room and hears what it missed. The room hears of a new user."""
    name = current_user.name
    room = text_field(data, "room")
    last_id = id_field(data, "last_id")
    state.check_entry(name, room)
    if not state.connections(name, room):
        state.spend_notice(name)
    new = state.add(request.sid, name, room)
    missed, gap = state.since(room, last_id)
    for message in missed:
        emit("chat", message)
    join_room(channel(room))
    notice = {"room": room, "username": name, "members": state.members(room)}
    if new:
        socketio.emit("join", notice, to=channel(room))
    return {"ok": True, **notice, "missed": len(missed), "gap": gap, "last_id": state.newest()}


@socketio.on("leave")
@one_at_a_time
def leave(data):
    """A connection leaves a room. The others hear it if it was the user's last one there."""
    room = my_room(data)
    if state.connections(current_user.name, room) == [request.sid]:
        state.spend_notice(current_user.name)
    remove_from_room(request.sid, room, "left")
    return {"ok": True}


@socketio.on("chat")
@one_at_a_time
def chat(data):
    """A user says something. The room hears it, including the sender; without a room, everyone."""
    return {"ok": True, "id": announce(data, request.sid)}


@socketio.on("typing")
@one_at_a_time
def typing(data):
    """A member is typing. The room hears it, except the member's own connections."""
    name = current_user.name
    room = my_room(data)
    state.spend_notice(name)
    own = state.connections(name, room)
    socketio.emit("typing", {"room": room, "username": name}, to=channel(room), skip_sid=own)
    return {"ok": True}


@socketio.on("invite")
@one_at_a_time
def invite(data):
    """The owner of a room invites a user, who hears it on all connections."""
    owner, room, guest = my_guest(data)
    state.invite(owner, room, guest)
    socketio.emit("invite", {"room": room, "by": owner}, to=f"user:{guest}")
    return {"ok": True, "username": guest}


@socketio.on("expel")
@one_at_a_time
def expel(data):
    """The owner of a room expels a user, who hears it as well. The room hears `leave`."""
    owner, room, guest = my_guest(data)
    state.expel(owner, room, guest)
    for sid in state.connections(guest, room):
        remove_from_room(sid, room, "expelled")
    socketio.emit("expel", {"room": room, "by": owner}, to=f"user:{guest}")
    return {"ok": True}


@socketio.on("*")
def unknown(event, data):
    """A client sends an event that has no handler. Nobody hears it."""
    raise Refused("Send join, leave, chat, typing, invite or expel, with one JSON object.", 400)


@socketio.on_error_default
def refuse(error):
    """Turn a Refused into the ack that says why; in `connect`, refuse the connection."""
    if not isinstance(error, Refused):
        raise error
    if request.event["message"] == "connect":
        raise ConnectionRefusedError(error.description)
    return error.answer


def channel(room):
    """Return Socket.IO's name for a room. Each sid is such a name, too: hence the prefix."""
    return f"room:{room}" if room else None


def my_room(data):
    """Return the room that an event names. Refused unless this connection has joined it."""
    room = text_field(data, "room")
    require(room in state.rooms_of(request.sid), "You are not in that room.")
    return room


def my_guest(data):
    """Return owner, room and guest of an event. Refused unless the sender is the owner."""
    owner, room = current_user.name, text_field(data, "room")
    guest = state.guest(owner, room, text_field(data, "username"))
    state.spend_notice(owner)
    return owner, room, guest


def announce(data, sid=None):
    """Send a message to its room, or to everyone, and return its id. A known key sends nothing."""
    with lock:  # so that everyone hears all messages in the order of their ids
        message_id, message = state.say(current_user, data, sid)
        if message:
            socketio.emit("chat", message, to=channel(message["room"]))
            if message["room"] is None:
                said.notify_all()
    return message_id


def remove_from_room(sid, room, reason):
    """Take a connection out of a room. The room hears `leave` if it was the user's last one."""
    name, was_last = state.remove(sid, room)
    leave_room(channel(room), sid=sid, namespace="/")
    if was_last:
        notice = {"room": room, "username": name, "members": state.members(room), "reason": reason}
        socketio.emit("leave", notice, to=channel(room))


# 4. Rules and state: accounts, rooms, who is connected, what was said -----------------------------

HOST = os.environ.get("HOST", "").strip() or "127.0.0.1"  # 0.0.0.0: every device may connect
PORT = os.environ.get("PORT", "").strip() or "5000"
DOMAIN = [name.strip().lower() for name in os.environ.get("DOMAIN", "").split(",") if name.strip()]
HISTORY = 500  # messages kept for each room, and keys for each user
RATE = 20  # messages a user may say in a second, and notices: join, leave, typing, ...
BURST = 60  # messages, and notices, that a user may send at once
DEMO_ACCOUNTS = ["ana", "luis", "eva"]  # their password is well known: for this machine only


def is_local(address):
    """Return whether only this machine can use the address."""
    with suppress(ValueError):
        return ip_address(address).is_loopback
    return address.lower() == "localhost"


LOCAL = is_local(HOST) and not DOMAIN
# DNS rebinding: another site can point its own name at this machine.
TRUSTED_HOSTS = DOMAIN or (["localhost", "127.0.0.1", "[::1]", HOST.lower()] if LOCAL else [])
TEACHER = "ana" if LOCAL else "lecturer"  # owns the room `staff`

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON allows it, UTF-8 does not
INVISIBLE = {"Cc", "Cf", "Mn", "Zl", "Zp", "Zs"}  # kinds of characters that alone show nothing
BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that show nothing
LOOK_ALIKES = str.maketrans("I10", "llo")


class Refused(HTTPException):
    """Something that the rules forbid: an ack says why, and a page answers with the status."""

    def __init__(self, reason, status, **more):
        super().__init__(reason)
        self.code = status
        self.answer = {"ok": False, "error": reason, **more}


def require(condition, reason, status=400):
    """Raise Refused with the given reason and HTTP status unless the condition is true."""
    if not condition:
        raise Refused(reason, status)


def text_field(data, name):
    """Return data[name]. Refused unless it is valid text."""
    value = data.get(name)
    require(isinstance(value, str), f'Send a JSON object with a string in "{name}".')
    require(not LONE_SURROGATE.search(value), f'"{name}" contains an incomplete character.')
    return value


def id_field(data, name):
    """Return data[name], or 0 if it is missing. Refused unless it can be the id of a message."""
    value = data.get(name) or 0
    valid = type(value) is int and value >= 0  # not isinstance: True is an int, too
    require(valid, f'"{name}" must be the id of the last message you heard.')
    return value


def message_field(data):
    """Return data["message"] without blank lines around it. Refused if it shows nothing."""
    message = text_field(data, "message").rstrip()
    message = re.sub(r"\A\s*\n", "", message)  # but keep the indentation of the first line
    shown = [c for c in message if unicodedata.category(c) not in INVISIBLE and c not in BLANKS]
    require(shown and len(message) <= 500, "A message has 1 to 500 characters.")
    return message


def looks(name):
    """Return what a name can be read as: Iuis, with a capital i, as luis."""
    return {name.lower(), name.translate(LOOK_ALIKES).lower()}


def is_taken(name, names):
    """Return whether one of the names can be read as this one."""
    return any(looks(name) & looks(other) for other in names)


class Allowance:
    """How much a user may send: RATE in a second, BURST at once."""

    def __init__(self):
        self.left = BURST
        self.counted_at = 0  # seconds

    def spend(self, now):
        """Use up one at the time `now` (seconds). Refused if none is left."""
        earned = (now - self.counted_at) * RATE
        self.left = min(BURST, self.left + earned)
        self.counted_at = now
        if self.left < 1:
            wait = math.ceil(1000 * (1 - self.left) / RATE) / 1000  # seconds, to the millisecond
            raise Refused(f"Slow down: the limit is {RATE} a second.", 429, retry_after=wait)
        self.left -= 1


class User(UserMixin):
    """An account. Cookies hold its token, which is renewed when the user signs out."""

    def __init__(self, id, name, password_hash):
        self.id = id
        self.name = name
        self.password_hash = password_hash
        self.token = secrets.token_urlsafe()
        self.keys = OrderedDict()  # key -> id of the message that was sent with it
        self.messages = Allowance()
        self.notices = Allowance()  # what others hear of the user besides: join, typing, ...

    def get_id(self):
        """Return what Flask-Login keeps in the cookie: unlike the id, the token can be renewed."""
        return self.token


class State:
    """Accounts, rooms, connections and messages. Hold the lock while you call what changes them."""

    def __init__(self):
        self.users = {}  # name in lower case -> User
        self.tokens = {}  # token -> User
        self.owners = {"python": None, "flask": None, "staff": TEACHER}  # room -> owner's name
        self.guests = defaultdict(set)  # room -> names of invited users
        self.present = defaultdict(dict)  # room -> {sid: name}; present[None] has all connections
        # One message more than `since` returns, to know whether there were older ones.
        self.history = defaultdict(lambda: deque(maxlen=HISTORY + 1))
        self.started = int(time.time() * 1000)  # ids start at the clock: they rise over a restart
        self.last_id = self.started

    def register(self, name, password_hash):
        """Create an account and its own room. Refused if a name that looks like it is taken."""
        taken = is_taken(name, [user.name for user in self.users.values()])
        require(not taken, "That name is taken, or looks like one that is.", 409)
        user = User(len(self.users) + 1, name, password_hash)
        self.users[name.lower()] = user
        self.tokens[user.token] = user
        self.owners[f"room{user.id}"] = name
        return user

    def user(self, name):
        """Return the User with that name, in upper or lower case, or None."""
        return self.users.get(name.strip(" ").lower())

    def holder(self, token):
        """Return the User the token belongs to, or None."""
        return self.tokens.get(token)

    def renew(self, user):
        """Give the user a new token and return the old one, which is no longer valid."""
        old = user.token
        account = self.tokens.pop(old)
        account.token = secrets.token_urlsafe()
        self.tokens[account.token] = account
        return old

    def rooms(self, name):
        """Return each room with its owner (or None) and whether it is open to the user."""
        return [
            {"room": room, "owner": owner, "open": self.may_enter(name, room)}
            for room, owner in self.owners.copy().items()
        ]

    def may_enter(self, name, room):
        """Return whether the user may enter an existing room."""
        return self.owners[room] in (None, name) or name in self.guests[room]

    def check_entry(self, name, room):
        """Refused unless the room exists and the user may enter it."""
        require(room in self.owners, "No room has that name.")
        reason = f"{room} belongs to {self.owners[room]}, who has not invited you."
        require(self.may_enter(name, room), reason)

    def guest(self, owner, room, name):
        """Return the guest's name as registered. Refused unless the owner owns the room."""
        require(self.owners.get(room) == owner, "Only the owner of a room can invite or expel.")
        user = self.user(name)
        require(user, "No user has that name.")
        require(user.name != owner, "You own this room: you cannot invite or expel yourself.")
        return user.name

    def invite(self, owner, room, name):
        """Let a user enter the owner's room from now on."""
        self.guests[room].add(self.guest(owner, room, name))

    def expel(self, owner, room, name):
        """Withdraw an invitation."""
        self.guests[room].discard(self.guest(owner, room, name))

    def add(self, sid, name, room=None):
        """Add a connection to a room (None: to those connected). Return whether its user is new."""
        new = not self.connections(name, room)
        self.present[room][sid] = name
        return new

    def remove(self, sid, room=None):
        """Remove a connection from a room. Return its user's name and whether it was the last."""
        name = self.present[room].pop(sid)
        return name, not self.connections(name, room)

    def rooms_of(self, sid):
        """Return the rooms that a connection has joined."""
        return [room for room, names in self.present.items() if room and sid in names]

    def members(self, room):
        """Return the sorted names of the users in a room."""
        return sorted(set(self.present[room].values()))

    def connections(self, name, room=None):
        """Return the sids of the user's connections in a room, or of all of them."""
        return [sid for sid, owner in self.present[room].items() if owner == name]

    def spend_notice(self, name):
        """Count what others are about to hear of a user. Refused beyond the rate."""
        self.user(name).notices.spend(time.monotonic())

    def say(self, user, data, sid=None):
        """Check and store data["message"], for data["room"] or, without one, for everyone.

        Return its id and the message to send. If the key is known, return the first id and None.
        """
        key = data.get("key")
        if key is not None:
            require(1 <= len(text_field(data, "key")) <= 64, "A key has 1 to 64 characters.")
            known = self.sent_with(user, key)
            if known:
                return known, None
        message = message_field(data)
        room = data.get("room")
        if room is not None:
            joined = text_field(data, "room") in self.rooms_of(sid)
            require(joined, "Join the room before you speak in it.", 403)
        user.messages.spend(time.monotonic())
        return self.store(user, room, message, key)

    def sent_with(self, user, key):
        """Return the id of the message the user sent with this key, or None."""
        return user.keys.get(key)

    def store(self, user, room, text, key):
        """Number a message and keep it with its key. Return its id and the message to send."""
        self.last_id += 1
        message = {
            "id": self.last_id,
            "room": room,
            "username": user.name,
            "message": text,
            "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        self.history[room].append(message)
        if key is not None:
            user.keys[key] = self.last_id
            if len(user.keys) > HISTORY:
                user.keys.popitem(last=False)  # the oldest
        return self.last_id, message

    def newest(self):
        """Return the id of the last message said anywhere."""
        return self.last_id

    def since(self, room, last_id):
        """Return a room's messages after an id, oldest first, and whether others are gone."""
        newer = [message for message in self.history[room] if message["id"] > last_id]
        before_restart = 0 < last_id < self.started
        from_the_future = last_id > self.last_id  # the clock was set back before a restart
        gap = len(newer) > HISTORY or before_restart or from_the_future
        return newer[-HISTORY:], gap


state = State()

# 5. Users -----------------------------------------------------------------------------------------

MAX_BYTES = 64 * 1024  # in the body of a request, or in a message over a WebSocket
OWN_PATH = re.compile(r"/(?![/\\])[^\x00-\x1f\x7f]*")  # //host and /\host lead to other sites
NAME = re.compile("[A-Za-z0-9_-]{1,20}")
DUMMY_HASH = generate_password_hash(secrets.token_hex())  # an unknown name takes as long to check
TEN_A_MINUTE = RateLimitItemPerMinute(10)
failed_logins = strategies.FixedWindowRateLimiter(storage.MemoryStorage())
hashing = threading.Lock()  # hashing takes 32 MB of memory: one password at a time

app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(),
    SESSION_COOKIE_NAME=f"session-{PORT}",  # keeps two servers on one machine apart
    SESSION_COOKIE_SAMESITE="Lax",
    MAX_CONTENT_LENGTH=MAX_BYTES,
    BOOTSTRAP_SERVE_LOCAL=True,
    DEMO_ACCOUNTS=[],
)
app.session_interface.get_cookie_secure = lambda app: request.is_secure  # behind HTTPS
# Without a time, or a clock that is set back would sign everyone out: cookies from the future.
TimestampSigner.get_timestamp = lambda signer: 0
Bootstrap5(app)
login_manager = LoginManager(app)


@login_manager.user_loader
def load_user(token):
    """Return the User whose token is in the cookie, or None."""
    return state.holder(token)


@login_manager.unauthorized_handler
def sign_in_first():
    """Redirect to the login form, and from there back to the page that was asked for."""
    if request.path == "/messages":
        raise Refused("Sign in first.", 401)
    wanted = None
    if request.method == "GET":
        wanted = request.full_path.rstrip("?")
    return redirect(url_for("login", next=wanted))


def sign_in(user):
    """Sign the user in and redirect to `next` if it is a path on this site."""
    login_user(user)
    path = request.values.get("next", "")
    if not OWN_PATH.fullmatch(path):
        path = url_for("index")
    return redirect(path)


@lru_cache(maxsize=1000)
def turn_of(address):
    """Return the lock of an address: only one request from it at a time waits for `hashing`."""
    return threading.Lock()


def check_password(name, password):
    """Return the user if the password is right, else None. Call it while you hold `hashing`.

    Ten wrong passwords from one address close the name to it for the rest of the minute.
    """
    attempts = name.lower()[:20], request.remote_addr
    if not failed_logins.test(TEN_A_MINUTE, *attempts):
        raise Refused("Too many wrong passwords for this name: wait a minute.", 429, retry_after=60)
    user = state.user(name)
    # `flask run --host 0.0.0.0` does not set HOST.
    allowed = name.lower() not in DEMO_ACCOUNTS or is_local(request.remote_addr)
    if check_password_hash(user.password_hash if user else DUMMY_HASH, password) and allowed:
        return user
    failed_logins.hit(TEN_A_MINUTE, *attempts)
    return None


@app.get("/login")
def login():
    """Show the login form."""
    return render_template("login.html")


@app.post("/login")
def submit_login():
    """Sign the user in."""
    name = request.form.get("username", "").strip(" ")
    password = request.form.get("password", "")
    with turn_of(request.remote_addr), hashing:  # no other try between the check and the count
        user = check_password(name, password)
    require(user, "Wrong name or password.", 401)
    return sign_in(user)


@app.post("/register")
def register():
    """Create an account and sign the new user in. A second click signs in, too."""
    name = request.form.get("username", "").strip(" ")
    password = request.form.get("password", "")
    require(NAME.fullmatch(name), "A name has 1 to 20 letters (a to z), digits, _ or -.")
    require(len(password) >= 8, "A password must have at least 8 characters.")
    with turn_of(request.remote_addr), hashing:
        if state.user(name):
            user = check_password(name, password)
            require(user, "That name is taken.", 409)
        else:
            require(not is_taken(name, [*DEMO_ACCOUNTS, TEACHER]), "That name is taken.", 409)
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
        disconnect_user(sids, old_token)  # see section 8
    logout_user()
    return redirect(url_for("login"))


# 6. Pages -----------------------------------------------------------------------------------------

mimetypes.add_type("text/javascript", ".js")  # the registry of Windows may say text/plain


def source(handler):
    """Return a handler's lines of source and the number of the first."""
    lines, first = inspect.getsourcelines(handler)
    return {"lines": lines, "first": first}


# What the room page shows. It is read now, because this file may be edited while it runs.
HANDLERS = {event: source(handler) for event, handler, _ in socketio.handlers if event != "*"}


@app.get("/")
@login_required
def index():
    """Show polling beside full duplex."""
    return render_template("index.html", last_id=state.newest())


@app.get("/room")
@login_required
def room_page():
    """Show the rooms, and the handlers behind them."""
    rooms = state.rooms(current_user.name)
    return render_template("room.html", rooms=rooms, handlers=HANDLERS)


@app.get("/socket.io.js")
def socket_io_client():
    """Serve Socket.IO's browser client from an installed package, so no network is needed."""
    file = distribution("nicegui").locate_file("nicegui/static/socket.io.min.js")
    return send_file(file, max_age=3600)


@app.get("/messages")
@login_required
def messages():
    """Answer with the messages to everyone: at once, or after `wait` seconds unless one arrives."""
    try:
        after = int(request.args.get("after", 0))
        wait = float(request.args.get("wait", 0))
    except ValueError:
        raise Refused('"after" and "wait" must be numbers.', 400) from None
    require(not math.isnan(wait), '"wait" must be a number of seconds.')
    token = current_user.token

    def has_answer():
        newer, _ = state.since(None, after)
        return newer or not state.holder(token)

    with said:
        said.wait_for(has_answer, timeout=min(25, wait))
        newer, gap = state.since(None, after)
    require(state.holder(token), "You have signed out.", 401)
    last_id = newer[-1]["id"] if newer else after
    return jsonify(messages=newer, last_id=last_id, gap=gap)


@app.post("/messages")
@login_required
def post_message():
    """Say something to everyone over HTTP, without a connection."""
    try:
        data = request.get_json(force=True, silent=True)
    except RecursionError:  # thousands of nested lists
        data = None
    require(isinstance(data, dict), "Send one JSON object.")
    return jsonify(id=announce(data)), 201


@app.errorhandler(HTTPException)
def say_why(error):
    """Show an error in the login form, as JSON on /messages, or as a plain page."""
    answer = getattr(error, "answer", {"ok": False, "error": error.description})
    headers = {}
    if "retry_after" in answer:
        headers["Retry-After"] = math.ceil(answer["retry_after"])
    if request.path == "/messages":
        return answer, error.code, headers
    if isinstance(error, Refused) and request.path in ("/login", "/register"):
        return render_template("login.html", error=error.description), error.code, headers
    return error


@app.before_request
def check_request():
    """Refuse a body that is too long, and a form sent by a page of another site."""
    g.nonce = secrets.token_urlsafe()
    require_length()
    require(request.method != "POST" or from_here(), "This request came from another site.", 403)


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
PING_EVERY = 6  # seconds
PATIENCE = 10  # seconds without a sign of life

writing = threading.Lock()  # guards a Connection; never held while waiting for client or handler
stuck = SimpleQueue()  # connections to close


class Frame(bytes):
    """A WebSocket frame, or the rest of one."""


@lru_cache(maxsize=1, typed=True)  # typed: a Frame is equal to the same bytes
def frame(data):
    """Return the frame for a packet. Without the cache, it is made again for each member."""
    if isinstance(data, Frame):
        return data
    return Frame(FrameProtocol(client=False, extensions=[]).send_data(data))


class EnginePacket(engineio.packet.Packet):
    """An Engine.IO packet. Without this, a malformed one leaves a traceback."""

    def encode(self, b64=False):
        """Encode a packet; bytes anew for each client: in the cache, a WebSocket's break a poll."""
        if not self.binary:
            return super().encode()
        return "b" + b64encode(self.data).decode() if b64 else self.data

    def decode(self, encoded_packet):
        """Decode a packet from a client. Anything malformed counts as a request to close."""
        try:
            super().decode(encoded_packet)
        except (ValueError, RecursionError):
            self.packet_type = CLOSE
        if self.packet_type == MESSAGE and not self.data:
            self.packet_type = CLOSE


class WebSocket(simple_websocket.Server):
    """The server's end of a WebSocket, read in the thread of the request that opened it."""

    def __init__(self, environ, connection):
        environ["HTTP_SEC_WEBSOCKET_EXTENSIONS"] = ""  # no compression: 0.5 MB can become 500
        super().__init__(environ, max_message_size=MAX_BYTES)
        self.connection = connection
        self.tcp = self.sock
        # A small buffer: what a slow client has not read waits in our queue, where it is counted.
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_BYTES)
        self.no_wait = socket.socket(fileno=self.tcp.fileno())  # the same connection
        self.no_wait.setblocking(False)
        self.tcp.settimeout(3 * PATIENCE)  # seconds; without one, `tcp` would not wait either
        self.sock = SimpleNamespace(send=self.answer)  # for pongs and close frames of the library

    def _thread(self):
        """Do nothing: the library would read in a second thread."""

    def wait(self):
        """Return the next message, or None when the connection has ended and all are read."""
        with suppress(OSError, ProtocolError):
            while self.connected and not self.input_buffer:
                received = self.tcp.recv(self.receive_bytes)
                self.ws.receive_data(received or None)
                self.connected = self._handle_events()
        return self.input_buffer.pop(0) if self.input_buffer else None

    def answer(self, frames):
        """Send a pong, or drop it; the library would write it into the middle of another frame."""
        if self.connection.upgraded and self.connection.idle:
            self.connection.send(EnginePacket(MESSAGE, Frame(frames)))

    def send(self, data):
        """Write a packet, or the rest of a frame, in 30 s at most."""
        self.tcp.sendall(frame(data))

    def close(self):
        """Shut TCP down, so that reader and writer wake up; the library leaves it open."""
        with suppress(OSError):
            self.tcp.shutdown(socket.SHUT_RDWR)


class Connection(engineio.socket.Socket):
    """The connection of one client."""

    websocket = None
    idle = False  # the queue is empty and everything has been written
    busy = False  # one of its packets is being handled
    alive_at = math.inf  # the last sign of life: the client sent something, or took what waited
    post_thread = None  # handles the latest POST
    open_posts = 0  # POSTs that are not handled yet

    def receive(self, packet):
        """Handle a packet once the client has taken most answers; else they fill the memory."""
        while self.queue.qsize() > MAX_WAITING - 2 * HISTORY and not self.closed:
            time.sleep(0.05)
        self.busy = True
        try:
            super().receive(packet)
        finally:
            self.alive_at = time.monotonic()
            self.busy = False

    def send(self, packet):
        """Write a packet at once if possible; the library queues it and wakes its writer."""
        with writing:
            if self.upgraded and self.idle:
                data = frame(packet.encode())
                try:
                    sent = self.websocket.no_wait.send(data)
                except OSError:  # the client takes nothing now, or is gone
                    sent = 0
                if sent == len(data):
                    return
                packet = EnginePacket(MESSAGE, Frame(data[sent:]))
            self.idle = False
            self.queue.put(packet)

    def poll(self):
        """Return the next packets, at most 16: Python clients refuse more.

        The library's writer calls this, too.
        """
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
        """Answer a poll, or serve a WebSocket until it ends.

        During an upgrade, the library answers each poll at once with nothing.
        """
        if environ.get("HTTP_UPGRADE", "").lower() != "websocket":
            return self.poll()
        with writing:
            if self.websocket:  # a second one must not take the connection over
                return self.server._bad_request()
            try:
                self.websocket = WebSocket(environ, self)
            except (ProtocolError, OSError, ValueError):  # not a valid handshake
                return self.server._bad_request()
        try:
            self._websocket_handler(self.websocket)
        finally:
            with writing:  # a closed descriptor's number may soon be another connection's
                self.websocket.no_wait.detach()
        raise BrokenPipeError(errno.EPIPE, "all is answered")  # neither web server logs this

    def handle_post_request(self, environ):
        """Handle a POST in a thread and answer after 3 s at most: Python clients wait for 5 s.

        The library drops a POST with more than 16 packets.
        """
        if self.open_posts > 16:
            raise engineio.exceptions.ContentTooLongError  # the library closes the connection
        with writing:
            self.open_posts += 1
            args = environ["body"].split("\x1e"), self.post_thread
            thread = self.post_thread = threading.Thread(target=self.receive_all, args=args)
            thread.start()
        thread.join(timeout=3)

    def receive_all(self, packets, previous):
        """Handle packets one after another, after those of the previous POST."""
        if previous:
            previous.join()
        for data in packets:
            with suppress(engineio.exceptions.UnknownPacketError):
                self.receive(EnginePacket(encoded_packet=data))
        with writing:
            self.open_posts -= 1

    def schedule_ping(self):
        """Note a sign of life; the library would start a thread for the next ping."""
        self.alive_at = time.monotonic()

    def is_stuck(self):
        """Return whether the client is silent, or has too many packets waiting."""
        is_silent = time.monotonic() - self.alive_at > PATIENCE and not self.busy
        return is_silent or self.queue.qsize() > MAX_WAITING

    def close(self, wait=True, **how):
        """Close without waiting for the client, and close TCP as well; the library does neither."""
        with lock:  # it runs `disconnect`
            super().close(wait=False, **how)
        self.server.sockets.pop(self.sid, None)
        if self.websocket:
            self.websocket.close()


# The library looks these names up for each connection. Python clients in this process do, too.
engineio.packet.Packet = EnginePacket
engineio.socket.Socket = Connection


def ping_all():
    """Ping all connections from one thread; the library starts a thread for each ping."""
    while True:
        for connection in list(engine.sockets.values()):
            if connection.is_stuck():
                stuck.put(connection)
            elif connection.connected:  # a ping before the first packet ends a client
                connection.send(EnginePacket(PING))
        time.sleep(PING_EVERY)


def close_stuck():
    """Close stuck connections in a thread of its own: closing waits for `lock`, pings must not."""
    while True:
        stuck.get().close(reason=engine.reason.PING_TIMEOUT)


# 8. The door: who may open a connection, and what may come through it -----------------------------


class Packet(packet.Packet):
    """A Socket.IO packet. An event has a name that clients may use, and one JSON object."""

    def decode(self, encoded_packet):
        """Decode a packet from a client. An invalid event becomes an unknown one."""
        with suppress(TypeError, ValueError, LookupError, RecursionError):
            super().decode(encoded_packet)
        if self.packet_type in (packet.CONNECT, packet.DISCONNECT, packet.ACK):
            return
        self.packet_type = packet.EVENT
        kinds = [type(part) for part in self.data] if isinstance(self.data, list) else []
        if kinds != [str, dict] or self.data[0] in ("connect", "disconnect", "*"):
            self.data = ["", {}]


class Announcer(Manager):
    """Hands packets to the connections in a room."""

    def emit(self, *args, **kwargs):
        """Emit one event at a time: a binary one is several packets, which must stay together."""
        with lock:
            super().emit(*args, **kwargs)


socketio.init_app(
    app,
    async_mode="threading",
    async_handlers=False,  # handle the events of a connection in the order they were sent
    client_manager=Announcer(),
    serializer=Packet,
    cors_allowed_origins=[],  # not checked by the library, but by `door`
    max_http_buffer_size=MAX_BYTES,
    monitor_clients=False,  # `ping_all` does it
    ping_interval=2 * PING_EVERY,  # a client that hears no ping for the sum of both gives up
    ping_timeout=PING_EVERY,
)
engine = socketio.server.eio


@engine.on("connect")
def open_connection(eio_sid, environ):
    """Open a connection, unless its user has signed out since `door` let the request in."""
    with lock:
        if not state.holder(environ["REMOTE_USER"]):
            return False
        socketio.server._handle_eio_connect(eio_sid, environ)


@engine.on("message")
def handle_message(eio_sid, data):
    """Handle a Socket.IO packet under the lock, unless its handler may run in parallel."""
    received, alone = Packet(encoded_packet=data), True
    if received.packet_type == packet.EVENT:
        handler = socketio.server.handlers["/"].get(received.data[0])
        alone = hasattr(inspect.unwrap(handler), "one_at_a_time")
    with lock if alone else nullcontext():
        if eio_sid in socketio.server.environ:  # it may have ended while we waited for the lock
            socketio.server._handle_eio_message(eio_sid, data)


def disconnect_user(sids, token):
    """End a user's connections, even those that are not yet in `connect`, and waiting polls."""
    with lock:
        for sid in sids:
            socketio.server.disconnect(sid)
        for eio_sid, environ in list(socketio.server.environ.items()):
            if environ.get("REMOTE_USER") == token:
                engine.disconnect(eio_sid)
        said.notify_all()


def from_here():
    """Return whether a page of this site sent the request, or no browser did."""
    site = request.headers.get("Sec-Fetch-Site")
    if site:
        return site in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is None or origin.partition("://")[2] == request.host


def require_length():
    """Refuse a body that is too long, or does not say how long it is."""
    if "Transfer-Encoding" in request.headers or (request.content_length or 0) > MAX_BYTES:
        raise RequestEntityTooLarge("Send at most 64 KB, with a Content-Length, not in chunks.")


def check_connection(environ):
    """Refuse a request that is not from a signed-in user, or names another user's connection."""
    require(from_here(), "This request came from another site.", 403)
    require(current_user.is_authenticated, "Sign in first.", 401)
    require_length()
    environ["REMOTE_USER"] = current_user.token
    eio_sid = request.args.get("sid")
    if eio_sid is not None:
        opened_by = socketio.server.environ.get(eio_sid, {}).get("REMOTE_USER")
        own = opened_by == current_user.token
        require(own, "This connection is not yours or has ended.", 403)
        environ["body"] = request.get_data(as_text=True)


behind_the_door = app.wsgi_app  # Flask, and Socket.IO in front of it


def door(environ, start_response):
    """Let a request in, or refuse it before its body is read."""
    if environ["wsgi.multithread"]:  # `flask run` and gunicorn do not call `main`
        with starting:
            start()
    environ["HTTP_HOST"] = host = environ.get("HTTP_HOST", "").lower()
    if TRUSTED_HOSTS and re.sub(r":\d*$", "", host) not in TRUSTED_HOSTS:  # Flask's has no IPv6
        return Refused("This server does not serve that host.", 400)(environ, start_response)
    if environ["PATH_INFO"].startswith("/socket.io/"):
        try:
            with app.request_context(environ):
                check_connection(environ)
        except HTTPException as refusal:
            return refusal(environ, start_response)
        # Adds Content-Length: without it, an answer that is cut off counts as a whole one.
        answer = app.response_class.from_app(behind_the_door, environ, buffered=True)
        return answer(environ, start_response)
    return behind_the_door(environ, start_response)


app.wsgi_app = ProxyFix(door) if DOMAIN else door  # nobody else may say X-Forwarded-For

# 9. Run -------------------------------------------------------------------------------------------


class Reader(io.BufferedReader):
    """Reads a request in pieces. Python takes 6 MB of headers, Werkzeug discards 10 MB at once."""

    head_left = 2 * MAX_BYTES  # bytes

    def readline(self, size=-1):
        """Return a line of the head."""
        line = super().readline(size)
        self.head_left -= len(line)
        if self.head_left < 0:
            raise http.client.HTTPException("The headers are too long.")  # answered with 431
        return line

    def read(self, size=-1):
        """Return a piece of an unread body, before it is discarded."""
        return self.read1(MAX_BYTES)


class Handler(WSGIRequestHandler):
    """A request to the web server."""

    protocol_version = "HTTP/1.0"  # one request a connection: the end of a WebSocket is not another
    timeout = 30  # seconds a client may be silent in the middle of a request
    disable_nagle_algorithm = True  # send small frames at once
    rbufsize = 0  # `Reader` has the buffer

    def setup(self):
        """Prepare to read the request."""
        super().setup()
        self.rfile = Reader(self.rfile, 2048)  # the buffer, in bytes; each WebSocket keeps its own

    def make_environ(self):
        """Return the WSGI environment, or drop a request whose URL is not valid."""
        try:
            return super().make_environ()
        except ValueError:
            raise ConnectionError from None


def print_log():
    """Print one line after another. When nobody reads them, only this thread waits."""
    with suppress(AttributeError):  # IDLE's has no `reconfigure`, a closed one is None
        sys.stdout.reconfigure(errors="replace")  # some consoles cannot show a QR code
    while True:
        line = log.get()
        with suppress(OSError, ValueError):  # the terminal is closed
            print(line, flush=True)


starting = threading.Lock()  # `cache` alone would let two first requests in


@cache
def start():
    """Start the background threads, create the first accounts, and say who can sign in."""
    for task in print_log, ping_all, close_stuck:
        threading.Thread(target=task, daemon=True).start()
    accounts, password = DEMO_ACCOUNTS, "demo"
    if LOCAL:
        app.config.update(DEMO_ACCOUNTS=DEMO_ACCOUNTS)
        log.put("Sign in as ana, luis or eva, password demo: one browser for each user.")
    else:
        accounts = [TEACHER]
        password = os.environ.get("LECTURER_PASSWORD") or secrets.token_urlsafe(6)
        log.put("Other devices can reach this server: no demo accounts, everyone registers.")
        log.put(f"You are {TEACHER}, password {password}; the room staff is yours.")
    password_hash = generate_password_hash(password)
    for name in accounts:
        with suppress(Refused):  # another State may keep accounts over a restart
            state.register(name, password_hash)


def addresses():
    """Return the addresses of this machine in its networks, the most likely one first."""
    likely = get_interface_ip(socket.AF_INET)  # where the default route leads
    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not is_local(entry.address)
    ]
    return sorted(found, key=lambda address: address != likely) or [likely]  # False comes first


def show_address():
    """Print where the server is, and for a class a QR code."""
    hosts = [f"[{HOST}]" if ":" in HOST else HOST]
    if HOST == "0.0.0.0":
        hosts = addresses()
    urls = [f"http://{host}:{PORT}" for host in hosts]
    log.put(f"Full duplex and rooms: open {' or '.join(urls)}")
    if not LOCAL:
        join_url = (f"https://{DOMAIN[0]}" if DOMAIN else urls[0]) + "/room?room=python"
        code, picture = segno.make(join_url), io.StringIO()
        app.config.update(ADDRESSES=hosts, JOIN_URL=join_url, QR_CODE=code)
        code.terminal(picture, compact=True)
        log.put(picture.getvalue().rstrip())


def main():
    """Open the port, print where it is, and serve until Ctrl+C."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))  # at once, even with open connections
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no access lines
    family = socket.AF_INET6 if ":" in HOST else socket.AF_INET
    try:
        listener = socket.create_server((HOST, int(PORT)), family=family, backlog=1024)
    except (OSError, ValueError, OverflowError) as error:
        advice = "HOST must be an address of this machine, and PORT a free port: try 5001"
        sys.exit(f"Cannot listen on HOST={HOST} and PORT={PORT}: {error}. {advice}.")
    show_address()
    start()
    log.put("Stop with Ctrl+C.")
    server = make_server(
        HOST, int(PORT), app, threaded=True, request_handler=Handler, fd=listener.fileno()
    )
    server.serve_forever()


if __name__ == "__main__":
    main()

# What `uv run app.py` installs by itself.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "flask==3.1.3",
#   "flask-socketio==5.7.0",
#   "flask-login==0.6.3",
#   "simple-websocket==1.1.0",
#   "python-socketio==5.18.1",
#   "python-engineio==4.15.1",
#   "bootstrap-flask==2.6.0",
#   "nicegui==3.18.0",
#   "limits==5.8.0",
#   "segno==1.6.6",
#   "psutil==7.2.2",
# ]
# [[tool.uv.dependency-metadata]]
# name = "nicegui"  # one file of it is needed, and none of its 40 dependencies
# version = "3.18.0"
# requires-dist = []
# ///
