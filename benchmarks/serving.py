"""`serve` under load: equality with `sample`, batches, throughput, memory.

    python benchmarks/serving.py          # about ten minutes on two cores
    LONG=200 python benchmarks/serving.py # without the 2,000 requests

Serves the miniature of the tests over loopback in a process of its own, asks from 32
clients, and writes the table in benchmarks/serving.md.
"""

import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import page_tables

HERE = Path(__file__).parent
ROOT = HERE.parent
CLIENTS, REQUESTS, BATCH = 32, 200, 8
LONG = int(os.environ.get("LONG", 2000))
SOLVERS = ("euler", "dpmpp_2m", "dpmpp_2m_flow")


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from parity import miniature

    weights = str(miniature.folder("sd35_medium"))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(weights, Path(folder))
    table = page_tables.table(("measure", "result"), rows)
    page_tables.fill(HERE / "serving.md", "load", table)
    for row in rows:
        print(*row, sep=": ")


def measure(weights: str, folder: Path) -> list[tuple[str, str]]:
    import httpx

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = common(weights, folder / "served")
    flags += [f"--config.serve.port={port}", "--config.serve.wait_ms=50"]
    server = subprocess.Popen(
        [sys.executable, "-m", "sd3_jax.main", "serve", *flags],
        env=page_tables.environment(),
        stderr=(folder / "log").open("w"),
    )
    limits = httpx.Limits(max_connections=CLIENTS)
    client = httpx.Client(base_url=url, timeout=600, limits=limits)
    try:
        wait_ready(client, server, folder / "log")
        requests = mixed(REQUESTS)
        ask(client, requests[:BATCH])  # the first batch has jax's last traces
        before = metrics(client)
        began = time.monotonic()
        answers = ask(client, requests)
        served = REQUESTS / (time.monotonic() - began)
        after = metrics(client)
        statuses = [x.status_code for x in answers]
        mean = mean_batch(before, after)
        first = resident(server.pid)
        pixels = {i: picture(x) for i, x in enumerate(answers) if x.status_code == 200}
        # Beside the idle server, as soon as possible: the machine has other work.
        equal, job = compare(weights, folder, requests, pixels)
        ask(client, mixed(LONG - REQUESTS, seed=1))
        last = resident(server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(120)
    return [
        ("answers", f"{statuses.count(200)} of 200, {statuses.count(429)} of 429"),
        ("pictures equal to sample's", f"{equal} of {len(pixels)}"),
        ("mean batch", f"{mean:.2f} of {BATCH}, {mean / BATCH:.0%}"),
        ("pictures a second", f"{served:.1f}; sample {job:.1f}, {served / job:.2f} x"),
        ("memory after 200", f"{first / 2**20:.0f} MiB"),
        ("memory after 2,000", f"{last / 2**20:.0f} MiB, {last / first - 1:+.1%}"),
        ("exit code after SIGTERM", str(code)),
    ]


def common(weights: str, workdir: Path) -> list[str]:
    flags = ["--config=configs/released.py:tiny", f"--workdir={workdir}"]
    flags += [f"--config.weights={weights}", f"--config.sample.batch_size={BATCH}"]
    return flags


def mixed(count: int, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    return [
        {
            "prompt": f"fox number {i}",
            "seed": draw.randrange(2**31),
            "steps": draw.choice((4, 6, 8)),
            "guidance": draw.choice((2.0, 4.0)),
            "solver": draw.choice(SOLVERS),
        }
        for i in range(count)
    ]


def ask(client, requests: list[dict]) -> list:
    post = lambda fields: client.post("/v1/images/generations", json=fields)
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(post, requests))


def wait_ready(client, server, log: Path) -> None:
    while True:
        if server.poll() is not None:
            raise SystemExit(log.read_text())
        try:
            if client.get("/readyz").status_code == 200:
                return
        except Exception:
            pass
        time.sleep(0.5)


def metrics(client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def mean_batch(before: dict, after: dict) -> float:
    """Over batches while clients waited: the last ones of a load are short."""
    change = lambda name: after[name] - before[name]
    rows = "sd3_jax_batch_rows"
    return change(f"{rows}_sum") / change(f"{rows}_count")


def resident(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])


def picture(answer):
    import numpy as np
    from PIL import Image

    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def compare(weights: str, folder: Path, requests, pixels) -> tuple[int, float]:
    """How many pictures `sample` paints alike, and its pictures a second.

    The job pads a group of equal settings to no full batch: each line is repeated, so
    that its batch has the server's size.
    """
    import numpy as np
    from PIL import Image

    lines = folder / "lines.jsonl"
    fields = [
        {("cfg" if k == "guidance" else k): v for k, v in x.items()} for x in requests
    ]
    groups: dict = {}
    for i, line in enumerate(fields):
        key = line["steps"], line["cfg"], line["solver"]
        groups.setdefault(key, []).append(i)
    # A multiple of the batch in each group, by repeating its last line.
    order = []
    for members in groups.values():
        order += members + [members[-1]] * (-len(members) % BATCH)
    lines.write_text("".join(json.dumps(fields[i]) + "\n" for i in order))
    flags = [*common(weights, folder / "job"), f"--config.sample.prompts_file={lines}"]
    command = [sys.executable, "-m", "sd3_jax.main", "sample", *flags]
    done = subprocess.run(
        command,
        env=page_tables.environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    paces = re.findall(r"(\d+) of (\d+) pictures, ([\d.]+) s each", done.stderr)
    seconds = [float(pace) for *_, pace in paces[1:]]
    text = (folder / "job" / "samples.jsonl").read_text().splitlines()
    files = [json.loads(line)["file"] for line in text]
    equal = set()
    for file, i in zip(files, order, strict=True):
        image = np.asarray(Image.open(folder / "job" / file))
        if i in pixels and np.array_equal(image, pixels[i]):
            equal.add(i)
    # A group's last batch is padded, here by repeats: they are no pictures of the job.
    return len(equal), len(requests) / (len(order) * sum(seconds) / len(seconds))


if __name__ == "__main__":
    main()
