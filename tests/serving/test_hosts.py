"""Two processes of four devices: one answers, both paint, and they end together."""

import base64
import contextlib
import io
import signal
import time

import httpx
import multiprocess
import numpy as np
import pytest
import served
from parity import miniature
from PIL import Image

from sd3_jax.serving import warm_up

OPTIONS = {"sample.batch_size": 8, "serve.kinds": "generate,mask", "serve.drain_s": 20}


@contextlib.contextmanager
def two_processes(tmp_path):
    """(url, the two processes) of a ready server."""
    port = served.free_port()
    keys = {"weights": miniature.folder("sd35_medium"), "serve.port": port} | OPTIONS
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    recipe = ["--config=configs/released.py:tiny", f"--workdir={tmp_path}"]
    command = ["-m", "sd3_jax.main", "serve", *recipe, *flags]
    with multiprocess.start(command, processes=2, devices=4) as cluster:
        url = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            assert [x.poll() for x in cluster] == [None, None], ends(cluster)
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{url}/readyz").status_code == 200
            return False

        served.wait(ready, 600)
        yield url, cluster


def ends(cluster) -> list[str]:
    multiprocess.kill(cluster)
    return [multiprocess.result(process).stderr[-1500:] for process in cluster]


def picture(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def test_two_processes_answer_and_stop_together(tmp_path):
    with two_processes(tmp_path) as (url, cluster):
        ask = lambda **fields: httpx.post(
            f"{url}/v1/images/generations",
            json={"prompt": "a red fox", "seed": 3} | fields,
            timeout=120,
        )
        first = picture(ask(steps=4))
        assert (first != picture(ask(steps=4, seed=5))).any()
        np.testing.assert_array_equal(first, picture(ask(steps=4)))
        # --- uploads travel to the other process
        grey = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        mask[:32] = 255
        files = {"image": grey, "mask": mask}
        files = {name: (name, warm_up.png_of(x)) for name, x in files.items()}
        data = {"prompt": "a hat", "strength": "0.9"}
        edits = f"{url}/v1/images/edits"
        edited = picture(httpx.post(edits, files=files, data=data, timeout=120))
        np.testing.assert_array_equal(edited[32:], grey[32:])
        assert (edited[:32] != grey[:32]).any()
        assert ask(n=10**6).status_code == 400
        # --- SIGTERM to the one that does not answer HTTP stops both
        cluster[1].send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in cluster]
        assert codes == [0, 0], ends(cluster)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_a_code_to_retry(tmp_path):
    with two_processes(tmp_path) as (url, cluster):
        cluster[1].kill()
        began = time.monotonic()
        with contextlib.suppress(httpx.TransportError):
            fields = {"prompt": "a red fox"}
            answer = httpx.post(f"{url}/v1/images/generations", json=fields, timeout=90)
            assert answer.status_code >= 500
        # 134: jax's own end of a process whose peer is lost (exit_codes.md).
        assert cluster[0].wait(120) in (3, -6), ends(cluster)
        assert time.monotonic() - began < 120
