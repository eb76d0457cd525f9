"""How weights are named: paths, hub names, links; and files that are none."""

import gzip
import json
import zipfile

import huggingface_hub
import numpy as np
import pytest
from etils import epath
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

from sd3_jax.data import tokenizers
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.sampling import bundle_loading
from sd3_jax.weights import hub, safetensors, source_names, sources
from sd3_jax.weights.safetensors import Entry

X = np.ones(2, np.float32)


def write(path, *names, value=1.0, **metadata):
    entry = Entry(np.dtype("float32"), (2,), lambda: value * X)
    safetensors.write_file(path, dict.fromkeys(names or ("w",), entry), metadata)


def said(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    return str(caught.value)


def opened(path):
    return sources.parts(*sources.locate(str(path)))


# Files that are no safetensors, and weights that are no plain ones

HTML = b"<!DOCTYPE html>\n<html><head><title>Just a moment...</title>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5107104\n"
FILES = {
    "gguf": (
        b"GGUF\x03\0\0\0\x24\x01\0\0",
        "not a GGUF file, or damaged: it ends within its header: copy it again",
    ),
    "git-lfs": (LFS, "is a git-lfs pointer, not the file", "`git lfs pull`"),
    "html": (HTML, "is a web page: download it again"),
    "html after a line": (b"\n" + HTML.lower(), "is a web page: download it again"),
    "xml": (b"<?xml version='1.0'?><Error>", "is an XML page: download it again"),
    "json": (b'{"error":"Repository not found"}', "is text", "Repository not found"),
    "text": (b"Entry not found", 'is text, "Entry not found": expected a .safetensors'),
    "gzip": (gzip.compress(b"x"), "is a gzip archive: unpack it"),
    "xz": (b"\xfd7zXZ\0\0", "is an xz archive: unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd", "is a zstd archive: unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it"),
    "tar": (bytes([1]) * 257 + b"ustar\0" + bytes(300), "is a tar archive: unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(9), "is an HDF5 file: expected the model as"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(9), "is a PNG picture"),
    "zeros": (bytes(4096), "begins with zeros, like an interrupted download"),
    "empty": (b"", "is empty; copy it again"),
    "pickle": (
        b"\x80\x02}q\0.",
        "is a pickle, and loading one may run code",
        "torch.load",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_format_is_called_by_its_name(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    data, *words = FILES[kind]
    path.write_bytes(data)
    told = said(opened, path)
    assert str(path) in told and all(x in told for x in words), told
    assert said(sources.control, epath.Path(path)) == told  # a ControlNet's as well


@pytest.mark.parametrize("suffix, kind", [(".onnx", "an ONNX"), (".msgpack", "flax's")])
def test_formats_without_first_bytes_are_known_by_their_suffix(suffix, kind, tmp_path):
    (tmp_path / f"model{suffix}").write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(99))
    assert f"is {kind}" in said(opened, tmp_path / f"model{suffix}")


def test_zips_of_pytorch_are_pickles_and_others_are_zips(tmp_path):
    for name, words in ("a/data.pkl", "is a pickle"), ("a.txt", "is a zip archive"):
        with zipfile.ZipFile(tmp_path / "a.safetensors", "w") as file:
            file.writestr(name, "x")
        assert words in said(opened, tmp_path / "a.safetensors")


@pytest.mark.parametrize("rest", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle(rest, tmp_path):
    """Its first bytes are 80 02 to 80 05; the ninth is the header's brace."""
    path = tmp_path / "a.safetensors"
    for note in range(rest - 100, rest):
        save_file({"a": np.zeros((2, 2))}, path, metadata={"note": "x" * note})
        if int.from_bytes(path.read_bytes()[:8], "little") == rest:
            break
    assert path.read_bytes()[:2] == bytes([0x80, rest >> 8])
    tensors, metadata = safetensors.open_file(path)
    assert tensors["a"].shape == (2, 2) and metadata["note"] == "x" * note
    path = path.rename(tmp_path / "a.ckpt")  # whatever it is called
    assert list(safetensors.open_file(path)[0]) == ["a"]


QUANTIZED = {
    "x.attn.qkv.weight_scale_2": "NVFP4",
    "x.attn.qkv.weight_scale_inv": "fp8 in blocks",
    "x.g_idx": "GPTQ",
    "x.qweight": "GPTQ or AWQ",
    "x.qzeros": "GPTQ or AWQ",
    "x.wscales": "SVDQuant",
    "x.smooth_factor": "SVDQuant",
    "x.weight._data": "quanto",
    "x.weight._scale": "quanto",
    "x:_weight_qdata": "torchao",
    "x.weight_zero_point": "torchao",
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_called_by_their_kind(name, tmp_path):
    write(tmp_path / "a.safetensors", "joint_blocks.0.weight", name)
    told = said(opened, tmp_path / "a.safetensors")
    assert f"is quantized, {QUANTIZED[name]}" in told
    assert "use the model in fp32, fp16, bf16 or fp8, as GGUF" in told


def test_a_dtype_of_microscaling_formats(tmp_path):
    header = b'{"w":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(2)
    (tmp_path / "a.safetensors").write_bytes(data)
    told = said(opened, tmp_path / "a.safetensors")
    assert "a.safetensors: w is of F8_E8M0: expected tensors of F64, F32" in told


# Folders


def value(folder, variant=""):
    return safetensors.open_folder(folder, variant)["w"].read()[0]


SHARDED = [  # the files, the index, the variant
    ("model{}.safetensors", "model.safetensors.index.json", ""),
    ("model.fp16{}.safetensors", "model.safetensors.index.fp16.json", "fp16"),
    ("model.fp16{}.safetensors", "model.fp16.safetensors.index.json", "fp16"),
    ("model{}.fp16.safetensors", "model.safetensors.fp16.index.json", "fp16"),
]


@pytest.mark.parametrize("file, index, variant", SHARDED)
def test_every_name_of_shards_and_of_their_index(file, index, variant, tmp_path):
    parts = [file.format(f"-0000{i}-of-00002") for i in (1, 2)]
    write(tmp_path / parts[0], "v", value=1)
    write(tmp_path / parts[1], "w", value=2)
    assert value(tmp_path) == 2  # of the two, complete by their numbers
    where = {"weight_map": {"v": parts[0], "w": parts[1]}}
    (tmp_path / index).write_text(json.dumps(where))
    assert value(tmp_path) == 2 and safetensors.variant_of(index) == variant
    write(tmp_path / "model.bf16.safetensors", value=3)
    assert value(tmp_path, "bf16") == 3
    assert value(tmp_path, variant) == 2
    write(tmp_path / "model.safetensors", value=4)
    assert value(tmp_path) == 4 and value(tmp_path, "fp16") == (2 if variant else 4)


def test_shards_that_are_not_there_are_named(tmp_path):
    for i in (1, 4):
        write(tmp_path / f"model-0000{i}-of-00015.safetensors", str(i))
    told = said(safetensors.open_folder, tmp_path)
    words = "13 of the 15 shards of model.safetensors are missing: 2, 3, 5, 6"
    assert words in told and "12 and 3 more" in told
    assert words in said(opened, tmp_path)  # of a single file in shards
    other = tmp_path / "other"
    for i in (1, 2):
        write(other / f"model-0000{i}-of-00002.safetensors", "w")
    assert "w is also in another shard" in said(safetensors.open_folder, other)
    write(other / "part-00001-of-00002.safetensors", "v")
    assert "holds shards of 2 models" in said(safetensors.open_folder, other)


def test_two_files_in_a_components_folder(tmp_path):
    write(tmp_path / "diffusion_pytorch_model.safetensors", value=1)
    write(tmp_path / "ema.safetensors", value=2)
    assert value(tmp_path) == 1
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    write(tmp_path / "raw.safetensors", value=2)
    told = said(safetensors.open_folder, tmp_path)
    assert "holds ema.safetensors, raw.safetensors; name one" in told
    assert "2 of those (ema.safetensors, raw.safetensors: name" in said(
        opened, tmp_path
    )


@pytest.mark.parametrize(
    "kind, words",
    [
        ("SD3ControlNetModel", "a ControlNet; use sd3_jax.load_control"),
        ("CLIPModel", "CLIPModel, a whole CLIP; use its .safetensors"),
        ("CLIPTextModel", "a CLIP without a projection; use the .safetensors"),
        ("T5ForConditionalGeneration", "a whole T5; use its .safetensors"),
        ("UNet2DConditionModel", "UNet2DConditionModel: expected "),
        (
            "FluxTransformer2DModel",
            "FluxTransformer2DModel: expected SD3Transformer2DM",
        ),
    ],
)
def test_folders_of_other_classes(kind, words, tmp_path):
    write(tmp_path / "diffusion_pytorch_model.safetensors", "decoder.layers.0.weight")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    assert words in said(opened, tmp_path)
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["x", kind]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    told = said(opened, tmp_path)
    assert f"model_index.json: transformer is {words[:12]}" in told or words in told


def test_what_a_pipeline_has_beside_its_model_is_told(tmp_path, caplog):
    index = {"controlnet": ["diffusers", "SD3ControlNetModel"], "vae": [None, None]}
    index |= {"scheduler": ["diffusers", "X"], "tokenizer": ["transformers", "Y"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert opened(tmp_path) == {}
    assert "model_index.json: not loaded: controlnet" in caplog.text
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "is of a U-Net; expected Stable Diffusion 3" in said(opened, tmp_path)


@pytest.mark.parametrize(
    "config, name",
    [
        (dict(hidden_size=768, hidden_act="gelu"), "clip_l"),
        (dict(hidden_size=1280, hidden_act="quick_gelu"), "clip_g"),
        (dict(hidden_size=64, hidden_act="quick_gelu"), "clip_l"),
        (dict(hidden_size=64, hidden_act="gelu"), "clip_g"),
    ],
)
def test_a_clips_folder_alone(config, name, tmp_path, monkeypatch):
    as_told = lambda component, config, *_: config
    monkeypatch.setattr(sources, "configured", as_told)  # there are no layers
    write(tmp_path / "model.safetensors")
    config |= {"architectures": ["CLIPTextModelWithProjection"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert list(opened(tmp_path)) == [name]


# Names


NAMES = {
    "owner/name": ("owner/name", None, "", ""),
    "owner/name@v1.0": ("owner/name", "v1.0", "", ""),
    "owner/name@refs/pr/5": ("owner/name", "refs/pr/5", "", ""),
    "owner/name:fp16": ("owner/name", None, "", "fp16"),
    "owner/name@v1:fp16": ("owner/name", "v1", "", "fp16"),
    "owner/name/a.safetensors": ("owner/name", None, "a.safetensors", ""),
    "owner/name/a/b c.safetensors": ("owner/name", None, "a/b c.safetensors", ""),
    "owner/name@v1/a.safetensors": ("owner/name", "v1", "a.safetensors", ""),
    "owner/name@v1/b/a-Q4_K_M.gguf": ("owner/name", "v1", "b/a-Q4_K_M.gguf", ""),
    "owner/a.gguf": None,
    "owner/name/a.safetensors@v1": ("owner/name", "v1", "a.safetensors", ""),
    "hf://owner/name@v1/a.safetensors": ("owner/name", "v1", "a.safetensors", ""),
    "hf://owner/name": ("owner/name", None, "", ""),
    "owner": None,
    "owner/a.safetensors": None,
    "a/b/c": None,
    "./owner/name": None,
    "../a/b.safetensors": None,
    "/owner/name/a.safetensors": None,
    "owner/name@v1/a.safetensors@v2": None,
    "owner/name/a.safetensors:fp16": None,
    "owner/name@": None,
    "owner/name:": None,
    "owner/na me": None,
}


@pytest.mark.parametrize("text", NAMES)
def test_hub_names(text):
    name = NAMES[text] and source_names.Name(*NAMES[text])
    assert source_names.parse(text) == name


SITE = "https://huggingface.co"
LINKS = {
    f"{SITE}/owner/name": '"owner/name"',
    f"{SITE}/owner/name/": '"owner/name"',
    f"{SITE}/owner/name/tree/main": '"owner/name"',
    f"{SITE}/owner/name/tree/v1/vae": '"owner/name@v1"',
    f"{SITE}/owner/name/blob/main/a.safetensors": '"owner/name/a.safetensors"',
    f"{SITE}/owner/name/blob/main/a.gguf": '"owner/name/a.gguf"',
    f"{SITE}/owner/name/resolve/main/b/a.safetensors?download=true": (
        '"owner/name/b/a.safetensors"'
    ),
    f"{SITE}/owner/name/resolve/ab12/a.safetensors": '"owner/name@ab12/a.safetensors"',
    "huggingface.co/owner/name": '"owner/name"',
    "http://hf.co/owner/name": '"owner/name"',
    "https://civitai.com/api/download/models/1": "download it and name the file",
    "HTTPS://example.org/a.safetensors": "download it and name the file",
    f"{SITE}/spaces/a/b": "download it and name the file",
    "ftp://example.org/a.safetensors": "expected a path, or one that begins with gs://",
    "file:///tmp/a.safetensors": "expected a path, or one that begins with gs://",
}


@pytest.mark.parametrize("source", LINKS)
def test_links_are_told_how_to_be_named(source):
    for what in "weights", "LoRA", "ControlNet":
        told = said(sources.resolve, source, label=what)
        assert f'{what} "{source}"' in told and LINKS[source] in told


def test_paths_of_buckets_are_left_to_epath(monkeypatch):
    asked = []
    exists = lambda path: asked.append(str(path)) or True
    for scheme in "gs", "s3":
        monkeypatch.setattr(
            type(sources.epath.Path(f"{scheme}://b/x")), "exists", exists
        )
        assert str(sources.resolve(f"{scheme}://b/x")) == f"{scheme}://b/x"
    assert asked == ["gs://b/x", "s3://b/x"]


def test_a_name_that_is_nearly_right(tmp_path):
    write(tmp_path / "sd3_medium.safetensors")
    told = said(sources.resolve, f"{tmp_path}/sd3-medium.safetensors")
    assert told.endswith(f'did you mean "{tmp_path}/sd3_medium.safetensors"?')
    assert 'weights "": expected a file, a folder' in said(sources.resolve, "")


def test_a_comma_in_a_path(tmp_path):
    a, b, plain = (tmp_path / name for name in ("a,b.safetensors", "x,y,z", "c"))
    for path in (a, plain):
        write(path)
    (b / "d,e").mkdir(parents=True)
    split = lambda *paths: sources.split(",".join(map(str, paths)))
    assert split(a) == [str(a)] and split(plain, a) == [str(plain), str(a)]
    assert split(b / "d,e", a, plain) == [str(b / "d,e"), str(a), str(plain)]
    assert split(b, " o/n ", a) == [str(b), "o/n", str(a)]
    assert sources.split([a, "o/n,x"]) == [str(a), "o/n,x"] and sources.split(a) == [
        str(a)
    ]
    for given in ([plain, tmp_path / "no,such"], f"{plain},{tmp_path}/no_such"):
        told = said(bundle_loading.load, given, mesh=sharding.make_mesh())
        assert told.startswith(f'weights "{tmp_path}/no') and str(plain) not in told


# The hub, with a function of ours in the place of its client's

REPOSITORY = """
.gitattributes LICENSE.md README.md model_index.json sd3.5_large.safetensors
sd3.5_large_fp8.safetensors text_encoders/clip_g.safetensors
text_encoders/clip_l.safetensors text_encoders/t5xxl_fp16.safetensors
scheduler/scheduler_config.json text_encoder/config.json
text_encoder/model.fp16.safetensors text_encoder/model.safetensors
text_encoder/pytorch_model.bin text_encoder_2/config.json
text_encoder_2/model.fp16.safetensors text_encoder_2/model.safetensors
text_encoder_3/config.json text_encoder_3/model-00001-of-00002.safetensors
text_encoder_3/model-00002-of-00002.safetensors
text_encoder_3/model.fp16-00001-of-00002.safetensors
text_encoder_3/model.fp16-00002-of-00002.safetensors
text_encoder_3/model.safetensors.index.fp16.json
text_encoder_3/model.safetensors.index.json tokenizer/merges.txt
tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json
tokenizer/vocab.json tokenizer_3/spiece.model tokenizer_3/tokenizer.json
transformer/config.json transformer/diffusion_pytorch_model-00001-of-00002.safetensors
transformer/diffusion_pytorch_model-00002-of-00002.safetensors
transformer/diffusion_pytorch_model.safetensors.index.json vae/config.json
vae/diffusion_pytorch_model.safetensors
""".split()
FP16 = {name for name in REPOSITORY if "fp16" in name and "/model" in name}
OTHERS = {
    *(name for name in REPOSITORY if "/" not in name and name != "model_index.json"),
    *(name for name in REPOSITORY if name.startswith("text_encoders/")),
    "text_encoder/pytorch_model.bin",
}


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """What is fetched of a repository, into a folder; it holds `files`."""
    asked = []

    def snapshot_download(
        repo_id, *, revision, allow_patterns, ignore_patterns, local_files_only
    ):
        asked.append((repo_id, revision))
        for name in filter_repo_objects(
            snapshot_download.files,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}")
        return str(tmp_path)

    snapshot_download.files = REPOSITORY
    snapshot_download.asked = asked
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return snapshot_download


def fetched(folder):
    return {str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file()}


def test_of_a_repository_only_the_diffusers_folder_is_fetched(repository, tmp_path):
    found = sources.locate("owner/name@v1")
    assert str(found.path) == str(tmp_path) and found.variant == ""
    assert repository.asked == [("owner/name", "v1")]
    assert fetched(tmp_path) == set(REPOSITORY) - OTHERS - FP16


def test_a_variant_is_fetched_and_what_has_none_beside_it(repository, tmp_path):
    assert sources.locate("owner/name:fp16") == (tmp_path, "fp16")
    assert repository.asked == [("owner/name", None)] * 2  # the second for the others
    plain = {x.replace("model.fp16", "model") for x in FP16 if "index" not in x}
    plain |= {"text_encoder_3/model.safetensors.index.json"}
    assert fetched(tmp_path) == set(REPOSITORY) - OTHERS - plain


def test_of_a_repository_of_tokenizers_no_weights_are_fetched(repository, tmp_path):
    sources.resolve("owner/name", tokenizers.WANTED, label="tokenizers")
    assert fetched(tmp_path) == {x for x in REPOSITORY if x.startswith("tokenizer")}


def test_a_repository_of_one_component(repository, tmp_path):
    kept = {"config.json", "diffusion_pytorch_model.safetensors"}
    repository.files = [*kept, "diffusion_pytorch_model.bin", "other.safetensors"]
    sources.locate("owner/name")
    assert fetched(tmp_path) == kept


def test_a_repository_of_single_files_wants_one_named(repository):
    repository.files = ["a.safetensors", "README.md"]
    told = said(sources.locate, "owner/name")
    assert 'name one of its files, such as "owner/name/FILE.safetensors"' in told


@pytest.mark.parametrize("call", [sources.resolve, sources.locate])
def test_one_file_of_a_repository(call, monkeypatch, tmp_path):
    asked = []

    def hf_hub_download(repo_id, filename, *, revision, local_files_only):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / "a.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    for source in "o/n/b/a.safetensors", "o/n@v1/b/a.safetensors":
        assert str(tmp_path / "a.safetensors") in str(call(source))
    assert asked == [("o/n", "b/a.safetensors", x) for x in (None, "v1")]


@pytest.mark.parametrize("source", ["o/n", "o/n:fp16", "o/n@v1", "o/n/a.safetensors"])
@pytest.mark.parametrize("reachable", [True, False])
def test_what_the_hub_refuses_is_one_line(source, reachable, monkeypatch):
    def fails(*args, local_files_only, **options):
        assert local_files_only is not reachable  # else it tries for half a minute
        raise OSError("404\nand a long explanation")

    monkeypatch.setattr(hub, "_reachable", lambda: reachable)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    told = said(sources.locate, source, label="LoRA")
    assert told.startswith('LoRA "o/n') and "no such local file or folder" in told
    assert told.endswith("refuses it: 404") if reachable else "be reached" in told


def test_a_gated_repository_says_how_to_get_in(monkeypatch):
    def fails(*args, **options):
        kind = huggingface_hub.errors.GatedRepoError
        raise kind.__new__(kind, "401 Client Error.")  # without a response

    monkeypatch.setattr(hub, "_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    told = said(sources.locate, "o/n", label="model")
    assert "accept its licence on huggingface.co/o/n, then run `hf auth" in told


def test_a_variant_of_a_path(tmp_path):
    write(tmp_path / "model.fp16.safetensors")
    assert sources.locate(f"{tmp_path}:fp16") == (tmp_path, "fp16")
    assert 'has no variants; remove ":fp16"' in said(
        sources.resolve, f"{tmp_path}:fp16"
    )
    told = said(opened, f"{tmp_path}/model.fp16.safetensors:fp16")
    assert "has no variants; remove :fp16" in told
