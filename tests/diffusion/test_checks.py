import pytest

from sd3_jax.diffusion.checks import choose


def test_a_wrong_name_names_the_nearest():
    table = {"euler": 1, "heun": 2}
    assert choose("solver", "heun", table) == 2
    message = "^solver: got 'eular', expected one of euler, heun \\(nearest: euler\\)$"
    with pytest.raises(ValueError, match=message):
        choose("solver", "eular", table)
