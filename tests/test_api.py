"""What `import sd3_jax` offers beyond diffusers' pipelines."""

import dataclasses
import inspect
import subprocess
import sys

import jax
import numpy as np
import pytest
from parity import convert, miniature

import sd3_jax
from sd3_jax import api
from sd3_jax.diffusion import grids
from sd3_jax.diffusion.solvers import SOLVERS, draws
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.sampling import arguments, compiled, control_arguments
from sd3_jax.sampling.control import ControlInput

RUN = dict(height=64, width=64, max_sequence_length=20, steps=4, output="latents")


@pytest.fixture(scope="module")
def bundle():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return sd3_jax.load(str(miniature.folder("sd35_medium")), mesh, "float32")


@pytest.fixture(scope="module")
def plain(bundle):
    return sd3_jax.generate(bundle, "a fox", **RUN)


def paint(bundle, **options):
    return sd3_jax.generate(bundle, "a fox", **RUN | options)


def apart(a, b):
    return convert.error(a, np.asarray(b))


def test_one_picture_is_shared_by_all_devices(plain):
    """Its two rows of guidance leave three of four devices to the tokens."""
    bundle = sd3_jax.load(str(miniature.folder("sd35_medium")), dtype="float32")
    assert bundle.mesh.shape["fsdp"] == 8
    latents = paint(bundle)
    assert tuple(latents.sharding.mesh.shape.values()) == (1, 2, 4, 1)
    assert apart(latents, plain) < 1e-5


def test_heads_that_devices_cannot_share_are_refused_before_weights_are_read():
    mesh = sharding.make_mesh(data=2, fsdp=1, context=4)
    folder = str(miniature.folder("sd35_medium"))
    with pytest.raises(UserError, match="the 1 heads; expected context to be one of 1"):
        sd3_jax.load(folder, mesh, "float32", context_attention="ulysses")
    with pytest.raises(UserError, match='did you mean "ring"'):
        sd3_jax.load(folder, mesh, "float32", context_attention="rings")


def test_a_guide_whose_heads_devices_cannot_share_is_one_line(bundle):
    """One picture takes the devices of the rows, which its guide then shares too."""
    mesh = sharding.make_mesh()
    cut = dict(mesh=mesh, configs=bundle.configs)
    module = bundle.part("denoiser").clone(context_attention="ulysses", num_heads=6)
    guide = dataclasses.replace(bundle, modules={"denoiser": module}, **cut)
    strong = dataclasses.replace(bundle, mesh=mesh)
    cond = jax.tree.map(np.asarray, bundle.encode_prompts("a fox", 20))
    with pytest.raises(UserError, match="cannot share the 6 heads; expected context"):
        run = RUN | dict(guidance_method="autoguidance", guide=guide)
        sd3_jax.generate(strong, cond, **run)


def test_previews(bundle, plain):
    seen = []
    look = lambda i, t, rgb: seen.append((int(i), float(t), np.asarray(rgb)))
    found = jax.block_until_ready(paint(bundle, preview=look))
    jax.effects_barrier()
    assert apart(found, plain) < 1e-5
    seen.sort(key=lambda x: x[0])
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    np.testing.assert_allclose([t for _, t, _ in seen], grids.released(4, 3.0)[1:])
    assert seen[-1][2].shape == (1, 8, 8, 3)
    assert 0 <= seen[-1][2].min() < seen[-1][2].max() <= 1


def test_a_bar_counts_the_steps_and_changes_no_picture(bundle, plain, capfd):
    seen = []
    look = lambda i, t, rgb: seen.append(int(i))
    for preview in (None, look):
        found = paint(bundle, progress=True, preview=preview)
        assert apart(found, plain) < 1e-5
        assert "100%" in (shown := capfd.readouterr().err) and "4/4" in shown
    assert sorted(seen) == [0, 1, 2, 3]


def test_the_guidances_interval_and_rescale(bundle, plain):
    assert apart(paint(bundle, guidance_interval=(0.0, 1.0)), plain) == 0
    none = paint(bundle, guidance=1.0)
    assert apart(paint(bundle, guidance_interval=(0.0, 0.0)), none) < 1e-5
    assert apart(paint(bundle, guidance_interval=(0.5, 1.0)), plain) > 0.01
    assert apart(paint(bundle, guidance_rescale=0.7), plain) > 0.01


def test_times_of_ones_own(bundle, plain):
    line = np.linspace(1, 3 / 1002, 4)  # what the released grid shifts
    assert apart(paint(bundle, sigmas=line), plain) < 1e-5
    assert apart(paint(bundle, shift=1.0), plain) > 0.01
    one = paint(bundle, mu=float(np.log(2.0)))
    other = paint(bundle, sigmas=np.linspace(1, 1e-3, 4), shift=2.0)
    assert apart(one, other) < 1e-5


def test_a_scheduler_that_shifts_by_size(bundle):
    moved = scheduled(bundle, use_dynamic_shifting=True)
    mu = grids.linear_mu(16)  # 64 pixels are 4 x 4 tokens
    assert apart(paint(moved), paint(bundle, mu=mu)) == 0
    assert apart(paint(moved), paint(bundle)) > 0.01
    assert apart(paint(moved, shift=3.0), paint(bundle)) == 0


def scheduled(bundle, **settings):
    """The bundle of a folder whose scheduler has other settings."""
    config = bundle.configs["scheduler"] | settings
    return dataclasses.replace(bundle, configs=bundle.configs | {"scheduler": config})


def test_the_folders_scheduler_decides(bundle, plain):
    fives = scheduled(bundle, shift=5.0)
    assert apart(paint(fives), paint(bundle, shift=5.0)) == 0
    assert apart(paint(fives), plain) > 0.01
    assert apart(paint(fives, shift=3.0), plain) == 0
    heun = scheduled(bundle, _class_name="FlowMatchHeunDiscreteScheduler")
    assert apart(paint(heun), paint(bundle, solver="heun")) == 0
    unknown = scheduled(bundle, _class_name="SASolverScheduler")
    with pytest.raises(UserError, match="SASolverScheduler is not supported"):
        paint(unknown)
    assert apart(paint(unknown, solver="euler", grid="released"), plain) == 0
    broken = scheduled(bundle, shift="abc")
    with pytest.raises(UserError, match='shift "abc": expected a finite number'):
        paint(broken)


def test_a_scheduler_that_draws_on_its_way_draws_by_the_seed(bundle, plain):
    noisy = scheduled(bundle, stochastic_sampling=True)
    both = paint(noisy, seed=[4], images_per_prompt=2)
    assert apart(both[:1], paint(noisy, seed=4)) < 1e-5
    assert apart(both[:1], both[1:]) > 0.1
    given = np.random.default_rng(0).standard_normal((1, 8, 8, 16))
    start = dict(latents=given.astype(np.float32))
    assert apart(paint(noisy, seed=1, **start), paint(noisy, seed=2, **start)) > 0.1
    assert apart(paint(noisy), plain) > 0.1


@pytest.fixture
def plans(monkeypatch):
    """Plans and inputs of the programs that are run from here on."""
    seen, run = [], compiled.sample

    def sample(plan, variables, inputs, *rest):
        seen.append((plan, inputs))
        return run(plan, variables, inputs, *rest)

    monkeypatch.setattr(compiled, "sample", sample)
    return seen


def test_a_guidance_of_1_or_less_is_none(bundle, plans):
    one = paint(bundle, guidance=1.0)
    for guidance in (0.0, 0.5, -2.0, np.float32(0)):
        np.testing.assert_array_equal(paint(bundle, guidance=guidance), one)
    assert not any(plan.guided for plan, _ in plans)
    paint(bundle, guidance=1.001)
    assert plans[-1][0].guided


def test_what_is_given_for_no_guidance_is_told_once(bundle, caplog):
    arguments.warn_once.cache_clear()
    none = paint(bundle, guidance=0.0)
    assert not caplog.messages
    options = dict(negative_prompts=["blue"], skip_layers=(1,), guidance_rescale=0.5)
    for _ in range(2):
        given = paint(bundle, guidance=0.0, guidance_interval=(0.1, 1.0), **options)
        np.testing.assert_array_equal(given, none)
    (told,) = caplog.messages
    assert "guidance 0 disables guidance, so these are not used: negative_" in told
    assert "negative_prompts, skip_layers," in told
    assert "guidance_interval, guidance_rescale; set guidance above 1" in told


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(guidance=float("nan")), "guidance nan: expected a finite"),
        (dict(guidance=float("inf")), "guidance inf: expected a finite"),
        (
            dict(guidance_interval=(0.6, 0.5)),
            "interval (0.6, 0.5): expected the lower",
        ),
        (dict(strength=2), "strength 2: expected a number in [0, 1]"),
        (dict(control=[ControlInput(None, None)]), "control 0: ControlInput: expected"),
        (
            dict(guidance_rescale=1.5),
            "guidance_rescale 1.5: expected a number in [",
        ),
        (dict(skip_layers=(1,), skip_scale=float("nan")), "skip_scale nan"),
        (dict(steps=2.0), "steps 2.0: expected an integer"),
        (dict(solver="eular"), 'did you mean "euler"'),
        (dict(grid="liner"), 'did you mean "linear"'),
        (dict(solver="unipc"), 'did you mean "unipc_'),
        (dict(solver="adaptive", skip_layers=[1]), 'with solver "adaptive"'),
        (dict(solver="adaptive", guidance_method="apg"), 'with solver "adaptive"'),
        (dict(grid="flow", mu=1.0), "grid and mu are both set"),
        (dict(seed=1.5), "seed 1.5: expected an integer"),
        (dict(seed=[1.5]), "expected an integer, or one a prompt"),
        (dict(seed=[1, 2]), "2 seeds for 1 prompts"),
        (dict(seed=-1), "seed -1: expected integers from 0"),
        (dict(seed=2**32), "expected integers from 0 to 4294967295"),
        (dict(sigmas=[0.2, 0.4]), "sigmas: got"),
        (dict(shift=-1.0), "shift: got -1.0"),
    ],
)
def test_what_generate_cannot_do_is_one_line(bundle, options, words):
    with pytest.raises(UserError) as error:
        paint(bundle, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [None, "sd35", 3])
def test_what_is_no_bundle_is_one_line(wrong, tmp_path):
    words = "bundle .*: expected a Bundle.*, from sd3_jax.load"
    # Unwrapped, as users have them: the tests' own type checks come before.
    generate, save, load = map(inspect.unwrap, (api.generate, api.save, api.load))
    with pytest.raises(UserError, match=words):
        generate(wrong, "a")
    with pytest.raises(UserError, match=words):
        save(wrong, tmp_path / "a", "diffusers")
    with pytest.raises(UserError, match="mesh '2': expected a Mesh, from"):
        load("anything", mesh="2")
    with pytest.raises(UserError, match="control 5: expected ControlInput"):
        inspect.unwrap(control_arguments.listed)(5)


def test_save_writes_on_nothing(bundle, tmp_path):
    (tmp_path / "picture.png").write_text("")
    with pytest.raises(UserError, match="already exists; give a new path"):
        api.save(bundle, tmp_path, "diffusers")
    with pytest.raises(UserError, match="ends in .safetensors"):
        api.save(bundle, tmp_path / "outdir", "original")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_the_package_has_the_names_of_the_api():
    assert sorted(sd3_jax.API) == sorted(api.__all__)
    assert sd3_jax.ControlBundle is api.ControlBundle


ODE = [name for name, solver in SOLVERS.items() if not draws(solver)]


@pytest.mark.parametrize("solver", ODE)
def test_solvers_come_to_the_same_end(bundle, solver):
    """Unguided and in many steps; adaptive to within its tolerance."""
    many = dict(guidance=1.0, steps=240, grid="released")
    most = 0.3 if solver == "adaptive" else 0.15
    assert apart(paint(bundle, solver=solver, **many), paint(bundle, **many)) < most


def test_adaptive_repaints_and_shows_its_steps(bundle, capfd):
    photo, latents = np.full((64, 64, 3), 0.5, np.float32), []
    mask = np.zeros((64, 64), np.float32)
    mask[:32] = 1
    look = lambda i, t, rgb: latents.append((int(i), float(t)))
    options = dict(image=photo, mask=mask, strength=1.0, steps=12, guidance=1.0)
    found = paint(bundle, solver="adaptive", progress=True, preview=look, **options)
    again = paint(bundle, solver="adaptive", **options)
    assert apart(found, again) < 1e-5
    # What is kept ends as the picture's latents, which euler keeps too.
    kept = paint(bundle, **options)
    np.testing.assert_allclose(found[:, 4:], kept[:, 4:], atol=1e-5)
    jax.effects_barrier()
    assert min(latents)[0] == 0 and min(t for _, t in latents) == 0
    assert "/12" in capfd.readouterr().err


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_3m_sde", "adaptive"])
def test_a_picture_does_not_depend_on_its_batch(bundle, solver):
    both = sd3_jax.generate(bundle, ["a", "b"], seed=[3, 4], solver=solver, **RUN)
    alone = sd3_jax.generate(bundle, ["b"], seed=[4], solver=solver, **RUN)
    assert apart(both[1:], alone) < 1e-5


def test_the_seed_and_the_number_tell_pictures_apart(bundle, plain):
    assert apart(paint(bundle, seed=1), plain) > 0.1
    both = paint(bundle, seed=[4], images_per_prompt=2)
    assert apart(both[:1], paint(bundle, seed=4)) < 1e-5
    assert apart(both[:1], both[1:]) > 0.1
    np.testing.assert_array_equal(paint(bundle, seed=4, images_per_prompt=2), both)


def test_a_picture_is_the_same_in_any_company(bundle):
    texts = ["a fox", "a house by the sea"]
    generate = lambda prompts, seed: sd3_jax.generate(bundle, prompts, seed=seed, **RUN)
    both = generate(texts, [4, 7])
    for i, seed in enumerate((4, 7)):
        assert apart(both[i : i + 1], generate(texts[i], seed)) < 1e-5
    encoded = bundle.encode_prompts(texts, 20)
    assert apart(generate(encoded, [4, 7]), both) < 1e-5
    second = jax.tree.map(lambda x: x[1:], encoded)
    assert apart(generate(second, 7), both[1:]) < 1e-5


def test_the_seed_alone_decides_the_noise(bundle, plans):
    """Also that of a picture's latents, whatever the words and the batch."""
    photo = np.random.default_rng(1).random((1, 64, 64, 3), np.float32)
    embedded = bundle.encode_prompts(["a fox", "a wolf"], 20)

    def noise(prompts, **options):
        sd3_jax.generate(bundle, prompts, **RUN | {"steps": 1} | options)
        return np.asarray(jax.random.key_data(plans[-1][1].keys))

    four = noise(["a fox", "a wolf"], seed=4)
    assert len({row.tobytes() for row in four}) == 2
    for prompts in (["a red fox", "foxes"], embedded, ["a fox"] * 2):
        np.testing.assert_array_equal(noise(prompts, seed=4), four)
    for i, prompts in enumerate(("a fox", "a wolf", embedded)):
        seeds = 4 if i < 2 else [4, 4]
        rows = noise(prompts, seed=seeds)
        np.testing.assert_array_equal(rows, four[[0] * len(rows)])
    paired = noise("a fox", seed=4, images_per_prompt=2)
    np.testing.assert_array_equal(paired, four)
    drawn = []
    for prompts, seed in ((["a fox", "foxes"], [4, 7]), ("foxes", 7), ("a wolf", 7)):
        noise(prompts, seed=seed, image=photo, strength=1.0)
        drawn.append(np.asarray(plans[-1][1].x0)[-1])
    assert apart(drawn[0], drawn[1]) < 1e-5
    np.testing.assert_array_equal(drawn[1], drawn[2])


def test_guidance_is_no_new_program(bundle):
    paint(bundle, guidance=2.0)
    count = compiled.sample._cache_size()
    paint(bundle, guidance=3.0, seed=9, shift=2.0, guidance_rescale=0.1)
    assert compiled.sample._cache_size() == count


def test_steps_sigmas_and_solvers_of_a_kind_are_no_new_program(bundle, compilations):
    paint(bundle)
    compilations.clear()
    two = paint(bundle, steps=2)
    for options in (
        dict(steps=5),
        dict(sigmas=[1.0, 0.7, 0.2]),
        dict(grid="linear", steps=7),
        dict(solver="dpmpp_2m"),
        dict(solver="dpmpp_2m_flow", steps=3),
    ):
        paint(bundle, **options)
    assert not compilations
    for first, *others in (
        ("unipc_2", "unipc_3", "deis_2", "deis_3", "res_2m", "dpmpp_3m_flow"),
        ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde"),
        ("adaptive", "adaptive"),
    ):
        paint(bundle, solver=first)
        compilations.clear()
        for solver in others:
            paint(bundle, solver=solver, steps=5, grid="karras")
        assert not compilations
    assert apart(paint(bundle, steps=2, solver="heun"), two) > 0.01
    compilations.clear()
    paint(bundle, steps=9, solver="heun")
    assert not compilations
    photo = np.full((64, 64, 3), 0.5, np.float32)
    paint(bundle, image=photo, strength=0.5)
    compilations.clear()
    paint(bundle, image=photo, strength=1.0, steps=6)
    assert not compilations


def test_skipped_layers_follow_the_steps_without_a_new_program(bundle, compilations):
    options = dict(skip_layers=[1], skip_stop=0.6)
    paint(bundle, **options)
    compilations.clear()
    skipped = paint(bundle, steps=8, **options)
    assert not compilations
    assert apart(skipped, paint(bundle, steps=8)) > 1e-3


def test_one_line_tells_of_a_compilation(bundle, caplog):
    caplog.set_level("INFO", "sd3_jax.sampling.compiled")
    paint(bundle, height=48, images_per_prompt=2)
    paint(bundle, height=48, images_per_prompt=2, steps=2, solver="dpmpp_2m")
    (line,) = caplog.messages
    assert line.startswith(
        "compiling euler, dpmpp_2m, dpmpp_2m_flow for 2 x 48 x 64 pixels; later calls"
    )


def test_a_compilation_is_told_without_logging(capfd, caplog):
    caplog.set_level("WARNING")
    compiled.say_compiling("heun", 1, 64, 64)
    assert "sd3-jax: compiling heun for 1 x 64 x 64 pixels" in capfd.readouterr().err
    caplog.set_level("WARNING", "sd3_jax")  # as a user does who wants silence
    compiled.say_compiling("heun", 1, 64, 64)
    assert not capfd.readouterr().err


def test_import_is_quick_and_lists_the_api():
    code = "import sys, sd3_jax; print('jax' in sys.modules, *dir(sd3_jax))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.startswith("False") and "load_control" in run.stdout
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        getattr(sd3_jax, "lod")  # noqa: B009
