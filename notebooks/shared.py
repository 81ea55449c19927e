"""Run app.py in several processes that serve one chat.

    REDIS_URL=redis://127.0.0.1:6379 SECRET_KEY=secret PORT=5001 python notebooks/shared.py

Each process does the same things in the same order, which a log in Redis decides, so all of them
know the same. Only how much a user may do in a second is counted by each process on its own.
"""

import json
import os
import pickle
import secrets
import sys
import time
from collections import Counter, defaultdict, deque
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import partial, partialmethod
from pathlib import Path
from threading import Thread

import redis
from itsdangerous import BadSignature, URLSafeSerializer
from limits import storage, strategies

sys.path.append(str(Path(__file__).resolve().parent.parent))
import app

URL = os.environ.get("REDIS_URL") or "redis://127.0.0.1:6379"
AWAY = "Redis cannot be reached. Try again in a moment."
ME = secrets.token_hex(8)  # this process
KEPT = 100_000  # commands that stay in the log; a process saves all it knows after each 1,000
database = redis.from_url(URL, decode_responses=True, socket_timeout=2, retry=None)
signed = URLSafeSerializer(app.app.secret_key, serializer=pickle)  # pickle trusts what it loads


class Shared(app.State):
    """A State of which each process has a copy: `invite` asks all of them to `do_invite`."""

    def __init__(self):
        super().__init__()
        self.history = defaultdict(partial(deque, maxlen=app.HISTORY + 1))  # can be pickled
        self.homes = {}  # sid -> the process that has the connection
        self.position = "0-0"  # of the last command in the log that was done here
        self.unsaved = 0  # commands done since the last snapshot
        self.started = 0
        if snapshot := database.get("snapshot"):
            vars(self).update(signed.loads(snapshot))
        with app.lock:
            self.catch_up()

    def agree(self, name, *arguments):
        """Append a command to the log, do everything up to it, and return its result."""
        token = secrets.token_urlsafe()  # made here, for each process would make up another one
        command = json.dumps([name, arguments, ME, token], default=lambda user: user.name)
        try:
            with app.lock:
                return self.catch_up(database.xadd("log", {"command": command}, maxlen=KEPT))
        except redis.RedisError:
            raise app.Refused(AWAY, 503) from None

    store = partialmethod(agree, "store")
    register = partialmethod(agree, "register")
    renew = partialmethod(agree, "renew")
    invite = partialmethod(agree, "invite")
    expel = partialmethod(agree, "expel")
    add = partialmethod(agree, "add")
    remove = partialmethod(agree, "remove")

    def catch_up(self, mine=None):
        """Do what is new in the log. Return the result of the command at position `mine`."""
        for _, entries in database.xread({"log": self.position}):
            for self.position, entry in entries:
                name, arguments, self.process, self.token = json.loads(entry["command"])
                self.clock = int(self.position.partition("-")[0])  # of Redis, in milliseconds
                if not self.started:
                    self.started = self.last_id = self.clock
                self.unsaved += 1
                own = self.position == mine
                with nullcontext() if own else suppress(app.Refused):  # all refuse it, one says so
                    result = getattr(self, f"do_{name}")(*arguments)
                if own:
                    return result

    def listen(self):
        """Do what other processes append, as soon as it is there."""
        while True:
            try:
                database.xread({"log": self.position}, block=1000)
                with app.lock:
                    self.catch_up()
            except redis.RedisError:
                time.sleep(0.2)

    def do_store(self, name, room, text, key):
        user = self.user(name)
        if known := self.sent_with(user, key):  # sent through two processes at once
            return known, None
        message_id, said = super().store(user, room, text, key)
        now = datetime.fromtimestamp(self.clock / 1000, UTC)
        said["created_at"] = now.isoformat(timespec="milliseconds")
        app.socketio.emit("chat", said, to=app.channel(room), ignore_queue=True)
        app.said.notify_all()
        return message_id, None  # everyone who is connected here has been told

    def do_register(self, name, password_hash):
        user = super().register(name, password_hash)
        self.do_renew(name)
        return user

    def do_renew(self, name):
        user = self.user(name)
        old, user.token = user.token, self.token
        self.tokens[user.token] = self.tokens.pop(old)
        Thread(target=app.disconnect_user, args=[self.connections(name), old]).start()
        return old

    def holder(self, token):
        if token not in self.tokens:  # the user comes from a process that is ahead of this one
            with suppress(redis.RedisError), app.lock:
                self.catch_up()
        return super().holder(token)

    do_invite, do_expel = app.State.invite, app.State.expel

    def do_add(self, sid, name, room=None):
        self.homes[sid] = self.process
        return super().add(sid, name, room)

    def do_remove(self, sid, room=None):
        if sid not in self.present[room]:
            return None, False  # another process was faster
        if room:
            app.socketio.server.leave_room(sid, app.channel(room))
        else:
            del self.homes[sid]
        return super().remove(sid, room)

    def do_emit(self, event, data, channel, skip_sid):
        if event in ("join", "leave"):
            data["members"] = self.members(data["room"])
        app.socketio.emit(event, data, to=channel, skip_sid=skip_sid, ignore_queue=True)

    def beat(self):
        """Say every two seconds that this process lives, and look after those that do not."""
        silent = Counter()
        while True:
            with suppress(redis.RedisError, app.Refused), app.lock, app.app.app_context():
                database.set(ME, "lives", ex=6)
                for process in set(self.homes.values()):
                    silent[process] = 0 if database.exists(process) else silent[process] + 1
                self.tidy([process for process in silent if silent[process] > 2])
                if self.unsaved > KEPT / 100:
                    self.unsaved = 0
                    database.set("snapshot", signed.dumps(vars(self)))
            time.sleep(2)

    def tidy(self, dead):
        """Remove connections that have ended; end those that another process has removed."""
        mine = dict(app.socketio.server.manager.get_participants("/", None))
        for sid, process in list(self.homes.items()):
            if process in dead or (process == ME and sid not in mine):
                for room in self.rooms_of(sid):
                    app.remove_from_room(sid, room, "connection lost")
                self.remove(sid)
        for sid in mine.keys() - self.homes.keys():
            app.socketio.server.eio.disconnect(mine[sid])


class Announcer(app.Announcer):
    """Socket.IO's list of connections. What a room hears goes to all processes, by the log."""

    def emit(self, event, data, namespace, room, skip_sid, ignore_queue, **more):
        if ignore_queue or event == "chat":
            super().emit(event, data, namespace, room, skip_sid)
        else:
            app.state.agree("emit", event, data, room, skip_sid)


def main():
    """Put the shared State into app.py, and run it."""
    app.socketio.server.manager = Announcer()
    app.socketio.server.manager.set_server(app.socketio.server)
    app.app.config.update(SESSION_COOKIE_NAME="session")  # one name, whatever the port
    away = app.Refused(AWAY, 503)  # nobody can count wrong passwords
    app.app.register_error_handler(redis.RedisError, lambda error: app.say_why(away))
    app.failed_logins = strategies.FixedWindowRateLimiter(storage.RedisStorage(URL))
    try:
        app.state = Shared()
    except redis.RedisError as error:
        sys.exit(f"No Redis at REDIS_URL={URL}: {error} Start redis-server.")
    except BadSignature:
        sys.exit("Give all processes the same SECRET_KEY.")
    for task in app.state.listen, app.state.beat:
        Thread(target=task, daemon=True).start()
    app.main()


if __name__ == "__main__":
    main()
