"""What a hostile or careless client can do to the running webhook, and what the others notice of it.

    hostile.py HTTPS HTTP MIB    addresses as HOST:PORT, the memory limit; prints one JSON object of what was seen, times in milliseconds
"""
import glob, itertools, json, multiprocessing, os, select, signal, socket, ssl, sys, threading, time

host, port = sys.argv[1].rsplit(":", 1)
address = (host, int(port))
flag = f"--http-listen={sys.argv[2]}".encode()
pid = next(path.split("/")[2] for path in glob.glob("/proc/[0-9]*/cmdline") if flag in open(path, "rb").read())
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.set_alpn_protocols(["http/1.1"])
context_h2 = ssl.create_default_context()
context_h2.check_hostname, context_h2.verify_mode = False, ssl.CERT_NONE
context_h2.set_alpn_protocols(["h2"])
limit = int(sys.argv[3])
CONVERT = "/convert"
MUTATE = "/mutate-elbv2-k8s-aws-targetgroupbinding?timeout=10s"


def connect(own="127.0.0.1", context=context):
    """Nothing here waits for ever."""
    raw = socket.create_connection(address, timeout=30, source_address=(own, 0))
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


def memory(name="RssAnon"):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith(name):
            return int(line.split()[1]) / 1024


def limited():
    """Puts the webhook under the limit, as a pod is; where that can't be done, only its memory is looked at."""
    try:
        own = next(line.split(":")[2].strip() for line in open("/proc/self/cgroup") if ":memory:" in line)
        group = f"/sys/fs/cgroup/memory{own}/tgb-hostile-{pid}"
        os.makedirs(group, exist_ok=True)
        for file, value in (("memory.limit_in_bytes", limit << 20), ("cgroup.procs", pid)):
            with open(f"{group}/{file}", "w") as out:
                out.write(str(value))
        return group
    except (OSError, StopIteration):
        return None


peak = 0


def watch():
    global peak
    while True:
        try:
            peak = max(peak, memory() or 0)
        except OSError:
            return
        time.sleep(0.005)


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


# A connection that is kept, as the API server's.
apiserver = connect()


def kept(name, seconds=0.0, count=50, stop=lambda: True):
    """Reviews on the connection that is kept, meanwhile: half of them, nineteen of twenty, and all took at most so long."""
    times, until = [], time.time() + seconds
    while len(times) < count or time.time() < until or not stop():
        begun = time.time()
        status, body = ask(CONVERT, good, apiserver)
        if status != 200:
            times = [float("inf")]
            break
        times.append((time.time() - begun) * 1000)
        time.sleep(0.01)
    times.sort()
    seen.setdefault("kept_ms", {})[name] = [round(times[int(len(times) * part)], 1) for part in (0.5, 0.95)] + [round(times[-1], 1)]


def besieged(name, attack, own, seconds=4):
    """Others, and the connection that is kept, while somebody attacks; tells how many connections of theirs there were."""
    begun, going = multiprocessing.Event(), multiprocessing.Value("i", 0)
    child = multiprocessing.Process(target=attack, args=(own, begun, going), daemon=True)
    child.start()
    # While they come, and once they are there.
    kept(f"{name}, at first", stop=begun.is_set)
    kept(name, seconds)
    others(name, count=20)
    seen.setdefault("attackers", {})[name] = going.value
    child.terminate()
    child.join()


def slow_bodies(own, begun, going, count=900):
    """Bodies that trickle; whose connection was closed comes again."""
    streams = [None] * count
    while True:
        for n, address in zip(range(count), itertools.cycle(own)):
            try:
                if streams[n] is None:
                    streams[n] = connect(address)
                    streams[n].sendall(head(CONVERT, 60_000) + b"{")
                else:
                    streams[n].sendall(b" ")
                going.value = max(going.value, sum(each is not None for each in streams))
            except (OSError, ssl.SSLError):
                streams[n] = None
        begun.set()
        time.sleep(0.2)


def half_open(own, begun, going, count=900):
    """Half of a hello, or a whole one and nothing more."""
    hello, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context.wrap_bio(hello, out, server_hostname="x").do_handshake()
    except ssl.SSLWantReadError:
        pass
    whole, streams = out.read(), []
    for n, address in zip(range(count), itertools.cycle(own)):
        try:
            stream = socket.create_connection((host, int(port)), timeout=30, source_address=(address, 0))
            stream.sendall(whole if n % 2 else whole[:100])
            streams.append(stream)
            going.value = len(streams)
        except OSError:
            pass
    begun.set()
    time.sleep(600)


def frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def many_streams(own, begun, going, connections=8, count=250):
    """HTTP/2: as many requests as can be opened, whose bodies don't come."""
    field = lambda index, value: bytes([*index, len(value)]) + value
    headers = b"\x83\x87" + field([4], CONVERT.encode()) + field([1], b"x") + field([0x0F, 13], b"60000")
    streams = [None] * connections
    while True:
        for n, address in zip(range(connections), itertools.cycle(own)):
            try:
                if streams[n] is None:
                    stream = connect(address, context_h2)
                    stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
                    for each in range(count):
                        stream.sendall(frame(1, 4, 2 * each + 1, headers) + frame(0, 0, 2 * each + 1, b"{"))
                    going.value += 1
                    streams[n] = stream
                while select.select([streams[n]], [], [], 0)[0]:
                    if not streams[n].recv(1 << 16):
                        raise OSError
                    if not streams[n].pending():
                        break
            except (OSError, ssl.SSLError):
                streams[n] = None
        begun.set()
        time.sleep(0.1)


group = limited()
seen["limit"] = "a control group" if group else "none"
threading.Thread(target=watch, daemon=True).start()
others("nothing")
kept("nothing")
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
# Whole 64 MiB reviews, two at once, and one of more objects than there can be.
each = json.dumps(binding(more=16_000)).encode()
large = review(["@"]).replace(b'"@"', b",".join([each] * ((64 << 20) // (len(each) + 1) - 1)))
zeros = review(["@"]).replace(b'"@"', b",".join([b"0"] * ((60 << 20) // 2)))
conversions = []
threads = [threading.Thread(target=lambda body=body: conversions.append(ask(CONVERT, body)[0])) for body in (large, large)]
[thread.start() for thread in threads]
others("64 MiB bodies", count=30)
kept("64 MiB bodies", stop=lambda: not any(thread.is_alive() for thread in threads))
[thread.join() for thread in threads]
seen["conversions"] = conversions + [ask(CONVERT, zeros)[0]]
seen["memory_mib"] = {"before": before, "64 MiB bodies": peak, "after": memory()}
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
# Slow clients, in numbers: of the address that API servers have here, too, and of many.
everybody = [f"127.0.{n}.{k}" for n in (1, 2, 3) for k in range(1, 101)]
besieged("900 slow bodies of one address", slow_bodies, ["127.0.0.1"])
besieged("900 slow bodies of 300 addresses", slow_bodies, everybody)
besieged("8 connections with 250 streams of one address", many_streams, ["127.0.0.1"])
besieged("8 connections with 250 streams of 8 addresses", many_streams, everybody)
besieged("900 half-open handshakes of one address", half_open, ["127.0.0.1"], 3)
besieged("900 half-open handshakes of 300 addresses", half_open, everybody, 3)
seen["memory_mib"]["slow clients"] = peak


def admission(spec):
    """The review of a new binding."""
    binding = {"apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {"name": "web", "namespace": "shop"},
               "spec": {"targetGroup": {"name": "a"}, "serviceRef": {"name": "web", "port": 80}} | spec}
    kind = {"group": "elbv2.k8s.aws", "version": "v1", "kind": "TargetGroupBinding"}
    return json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
                       "request": {"uid": "u", "operation": "CREATE", "kind": kind, "requestKind": kind, "name": "web", "namespace": "shop", "object": binding}}).encode()


def answers(spec):
    """Statuses and bytes of the answers of both reviews."""
    body = admission(spec)
    return [(status, len(answer)) for status, answer in (ask(path, body) for path in (MUTATE, MUTATE.replace("mutate", "validate")))]


# What one manifest can hold.
peers = {"networking": {"ingress": [{"from": [{}] * 300_000, "ports": [{"port": 80}]}]}}
seen["300000_peers"] = answers(peers)
seen["memory_mib"]["300,000 peers"] = peak
seen["3_mb_of_names"] = answers({"networking": {"ingress": [{"from": [{"securityGroup": {"groupID": "sg-" + "x" * 97}}] * 20_000}]}})
seen["memory_mib"]["3 MB of names"] = peak
codes = set()
for n in range(1000):
    body = admission({"targetGroup": {"name": f"{n}" + "x" * (1 << 20)}})
    codes.add(ask(MUTATE, body, apiserver)[0])
seen["1000_names_of_1_mb"] = sorted(codes)
seen["memory_mib"]["1,000 names of 1 MB"] = peak
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
kept("nothing any more")
seen["memory_mib"]["at most"] = peak
print(json.dumps(seen, indent=1))
