"""Features of a process's share, put together with others': gather_worker.py COUNT."""

import sys

from sd3_jax import main

main.join_processes()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from sd3_jax.evaluation import picture_features  # noqa: E402

count = int(sys.argv[1])
whole = (np.random.default_rng(0).normal(size=(count, 5)) + 1e3).astype(np.float32)
mine = whole[jax.process_index() :: jax.process_count()]
found = picture_features.gather([mine[:3], mine[3:]] if len(mine) else [], summed=True)
np.testing.assert_array_equal(found.rows, whole)
wanted = np.cov(whole.T.astype(np.float64))
assert found.statistics.count == count
assert np.abs(found.statistics.covariance - wanted).max() < 1e-11  # float32: 1e-7
third = picture_features.everyones(np.float64([[jax.process_index() + 1 / 3]]))
assert [x.item() for x in third] == [i + 1 / 3 for i in range(jax.process_count())]
print(found.statistics.mean.tobytes().hex())
