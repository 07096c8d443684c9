"""What a hostile or careless client can do to the running webhook, and what the others notice of it.

    hostile.py HTTPS HTTP    addresses as HOST:PORT; prints one JSON object of what was seen, times in milliseconds
"""
import glob, json, socket, ssl, sys, threading, time

host, port = sys.argv[1].rsplit(":", 1)
address = (host, int(port))
flag = f"--http-listen={sys.argv[2]}".encode()
pid = next(path.split("/")[2] for path in glob.glob("/proc/[0-9]*/cmdline") if flag in open(path, "rb").read())
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.set_alpn_protocols(["http/1.1"])
CONVERT = "/convert"
MUTATE = "/mutate-elbv2-k8s-aws-targetgroupbinding?timeout=10s"


def connect():
    """Nothing here waits for ever."""
    raw = socket.create_connection(address, timeout=30)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(raw, server_hostname="x")


def head(path, length, more=""):
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def answer(stream):
    """Status and body of one answer; 0 if the connection ends without."""
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            piece = stream.recv(65536)
            if not piece:
                return 0, b""
            data += piece
        top, body = data.split(b"\r\n\r\n", 1)
        length = next(int(l.split(b":")[1]) for l in top.split(b"\r\n") if l.lower().startswith(b"content-length:"))
        pieces, missing = [body], length - len(body)
        while missing > 0:
            piece = stream.recv(1 << 20)
            if not piece:
                return 0, b""
            pieces.append(piece)
            missing -= len(piece)
        body = b"".join(pieces)
        return int(top.split()[1]), body
    except (OSError, ssl.SSLError):
        return 0, b""


def ask(path, body, stream=None):
    own = stream or connect()
    try:
        own.sendall(head(path, len(body)) + body)
    except (OSError, ssl.SSLError):
        pass  # it may answer before it has read all
    return answer(own)


def binding(name="web", more=0):
    annotations = {"note": "x" * more} if more else {}
    return {"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding",
            "metadata": {"name": name, "namespace": "shop", "annotations": annotations},
            "spec": {"targetGroupARN": "arn:aws:elasticloadbalancing:us-west-2:1:targetgroup/a/b", "targetType": "ip",
                     "serviceRef": {"name": "web", "port": 80}, "networking": {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": None}]}}}


def review(objects, desired="elbv2.k8s.aws/v1"):
    return json.dumps({"apiVersion": "apiextensions.k8s.io/v1", "kind": "ConversionReview",
                       "request": {"uid": "u", "desiredAPIVersion": desired, "objects": objects}}).encode()


def memory():
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024


seen = {}
good = review([binding()])


def others(name, seconds=0.0, count=20):
    """New connections and requests of somebody else meanwhile: the slowest."""
    slowest, until = 0.0, time.time() + seconds
    while count > 0 or time.time() < until:
        begun = time.time()
        status, body = ask(CONVERT, good)
        if status != 200 or json.loads(body)["response"]["result"]["status"] != "Success":
            slowest = float("inf")
            break
        slowest, count = max(slowest, time.time() - begun), count - 1
    seen.setdefault("others_ms", {})[name] = round(slowest * 1000, 1)


others("nothing")
# Bodies that are no reviews.
deep = b"[" * 200_000 + b"]" * 200_000
bad = {"empty": b"", "text": b"hello", "null": b"null", "list": b"[]", "object": b"{}", "cut": good[:-20], "binary": bytes(range(256)),
       "deep": deep, "no request": b'{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}',
       "no uid": b'{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"operation":"CREATE"}}'}
seen["bad"] = {name: [ask(path, body)[0] for path in (MUTATE, CONVERT, "/mutate-v1-pod", "/validate-v1-service")] for name, body in bad.items()}
seen["unknown_path"] = ask("/nothing", b"{}")[0]
# Depth inside of an object is no matter for its review, and a failure that is told for a conversion.
nested = json.dumps({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": {"uid": "u", "operation": "CREATE", "object": "@"}}).encode().replace(b'"@"', deep)
seen["deep_object"] = ask(MUTATE, nested)[0]
status, body = ask(CONVERT, review(["@"]).replace(b'"@"', deep))
seen["deep_conversion"] = [status, json.loads(body)["response"]["result"]["status"]]
# Too much.
seen["too_large"] = [ask(MUTATE, b" " * ((8 << 20) + 1))[0], ask(CONVERT, b" " * ((64 << 20) + 1))[0]]
stream = connect()
stream.sendall(f"POST {MUTATE} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
try:
    for _ in range(10):
        stream.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
except (OSError, ssl.SSLError):
    pass
seen["too_large_in_pieces"] = answer(stream)[0]
stream = connect()
try:
    stream.sendall(b"POST /convert HTTP/1.1\r\nX: " + b"a" * (1 << 20))
except (OSError, ssl.SSLError):
    pass
seen["large_headers"] = answer(stream)[0]
before = memory()
# Whole 64 MiB reviews, several at once.
large = review(["@"]).replace(b'"@"', b",".join([json.dumps(binding(more=16_000)).encode()] * 3_900))[: 64 << 20]
zeros = review(["@"]).replace(b'"@"', b",".join([b"0"] * ((60 << 20) // 2)))
threads = [threading.Thread(target=ask, args=(CONVERT, body)) for body in (large, zeros, large, zeros, large, zeros)]
[thread.start() for thread in threads]
others("64 MiB bodies", count=30)
[thread.join() for thread in threads]
seen["memory_mib"] = {"before": before, "after": memory()}
# A thousand connections that say nothing, a thousand handshakes that never end, slow headers, and bodies that don't come.
silent = []
for n in range(1000):
    silent.append(socket.create_connection(address, timeout=30))
    if n % 2:
        silent[-1].sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc")
others("1000 silent connections", count=30)
slow = []
for n in range(100):
    stream = connect()
    stream.sendall(b"POST /convert HTTP/1.1\r\nHost: x\r\n" if n % 2 else head(CONVERT, 60_000) + b"{")
    slow.append(stream)
others("100 slow requests", count=30)
begun = time.time()
slow[1].settimeout(30)
try:
    ended = slow[1].recv(1) == b""
except (OSError, ssl.SSLError):
    ended = True
seen["slow_headers_cut_after_s"] = round(time.time() - begun, 1) if ended else None
[stream.close() for stream in silent + slow]
# Many reviews on one connection, and many objects in one review.
stream, begun = connect(), time.time()
for n in range(5000):
    status, body = ask(CONVERT, good, stream)
    assert status == 200 and b'"Success"' in body, (n, status, body)
seen["5000_reviews_s"] = round(time.time() - begun, 2)
objects = [binding(f"b{n}") for n in range(5000)]
begun = time.time()
status, body = ask(CONVERT, review(objects), stream)
seen["5000_objects_s"] = round(time.time() - begun, 2)
converted = json.loads(body)["response"]["convertedObjects"]
assert [o["metadata"]["name"] for o in converted] == [o["metadata"]["name"] for o in objects]
back = json.loads(ask(CONVERT, review(converted, "elbv2.k8s.aws/v1beta1"), stream)[1])["response"]["convertedObjects"]
for each in objects:
    del each["spec"]["networking"]["ingress"][0]["ports"]  # a null member is an absent one
seen["5000_objects_come_back"] = back == objects
others("nothing any more")
print(json.dumps(seen, indent=1))
