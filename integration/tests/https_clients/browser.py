"""Speaks HTTP/2 as browsers do: cookies in crumbs, priorities, large windows, many requests at a time, large headers.

    browser.py PORT NAME ROOT     on 127.0.0.1; trusts the certificate in the file ROOT alone
"""

import asyncio
import hashlib
import json
import socket
import ssl
import sys

import h2.config
import h2.connection
import h2.events
import h2.settings
import httpx

PATIENCE = 20
FILE = bytes(place % 251 for place in range(100_000))
CRUMBS = [("cookie", f"crumb{number}=value{number}") for number in range(20)]


def same(found, expected):
    assert found == expected, f"{found!r} in place of {expected!r}"


class Browser:
    """One connection, frame by frame."""

    def __init__(self, port, name, trust):
        raw = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.socket = trust.wrap_socket(raw, server_hostname=name)
        same(self.socket.selected_alpn_protocol(), "h2")
        self.name = f"{name}:{port}"
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        codes = h2.settings.SettingCodes
        self.h2.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                codes.HEADER_TABLE_SIZE: 65536,
                codes.ENABLE_PUSH: 0,
                codes.INITIAL_WINDOW_SIZE: 6 << 20,
                codes.MAX_HEADER_LIST_SIZE: 256 << 10,
            },
        )
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(15 << 20)
        self.answers = {}
        self.ended = set()

    def flush(self):
        self.socket.sendall(self.h2.data_to_send())

    def ask(self, path, more=(), method="GET", end=True, **priority):
        stream = self.h2.get_next_available_stream_id()
        head = [(":method", method), (":authority", self.name), (":scheme", "https"), (":path", path), *more]
        self.h2.send_headers(stream, head, end_stream=end, **priority)
        self.answers[stream] = [None, b""]
        return stream

    def wait(self, streams):
        """Until they have all been answered."""
        self.flush()
        while not self.ended.issuperset(streams):
            data = self.socket.recv(65536)
            assert data, "the connection ended"
            for event in self.h2.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    self.answers[event.stream_id][0] = dict(event.headers)
                elif isinstance(event, h2.events.DataReceived):
                    self.answers[event.stream_id][1] += event.data
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    self.ended.add(event.stream_id)
                elif isinstance(event, (h2.events.StreamReset, h2.events.ConnectionTerminated)):
                    raise AssertionError(event)
            self.flush()
        return [self.answers[stream] for stream in streams]


def frames(port, name, trust):
    browser = Browser(port, name, trust)
    # As Firefox did: a tree of streams that are never opened, then requests below it.
    for stream, weight in ((3, 201), (5, 101), (7, 1), (9, 1), (11, 1)):
        browser.h2.prioritize(stream, weight=weight, depends_on=0 if stream < 9 else 7)
    browser.h2.get_next_available_stream_id = iter(range(13, 10_001, 2)).__next__
    # As Chrome does: one below the other, exclusively, with many crumbs.
    first = browser.ask("/mirror?x", CRUMBS, priority_weight=256, priority_depends_on=0, priority_exclusive=True)
    [(head, body)] = browser.wait([first])
    told = json.loads(body)
    same((head[":status"], told["cookies"]), ("200", 1))
    same(told["cookie"], "; ".join(value for _, value in CRUMBS))
    same((told["host"], told["target"]), (browser.name, "/mirror?x"))
    # A page of files, with priorities that change while they come, and one that nobody wants any more.
    files = [browser.ask("/file", CRUMBS, priority_weight=1 + n * 5, priority_depends_on=first) for n in range(50)]
    browser.flush()
    for stream in files[::3]:
        browser.h2.prioritize(stream, weight=256, depends_on=0, exclusive=True)
    browser.h2.reset_stream(files.pop(25), 8)
    for head, body in browser.wait(files):
        same((head[":status"], len(body), body == FILE), ("200", len(FILE), True))
    # The same headers again come from the table that both sides keep.
    [(head, body)] = browser.wait([browser.ask("/mirror?y", CRUMBS)])
    same(json.loads(body)["cookie"], told["cookie"])
    # A body, with padding, and trailers.
    stream = browser.ask("/mirror", [("te", "trailers")], method="POST", end=False)
    browser.h2.send_data(stream, b"a" * 5000, pad_length=200)
    browser.h2.send_data(stream, b"b" * 5000, pad_length=0)
    browser.h2.send_headers(stream, [("x-end", "1")], end_stream=True)
    [(head, body)] = browser.wait([stream])
    same(json.loads(body)["sha256"], hashlib.sha256(b"a" * 5000 + b"b" * 5000).hexdigest())
    # All of a body's length is there, so the answer comes; that the body ends is said afterwards, and is no fault.
    stream = browser.ask("/mirror", [("content-length", "5")], method="POST", end=False)
    browser.h2.send_data(stream, b"hello")
    [(head, body)] = browser.wait([stream])
    same((head[":status"], json.loads(body)["bytes"]), ("200", 5))
    browser.wait([browser.ask("/file")])
    browser.h2.end_stream(stream)
    browser.wait([browser.ask("/file")])
    browser.h2.ping(b"12345678")
    # Headers that take several frames, within the bound.
    [(head, body)] = browser.wait([browser.ask("/mirror", [("x-large", "l" * 30_000)])])
    same(json.loads(body)["large"], 30_000)
    # Beyond it the request is refused, and the others go on.
    large, other = browser.ask("/mirror", [("x-large", "l" * 40_000)]), browser.ask("/file")
    [(refused, _), (head, body)] = browser.wait([large, other])
    same((refused[":status"], head[":status"], body == FILE), ("431", "200", True))
    browser.h2.close_connection()
    browser.flush()


async def many(port, name, trust):
    """Requests of httpx, which has its own limits and pools."""

    # The name leads to loopback, without a word to any name server.
    look_up = socket.getaddrinfo
    socket.getaddrinfo = lambda host, *more, **named: look_up("127.0.0.1", *more, **named)
    base = f"https://{name}:{port}"
    async with httpx.AsyncClient(http2=True, verify=trust, trust_env=False, base_url=base, timeout=PATIENCE) as client:
        answers = await asyncio.gather(*(client.get("/file") for _ in range(200)))
        assert all(answer.http_version == "HTTP/2" and answer.content == FILE for answer in answers)
        bodies = [b"%d" % number * 20_000 for number in range(40)]
        answers = await asyncio.gather(*(client.post("/mirror", content=body) for body in bodies))
        same([answer.json()["sha256"] for answer in answers], [hashlib.sha256(body).hexdigest() for body in bodies])
        cookies = {"session": "s" * 4000, "theme": "dark"}
        told = (await client.get("/mirror", headers=[("cookie", f"{k}={v}") for k, v in cookies.items()])).json()
        same((told["cookies"], told["cookie"]), (1, f"session={cookies['session']}; theme=dark"))


port, name, trust = int(sys.argv[1]), sys.argv[2], ssl.create_default_context(cafile=sys.argv[3])
trust.set_alpn_protocols(["h2", "http/1.1"])
frames(port, name, trust)
asyncio.run(asyncio.wait_for(many(port, name, trust), 3 * PATIENCE))
print("all as it should be")
