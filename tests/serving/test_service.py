"""The API by OpenAI's own client, batching, and what a server does under load."""

import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import served
from PIL import Image

from sd3_jax.errors import RetryableError, UserError
from sd3_jax.jobs import serve
from sd3_jax.serving import warm_up


def opened(picture) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.b64_json)))


def png(pixels: np.ndarray) -> bytes:
    return warm_up.png_of(pixels)


@pytest.fixture(scope="module")
def server():
    relay = serve.Relay()

    def paint(rows):
        for step in range(rows[0].task.settings["steps"]):
            relay.preview(step, 0.5, np.full((len(rows), 8, 8, 3), 0.25, np.float32))
        return served.colours(rows)

    with served.running(paint, relay=relay, partial_images=3) as running:
        yield running


# --- the API


def test_the_client_of_openai_generates(server):
    client = server.client()
    assert [x.id for x in client.models.list()] == ["model"]
    fields = {"seed": 7, "steps": 4, "guidance": 3.5, "negative_prompt": "blue"}
    answer = client.images.generate(
        prompt="ein roter Fuchs 🦊", n=3, size="64x64", extra_body=fields
    )
    assert [x.seed for x in answer.data] == [7, 8, 9] and answer.size == "64x64"
    assert [np.unique(opened(x)).tolist() for x in answer.data] == [[7], [8], [9]]
    line = json.loads(opened(answer.data[1]).text["sd3_jax"])
    assert line["prompt"] == "ein roter Fuchs 🦊" and line["seed"] == 8
    assert line["settings"]["cfg"] == 3.5 and line["settings"]["steps"] == 4
    webp = client.images.generate(prompt="fox", output_format="webp")
    assert opened(webp.data[0]).format == "WEBP"
    seeds = {client.images.generate(prompt="x").data[0].seed for _ in range(3)}
    assert len(seeds) == 3  # drawn anew, and told
    by_url = client.images.generate(prompt="fox", response_format="url")
    file = httpx.get(by_url.data[0].url)
    assert file.headers["content-type"] == "image/png"
    assert httpx.get(by_url.data[0].url + "x").status_code == 404


def test_the_client_of_openai_edits(server):
    grey = np.full((64, 64, 3), 90, np.uint8)
    alpha = np.full((64, 64, 4), 255, np.uint8)
    alpha[:32, :, 3] = 0
    seen = []
    paint = lambda rows: (seen.append(read(rows)), served.colours(rows))[1]

    def read(rows):
        settings = rows[0].task.settings
        return {k: np.asarray(Image.open(settings[k])) for k in ("image", "mask")}

    with served.running(paint, kinds=("mask",)) as other:
        answer = other.client().images.edit(
            image=("a.png", png(grey)),
            mask=("m.png", png(alpha)),
            prompt="a hat",
            extra_body={"strength": 0.5, "seed": 3},
        )
        assert not list(other.spool.folder.iterdir())  # uploads are gone
    # OpenAI's transparency became white, where the picture is repainted.
    assert (seen[-1]["mask"][:32] == 255).all() and not seen[-1]["mask"][32:].any()
    assert (seen[-1]["image"] == 90).all()
    line = json.loads(opened(answer.data[0]).text["sd3_jax"])
    assert line["settings"]["strength"] == 0.5 and line["settings"]["image"] == "image"
    assert set(line["inputs"]) == {"image", "mask"} and "/" not in str(line["inputs"])


def test_the_client_of_openai_streams(server):
    client, fields = server.client(), {"seed": 5, "steps": 6}
    stream = client.images.generate(
        prompt="fox", stream=True, partial_images=2, extra_body=fields
    )
    events = list(stream)
    kinds = [event.type.partition(".")[2] for event in events]
    assert kinds == ["partial_image"] * 2 + ["completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert opened(events[0]).size == (64, 64)
    assert (np.asarray(opened(events[-1])) == 5).all()
    image = ("a.png", png(np.zeros((64, 64, 3), np.uint8)))
    stream = client.images.edit(image=image, prompt="x", stream=True)
    assert [event.type for event in stream] == ["image_edit.completed"]


BAD = [  # fields, status, what the message has
    ({}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": "a\0b"}, 400, "control characters"),
    ({"prompt": "x" * 5000}, 400, "5000 bytes"),
    ({"prompt": ["a"]}, 400, "expected a string"),
    ({"prompt": "x", "n": 10**6}, 400, "n 1000000"),
    ({"prompt": "x", "n": True}, 400, "expected an integer"),
    ({"prompt": "x", "n": 10**400}, 400, "expected 1 to"),
    ({"prompt": "x", "size": "30000x30000"}, 400, "has compiled 64x64"),
    ({"prompt": "x", "size": "wide"}, 400, "WIDTHxHEIGHT"),
    ({"prompt": "x", "steps": 500}, 400, "at most 100"),
    ({"prompt": "x", "seed": -1}, 400, "seed"),
    ({"prompt": "x", "seed": 2**32 - 1, "n": 2}, 400, "below 4294967296"),
    ({"prompt": "x", "solver": "eular"}, 400, "eular"),
    ({"prompt": "x", "model": "gpt"}, 404, "this server has"),
    ({"prompt": "x", "image": "/etc/passwd"}, 400, "unknown field"),
    ({"prompt": "x", "stepz": 3}, 400, 'did you mean "steps"'),
    ({"prompt": "x", "adapters": {"a": 1}}, 400, "adapters"),
    ({"prompt": "x", "partial_images": 1}, 400, "stream"),
]


@pytest.mark.parametrize("fields, status, words", BAD)
def test_a_bad_field_is_the_api_s_error(server, fields, status, words):
    answer = server.post(fields)
    error = answer.json()["error"]
    assert answer.status_code == status and words in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}
    assert "/" not in error["message"].replace("expected 1/", "")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'{"prompt": "x", "steps": NaN}', b"\xff\xfe"),
        *(b'{"prompt": "\\ud800"}', b'{"prompt": "x", "prompt": "y"}'),
        *(b'{"prompt": "x", "guidance": 1e999}', b'{"a":' * 5000, b"1" * 5000),
    ],
)
def test_a_bad_body_is_the_api_s_error(server, body):
    header = {"Content-Type": "application/json"}
    answer = server.post(content=body, headers=header)
    assert answer.status_code == 400 and answer.json()["error"]["code"]


def bomb() -> bytes:
    """A PNG whose header says 30000 x 30000."""
    data = bytearray(png(np.zeros((16, 16, 3), np.uint8)))
    data[16:24] = (30000).to_bytes(4, "big") * 2
    return bytes(data)


@pytest.mark.parametrize(
    "image, words",
    ids=["bomb", "svg", "text", "empty", "cut", "size"],
    argvalues=[
        (bomb(), "expected a whole"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not one of JPEG"),
        (b"text", "not one of JPEG"),
        (b"", "not one of JPEG"),
        (png(np.zeros((64, 64, 3), np.uint8))[:70], "truncated"),
        (png(np.zeros((48, 64, 3), np.uint8)), "has compiled 64x64"),
    ],
)
def test_a_bad_upload_is_the_api_s_error(server, image, words):
    files = {"image": ("a.png", image)}
    answer = server.post(path="/v1/images/edits", files=files, data={"prompt": "x"})
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert words in message and str(server.spool.folder) not in message
    assert not list(server.spool.folder.iterdir())


def test_a_bad_form_is_the_api_s_error(server):
    path, grey = "/v1/images/edits", png(np.zeros((64, 64, 3), np.uint8))
    kind = {"Content-Type": "multipart/form-data"}
    twice = [("image", ("a.png", grey)), ("image", ("b.png", grey))]
    answers = [
        server.post(path=path, content=b"x", headers=kind),
        server.post(
            path=path,
            content=b"x",
            headers={**kind, "Content-Type": kind["Content-Type"] + "; boundary=y"},
        ),
        server.post(path=path, files=twice, data={"prompt": "x"}),
        server.post(path=path, files={"other": ("a", b"")}, data={"prompt": "x"}),
        server.post(path=path, files={"mask": ("a", grey)}, data={"prompt": "x"}),
        server.post(
            path=path, files={"image": ("a", grey)}, data={"prompt": "x", "n": "two"}
        ),
    ]
    assert [x.status_code for x in answers] == [400] * 6, [x.text for x in answers]
    assert server.post(path=path, content=b"x").status_code == 415
    assert (
        server.post(
            path=path.replace("edits", "generations"),
            content=b"x",
            headers={"Content-Type": "text/plain"},
        ).status_code
        == 415
    )
    assert server.get("/v1/images/generations").status_code == 405
    assert server.get("/no/such").json()["error"]["code"] == "not_found"


def test_health_metrics_and_schema(server):
    assert server.get("/healthz").json() == {"alive": True}
    assert server.metric("sd3_jax_batch_rows_count") > 0
    assert server.metric("sd3_jax_queue_pictures") == 0
    fields = server.get("/openapi.json").json()["paths"]["/v1/images/generations"]
    schema = fields["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["size"]["enum"] == ["auto", "64x64"]
    assert "/v1/images/generations" in server.get("/").text
    headers = server.get("/v1/models").headers
    assert "access-control-allow-origin" not in headers and "server" not in headers


# --- batches


class Gate:
    """A painter that records its batches, and waits for `open` if it is told to."""

    def __init__(self):
        self.open, self.batches = threading.Event(), []
        self.open.set()

    def __call__(self, rows):
        # Padding repeats rows; a request's picture is known by its seed.
        self.batches.append([row.task.settings["seed"] for row in rows])
        assert self.open.wait(30)
        return served.colours(rows)

    def sizes(self):
        return [len(set(seeds)) for seeds in self.batches]


def ask(server, seed, **fields):
    return server.post({"prompt": "x", "seed": seed, **fields})


def behind_a_batch(gate, server, pool, seed=200):
    """A request that is being painted until gate.open is set."""
    gate.batches.clear()
    gate.open.clear()
    first = pool.submit(ask, server, seed)
    served.wait(lambda: len(gate.batches) == 1)
    return first


def waiting(server, count):
    served.wait(lambda: server.metric("sd3_jax_queue_pictures") == count)


def test_requests_share_batches_of_one_size():
    gate = Gate()
    with served.running(gate) as server, ThreadPoolExecutor(32) as pool:
        first = behind_a_batch(gate, server, pool)
        rest = [pool.submit(ask, server, i, steps=i + 1) for i in range(16)]
        waiting(server, 16)
        gate.open.set()
        answers = [x.result() for x in rest]
        assert first.result().status_code == 200
    assert gate.sizes() == [1, 8, 8] and {len(x) for x in gate.batches} == {8}
    for i, answer in enumerate(answers):
        picture = base64.b64decode(answer.json()["data"][0]["b64_json"])
        assert (np.asarray(Image.open(io.BytesIO(picture))) == i).all()


def test_a_full_queue_refuses_and_a_stopping_server_finishes():
    gate = Gate()
    with served.running(gate, queue=4) as server, ThreadPoolExecutor(32) as pool:
        first = behind_a_batch(gate, server, pool)
        rest = [pool.submit(ask, server, i, n=2) for i in range(2)]
        waiting(server, 4)
        refused = ask(server, 9)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
        server.stop()
        served.wait(lambda: server.get("/readyz").status_code == 503)
        assert ask(server, 9).status_code == 503
        gate.open.set()
        assert [x.result().status_code for x in (first, *rest)] == [200] * 3
        server.thread.join(20)
        assert server.error is None and not server.thread.is_alive()


def test_who_goes_away_is_not_painted_and_who_waits_too_long_is_told():
    gate = Gate()
    with served.running(gate, request_s=1.5) as server, ThreadPoolExecutor(8) as pool:
        first = behind_a_batch(gate, server, pool)
        with pytest.raises(httpx.ReadTimeout):
            server.post({"prompt": "x", "seed": 1}, timeout=0.3)
        with pytest.raises(httpx.ReadTimeout):
            stream = {"prompt": "x", "seed": 2, "stream": True}
            server.post(stream, timeout=0.3)
        late = pool.submit(ask, server, 3)
        answer = late.result()
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        assert first.result().status_code == 504
        gate.open.set()
        assert ask(server, 4).status_code == 200
    assert gate.batches[1:] == [[4] * 8]


def test_an_error_of_one_request_touches_no_other():
    def paint(rows):
        gate(rows)
        if any(row.task.settings["seed"] == 66 for row in rows):
            raise UserError("/secret/path/of/host: cannot be painted")
        if any(row.task.settings["seed"] == 77 for row in rows):
            raise RuntimeError("a bug")
        return served.colours(rows)

    gate = Gate()
    with served.running(paint) as server, ThreadPoolExecutor(8) as pool:
        first = behind_a_batch(gate, server, pool)
        rest = [pool.submit(ask, server, seed) for seed in (1, 66, 3)]
        waiting(server, 3)
        gate.open.set()
        answers = [x.result() for x in rest]
        assert [x.status_code for x in answers] == [200, 400, 200]
        assert "secret" not in answers[1].text
        assert first.result().status_code == 200
        assert ask(server, 77).status_code == 500
        assert ask(server, 5).status_code == 200


def test_a_lost_device_ends_the_server_with_the_code_to_retry():
    def paint(rows):
        if rows[0].task.settings["seed"] == 13:
            raise RetryableError("the device is gone")
        return served.colours(rows)

    with served.running(paint) as server:
        assert ask(server, 13).status_code == 500
        served.wait(lambda: not server.thread.is_alive())
        assert isinstance(server.error, RetryableError)


# --- access


def test_keys_origins_and_limits(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    options = dict(keys_file=str(keys), cors=("https://a.example",), body_bytes=1000)
    with served.running(**options) as server:
        assert server.client("two").models.list().data[0].id == "model"
        with pytest.raises(openai.AuthenticationError):
            server.client("three").models.list()
        assert server.get("/readyz").status_code == 200  # for probes
        fields, key = {"prompt": "x" * 2000}, {"Authorization": "Bearer one"}
        assert server.post(fields, headers=key).status_code == 413
        assert server.post({"prompt": "x"}, headers=key).status_code == 200
        origin = {"Origin": "https://a.example"}
        header = httpx.get(f"{server.url}/healthz", headers=origin).headers
        assert header["access-control-allow-origin"] == "https://a.example"
        origin = {"Origin": "https://b.example"}
        header = httpx.get(f"{server.url}/healthz", headers=origin).headers
        assert "access-control-allow-origin" not in header


def test_adapters_are_weighed_by_name():
    seen = []

    def paint(rows):
        seen.append([row.adapters for row in rows])
        return served.colours(rows)

    with served.running(paint, adapters={"fox": 0.7, "oil": 1.0}) as server:
        assert ask(server, 1, adapters={"fox": 0.2}).status_code == 200
        assert seen[-1] == [{"fox": 0.2}] * 8
        assert ask(server, 1).status_code == 200
        assert seen[-1] == [{"fox": 0.7, "oil": 1.0}] * 8
        for bad in ({"fix": 1}, {"fox": "much"}, {"fox": 1e9}, {"fox": True}):
            answer = ask(server, 1, adapters=bad)
            assert answer.json()["error"]["param"] == "adapters", answer.text


def test_slow_clients_are_left_and_many_are_served():
    import socket

    with served.running(read_s=1.0) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        # --- 500 connections, of which none asks for anything
        idle = [socket.create_connection(address) for _ in range(500)]
        assert ask(server, 1).status_code == 200
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\n"
        slow_head, slow_body = idle[0], idle[1]
        slow_head.sendall(head)
        kind = b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        slow_body.sendall(head + kind)
        slow_body.settimeout(10)
        assert b"408" in slow_body.recv(1000).split(b"\r\n")[0]
        slow_head.settimeout(10)
        assert slow_head.recv(10) == b""  # closed
        time.sleep(0.5)
        assert ask(server, 2).status_code == 200
        for connection in idle:
            connection.close()


def test_fuzzed_requests_get_the_answers_of_the_schema(server):
    """schemathesis makes requests that keep the schema, and some that do not."""
    import hypothesis
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for operation in schema.get_all_operations():
        case_of = operation.ok().as_strategy()

        @hypothesis.settings(
            max_examples=6,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
            database=None,
        )
        @hypothesis.given(case=case_of)
        def check(case):
            response = case.call(base_url=server.url, timeout=30)
            assert response.status_code < 500, (case, response.text)

        check()
    assert server.get("/readyz").status_code == 200
