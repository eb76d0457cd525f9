"""Lines with pictures, masks, ControlNets and LoRAs: kills, repeats, mistakes."""

import json
import logging
import time
from types import SimpleNamespace

import jax
import multiprocess
import numpy as np
import pytest
import safetensors.torch
import torch
from jobs.test_sample import flags, lines, pixels
from ml_collections import ConfigDict
from parity import miniature
from parity.test_pipelines import control_net
from PIL import Image

import sd3_jax
from sd3_jax import main, pictures, tree
from sd3_jax.assembly import model_parts
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.sampling.job import released_sampler
from sd3_jax.sampling.job.prompt_file import Task

DRAW = np.random.default_rng(0)
SIDES = {"photo": (64, 64), "other": (64, 64), "large": (75, 101), "small": (48, 56)}
TEXT = dict(height=64, width=64, steps=4, guidance=5.0, max_sequence_length=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, masks, two ControlNets and two LoRAs, beside the file of prompts."""
    path = tmp_path_factory.mktemp("lines")
    for name, sides in SIDES.items():
        picture = DRAW.integers(0, 256, (*sides, 3), np.uint8)
        Image.fromarray(picture).save(path / f"{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 8:40] = 255
    Image.fromarray(mask).save(path / "mask.png")
    # Programs of other people write masks as RGB.
    far = np.zeros((75, 101, 3), np.uint8)
    far[50:60, 80:99] = 255
    Image.fromarray(far).save(path / "far.png")
    pipe = SimpleNamespace(transformer=miniature.transformer(**KIND))
    for name in ("net", "net2"):
        control_net(pipe, "joint").save_pretrained(path / name)
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        width = pipe.transformer.inner_dim
        key = "transformer.transformer_blocks.0.attn.to_q.lora_"
        pair = {f"{key}A.weight": torch.randn(2, width)}
        pair[f"{key}B.weight"] = torch.randn(width, 2)
        safetensors.torch.save_file(pair, path / f"{name}.safetensors")
    return path


KIND = miniature.KINDS["sd35_medium"]
HINTS = [
    {"net": "net", "image": "photo.png", "scale": 0.7},
    {"net": "net2", "image": "other.png", "stop": 0.5},
]
ROWS = [
    {"prompt": "a red fox", "seed": 1},
    {"prompt": "a red box", "seed": 2, "guidance": 3.0, "negative": "a fox"},
    {"prompt": "a fox", "seed": 3, "image": "photo.png", "strength": 0.5},
    {"prompt": "foxes", "seed": 4, "image": "other.png", "strength": 0.5},
    {"prompt": "a hat", "seed": 5, "image": "photo.png", "mask": "mask.png"},
    {"prompt": "hat", "image": "photo.png", "mask": "mask.png", "mask_blur": 2.0}
    | {"mask_padding": 3},
    {"prompt": "far", "image": "large.png", "mask": "far.png", "crop_to_mask": 4}
    | {"strength": 0.9},
    {"prompt": "wide", "image": "small.png", "outpaint": [4, 8, 4, 8], "strength": 1.0},
    {"prompt": "fox", "seed": 9, "control": HINTS},
    {"prompt": "fox", "seed": 9, "control": HINTS, "image": "photo.png"},
    {"prompt": "a red fox", "seed": 1, "lora": {"a.safetensors": 0.8}},
    {"prompt": "a red fox", "seed": 1, "lora": ["b.safetensors=0.5", "a.safetensors"]},
]


def api_arguments(row, folder, nets):
    """generate's arguments for a line, as a person would write them."""
    load = lambda name: Image.open(folder / name)
    arguments = {"guidance": row["guidance"]} if "guidance" in row else {}
    if "negative" in row:
        arguments["negative_prompts"] = [row["negative"]]
    if "image" in row:
        arguments |= dict(image=load(row["image"]), strength=row.get("strength", 0.6))
    if "mask" in row:
        arguments["mask"] = load(row["mask"]).convert("L")
    if "mask" in row or "outpaint" in row:
        names = ("mask_blur", "mask_padding", "crop_to_mask", "outpaint")
        arguments |= {name: row[name] for name in names if name in row}
        arguments["paste"] = True
    if "control" in row:
        arguments["control"] = [
            sd3_jax.ControlInput(
                nets[x["net"]], load(x["image"]), x.get("scale", 1.0), 0.0, stop
            )
            for x in row["control"]
            for stop in [x.get("stop", 1.0)]
        ]
    return arguments


@pytest.fixture(scope="module")
def killed(folder, tmp_path_factory):
    """The workdir of a job of twelve lines that was killed, and what it had painted."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, ROWS)))
    workdir = tmp_path_factory.mktemp("killed")
    command = ["-m", "sd3_jax.main", "sample", *flags(workdir, prompts)]
    with multiprocess.start(command, processes=1, devices=1) as cluster:
        deadline = time.monotonic() + 300
        while len(list(workdir.glob("samples/*.png"))) < 5:
            assert time.monotonic() < deadline
            assert cluster[0].poll() is None, multiprocess.result(cluster[0]).stderr
            time.sleep(0.01)
        multiprocess.kill(cluster)
    painted = {p: p.stat().st_mtime_ns for p in workdir.glob("samples/*.png")}
    assert 5 <= len(painted) < len(ROWS)
    (done,) = multiprocess.run(command, processes=1, devices=1, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p: p.stat().st_mtime_ns for p in painted} == painted  # none was redone
    return workdir, done.stderr


def test_twelve_lines_killed_and_resumed_are_the_apis_bit_for_bit(killed, folder):
    workdir, log = killed
    records = lines(workdir)
    assert len(records) == len(ROWS)
    assert "groups of equal settings, by" in log
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    bundle = sd3_jax.load(str(miniature.folder("sd35_medium")), mesh, "float32")
    load = lambda name: sd3_jax.load_control(str(folder / name), bundle)
    nets = {name: load(name) for name in ("net", "net2")}
    images = pixels(workdir)
    for row, record, image in zip(ROWS, records, images):
        arguments = TEXT | api_arguments(row, folder, nets)
        if "outpaint" in row:
            arguments |= dict(height=None, width=None)
        if "lora" in row:
            arguments["adapters"] = adapters(bundle, row["lora"], folder)
        # The two lines that differ in prompt, seed and picture are one batch.
        place, rows = record["batch"]
        prompts, seeds = [row["prompt"]] * rows, [row.get("seed", 0)] * rows
        ours = sd3_jax.generate(bundle, prompts, seed=seeds, **arguments)
        ours = pictures.to_uint8(2 * np.asarray(ours, np.float32) - 1)[place]
        np.testing.assert_array_equal(image, ours, err_msg=row["prompt"])
    assert [record["batch"][1] for record in records].count(2) == 2


def adapters(bundle, loras, folder):
    """A bundle has the adapters of one line at a time."""
    if not isinstance(loras, dict):
        pairs = [text.partition("=")[::2] for text in loras]
        loras = {name: float(weight or 1) for name, weight in pairs}
    bundle.unload_adapters()
    for name in loras:
        bundle.load_adapter(str(folder / name), name=name)
    return loras


def test_inputs_that_are_kept_are_kept_exactly(killed, folder):
    records = {x["prompt"]: x for x in lines(killed[0])}
    read = lambda x: np.asarray(Image.open(x))
    hat = read(killed[0] / records["a hat"]["file"])
    outside = read(folder / "mask.png") == 0
    np.testing.assert_array_equal(hat[outside], read(folder / "photo.png")[outside])
    far, large = read(killed[0] / records["far"]["file"]), read(folder / "large.png")
    outside = read(folder / "far.png")[..., 0] == 0
    np.testing.assert_array_equal(far[outside], large[outside])
    wide = read(killed[0] / records["wide"]["file"])
    np.testing.assert_array_equal(wide[8:56, 4:60], read(folder / "small.png"))
    assert records["far"]["inputs"].keys() == {
        str(folder / name) for name in ("large.png", "far.png")
    }


def repeat(workdir, picture, **keys):
    args = flags(workdir, "", **{"sample.from": picture} | keys)
    return main.main(["sample", *args])


@pytest.mark.parametrize("format", ["png", "webp", "jpg"])
def test_a_picture_is_repeated_from_its_own_settings(format, folder, tmp_path, caplog):
    """The last of three in one batch; its file holds all that is needed."""
    prompts = folder / f"{format}.jsonl"
    rows = [
        {"prompt": f"{i} foxes", "seed": 7, "image": "photo.png", "strength": 0.5}
        | {"mask": "mask.png", "cfg": 4.0, "mask_blur": 1.5}
        for i in range(3)
    ]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    keys = {"sample.format": format, "sample.quality": 100}
    assert main.main(["sample", *flags(run, prompts, **keys)]) == 0
    record = lines(run)[-1]
    assert record["batch"] == [2, 3] and record["file"].endswith(f".{format}")
    caplog.clear()
    # Other settings of the recipe are not used.
    other = {"sample.cfg": 1.0, "sample.steps": 2, "sample.seed": 3} | keys
    assert repeat(tmp_path / "again", run / record["file"], **other) == 0
    (again,) = lines(tmp_path / "again")
    assert {**again, "file": ""} == {**record, "file": ""}
    assert not [x for x in caplog.messages if "will differ" in x]
    a, b = pixels(run)[-1], pixels(tmp_path / "again")[0]
    np.testing.assert_array_equal(a, b)


def test_what_differs_from_the_repeated_picture_is_a_warning(folder, tmp_path, caplog):
    prompts = folder / "one.jsonl"
    prompts.write_text('{"prompt": "a fox", "image": "changed.png"}')
    photo = (folder / "photo.png").read_bytes()
    (folder / "changed.png").write_bytes(photo)
    run = tmp_path / "run"
    assert main.main(["sample", *flags(run, prompts)]) == 0
    (folder / "changed.png").write_bytes((folder / "other.png").read_bytes())
    picture = run / lines(run)[0]["file"]
    keys = {"quantize.denoiser": "int8", "sample.per_prompt": 3}
    assert repeat(tmp_path / "again", picture, **keys) == 0
    told = "\n".join(x for x in caplog.messages if "will differ" in x)
    assert "inputs was " in told and told.count("will differ") == 1
    # The picture's own kind of weights is used, not the command's.
    assert len(lines(tmp_path / "again")) == 1
    (folder / "changed.png").unlink()
    assert repeat(tmp_path / "gone", picture) == 2


def test_a_line_that_fails_is_reported_and_the_rest_are_painted(
    folder, tmp_path, caplog
):
    whole = (folder / "photo.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "none.json").write_text("{}")
    (folder / "nets").mkdir(exist_ok=True)
    bad = [  # the line's settings, and the reason
        ({"image": "missing.png"}, "missing.png: cannot be read: No such file"),
        ({"image": "none.json"}, "not one of JPEG, PNG, WEBP, or damaged"),
        ({"image": "large.png"}, "config.image.height = 75: expected a multiple of 16"),
        ({"image": "photo.png", "height": 48}, "height 48, width 64: "),
        ({"image": "photo.png", "mask": "far.png"}, "pixels: must equal the size"),
        ({"mask": "mask.png"}, "mask without image; give image"),
        ({"crop_to_mask": 1, "control": HINTS}, "crop_to_mask with control"),
        ({"image": "photo.png", "strength": 2}, "config.sample.strength = 2"),
        ({"image": "photo.png", "resize": "fit"}, 'config.sample.resize = "fit"'),
        ({"control": [{"net": "net"}]}, 'control 0: "image": expected a text'),
        ({"control": [HINTS[0] | {"scal": 1}]}, 'unknown "scal"; did you mean "scale"'),
        (
            {"control": [HINTS[0] | {"net": "gone/net/x"}]},
            "no such file, folder or hub",
        ),
        ({"control": [HINTS[0] | {"start": 1}]}, "0 <= start < stop <= 1"),
        ({"guidance": 2, "cfg": 2}, '"guidance" and "cfg" are one setting'),
        ({"paste": 1}, "paste 1: expected bool"),
        ({"lora": "gone.safetensors"}, "lora gone.safetensors: no such file, folder"),
        ({"lora": {"a.safetensors": "x"}}, "lora a.safetensors 'x': expected a finite"),
        ({"lora": "photo.png"}, "photo.png"),
        ({"skip_layers": [9]}, "skip_layers 9: expected a whole number 0 to 3"),
        ({"control": [HINTS[0] | {"net": "nets"}]}, "nets: "),
        ({"image": "cut.png"}, "cut.png: truncated; expected a whole JPEG"),
    ]
    good = {"prompt": "a fox", "image": "photo.png", "seed": 5}
    rows = [{"prompt": "a fox"} | settings for settings, _ in bad]
    rows.insert(9, good)
    prompts = folder / "bad.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        assert main.main(["sample", *flags(tmp_path / "run", prompts)]) == 0
    told = [x for x in caplog.messages if "skipped: " in x]
    rows.remove(good)
    for i, (_, words) in enumerate(bad):
        number = i + 1 + (i >= 9)
        (line,) = [x for x in told if f"bad.jsonl:{number}: " in x]
        assert words in line and "\n" not in line, line
    assert len(told) == len(bad)
    assert any("skipped 3 of 4 pictures" in x for x in caplog.messages)
    (record,) = lines(tmp_path / "run")
    assert record["seed"] == 5
    page = (tmp_path / "run" / "samples.html").read_text()
    assert page.count("<img") == 1


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"sample.images": "empty"}, "holds no picture; expected .png, .jpg"),
        ({"sample.from": "photo.png"}, "holds no settings; expected a picture that"),
        ({"sample.from": "gone.png"}, "config.sample.from = "),
        ({"sample.image": "gone.png", "sample.prompt": "a"}, "no such file"),
        (
            {"sample.image": "large.png", "sample.prompt": "a"},
            "config.image.height = 75: expected a multiple of 16",
        ),
        ({"sample.images": ".", "sample.from": "photo.png"}, "are both set; set only"),
        ({"sample.outpaint": "1,2", "sample.prompt": "a"}, "four numbers of pixels"),
        (
            {"sample.image": "cut.png", "sample.prompt": "a"},
            "no picture can be painted",
        ),
    ],
)
def test_mistakes_of_the_command_are_one_line(keys, words, folder, tmp_path, capsys):
    (folder / "empty").mkdir(exist_ok=True)
    whole = (folder / "photo.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    path = lambda name: name.rpartition(".")[2] in ("image", "images", "from")
    keys = {k: folder / v if path(k) else v for k, v in keys.items()}
    assert main.main(["sample", *flags(tmp_path / "run", "", **keys)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sd3-jax: error:") and words in error, error
    assert not list(tmp_path.glob("run/samples/*"))


@pytest.fixture
def checkpoint(monkeypatch):
    """A run's first parameters, without the run."""

    def first(config, parts, workdir, mesh):
        init = jax.jit(lambda key: tree.unbox(parts.objective.init(key)))
        return init(jax.random.key(0)), 1

    monkeypatch.setattr(model_parts, "trained_params", first)
    monkeypatch.setattr(model_parts, "trained_encoders", lambda *args: {})


def test_a_runs_checkpoint_repeats_too_and_names_what_it_lacks(
    checkpoint, tmp_path, caplog
):
    run = tmp_path / "run"
    command = ["sample", "--config=configs/quickstart.py:tiny", f"--workdir={run}"]
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "four", "seed": 4, "per_prompt": 2},
        {"prompt": "four", "image": "photo.png"},
        {"prompt": "four", "clip_skip": 1},
    ]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    file = f"--config.sample.prompts_file={prompts}"
    assert main.main([*command, file]) == 0
    told = "\n".join(caplog.messages)
    assert 'prompts.jsonl:2: skipped: "image" needs released weights' in told
    assert 'prompts.jsonl:3: skipped: "clip_skip" needs released weights' in told
    before, record = pixels(run), lines(run)[1]
    assert (record["number"], record["seed"], record["batch"]) == (1, 4, [1, 8])
    # The first picture has the other's name in the same workdir.
    picture = tmp_path / "kept.png"
    picture.write_bytes((run / record["file"]).read_bytes())
    seed = "--config.sample.seed=9"
    repeat = f"--config.sample.from={picture}"
    assert main.main([*command, repeat, seed]) == 0
    (again,) = lines(run)
    assert {**again, "file": ""} == {**record, "file": ""}
    np.testing.assert_array_equal(pixels(run)[0], before[1])
    assert "will differ" not in "\n".join(caplog.messages)
    weights = f"--config.weights={miniature.folder('sd35_medium')}"
    assert main.main([*command, repeat, weights]) == 2


def test_a_folder_of_pictures_by_captions_and_by_one_prompt(folder, tmp_path, caplog):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("photo", "other", "large"):
        (photos / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes())
    (photos / "photo.txt").write_text("a red fox\n")
    (photos / "large.png.caption").write_text("a fox in the rain")
    keys = {"sample.images": photos, "sample.resize": "crop", "sample.strength": 0.5}
    run = tmp_path / "run"
    assert main.main(["sample", *flags(run, "", **keys)]) == 0
    records = lines(run)
    assert [x["prompt"] for x in records] == ["a fox in the rain", "a red fox"]
    assert all(image.shape == (64, 64, 3) for image in pixels(run))
    (told,) = [x for x in caplog.messages if "skipped: " in x]
    assert "other.png: skipped: other.txt: no such file; write the prompt" in told
    keys["sample.prompt"] = "a box"
    assert main.main(["sample", *flags(tmp_path / "one", "", **keys)]) == 0
    records = lines(tmp_path / "one")
    assert [x["prompt"] for x in records] == ["a box"] * 3
    names = [x["settings"]["image"].rpartition("/")[2] for x in records]
    assert names == ["large.png", "other.png", "photo.png"]


def test_what_generate_refuses_ends_its_line_alone(folder, tmp_path, caplog):
    """Mistakes that only the call or the pixels show, in batches with good lines."""
    torch.manual_seed(0)
    key = "transformer.transformer_blocks.0.attn.to_q.lora_"
    width = miniature.transformer(**KIND).inner_dim
    huge = {f"{key}A.weight": torch.full((2, width), 1e30)}
    huge[f"{key}B.weight"] = torch.full((width, 2), 1e30)
    safetensors.torch.save_file(huge, folder / "huge.safetensors")
    net = HINTS[0] | {"mask": "mask.png"}
    rows = [
        {"image": "photo.png", "strength": 0},
        {"control": HINTS[:1], "solver": "adaptive"},
        {"control": [net]},
        {"lora": "huge.safetensors"},
        {"prompt_weighting": "compel", "prompt": "(" * 3000 + "a" + ")" * 3000},
        {"seed": 5},
    ]
    prompts = folder / "refused.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": "a fox"} | x) for x in rows))
    assert main.main(["sample", *flags(tmp_path / "run", prompts)]) == 0
    told = [x for x in caplog.messages if "skipped: " in x]
    words = [
        "strength",
        "control does not work with the solver adaptive",
        "this ControlNet takes no mask; remove it",
        "1 of 1 changes do not fit the model",
        "more than 100 groups inside each other",
    ]
    for i, reason in enumerate(words, 1):
        (line,) = [x for x in told if f"refused.jsonl:{i}: " in x]
        assert reason in line and "\n" not in line, line
    (record,) = lines(tmp_path / "run")
    assert record["seed"] == 5


def test_one_row_that_fails_in_a_batch_leaves_the_others_as_they_are(monkeypatch):
    settings = {"guidance_method": "cfg"}
    tasks = [Task(i, "a fox", 0, ConfigDict(), settings) for i in range(3)]

    def generate(model, rows, extra):
        if 1 in (x.index for x in rows):
            raise UserError("refused")
        bad = lambda x: np.nan if x.index == 2 else 0.5
        return np.stack([np.full((2, 2, 3), bad(x), np.float32) for x in rows])

    monkeypatch.setattr(released_sampler, "_generate", generate)
    paint = lambda rows: released_sampler.sample_lines(model, {}, None, rows)
    model = object.__new__(sd3_jax.Bundle)
    object.__setattr__(model, "dtype", "bfloat16")
    images, failures = paint(tasks)
    assert (
        failures[1] == "refused" and "set config.model.dtype to float32" in failures[2]
    )
    assert failures.keys() == {1, 2} and (images[0] == 128).all()
    images, failures = paint(tasks[1:2])
    assert images is None and failures == {0: "refused"}


def test_another_quality_is_another_file(folder, tmp_path):
    prompts = folder / "quality.jsonl"
    prompts.write_text('{"prompt": "a fox"}')
    sizes = []
    for quality in (95, 10, 10):
        keys = {"sample.format": "jpg", "sample.quality": quality}
        assert main.main(["sample", *flags(tmp_path, prompts, **keys)]) == 0
        path = tmp_path / lines(tmp_path)[0]["file"]
        sizes.append((path.stat().st_size, path.stat().st_mtime_ns))
    assert sizes[0][0] > sizes[1][0] and sizes[1] == sizes[2]
