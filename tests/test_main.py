"""The command line: every mistake is one line, said before jax is imported."""

import importlib
import logging
import os
import shlex
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import multiprocess
import pytest
from ml_collections import ConfigDict

from configs import base
from sd3_jax import main
from sd3_jax.config import command_line, help_pages, unread_keys
from sd3_jax.config.recipes import recipes
from sd3_jax.config.relations import RELATIONS
from sd3_jax.config.schema import KEYS as SCHEMA
from sd3_jax.config.validation import flatten, leaves, validate
from sd3_jax.config.value_text import read, show
from sd3_jax.distributed import jax_internals
from sd3_jax.errors import ConfigError, UserError
from sd3_jax.jobs import JOBS

ROOT = Path(__file__).parents[1]
RECIPES = {
    "toy": """
        '''A toy.

        More about it.'''
        from configs import base
        VARIANTS = ("tiny", "small")
        def get_config(variant=""):
            c = base.get_config()
            with c.unlocked():
                c.extra = dict(sizes=(1, 2), scales=[0.5], note="a b")
            if variant:
                base.shrink(c)
            return c
        """,
    "broken": "x = 1\ny = [1, 2\n",
    "raises": "import math\nimport nothing_of_the_kind\n",
    "late": "def get_config():\n    return {}['a key']\n",
    "empty": "x = 1\n",
    "none": "def get_config():\n    pass\n",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder that holds a few recipes, good and bad, and stand-in jobs."""
    (tmp_path / "configs").mkdir()
    for name, text in RECIPES.items():
        path = tmp_path / "configs" / f"{name}.py"
        path.write_text(textwrap.dedent(text).lstrip())
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def parse(*flags, job="train", recipe="configs/toy.py:tiny"):
    return main.parse([job, f"--config={recipe}", "--workdir=runs/a", *flags])


# What is right


def test_parse_gives_the_job_the_locked_config_and_the_workdir(here):
    job, config, workdir = parse("--config.optim.lr=1", "--config.data.batch_size", "4")
    assert (job, workdir) == ("train", str(here / "runs" / "a"))
    assert (config.optim.lr, config.data.batch_size) == (1.0, 4)
    assert config.is_locked and config.optim.is_locked


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=1", 1.0),
        ("model.width=192", 192),  # a placeholder
        ("mesh.fsdp=-1", -1),
        ("model.qk_norm=false", False),
        ("model.qk_norm=True", True),
        ("sample.prompt='a = b'", "'a = b'"),  # quotes are the shell's
        ("sample.negative=--no", "--no"),
        ("eval.scores=val_loss,fid", ("val_loss", "fid")),
        ("eval.scores=('val_loss',)", ("val_loss",)),
        ("eval.scores=", ()),
        ("eval.scores=a red fox (at night)", ("a red fox (at night)",)),
        ("eval.scores=[masterpiece], a fox", ("[masterpiece]", "a fox")),
        ("eval.scores=(masterpiece), (a fox)", ("(masterpiece)", "(a fox)")),
        ("eval.scores=(a fox)", ("(a fox)",)),
        ("eval.scores=(a, b)", ("a", "b")),
        ("eval.scores=[a, b,]", ("a", "b")),
        ("eval.scores=a fox (red, small), b", ("a fox (red, small)", "b")),
        ("eval.scores='(a, b)'", ("(a, b)",)),
        ("eval.scores=sad :(, b", ("sad :(", "b")),
        ("eval.scores=1_000, 1e3", ("1_000", "1e3")),
        ("eval.scores=007", ("007",)),
        ("ingest.inputs=photos (1)", ("photos (1)",)),
        ("ingest.inputs=train-0000[0-4]", ("train-0000[0-4]",)),
        ("extra.sizes=(3, 4, 5)", (3, 4, 5)),
        ("extra.sizes=[3]", (3,)),
        ("extra.sizes=3,4", (3, 4)),
        ("extra.scales=1,2", [1.0, 2.0]),
    ],
)
def test_a_value_is_read_as_its_key_s_type(here, flag, value):
    config = parse(f"--config.{flag}", recipe="configs/toy.py").config
    got = dict(flatten(config))[flag.partition("=")[0]]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("tune.rank=8 optim.lr=1", 'config.tune.rank (config.tune.method = "full")'),
        ("optim.muon_lr=3", 'config.optim.muon_lr (config.optim.name = "adamw")'),
        ("convert.to=orbax", "config.convert.to (train does not read it)"),
        ("ingest.inputs=a", "config.ingest.inputs (train does not read it)"),
        ("sample.skip_layers=9 seed=3", "config.sample.skip_layers (train does"),
        ("data.mix=1,0,0", 'config.data.mix (config.data.name = "synthetic")'),
        ("eval.scores=fid", "config.eval.scores (train does not read it)"),
    ],
)
def test_flags_that_are_not_read_are_named(here, caplog, flags, words):
    parse(*(f"--config.{flag}" for flag in flags.split()))
    (record,) = caplog.records
    assert words in record.message and record.message.count("config.") <= 3


def test_training_has_no_weights_of_eight_bits(here):
    words = 'quantize.denoiser = "int8_dynamic": train keeps .* set it for sample'
    with pytest.raises(UserError, match=words):
        parse("--config.quantize.denoiser=int8_dynamic")
    parse("--config.quantize.denoiser=")


@pytest.mark.parametrize("job", ["train", "study"])
def test_no_curve_is_of_weights_that_change(here, job):
    words = f'cache = "magcache": {job} changes the weights .* first_block or taylor'
    with pytest.raises(UserError, match=words):
        parse("--config.sample.cache=magcache", job=job)
    parse("--config.sample.cache=first_block", job=job)


def test_plan_names_a_cache_that_it_does_not_count(here, caplog):
    parse("--config.sample.cache=first_block", job="plan")
    assert "sample.cache (plan does not read it)" in caplog.text


@pytest.mark.parametrize(
    "job, flags",
    [
        ("train", "optim.name=muon optim.muon_lr=3 quantize.t5=int8 extra.note=a"),
        ("train", "data.name=records data.records=a tune.method=lora tune.rank=8"),
        ("train", "sample.cfg=3 eval.examples=3"),
        ("precompute", "precompute.only= ingest.prefix=a seed=3"),
        ("study", "tune.rank=8 flow.mean=1"),
        ("dedup", "ingest.inputs=a dedup.pairs=3"),
        ("inspect", "data.records=a model.dtype=float32"),
        ("sample", "train.prompts=a sample.prompt=b quantize.denoiser=int8"),
    ],
)
def test_flags_that_are_read_are_not_named(here, caplog, job, flags):
    parse(*(f"--config.{flag}" for flag in flags.split()), job=job)
    assert [x.message for x in caplog.records if "ingest" not in flags] == []


@pytest.mark.parametrize("key", unread_keys.RELEASED)
def test_a_run_refuses_the_options_of_released_weights(here, key):
    picture = here / "picture.png"
    picture.write_bytes(b"")
    values = {"sample.image": picture, "sample.mask": picture, "sample.resize": "crop"}
    values["sample.outpaint"] = "0,0,8,8"
    value = values.get(key) or show(SCHEMA[key].default) or here
    flag = f"--config.{key}={value}"
    with pytest.raises(UserError, match=f"config.{key}: a run's own checkpoint"):
        parse(flag, job="sample")
    parse(flag, f"--config.weights={here}", job="sample")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--version"], "sd3-jax 0."),
        (["-V"], "sd3-jax 0."),
        (["help"], "Jobs:"),
        (["help", "dedup"], "Usage: sd3-jax dedup [--config=RECIPE"),
    ],
)
def test_what_prints_a_page(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main.parse(argv)
    assert stop.value.code == 0 and words in capsys.readouterr().out


def test_a_page_about_a_run_needs_no_recipe(here):
    assert main.parse(["report", "--workdir=a"]).workdir == str(here / "a")


def test_flags_come_in_any_order_and_workdir_may_be_a_bucket():
    argv = "--config.seed=3 --workdir gs://b/x --config configs/base.py sample"
    job, config, workdir = main.parse(argv.split())
    assert (job, config.seed, workdir) == ("sample", 3, "gs://b/x")


def test_a_recipe_outside_any_configs_folder_imports_base(here, monkeypatch):
    away = here / "a" / "b" / "mine.py"
    away.parent.mkdir(parents=True)
    away.write_text("from configs.base import get_config\n")
    assert parse(recipe=str(away)).config.seed == 0
    monkeypatch.chdir(away.parent)  # the package's own recipes, from anywhere
    assert parse(recipe="configs/base.py").config.seed == 0


@pytest.mark.parametrize("name", ["", "configs/"])
@pytest.mark.parametrize("end", ["", ".py"])
def test_a_recipe_is_named_from_any_folder(here, name, end):
    for recipe in "quickstart", "toy":  # ours, and the user's
        config = parse(recipe=f"{name}{recipe}{end}:tiny").config
        assert config.model.width == 32 and ("extra" in config) == (recipe == "toy")


def test_a_file_of_the_user_s_wins_over_a_recipe_of_ours(here):
    ours = parse(recipe="quickstart").config
    text = "import sibling\nfrom configs import digits, toy\n"
    text += (
        "def get_config():\n    c = toy.get_config()\n    c.seed = {}\n    return c\n"
    )
    (here / "sibling.py").write_text("")
    (here / "configs" / "quickstart.py").write_text(text.format(1))
    assert parse(recipe="quickstart").config.seed == 1 != ours.seed
    (here / "quickstart.py").write_text(text.format(2))
    assert parse(recipe="quickstart.py").config.seed == 2
    assert parse(recipe="configs/quickstart").config.seed == 1
    (here / "configs" / "base.py").write_text("")  # of something else
    with pytest.raises(ConfigError, match="configs/quickstart:4 raised"):
        parse(recipe="configs/quickstart")
    own = "from ml_collections import ConfigDict\nget_config = ConfigDict\n"
    (here / "quickstart.py").write_text(own)
    with pytest.raises(ConfigError, match="configs/base.py hides configs/base.py"):
        parse(recipe="quickstart")
    assert main.parse(["train", "--config=digits", "--workdir=a"]).config.seed == 0


def test_the_working_directory_hides_no_installed_module(here):
    """Neither `python -m` nor a recipe in it puts it before the others."""
    modules = "colorsys", "grain", "jax"
    for name in modules:
        (here / f"{name}.py").write_text("raise SystemExit('hidden')\n")
    (here / "mine.py").write_text("def filter(images): return images\n")
    code = f"""if True:
        from sd3_jax import hooks
        from sd3_jax.config import command_line
        command_line.parse({["train", "--config=toy", "--workdir=a"]})
        for name in {modules}: __import__(name)
        print(hooks.load("mine:filter")(1))"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=here, env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr[-500:]


def test_help_prints_each_key_as_the_flag_that_sets_it(here, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help", "--config.sample.negative=a red fox", recipe="configs/toy.py")
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert "  --config.model.width=<int>" in lines
    assert "* --config.sample.negative='a red fox'" in lines  # not the default
    assert not any("config.plan" in line for line in lines)  # train does not read it
    flags = [line[2:] for line in lines if line[2:4] == "--" and "<" not in line]
    config = parse(*(shlex.split(flag)[0] for flag in flags)).config
    assert config.sample.negative == "a red fox" and config.extra.sizes == (1, 2)
    assert "  --config.extra.sizes='(1, 2)'" in lines


def every_variant():
    for name, path in recipes().items():
        variants = importlib.import_module(f"configs.{path.stem}")
        for variant in ("", *getattr(variants, "VARIANTS", ())):
            yield f"{name}:{variant}".rstrip(":")


@pytest.mark.parametrize("recipe", every_variant())
def test_every_line_of_help_reads_back(recipe):
    config, again = command_line.load(recipe), command_line.load(recipe)
    page = help_pages.recipe_page(recipe, config).splitlines()
    assert all(len(line) <= 100 for line in page if "--config" not in line)
    lines = [line for line in page if "--config" in line]
    settings = dict(leaves(config))
    assert len(lines) == len(settings)
    for line in lines:
        if "=<" not in line:  # not set: <int>
            (flag,) = shlex.split(line.lstrip("* "))
            key, _, text = flag.removeprefix("--config.").partition("=")
            holder, name = command_line.place(again, key)
            old = holder[name]
            holder[name] = read(text, holder.get_type(name), old)
            assert holder[name] == old == settings[key], line
            assert type(holder[name]) is type(old), line
            assert (old != SCHEMA[key].default) == line.startswith("* "), line


@pytest.mark.parametrize(
    "value",
    [(), ("a, b", ""), ('"42"', "it's"), ("1", "2"), ("é\n",), (1,), (0.5,)],
)
def test_a_shown_tuple_reads_back(value):
    assert read(show(value), tuple, value) == value


# What is wrong

TOY = "--config=configs/toy.py"
MISTAKES = [
    (TOY, "no job train sample evaluate report"),
    ("trian", 'job "trian"', '"train"'),
    ("train", "--config="),
    ("train {toy}", "--workdir="),
    ("train {toy} --workdir=file", "file expected folder"),
    ("train {toy} --workdir=file/deeper", "file expected folder"),
    ("train {toy} --wokrdir=a", "--wokrdir", '"--workdir"'),
    ("train {toy} -config=a", "-config", '"--config"'),
    ("train {toy} --seed=1", '"--config.seed" or "--config.sample.seed"'),
    ("train {toy} --steps=1", '"--config.train.steps"', '"--config.sample.steps"'),
    ("train {toy} --batch_size=3", 'did you mean "--config.data.batch_size"'),
    ("train {toy} --guidance-scale=3", 'did you mean "--config.sample.cfg"?'),
    ("train {toy} --output_dir=a", 'did you mean "--workdir"?'),
    ("train {toy} --optim.lr=1", "--optim.lr", '"--config.optim.lr"'),
    ("train {toy} --confg.optim.lr=1", "--confg.", '"--config.optim.lr"'),
    ("train {toy} --workdir=a optim.lr=1", "optim.lr=1", "did you forget --?"),
    ("train {toy} --workdir=a --workdir=b", "twice a b"),
    ("train {toy} --config.seed=1 --config.seed 2", "twice 1 2 config.seed"),
    ("train {toy} --config.seed", "--config.seed no value"),
    ("train {toy} --config.seed --workdir=a", "--config.seed no value"),
    ("train --config=configs/tooy.py", "configs/tooy.py not found", '"configs/toy.py"'),
    ("train --config=tooy", "tooy not found", '"configs/toy.py"'),
    ("train --config=:tiny", "recipe  not found expected one of configs/"),
    ("train --config=configs", "configs not found"),
    ("train {toy}:tinny", "configs/toy.py variant", '"tiny"'),
    ("train {toy}:big", "variant tiny, small"),
    ("train --config=configs/base.py:tiny", 'variant "tiny" none'),
    ("train --config=configs/broken.py", "configs/broken.py:2 SyntaxError"),
    (
        "train --config=configs/raises.py",
        "configs/raises.py:2 ModuleNotFoundError nothing_of_the_kind",
    ),
    ("train --config=configs/late.py", "configs/late.py:2 KeyError 'a key'"),
    ("train --config=configs/empty.py", "configs/empty.py get_config"),
    ("train {toy} --config.mesh.data=-1", "config.mesh = -1 for one axis at most"),
    ("train --config=configs/none.py", "configs/none.py NoneType ConfigDict"),
]
KEYS = [
    ("optim.learning_rate=1", '"config.optim.lr"'),
    ("lr=1", '"config.optim.lr"'),
    ("optimizer.lr=1", '"config.optim.lr"'),
    ("train.batch_size=1", '"config.data.batch_size"'),
    ("data.batch=1", '"config.data.batch_size"'),
    ("model.heads=1", '"config.model.num_heads"'),
    ("data.path=a", 'did you mean "config.data.records"'),
    ("sample.guidance=3", 'did you mean "config.sample.cfg"'),
    ("train.epochs=3", 'did you mean "config.train.steps"'),
    ("optim.nesterov=1", "config.optim has lr warmup"),
    ("nothing.here=1", "config has model optim"),
    ("seed.x=1", "unknown key config.seed.x"),
    ("sample=1", "config.sample is a group solver"),
    ("=1", "unknown key config."),
]
VALUES = [
    ("data.batch_size=2.5", "expected an integer in [1, 1048576]"),
    ("data.batch_size=1e3", "expected an integer in", '"1000"'),
    ("data.batch_size=", "expected an integer in"),
    ("data.batch_size=None", "expected an integer in"),
    (
        "data.batch_size=0",
        "config.data.batch_size = 0: expected an integer in [1, 1048576]",
    ),
    ("data.batch_size=-8", "an integer in [1, 1048576]"),
    ("data.batch_size=10 --config.optim.accumulate=4", "a multiple of 4 nearest is 8"),
    ("model.width=1.5", "expected an integer in [1, 65536]"),
    ("model.width=100", "num_heads = 24 nearest is 96"),
    ("model.depth=0", "an integer in [1, 1000]"),
    ("model.dual_blocks=24", "at most 23 config.model.depth = 24"),
    ("model.weight_sets=4", "one of 2, 3"),
    ("model.context_attention=ulises", 'did you mean "ulysses"'),
    (
        "model.context_attention=ring --config.model.attention=dot_product",
        "log-denominators",
    ),
    ("model.remat=ful", '"full"'),
    ("model.qk_norm=yes", "true or false"),
    ("model.qk_norm=1", "true or false"),
    ("extra.sizes=1,2.5", "expected tuple"),
    ("train.writers=wandbb", '("wandbb",)', 'did you mean "wandb"', "TensorBoard"),
    ("ingest.captions=a,,b", "a,,b", 'write "" in quotes'),
    ("data.records=a", '("a",): not read', 'data.name = "synthetic"', "=records"),
    ("data.held_out=a", '("a",): not read', "or remove config.data.held_out"),
    ("optim.lr=fast", "expected a number in (0, 100]"),
    ("optim.lr=nan", "a number in (0, 100]"),
    ("optim.lr=inf", "a number in (0, 100]"),
    ("optim.lr=0", "a number in (0, 100]"),
    ("optim.name=AdmaW", '"adamw"'),
    ("optim.schedule=cos", "constant cosine"),
    ("optim.clip=-1", "a number in [0, 1e+09] (0 or inf: none)"),
    ("optim.name=schedule_free --config.optim.schedule=cosine", '"constant"'),
    ("optim.name=schedule_free --config.optim.b1=0.0", "> 0 divides"),
    ("optim.name=prodigy --config.optim.mu_dtype=bfloat16", "adamw muon lion"),
    ("optim.b2=1", "[0, 1)"),
    ("text.dropout=1.0", "[0, 1)"),
    ("seed=-1", "in [0, 4294967295]"),
    ("seed=4294967296", "in [0, 4294967295]"),
    ("image.height=250", "a multiple of 16 nearest is 256"),
    ("image.width=1", "a multiple of 16 nearest is 16"),
    ("image.height=4096", "at most 3072 config.model.pos_size"),
    ("image.width=255 --config.image.autoencoder=pixels", "a multiple of 2 is 256"),
    ("image.autoencoder=vae", "latents pixels"),
    ("flow.density=normal", '"logit_normal"'),
    ("flow.mode_scale=2", "[-1, 1.75194]"),
    ("mesh.tensor=0", "an integer in [1, 1048576] or -1"),
    ("profile.start=-1", "an integer in [0, 2147483647]"),
    ("profile.start=11 --config.train.steps=10", "at most config.train.steps = 10"),
    ("profile.steps=0", "an integer in [1, 10000]"),
    ("sample.solver=eular", 'config.sample.solver = "eular"', '"euler"'),
    ("sample.grid=karas", '"karras"'),
    ("sample.weights=model", "ema, params"),
    ("sample.steps=0", "an integer in [1, 10000]"),
    ("sample.cfg=-1", "a number in [0, 1000]"),
    ("sample.cfg=inf", "a number in [0, 1000]"),
    ("sample.cfg_start=0.9 --config.sample.cfg_stop=0.5", "at most 0.5"),
]


def cases():
    for argv, *wanted in MISTAKES:
        yield argv.format(toy=TOY), wanted
    for flag, *wanted in KEYS + VALUES:
        name = flag.partition("=")[0]
        yield f"train {TOY} --workdir=a --config.{flag}", [f"config.{name}", *wanted]


@pytest.mark.parametrize(("argv", "wanted"), cases(), ids=lambda x: str(x)[-40:])
def test_a_mistake_is_one_line_and_exit_code_2(here, capsys, argv, wanted):
    assert main.main(argv.split(" ")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sd3-jax: error: ")
    for words in wanted:
        assert words in line or all(word in line for word in words.split()), line


def test_absent_keys_pass_and_wrong_types_in_a_recipe_do_not():
    validate(ConfigDict())
    with pytest.raises(ConfigError, match="batch_size = True: expected an integer"):
        validate(ConfigDict(dict(data=dict(batch_size=True))))
    with pytest.raises(ConfigError, match='lr = "1": expected a number'):
        validate(ConfigDict(dict(optim=dict(lr="1"))))


def test_every_relation_is_about_keys_that_exist():
    known = {key for key, _ in flatten(base.get_config())}
    assert {key for _, *keys in RELATIONS for key in keys} <= known
    validate(base.get_config())


def test_the_choices_are_those_of_the_code():
    from sd3_jax.diffusion import grids, solvers, timesteps
    from sd3_jax.models import denoisers, scan, step_cache
    from sd3_jax.models.attention import attention

    for key, table in {
        "model.name": denoisers.DENOISERS,
        "model.remat": scan.REMAT,
        "model.attention": attention.KERNELS,
        "flow.density": timesteps.DENSITIES,
        "sample.solver": solvers.SOLVERS,
        "sample.grid": grids.GRIDS,
        "sample.cache": step_cache.METHODS,
    }.items():
        assert {*SCHEMA[key].rule.choices} - {""} == set(table), key


# Running


def stand_in(monkeypatch, body):
    job = types.ModuleType("stand_in")
    exec(f"def run(config, workdir):\n    {body}\n", vars(job))
    monkeypatch.setitem(sys.modules, "sd3_jax.jobs.train", job)


def run():
    return main.main(["train", f"{TOY}:tiny", "--workdir=runs/a"])


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("print(config.train.steps, workdir)", 0, ""),
        (
            "raise KeyboardInterrupt",
            130,
            "sd3-jax: interrupted: run the same command to continue\n",
        ),
        (
            "from sd3_jax.distributed.watchdog import expect; expect('step 3', 9)\n"
            "    raise KeyboardInterrupt",
            130,
            "sd3-jax: interrupted: during step 3; run the same command to continue\n",
        ),
        (
            "from sd3_jax.errors import UserError; raise UserError('no\\nweights')",
            2,
            "sd3-jax: error: no weights\n",
        ),
        (
            "from sd3_jax.errors import RetryableError; raise RetryableError('slow')",
            3,
            "sd3-jax: error: slow\n",
        ),
    ],
)
def test_main_runs_the_job(here, monkeypatch, capsys, body, code, err):
    stand_in(monkeypatch, body)
    assert run() == code
    page = capsys.readouterr()
    assert page.err == err
    assert page.out == (f"10 {here}/runs/a\n" if code == 0 else "")


def test_a_fault_of_ours_keeps_its_traceback(here, monkeypatch):
    stand_in(monkeypatch, "1 / 0")
    with pytest.raises(ZeroDivisionError):
        run()


def test_a_fault_that_passes_keeps_its_traceback_and_ends_with_3(
    here, monkeypatch, capsys
):
    stand_in(monkeypatch, "raise ConnectionResetError('peer')")
    assert run() == 3
    assert capsys.readouterr().err.endswith("ConnectionResetError: peer\n")


def test_a_run_on_a_bucket_keeps_its_programs_there(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = "JAX_COMPILATION_CACHE_DIR"
    for workdir, folder in {
        "gs://ours/run/": "gs://ours/run/compilation_cache/",
        "runs/a": f"{tmp_path}/sd3_jax/",
    }.items():
        monkeypatch.delenv(name, raising=False)
        main.keep_programs(workdir)
        assert os.environ[name].startswith(folder)
    monkeypatch.setenv(name, "gs://shared/programs")
    main.keep_programs("gs://ours/run")
    assert os.environ[name] == "gs://shared/programs"


def test_only_our_logging_is_informative(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    main.set_up_logging()
    for name in ("sd3_jax.training.trainer", None, "absl", "orbax", "jax._src"):
        logging.getLogger(name).info("info of %s", name)
    logging.getLogger("orbax").warning("careful")
    err = capsys.readouterr().err
    assert err.count("info of") == 2 and "careful" in err
    assert "sd3_jax.training.trainer" in err


def shell(code, **env):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["--help"], 0), ([], 2), (["train", TOY, "--config.lr=1"], 2)],
)
def test_help_and_mistakes_do_not_wait_for_jax(here, argv, code):
    process = shell(
        "import sys\nfrom sd3_jax.main import main\n"
        f"try: code = main({argv})\nexcept SystemExit as stop: code = stop.code\n"
        "print('jax' in sys.modules)\nsys.exit(code)"
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out.endswith("False\n") and "Traceback" not in err
    page = out if code == 0 else err
    if argv[:1] != ["train"]:
        assert all(word in page for word in ("Usage:", *JOBS, "A toy.", "--config.KEY"))
        assert "Exit codes:" in page and "3    start it again" in page
        assert "More about it" not in page and "base.py" not in page


PRINTS = """
import sys
from sd3_jax import main
main.parse = lambda argv: main.Call("report", None, "")
main.set_up_logging = main.join_processes = lambda: None
main.keep_programs, main.joined = id, bool
main.run = lambda call: print("x" * int(sys.argv[1])) or 0
sys.exit(main.main(["report"]))
"""


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["-m", "sd3_jax.main", "--help"], 1),
        (["-m", "sd3_jax.main", "train", "--help", "--config=quickstart"], 1),
        (["-c", PRINTS, "10"], 1),  # held back until the end
        (["-c", PRINTS, "1000000"], 1),
        (["-m", "sd3_jax.main", "trian"], 2),
    ],
)
@pytest.mark.parametrize("also", [None, subprocess.STDOUT])
def test_output_that_nobody_reads_is_no_traceback(here, argv, code, also):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, *argv],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=writing,
            stderr=also or subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writing)
    assert done.returncode == code
    assert also or "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_output_to_a_full_disk_is_one_line(here):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS, "10"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2 and done.stderr.startswith("sd3-jax: error: [Errno 28]")


def test_python_m_runs_main(here):
    process = subprocess.run(
        [sys.executable, "-m", "sd3_jax.main", "trian"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr == (
        'sd3-jax: error: unknown job "trian"; did you mean "train"?\n'
    )


# Many processes


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({"SD3_COORDINATOR": "a:1"}, "SD3_NUM_PROCESSES is not set"),
        ({"SD3_COORDINATOR": "a"}, "SD3_COORDINATOR = a: expected host:port"),
        ({"SD3_NUM_PROCESSES": "0"}, "SD3_NUM_PROCESSES = 0: expected an integer"),
        (
            {"SD3_PROCESS_ID": "2"},
            r"SD3_PROCESS_ID = 2: expected an integer in \[0, 1\]",
        ),
        ({"SD3_HEARTBEAT_S": "1.5"}, "SD3_HEARTBEAT_S = 1.5: expected an integer"),
    ],
)
def test_a_wrong_environment_is_the_user_s_mistake(monkeypatch, env, wanted):
    right = dict(SD3_COORDINATOR="a:1", SD3_NUM_PROCESSES="2", SD3_PROCESS_ID="0")
    for name, value in (env if "not set" in wanted else {**right, **env}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=wanted):
        main.join_processes()


def test_jax_s_own_detection_counts_processes(monkeypatch):
    assert jax_internals.detected_processes() == 1
    for name in ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert jax_internals.detected_processes() == 4


@pytest.mark.parametrize(
    ("fault", "code", "err"),
    [
        ("UserError('no such weights')", 2, "sd3-jax: error: no such weights\n"),
        ("ValueError('a bug')", 1, "ValueError: a bug\n"),
    ],
)
def test_a_failing_process_leaves_at_once(here, fault, code, err):
    """Without os._exit it would wait for its peer until the shutdown barrier ends."""
    (here / "train.py").write_text(
        "import jax, os, time\nfrom sd3_jax.errors import UserError\n"
        "def run(config, workdir):\n"
        "    assert jax.distributed.is_initialized()\n"
        "    if os.environ['SD3_PROCESS_ID'] == '1':\n"
        f"        raise {fault}\n"
        "    time.sleep(120)\n"
    )
    program = (
        "import sys\nfrom sd3_jax import jobs, main\n"
        f"jobs.__path__.insert(0, {str(here)!r})\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    flags = ["train", f"--config={here}/configs/toy.py:tiny", f"--workdir={here}"]
    env = dict(PYTHONPATH=f"{ROOT}:{here}", SD3_SHUTDOWN_S="100")
    with multiprocess.start(["-c", program, *flags], env=env) as (waiting, failing):
        assert failing.wait(60) == code
        assert waiting.poll() is None
        assert multiprocess.result(failing).stderr.endswith(err)
