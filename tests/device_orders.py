"""Jobs on a mesh that orders CPU devices as a TPU slice orders its chips.

    python tests/device_orders.py v5p-16 '[["train", "--config=...", ...], ...]'

Virtual CPU devices are in order of their processes, and TPU meshes follow the torus.
The script runs sd3_jax.main for each list of arguments in turn. Start it with
multiprocess.run. "launch/preflight.py" in place of a job runs preflight. "in order" in
place of a slice leaves the mesh as it is; "v5p-16, contiguous" loads the rows that
sharding.local_rows once gave, all from the first to the last.
"""

import json
import runpy
import sys

# By place in the mesh the index in jax.devices(), which lists process after process.
# tests/tools/plan/test_host_rows.py compares the first two with libtpu's.
ORDERS = {
    "v5p-16": [0, 4, 2, 6, 1, 5, 3, 7],  # 2 processes of 4 devices
    "v5e-16": [0, 1, 4, 5, 7, 6, 3, 9, 12, 13, 15, 14, 11, 10, 8, 2],  # 4 of 4
}
# Of 32 devices every fourth, and of each slice's four processes two.
ORDERS["2xv5e-16"] = [0, 2, 3, 1, 4, 6, 7, 5]
HOSTS = {"v5p-16": (2, 4), "v5e-16": (4, 4), "2xv5e-16": (4, 2)}  # and devices of each


def permute(order: list[int]) -> None:
    """Meshes made from now on have the devices in this order."""
    import jax
    import numpy as np

    from sd3_jax.distributed import sharding

    place = {jax.devices()[index]: i for i, index in enumerate(order)}
    sharding.arrange = lambda sizes, devices: np.array(
        sorted(devices, key=place.get)
    ).reshape(sizes)


def load_contiguous_rows() -> None:
    import numpy as np

    from sd3_jax.distributed import sharding

    local_rows = sharding.local_rows

    def span(*args, **kwargs):
        rows = local_rows(*args, **kwargs)
        return np.arange(rows[0], rows[-1] + 1)

    sharding.local_rows = span


def run(argv: list[str]) -> int:
    from sd3_jax import main

    if argv[0].endswith(".py"):
        return runpy.run_path(argv[0])["run"](argv[1:])
    return main.main(argv)


if __name__ == "__main__":
    from sd3_jax import main

    main.set_up_logging()
    main.join_processes()
    main.join_processes = lambda: None
    name, _, fault = sys.argv[1].partition(", ")
    if name in ORDERS:
        permute(ORDERS[name])
    if fault == "contiguous":
        load_contiguous_rows()
    sys.exit(max([run(argv) for argv in json.loads(sys.argv[2])]))
