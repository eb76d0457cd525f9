"""Cloud Storage over loopback, for tests: the parts of its JSON API that we meet.

    with cloud_storage.serving() as bucket:
        subprocess.run([...], env=os.environ | bucket.environment)
        bucket.objects["run/config.json"].data

etils and gcsfs find it by STORAGE_EMULATOR_HOST, tensorstore (orbax's arrays) by
TENSORSTORE_GCS_HTTP_URL. One bucket, "emulated"; names in `objects` are below it.
`fault` is asked of every request: None, an HTTP status, "slow" or "cut" (half an
answer).
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "emulated"  # tensorstore takes no short one
SLOW = 0.3  # seconds
OBJECT = rf"(?:/download)?/storage/v1/b/{BUCKET}/o/(.+)"


class Object(NamedTuple):
    data: bytes
    generation: int


class Bucket:
    def __init__(self):
        self.objects: dict[str, Object] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.lock = threading.RLock()
        self.generation = int(time.time() * 1e6)
        self.fault: Callable[[str, str], int | str | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.port = 0

    @property
    def environment(self) -> dict[str, str]:
        address = f"http://127.0.0.1:{self.port}"
        return {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # tensorstore looks for no other
            "GCE_METADATA_ROOT": "127.0.0.1:1",  # nor asks a machine of Google's
            "NO_GCE_CHECK": "true",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which is by gRPC
        }

    def put(self, name: str, data: bytes, condition: str | None) -> dict | None:
        """The object's description; None if its generation is not the wanted one."""
        with self.lock:
            now = self.objects.get(name, Object(b"", 0)).generation
            if condition is not None and int(condition) != now:
                return None
            self.generation += 1
            self.objects[name] = Object(bytes(data), self.generation)
            return self.describe(name)

    def describe(self, name: str) -> dict:
        size, made = len(self.objects[name].data), "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "size": str(size),
            "generation": str(self.objects[name].generation),
            "metageneration": "1",
            "timeCreated": made,
            "updated": made,
            "etag": str(self.objects[name].generation),
            "storageClass": "STANDARD",
            "contentType": "application/octet-stream",
        }

    def listing(self, prefix: str, delimiter: str, most: int, after: str) -> dict:
        with self.lock:
            names = [x for x in sorted(self.objects) if x.startswith(prefix)]
            entries = {}  # objects, and prefixes where a delimiter folds them
            for name in names:
                head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
                key = prefix + head + delimiter if delimiter and found else name
                entries.setdefault(key, key != name or None)
            keys = [key for key in entries if key > after]
            page, rest = keys[:most], keys[most:]
            answer = {
                "kind": "storage#objects",
                "items": [self.describe(x) for x in page if not entries[x]],
                "prefixes": [x for x in page if entries[x]],
            }
            return answer | ({"nextPageToken": page[-1]} if rest else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, value: dict | bytes = b"", **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        if self.cut:  # the length of all, and half of it
            headers["Connection"], self.close_connection = "close", True
        self.send_response(status)
        kind = "application/json" if isinstance(value, dict) else "text/plain"
        for name, text in {"Content-Type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)

    def refuse(self, status: int) -> None:
        self.answer(status, {"error": {"code": status, "message": f"status {status}"}})

    def handle_any(self) -> None:
        url, data = urlsplit(self.path), self.body()
        query = {k: v[0] for k, v in parse_qs(url.query, True).items()}
        bucket = self.bucket
        bucket.requests.append((self.command, self.path))
        fault, self.cut = bucket.fault(self.command, self.path), False
        if isinstance(fault, int):
            return self.refuse(fault)
        if fault == "slow":
            time.sleep(SLOW)
        self.cut = fault == "cut"
        self.route(self.command, url.path, query, data)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_any

    def route(self, method: str, path: str, query: dict, data: bytes) -> None:
        bucket = self.bucket
        if path == f"/upload/storage/v1/b/{BUCKET}/o":
            return self.upload(query, data)
        if path == "/batch/storage/v1":
            return self.batch(data)
        if path == f"/storage/v1/b/{BUCKET}":
            return self.answer(200, {"kind": "storage#bucket", "name": BUCKET})
        if path == f"/storage/v1/b/{BUCKET}/storageLayout":
            return self.answer(200, {"bucket": BUCKET, "locationType": "region"})
        if path == f"/storage/v1/b/{BUCKET}/o":
            most = int(query.get("maxResults", 1000))
            options = query.get("prefix", ""), query.get("delimiter", "")
            return self.answer(
                200, bucket.listing(*options, most, query.get("pageToken", ""))
            )
        if (match := re.fullmatch(OBJECT, path)) is None:
            return self.refuse(404)
        name, *target = re.split(f"/(rewriteTo/b/{BUCKET}|moveTo)/o/", match[1])
        name = unquote(name)
        with bucket.lock:
            if name not in bucket.objects:
                return self.refuse(404)
            if target:
                made = bucket.put(unquote(target[1]), bucket.objects[name].data, None)
                if target[0] == "moveTo":
                    del bucket.objects[name]
                    return self.answer(200, made)
                return self.answer(200, {"done": True, "resource": made})
            wanted = query.get("ifGenerationMatch")
            generation = str(bucket.objects[name].generation)
            if wanted is not None and wanted != generation:
                return self.refuse(412)
            if query.get("ifGenerationNotMatch") == generation:
                return self.answer(304)
            if method == "DELETE":
                del bucket.objects[name]
                return self.answer(204)
            if query.get("alt") != "media":
                return self.answer(200, bucket.describe(name))
            found = bucket.objects[name]
        self.media(found)

    def media(self, found: Object) -> None:
        about = {"x_goog_generation": str(found.generation)}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self.answer(200, found.data, **about)
        size = len(found.data)
        first = int(span[1]) if span[1] else max(0, size - int(span[2]))
        last = min(int(span[2]), size - 1) if span[1] and span[2] else size - 1
        if first >= size or last < first:
            return self.refuse(416)
        about["Content_Range"] = f"bytes {first}-{last}/{size}"
        self.answer(206, found.data[first : last + 1], **about)

    def upload(self, query: dict, data: bytes) -> None:
        bucket, kind = self.bucket, query["uploadType"]
        condition = query.get("ifGenerationMatch")
        if kind == "media":
            return self.stored(bucket.put(query["name"], data, condition))
        if kind == "multipart":
            mark = re.search(r"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"])
            _, about, content, _ = data.split(b"--" + mark[1].encode(), 3)
            about = json.loads(
                about.split(b"\n\n" if b"\r" not in about else b"\r\n\r\n")[1]
            )
            gap = b"\r\n\r\n" if b"\r\n\r\n" in content else b"\n\n"
            content = content.split(gap, 1)[1]
            content = content.removesuffix(b"\n").removesuffix(b"\r")
            name = about.get("name") or query["name"]
            return self.stored(bucket.put(name, content, condition))
        if "upload_id" not in query:
            name = query.get("name") or json.loads(data)["name"]
            with bucket.lock:
                number = str(len(bucket.uploads))
                bucket.uploads[number] = name, bytearray()
            place = f"http://127.0.0.1:{bucket.port}/upload/storage/v1/b/{BUCKET}/o"
            return self.answer(
                200, {}, Location=f"{place}?uploadType=resumable&upload_id={number}"
            )
        name, parts = bucket.uploads[query["upload_id"]]
        start, total = re.fullmatch(
            r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"]
        ).groups()
        if start is not None:
            del parts[int(start) :]
            parts += data
        if total == str(len(parts)):
            return self.stored(bucket.put(name, parts, None))
        held = {"Range": f"bytes=0-{len(parts) - 1}"} if parts else {}
        self.answer(308, b"", **held)

    def stored(self, about: dict | None) -> None:
        self.refuse(412) if about is None else self.answer(200, about)

    def batch(self, data: bytes) -> None:
        """Deletions, which is what gcsfs sends so."""
        answers = []
        for name in re.findall(rb"DELETE \S*?/o/(\S+) HTTP", data):
            with self.bucket.lock:
                gone = self.bucket.objects.pop(unquote(name.decode()), None)
            answers.append("204 No Content" if gone else "404 Not Found")
        parts = "".join(
            f"--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {text}\r\n\r\n"
            for text in answers
        )
        self.answer(
            200,
            f"{parts}--batch--".encode(),
            Content_Type="multipart/mixed; boundary=batch",
        )


@contextlib.contextmanager
def serving() -> Iterator[Bucket]:
    bucket = Bucket()
    handler = type("Bound", (Handler,), {"bucket": bucket})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # of clients that were killed
    server.daemon_threads = True
    bucket.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
