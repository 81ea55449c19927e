"""Judge a chat by what is said and heard on it.

    python notebooks/judge.py chat.py                        start this program, and judge it
    python notebooks/judge.py chat.py --level 2              the first two levels only
    python notebooks/judge.py --url http://127.0.0.1:5000    one that runs here, in any language

    level            what the judge does                                what it counts
    1 heard          three clients speak, over WebSocket and polling    lost, doubled
    2 rooms          speak in a room, leave it, speak without joining   overheard
    3 answers        events get acks, forty malformed ones as well      without ok, tracebacks, ...
    4 doors          a stranger, another site, another's name or room   ways in
    5 nothing lost   all speak while each is cut off again and again    lost, doubled, out of order

The exit status is 0 when these levels hold, 1 when one fails, 2 when there is nothing to judge.
Where the events have other names: --events chat=say,heard=said,message=text,join=enter
"""

import argparse
import json
import socket
import sys
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import lab
import requests
from record import NAMES, Client, Record, as_text, come_back, smallest

NO_ROOM = None, 7, "python", [], {}, {"room": None}, {"room": 7}, {"room": []}, {"room": {}}
NO_TEXT = None, 7, "", " ", ["Hello"], "x" * 501
MALFORMED = [(event, data) for event in ("join", "leave", "chat") for data in NO_ROOM]
MALFORMED += [(event,) for event in ("join", "leave", "chat")]
MALFORMED += [("chat", {"room": "python", "message": text}) for text in NO_TEXT]
MALFORMED += [(event, {}) for event in ("wave", "", "message", "json")]
OTHER_SITE = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
ACCIDENTS = None, "the ack is lost", None, "cut off at once", None, "cut off while coming back"

Fault = namedtuple("Fault", "kind sentence about")
Verdict = namedtuple("Verdict", "holds counts faults moments")


def heard(record, server):
    """Three clients speak, one of them by polling: each hears each message once."""
    people = record.gather(luis="polling")
    record.speak(people, rounds=7)
    record.settle(people)
    yield from compare(record, people)


def compare(record, people):
    """Find what was lost, doubled or overheard."""
    order = {text: place for place, text in enumerate(record.said)}
    for one, text in record.lost(people):
        later = [other for other in one.heard if order[other] > order[text]][:1]
        yield Fault("lost", f'{one.name} never hears "{text}".', [text, *later, one.name])
    for one in people:
        for text, messages in one.heard.items():
            if len(messages) > 1:
                yield Fault("doubled", f'{one.name} hears "{text}" twice.', [text, one.name])
            if one.name not in record.said[text]:
                yield Fault("overheard", f'{one.name} should not hear "{text}".', [text, one.name])


def rooms(record, server):
    """Speak in a room, leave it, speak without having joined it: its members hear that."""
    people = ana, luis, _ = record.gather()
    record.join([ana, luis], "flask")
    for one in people * 3:
        record.say(one, "flask")
    record.settle(people)
    luis.ack("leave", {"room": "flask"})
    record.members["flask"].remove("luis")
    for one in [ana, luis] * 3:
        record.say(one, "flask")
    record.settle(people)
    yield from compare(record, people)


def answers(record, server):
    """Every event gets an ack; a malformed one is refused, and nothing else happens."""
    ana, luis, eva = record.gather()
    data, log = {"room": "flask", "message": "Hello"}, server.log if server else []
    before = " ".join(log).count("Traceback (most")
    for event in "join", "chat", "leave":
        if eva.ack(event, data).get("ok") is not True:
            yield Fault("without ok", 'eva gets no {"ok": true}.', [json.dumps((event, data))])
    asked = [eva.ask(*event) for event in MALFORMED]
    record.settle([ana, luis], lambda: all(eva.answered(about) for about in asked))
    for about in asked:
        ack = eva.acks.get(about, {})
        if ack.get("ok") is not False or not ack.get("error"):
            yield Fault("without ok", "eva is not told what is wrong.", [about])
    for _ in range(" ".join(log).count("Traceback (most") - before):
        yield Fault("tracebacks", "The program prints a traceback.", asked[-3:])
    if not eva.open:
        yield Fault("connections lost", "eva is disconnected.", asked[-3:])
    yield from compare(record, [ana, luis])


def doors(record, server):
    """Try to get in without a log-in, from another site, as another user, into another's room."""
    ana, luis, eva = record.gather()
    tries = [
        ("without a log-in", "a stranger", requests.Session(), {}),
        ("with a wrong password", "a stranger", record.sign_in("ana", "wrong"), {}),
        ("without an account", "a stranger", record.sign_in("mallory", None), {}),
        ("from another site", "ana", ana.session, OTHER_SITE),
    ]
    for how, name, session, headers in tries:
        for transport in "websocket", "polling":
            options = headers | {"transport": transport}
            yield from door(record, f"{how}, by {transport}", name, session, options)
    ana.ack("join", {"room": "room1"})
    for room in "room1", ana.get_sid():
        if eva.ack("join", {"room": room}).get("ok"):
            about = [json.dumps(("join", {"room": room}))]
            yield Fault("ways in", "eva is let into a room that is ana's alone.", about)
    masked = Client(record, "eva", eva.session, auth={"username": "ana"})
    masked.ack("join", {"room": "python"})
    for one in [eva, masked] if masked.open else [eva]:
        text, _ = record.say(one, username="ana", name="ana", user="ana")
        record.settle([ana, luis])
        if any(message.get("username") != "eva" for message in ana.heard.get(text, [])):
            yield Fault("ways in", "eva speaks under another's name.", [text])
    old = requests.Session()
    old.cookies.update(luis.session.cookies)
    luis.session.post(f"{record.url()}/logout", allow_redirects=False, timeout=20)
    record.wait(lambda: not luis.open)
    record.members["python"].remove("luis")
    yield from door(record, "with the cookie from before the log-out", "luis", old, {})
    late, later = [record.say(one)[0] for one in (luis, ana)]
    record.settle([ana, luis, eva])
    if late in ana.heard or later in luis.heard:
        yield Fault("ways in", "luis speaks or hears after the log-out.", [late, later])
    record.sessions.clear()
    yield from compare(record, [ana, eva])


def door(record, how, name, session, options):
    """Somebody connects who must not."""
    record.note(name, f"connects {how}", how)
    client = Client(record, name, session, **options)
    if client.open and client.ack("join", {"room": "python"}):
        record.note(name, "is let in", how)
        yield Fault("ways in", f"{name} is let in {how}.", [how])


def nothing_lost(record, server):
    """All speak while each is cut off again and again: all is heard once, in the order of ids."""
    with ExitStack() as stack:
        relays = [stack.enter_context(closing(lab.Relay(record.port))) for _ in NAMES]
        people = record.gather([relay.port for relay in relays])
        record.speak(people, rounds=3)
        with ThreadPoolExecutor(len(NAMES)) as pool:
            people = [*pool.map(talk, people, relays)]
        record.settle(people)
    yield from compare(record, people)
    for one in people:
        for (first, said), (then, later) in pairwise(one.heard.items()):
            if (later[0].get("id") or 0) < (said[0].get("id") or 0):
                sentence = f'{one.name} hears "{first}" before "{then}".'
                yield Fault("out of order", sentence, [first, then, one.name])


def talk(client, relay):
    """Speak as a good client does: come back after an accident, and say again what is open."""
    record, size = client.record, len(client.record.said)
    if client.name == "eva":  # stays away while the others go on
        client = come_back(client, relay, lambda: len(record.said) > size + 16)
    for accident in ACCIDENTS * 4:
        client.deaf = accident == "the ack is lost"
        if client.deaf:
            record.note(client.name, "stops hearing", client.name)
        text, about = record.say(client)
        if client.deaf:
            record.wait(lambda client=client, text=text: text in client.missed)
        if accident:
            client = come_back(client, relay, again=accident == "cut off while coming back")
            about = record.say(client, text=text)[1]
        record.wait(lambda client=client, about=about: client.answered(about))
        if not client.acks.get(about, {}).get("ok"):
            raise TimeoutError(f'{client.name} is not told that "{text}" was said.', about)
    return client


LEVELS = {
    "heard": (heard, "lost", "doubled"),
    "rooms": (rooms, "overheard"),
    "answers": (answers, "without ok", "tracebacks", "connections lost"),
    "doors": (doors, "ways in"),
    "nothing lost": (nothing_lost, "lost", "doubled", "out of order"),
}


def start(file):
    """Start `python FILE` or, if that does not listen, `flask --app FILE run`."""
    file, reasons = Path(file).resolve(), []
    for command in [file.name], ["-m", "flask", "--app", file.name, "run"]:
        try:
            server = lab.Server(*command, folder=file.parent, PYTHONUNBUFFERED="1")
        except AssertionError:
            raise LookupError(f"{file.name} does not listen on the port in PORT.") from None
        if server.process.poll() is None:
            return server
        server.stop()
        reasons += server.log[-1:]
    raise LookupError(f"{file.name} does not start. {' '.join(reasons[:1])}")


def judge(file=None, level=len(LEVELS), url=None, events=()):
    """Judge a program, or what runs at a URL, up to a level. Print a line for each."""
    with ExitStack() as stack:
        server = stack.enter_context(start(file)) if file else None
        address = urlsplit(server.url if server else url)
        if address.hostname not in (lab.ME, "localhost"):
            raise LookupError(f"The chat has to run on this machine: --url http://{lab.ME}:5000")
        port = address.port or 80
        socket.create_connection((lab.ME, port)).close()  # an error if nothing listens there
        record = Record(port, events)
        stack.callback(record.begin)
        for number, (name, (examine, *kinds)) in enumerate([*LEVELS.items()][:level], 1):
            faults = []
            try:
                faults += examine(record, server)
            except (OSError, RuntimeError) as error:  # nobody answers
                faults.append(Fault("stuck", str(error.args[0]), error.args[1:]))
            counts = dict.fromkeys(kinds, 0) | Counter(fault.kind for fault in faults)
            words = ", ".join(f"{many} {kind}" for kind, many in counts.items())
            print(f"level {number} {name}: {'fails' if faults else 'holds'} ({words})", flush=True)
            if faults:
                moments = smallest(record.history, faults[0].about)
                return Verdict(number - 1, counts, faults, moments)
    return Verdict(level, counts, [], [])


def main():
    parser = argparse.ArgumentParser(description="Judge a chat; the head of this file says how.")
    parser.add_argument("file", nargs="?")
    parser.add_argument("--url")
    parser.add_argument("--level", type=int, default=len(LEVELS), choices=range(1, len(LEVELS) + 1))
    parser.add_argument("--events", default="")
    options = parser.parse_args()
    if not options.file and not options.url:
        parser.error("Name a file or a --url.")  # exits with 2
    events = [pair.split("=") for pair in options.events.split(",") if pair]
    try:
        verdict = judge(options.file, options.level, options.url, events)
    except (LookupError, OSError) as error:
        parser.exit(2, f"There is nothing to judge. {error}\n")
    if verdict.faults:
        print(f"\n{verdict.faults[0].sentence}\n{as_text(verdict.moments)}")
    sys.exit(verdict.holds < options.level)


if __name__ == "__main__":
    main()
