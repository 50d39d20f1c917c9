"""A WebSocket server that echoes, and a client that checks it.

    websocket.py serve              prints its port; ends with its standard input
    websocket.py visit URL ROOT     trusts the certificate in the file ROOT alone
"""

import asyncio
import os
import ssl
import sys
import urllib.parse

import websockets

PATIENCE = 20
LARGE = 3 << 20


async def echo(socket, path):
    if path == "/farewell":
        await socket.close(4001, "go home")
        return
    # What the proxy says of the client is there.
    assert socket.request_headers["X-Forwarded-Proto"] == "https"
    try:
        async for message in socket:
            await socket.send(message)
    except websockets.ConnectionClosedError as closed:
        assert closed.rcvd.code == 4000, closed


async def serve():
    async with websockets.serve(echo, "127.0.0.1", 0, subprotocols=["mirror"], max_size=2 * LARGE) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def visit(url, root):
    site = urllib.parse.urlsplit(url)
    trust = ssl.create_default_context(cafile=root)

    def connect(path, **more):
        return websockets.connect(
            url + path,
            ssl=trust,
            server_hostname=site.hostname,
            host="127.0.0.1",
            port=site.port,
            max_size=2 * LARGE,
            open_timeout=PATIENCE,
            **more,
        )

    # Compressed, as browsers do it, and plain, in which every byte is carried as it is.
    for compression in ("deflate", None):
        async with connect("/echo", subprotocols=["other", "mirror"], compression=compression) as socket:
            assert socket.subprotocol == "mirror", socket.subprotocol
            assert bool(socket.extensions) == (compression is not None), socket.extensions
            for message in ("", "hello", "grüße \U0001f512", b"", bytes(range(256)), os.urandom(LARGE), "x" * LARGE):
                await socket.send(message)
                answer = await socket.recv()
                assert answer == message, (type(answer), len(answer), len(message))
            # One message in pieces.
            await socket.send(["one ", "two ", "three"])
            assert await socket.recv() == "one two three"
            # Many on their way at a time.
            numbers = [str(number) for number in range(500)]
            for number in numbers:
                await socket.send(number)
            assert [await socket.recv() for _ in numbers] == numbers
            pong = await socket.ping(b"are you there")
            await asyncio.wait_for(pong, PATIENCE)
            await socket.close(4000, "enough")
            assert (socket.close_code, socket.close_reason) == (4000, "enough"), socket.close_reason
    async with connect("/farewell") as socket:
        try:
            await socket.recv()
            raise AssertionError("a message in place of a farewell")
        except websockets.ConnectionClosed as closed:
            assert (closed.rcvd.code, closed.rcvd.reason) == (4001, "go home"), closed
    # Many at a time.
    sockets = await asyncio.gather(*(connect("/echo") for _ in range(30)))
    await asyncio.gather(*(socket.send(f"I am {number}") for number, socket in enumerate(sockets)))
    answers = await asyncio.gather(*(socket.recv() for socket in sockets))
    assert answers == [f"I am {number}" for number in range(30)], answers
    await asyncio.gather(*(socket.close() for socket in sockets))
    print("all as it should be")


if sys.argv[1] == "serve":
    asyncio.run(serve())
else:
    asyncio.run(asyncio.wait_for(visit(sys.argv[2], sys.argv[3]), 3 * PATIENCE))
