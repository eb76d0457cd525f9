"""The lines about one picture's latency, from rows as plan has them."""

from sd3_jax.tools.plan import latency_lines

ROW = dict(
    program="denoise",
    context_attention="ring",
    steps=10,
    serial=400.0,
    hbm=100.0,
    links=50.0,
    other_slices=0.0,
    scheduled=500.0,
)
ONE = ROW | dict(slice="v6e-1", chips=1, batch=1.0, spelt="", serial=2400.0)
EIGHT = ROW | dict(slice="v6e-8", chips=8, batch=0.125, spelt="data 2 context 4")


def test_a_line_says_how_well_the_chips_share_a_picture():
    others = [EIGHT | dict(program="decode"), EIGHT | dict(slice="v5e-8")]
    del others[1]["serial"]  # does not fit
    one, eight = latency_lines.lines([ONE, EIGHT, *others])
    assert "bound 240 ms a step and 2.4 s for 1 picture;" in one and "times" not in one
    assert "v6e-8 data 2 context 4, ring: bound 40 ms a step and 0.4 s" in eight
    # 2400 / (8 * 400) and 500 / (8 * 500)
    assert eight.endswith("of 8 times v6e-1: 0.75 by bound, 0.12 as scheduled")
    (alone,) = latency_lines.lines([EIGHT])
    assert "times" not in alone
