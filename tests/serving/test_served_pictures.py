"""Served pictures are those of the job `sample`, bit for bit, in any company."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import served
from etils import epath
from parity import miniature
from PIL import Image

from configs import quickstart, released
from sd3_jax.distributed import sharding
from sd3_jax.jobs import train
from sd3_jax.sampling.job import painters, prompt_file
from sd3_jax.sampling.job.prompt_lines import read_fields
from sd3_jax.sampling.job.task_batches import filled
from sd3_jax.serving import row_painters, warm_up
from sd3_jax.serving.request_tasks import Row

MIXED = [  # fields of requests that share one program
    {"seed": 3, "n": 2},
    {"seed": 4, "steps": 5, "guidance": 3.0, "negative_prompt": "blue"},
    {"seed": 5, "steps": 7, "solver": "dpmpp_2m", "shift": 2.0},
    {"seed": 6, "steps": 3, "guidance_rescale": 0.5, "guidance_start": 0.2},
    {"seed": 7, "steps": 6, "grid": "karras", "solver": "dpmpp_2m_flow"},
]
LINE = {"guidance": "cfg", "negative_prompt": "negative", "n": "per_prompt"}
LINE |= {"guidance_rescale": "rescale", "guidance_start": "cfg_start"}


@pytest.fixture(scope="module")
def server():
    weights = str(miniature.folder("sd35_medium"))
    options = dict(kinds=("generate", "mask"), partial_images=1, wait_ms=200.0)
    painter = served.released_painter
    with served.running(painter=painter, weights=weights, **options) as running:
        yield running


def pictures(answer) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(x["b64_json"]) for x in answer.json()["data"]]
    return [np.asarray(Image.open(io.BytesIO(x))) for x in files]


def of_the_job(config, painter, lines) -> list[list[np.ndarray]]:
    """What `sample` paints for each line, in batches of the server's size."""
    looked = prompt_file.Looked()
    painted = []
    for fields in lines:
        line = read_fields(fields, config, ".", looked)
        tasks = prompt_file.tasks_of([line], looked)
        images, failures = painter.paint(filled(tasks, served.SIZE))
        assert not failures
        painted.append(list(images[: len(tasks)]))
    return painted


def lines_of(requests) -> list[dict]:
    fields = [{"prompt": "a red fox"} | request for request in requests]
    return [{LINE.get(name, name): x for name, x in f.items()} for f in fields]


def test_mixed_requests_are_the_pictures_of_sample(server, tmp_path):
    ask = lambda request: server.post({"prompt": "a red fox"} | request)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, MIXED))
    assert server.metric("sd3_jax_batch_rows_count") == 1  # one batch of all
    config = released.get_config("tiny")
    config.weights = str(miniature.folder("sd35_medium"))
    mesh = sharding.make_mesh(**config.mesh)
    usual = prompt_file.task(config, "x", 0)
    painter = painters.released(config, epath.Path(tmp_path), mesh, [usual])
    expected = of_the_job(config, painter, lines_of(MIXED))
    for answer, images in zip(together, expected, strict=True):
        np.testing.assert_array_equal(pictures(answer), images)
    np.testing.assert_array_equal(pictures(ask(MIXED[1])), expected[1])  # alone

    # --- a picture that is changed where its mask says
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48] = 255
    for name, pixels in ("image", grey), ("mask", mask):
        (tmp_path / name).write_bytes(warm_up.png_of(pixels))
    files = {name: (name, (tmp_path / name).read_bytes()) for name in ("image", "mask")}
    fields = {"prompt": "a hat", "strength": 0.7, "seed": 9, "steps": 5}
    answer = server.post(path="/v1/images/edits", files=files, data=fields)
    paths = {name: str(tmp_path / name) for name in files}
    edited = of_the_job(config, painter, [fields | paths])
    np.testing.assert_array_equal(pictures(answer), edited[0])

    # --- what would compile is refused, and a stream previews
    assert ask({"solver": "heun"}).json()["error"]["code"] == "program_not_compiled"
    assert ask({"guidance": 1}).json()["error"]["code"] == "program_not_compiled"
    options = dict(prompt="a red fox", stream=True, partial_images=1)
    events = list(server.client().images.generate(**options, extra_body=MIXED[1]))
    assert [x.type.partition(".")[2] for x in events] == ["partial_image", "completed"]
    file = io.BytesIO(base64.b64decode(events[-1].b64_json))
    np.testing.assert_array_equal(np.asarray(Image.open(file)), expected[1][0])


def test_a_checkpoint_is_served_as_sample_paints_it(tmp_path):
    config = quickstart.get_config("tiny")
    config.train.update(steps=1)
    workdir = epath.Path(tmp_path)
    train.run(config, workdir)
    config.sample.batch_size = served.SIZE
    mesh = sharding.make_mesh(**config.mesh)
    requests = [{"seed": 3, "n": 2}, {"seed": 5, "steps": 4, "guidance": 2.0}]
    requests += [{"seed": 6, "solver": "dpmpp_2m", "negative_prompt": "a blue one"}]
    looked = prompt_file.Looked()
    with jax.set_mesh(mesh):
        rows = []
        for fields in lines_of(requests):
            line = read_fields(fields, config, ".", looked)
            rows += [Row(task) for task in prompt_file.tasks_of([line], looked)]
        painter = row_painters.trained(config, workdir, mesh, None)
        images, failures = painter.paint(filled(rows, served.SIZE))
        assert not failures and len({painter.key(row) for row in rows}) == 1
        tasks = [row.task for row in rows]
        job = painters.trained(config, workdir, mesh, tasks)
        expected = of_the_job(config, job, lines_of(requests))
    flat = [image for pictures in expected for image in pictures]
    np.testing.assert_array_equal(images[: len(flat)], flat)
    assert json.dumps(painter.facts)
