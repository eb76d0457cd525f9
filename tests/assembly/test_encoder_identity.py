"""Runs and samples are held to the encoders that their records were made by."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import real_pictures
import torch
from parity import miniature
from safetensors.numpy import load_file, save_file

import sd3_jax
from sd3_jax import main
from sd3_jax.assembly import compatibility, encoder_identity, examples
from sd3_jax.checkpoints.restoring import saved_data
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.jobs import convert

TINY = "--config=configs/sd3_2b.py:tiny"
SIZES = ("model.context_dim=160", "model.pooled_dim=128", "text.length=100")


def start(job, workdir, weights, *flags):
    given = [*SIZES, f"encode.weights={weights}", *flags]
    argv = [job, TINY, f"--workdir={workdir}", *(f"--config.{x}" for x in given)]
    return main.main(argv)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two released models, of which one number in the autoencoder differs."""
    one = miniature.folder("sd35_large")
    two = tmp_path_factory.mktemp("weights") / "two"
    shutil.copytree(one, two)
    (path,) = (two / "vae").glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + np.float32(0.25)
    save_file(tensors, path, {"format": "pt"})
    return one, two


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """Records of the first model's, and a run of one step on them."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "in").mkdir()
    real_pictures.make(folder / "in", 8)
    shutil.rmtree(folder / "in" / "odd")
    inputs = f"ingest.inputs={folder}/in"
    assert start("precompute", folder / "data", weights[0], inputs) == 0
    assert train(folder, weights[0], f"data.records={folder}/data/records/*") == 0
    return folder


def train(folder, weights, *flags, name="run"):
    steps = [f"train.{x}" for x in ("steps=1", "eval_every=9", "sample_every=9")]
    return start("train", folder / name, weights, "data.name=records", *steps, *flags)


def moved(trained, tmp_path):
    """The same records, as the second model's autoencoder would have made them."""
    shutil.copytree(trained / "data", tmp_path / "data")
    path = tmp_path / "data" / encoder_identity.NAME
    prints = json.loads(path.read_text()) | {"vae": "0123456789ab"}
    path.write_text(json.dumps(prints))
    return f"{tmp_path}/data/records/*"


def test_records_and_checkpoints_say_whose_they_are(trained):
    manifest = json.loads((trained / "data/manifest.json").read_text())
    prints = json.loads((trained / "data" / encoder_identity.NAME).read_text())
    assert manifest["encoders"] == prints
    assert prints.keys() == {"vae", "clip_l", "clip_g", "t5"}
    assert saved_data(trained / "run" / "checkpoints")["encoders"] == prints


def test_samples_by_other_encoders_are_told_of(trained, weights, caplog):
    flags = "sample.prompt=a fox", "sample.steps=1", "sample.cfg=1"
    assert start("sample", trained / "run", weights[1], *flags) == 0
    line = json.loads((trained / "run" / "samples.jsonl").read_text())
    one = json.loads((trained / "data" / encoder_identity.NAME).read_text())
    assert line["encoders"].keys() == one.keys()
    assert {k for k in one if line["encoders"][k] != one[k]} == {"vae"}
    (told,) = [x for x in caplog.messages if " had the fingerprint " in x]
    assert f"config.encode.weights = {weights[1]}: the run was trained with" in told
    assert (
        f"vae had the fingerprint {one['vae']}, now {line['encoders']['vae']}" in told
    )
    assert "clip_l" not in told and "t5 had" not in told


def test_a_run_is_exported_with_the_encoders_of_its_records(
    trained, weights, tmp_path, caplog
):
    caplog.set_level("INFO")
    out = tmp_path / "out"
    flags = f"convert.out={out}", "sample.shift=2"
    assert start("convert", trained / "run", weights[0], *flags) == 0
    assert not [x for x in caplog.messages if " had the fingerprint " in x]
    assert [x for x in caplog.messages if "pass max_sequence_length=23" in x]
    for folder in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        (path,) = (weights[0] / folder).glob("*.safetensors")
        ours = load_file(out / folder / path.name)
        for name, tensor in load_file(path).items():
            np.testing.assert_array_equal(ours[name], tensor)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(out)
    assert pipe.scheduler.config.shift == 2  # the recipe's, not that of the weights
    options = dict(height=64, width=64, num_inference_steps=2, max_sequence_length=23)
    # Run in PyTorch and here from one noise: every part is in its place.
    draw = np.random.default_rng(0).standard_normal
    noise = draw((1, 8, 8, 16)).astype(np.float32)
    theirs = pipe(
        "a fox",
        latents=torch.tensor(noise).permute(0, 3, 1, 2),
        guidance_scale=1.0,
        output_type="np",
        **options,
    ).images
    bundle = sd3_jax.load(str(out), dtype="float32")
    sizes = dict(steps=2, guidance=1.0, max_sequence_length=23)
    ours = sd3_jax.generate(bundle, "a fox", latents=noise, **sizes)
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-3)
    # The same parts, joined when they are loaded.
    flags = *SIZES, f"convert.out={tmp_path}/alone", "sample.shift=2"
    flags = [f"--config.{flag}" for flag in flags]
    assert main.main(["convert", TINY, f"--workdir={trained}/run", *flags]) == 0
    again = sd3_jax.load([str(weights[0]), str(tmp_path / "alone")], dtype="float32")
    assert again.fingerprint() == bundle.fingerprint()
    assert again.scheduler == bundle.scheduler


def test_an_export_with_other_encoders_is_logged(trained, weights, tmp_path, caplog):
    flags = "convert.to=original", f"convert.out={tmp_path}/out.safetensors"
    assert start("convert", trained / "run", weights[1], *flags) == 0
    (warning,) = [x for x in caplog.messages if " had the fingerprint " in x]
    assert f"config.encode.weights = {weights[1]}" in warning
    assert "vae had the fingerprint" in warning and "t5 had" not in warning


def test_a_source_without_encoders_is_refused(trained, weights, tmp_path, capsys):
    source, flag = weights[0] / "transformer", f"convert.out={tmp_path}/out"
    assert start("convert", trained / "run", source, flag) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert f"config.encode.weights = {source}: has none of vae, clip_l" in said


def test_encoders_of_another_model_are_refused(weights):
    flags = [f"--config.{x}" for x in (*SIZES, f"encode.weights={weights[0]}")]
    config = main.parse(["convert", TINY, "--workdir=unused", *flags]).config
    denoiser = {"pooled_projection_dim": 128, "joint_attention_dim": 160}
    wrong = denoiser | {"in_channels": 4}
    with pytest.raises(UserError, match="vae is of another model: latent_channels"):
        convert.released_encoders(config, wrong, {}, sharding.make_mesh())
    with config.unlocked():
        config.text.name = "bytes"  # whose denoiser reads neither CLIP nor T5
    args = denoiser | {"in_channels": 16}, {}, sharding.make_mesh()
    assert [*convert.released_encoders(config, *args).modules] == ["vae"]


def test_records_of_two_encoders_are_not_mixed(trained, weights, tmp_path, capsys):
    one, two = f"{trained}/data/records/*", moved(trained, tmp_path)
    assert train(tmp_path, weights[0], f"data.records={one},{two}") == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert "config.data.records: " in said and "encoded by another vae than" in said
    flags = f"data.records={one}", f"data.held_out={two}", "eval.examples=8"
    assert train(tmp_path, weights[0], *flags) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert (
        "config.data.held_out and config.data.records have" in said
        and "vae had" in said
    )


def test_a_run_does_not_go_on_with_other_encoders(trained, weights, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    two = f"data.records={moved(trained, tmp_path)}"
    said_so = "train.changes=data.records"  # the path alone
    assert train(tmp_path, weights[0], two, said_so) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert "was trained with other encoders: vae had the fingerprint" in said


def test_what_the_run_encodes_itself_counts_as_well():
    config = main.parse(["train", TINY, "--workdir=unused"]).config
    compare = encoder_identity.compare
    compare("run", {}, {"vae": "b"}, config)  # of an earlier version
    compare("run", {"t5": "a"}, {"vae": "b"}, config)
    with pytest.raises(UserError, match="vae had the fingerprint a, now b"):
        compare("run", {"vae": "a"}, {"vae": "b"}, config)
    with config.unlocked():
        config.train.changes = ("data",)
    compare("run", {"vae": "a"}, {"vae": "b"}, config)


@pytest.mark.parametrize("change", ["encode.dtype=float32", "quantize.t5=int8"])
def test_another_encoder_dtype_needs_one_declaration(change):
    """The setting's own message asks for it, and the fingerprints ask no further."""
    flag, key = f"--config.{change}", change.partition("=")[0]
    parse = lambda *flags: main.parse(["train", TINY, "--workdir=unused", *flags])
    saved = parse().config.to_dict()
    with pytest.raises(UserError, match=f"--config.train.changes={key};"):
        compatibility.compare("run", saved, parse(flag).config)
    declared = parse(flag, f"--config.train.changes={key}").config
    compatibility.compare("run", saved, declared)
    encoder_identity.compare("run", {"vae": "a"}, {"vae": "b"}, declared)


def test_the_empty_caption_is_zeros(weights):
    flags = [f"--config.{x}" for x in (*SIZES, f"encode.weights={weights[0]}")]
    config = main.parse(["train", TINY, "--workdir=unused", *flags]).config
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    made = examples.encoder(config, mesh, ["clip_l", "clip_g", "t5"])
    found = made.text(jax.device_put(made.tokenize(["", "a fox"])))
    assert found.keys() == {"clip", "t5", "pooled"}
    for x in found.values():
        x = np.float32(x)
        assert not x[0].any() and np.abs(x[1]).mean() > 0.01


def test_fingerprints_are_read_once(trained, weights, tmp_path, monkeypatch):
    reads, really = [], encoder_identity._read
    count = lambda workdir: reads.append(str(workdir)) or really(workdir)
    monkeypatch.setattr(encoder_identity, "_read", count)
    records = f"data.records={trained}/data/records/*"
    assert train(tmp_path, weights[0], records) == 0
    assert reads == [f"{trained}/data"]
