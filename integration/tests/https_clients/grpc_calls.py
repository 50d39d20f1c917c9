"""A gRPC server with methods on plain bytes, and a client that checks it.

    grpc_calls.py serve                       prints its port; ends with its standard input
    grpc_calls.py call|fail ADDRESS NAME ROOT trusts the certificate in the file ROOT alone
"""

import queue
import sys
import threading
from concurrent import futures

import grpc

PATIENCE = 20
LARGE = 3 << 20
NO_BOUND = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
cancelled = threading.Event()


def unary(request, context):
    seen = dict(context.invocation_metadata())
    context.send_initial_metadata((("seen", seen.get("word", "none")), ("proto", seen.get("x-forwarded-proto", "none"))))
    context.set_trailing_metadata((("count", str(len(request))), ("raw-bin", seen.get("raw-bin", b""))))
    return request


def refuse(request, context):
    context.set_trailing_metadata((("why", "nothing is here"),))
    context.abort(grpc.StatusCode.NOT_FOUND, "größe 100% unbekannt")


def count(request, context):
    for number in range(int(request)):
        yield b"%d" % number
    context.set_trailing_metadata((("sum", "done"),))


def half(request, context):
    yield b"one"
    context.abort(grpc.StatusCode.DATA_LOSS, "the other half is lost")


def collect(requests, context):
    return b",".join(requests)


def talk(requests, context):
    total = 0
    for request in requests:
        total += 1
        yield b"to " + request
    context.set_trailing_metadata((("total", str(total)),))


def hang(request, context):
    context.add_callback(cancelled.set)
    yield b"wait"
    cancelled.wait(PATIENCE)


def was_cancelled(request, context):
    return b"yes" if cancelled.wait(PATIENCE) else b"no"


def serve():
    server = grpc.server(futures.ThreadPoolExecutor(32), options=NO_BOUND)
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Refuse": grpc.unary_unary_rpc_method_handler(refuse),
        "Count": grpc.unary_stream_rpc_method_handler(count),
        "Half": grpc.unary_stream_rpc_method_handler(half),
        "Collect": grpc.stream_unary_rpc_method_handler(collect),
        "Talk": grpc.stream_stream_rpc_method_handler(talk),
        "Hang": grpc.unary_stream_rpc_method_handler(hang),
        "WasCancelled": grpc.unary_unary_rpc_method_handler(was_cancelled),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Mirror", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    sys.stdin.read()
    server.stop(None)


def same(found, expected):
    assert found == expected, f"{found!r} in place of {expected!r}"


def call(channel):
    def method(kind, name):
        return getattr(channel, kind)("/test.Mirror/" + name)

    plain = method("unary_unary", "Unary")
    answer, done = plain.with_call(
        b"hello", metadata=(("word", "given"), ("raw-bin", bytes(range(256))), ("x-forwarded-proto", "forged")), timeout=PATIENCE
    )
    same(answer, b"hello")
    initial, trailing = dict(done.initial_metadata()), dict(done.trailing_metadata())
    same((initial["seen"], initial["proto"]), ("given", "https"))
    same((trailing["count"], trailing["raw-bin"]), ("5", bytes(range(256))))
    same(done.code(), grpc.StatusCode.OK)
    same(plain(b"", timeout=PATIENCE), b"")
    large = bytes(range(256)) * (LARGE // 256)
    same(plain(large, timeout=PATIENCE) == large, True)
    same(plain(b"y" * 10_000, timeout=PATIENCE, compression=grpc.Compression.Gzip), b"y" * 10_000)

    # Status, message and metadata of a call that has no other answer.
    for name, code in (("Refuse", grpc.StatusCode.NOT_FOUND), ("Missing", grpc.StatusCode.UNIMPLEMENTED)):
        try:
            method("unary_unary", name)(b"", timeout=PATIENCE)
            raise AssertionError(name + " succeeded")
        except grpc.RpcError as error:
            same(error.code(), code)
            if name == "Refuse":
                same(error.details(), "größe 100% unbekannt")
                same(dict(error.trailing_metadata())["why"], "nothing is here")

    numbers = method("unary_stream", "Count")(b"1000", timeout=PATIENCE)
    same(list(numbers), [b"%d" % number for number in range(1000)])
    same(dict(numbers.trailing_metadata())["sum"], "done")
    half = method("unary_stream", "Half")(b"", timeout=PATIENCE)
    same(next(half), b"one")
    try:
        next(half)
        raise AssertionError("a second half")
    except grpc.RpcError as error:
        same((error.code(), error.details()), (grpc.StatusCode.DATA_LOSS, "the other half is lost"))
    same(method("stream_unary", "Collect")(iter([b"a", b"b", b"c"]), timeout=PATIENCE), b"a,b,c")

    # Every word waits for the answer to the one before it.
    words = queue.Queue()
    talk = method("stream_stream", "Talk")(iter(words.get, None), timeout=PATIENCE)
    for number in range(50):
        words.put(b"%d" % number)
        same(next(talk), b"to %d" % number)
    words.put(None)
    same(list(talk), [])
    same((talk.code(), dict(talk.trailing_metadata())["total"]), (grpc.StatusCode.OK, "50"))

    # Who cancels is heard behind the proxy.
    hanging = method("unary_stream", "Hang")(b"")
    same(next(hanging), b"wait")
    hanging.cancel()
    same(method("unary_unary", "WasCancelled")(b"", timeout=PATIENCE), b"yes")

    # Many at a time over one connection.
    pending = [plain.future(b"%d" % number, timeout=PATIENCE) for number in range(300)]
    same([future.result() for future in pending], [b"%d" % number for number in range(300)])
    print("all as it should be")


def fail(channel):
    try:
        channel.unary_unary("/test.Mirror/Unary")(b"", timeout=PATIENCE)
        raise AssertionError("an answer of nobody")
    except grpc.RpcError as error:
        same(error.code(), grpc.StatusCode.UNAVAILABLE)
    print("unavailable")


if sys.argv[1] == "serve":
    serve()
else:
    what, address, name, root = sys.argv[1:]
    with open(root, "rb") as file:
        trust = grpc.ssl_channel_credentials(file.read())
    named = [("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)]
    with grpc.secure_channel(address, trust, options=NO_BOUND + named) as channel:
        {"call": call, "fail": fail}[what](channel)
