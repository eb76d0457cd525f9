"""Files of textual inversion that do not say one thing, without a model."""

import numpy as np
import pytest
import safetensors.numpy

from sd3_jax.errors import UserError
from sd3_jax.weights import embedding_files

WIDTHS = {"clip_l": 8, "clip_g": 12, "t5": 16}
ROW = {name: np.ones((2, width), np.float32) for name, width in WIDTHS.items()}


def write(path, **tensors):
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "names, encoder",
    [
        (("t5", "t5xxl"), "t5"),
        (("clip_l", "text_encoders_0"), "clip_l"),
        (("clip_g", "text_encoders_1"), "clip_g"),
    ],
)
def test_two_names_of_one_encoder(names, encoder, tmp_path):
    file = write(tmp_path / "x.safetensors", **dict.fromkeys(names, ROW[encoder]))
    words = f"are all for {encoder}; expected one"
    with pytest.raises(UserError, match=words) as error:
        embedding_files.read(str(file), WIDTHS)
    assert all(name in str(error.value) for name in names)


def test_two_files_of_a_folder_for_one_encoder(tmp_path):
    for end in "", "_1":
        write(tmp_path / f"learned_embeds{end}.safetensors", cat=ROW["clip_l"])
    with pytest.raises(UserError, match="of cat for clip_l, as learned_embeds"):
        embedding_files.read(str(tmp_path), WIDTHS)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.bool_])
@pytest.mark.parametrize("name", ["clip_l", "<cat>", "emb_params"])
def test_vectors_are_floats(name, dtype, tmp_path):
    file = write(tmp_path / "x.safetensors", **{name: ROW["clip_l"].astype(dtype)})
    with pytest.raises(UserError, match=f"is of {np.dtype(dtype)}; expected floats"):
        embedding_files.read(str(file), WIDTHS)
