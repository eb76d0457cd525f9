"""Download from the Hugging Face hub; source_names parses the names."""

import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence

from etils import epath

from sd3_jax.data import tokenizers
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.weights.components import COMPONENTS
from sd3_jax.weights.source_names import Name

INDEX = "model_index.json"


def weights(stem: str, variant: str = "") -> list[str]:
    """Patterns of one component's file, its shards and its index, for a variant."""
    # Libraries have put the variant in different places over time.
    v, shard = f".{variant}" if variant else "", "-?????-of-?????"  # five digits
    ends = f"{v}.safetensors", f"{v}{shard}.safetensors", f"{shard}{v}.safetensors"
    index = (
        f"{v}.safetensors.index.json",
        f".safetensors{v}.index.json",
        f".safetensors.index{v}.json",
    )
    # Without a variant some patterns are equal.
    return list(dict.fromkeys(stem + end for end in ends + index))


def of_model(variant: str = "") -> list[str]:
    """Patterns of files that a diffusers folder or one component needs."""
    # Neither what lies beside them for other programs, nor other variants.
    patterns = [INDEX, "config.json", "scheduler/*.json", *tokenizers.WANTED]
    for stem in dict.fromkeys(x.stem for x in COMPONENTS.values()):
        patterns += weights(stem, variant)
    for component in COMPONENTS.values():
        patterns.append(f"{component.folder}/config.json")
        patterns += weights(f"{component.folder}/{component.stem}", variant)
    return patterns


def fetch(
    name: Name, wanted: Sequence[str] | None, unwanted: Sequence[str], label: str
) -> epath.Path:
    """Local path of the downloaded folder, or of the file that `name` names.

    `wanted` are patterns of files, by default those of a model; `unwanted` patterns are
    left out. `label` begins messages, such as "weights" or "LoRA".
    """
    if name.file:
        return _downloaded("hf_hub_download", name, label, filename=name.file)
    patterns = of_model(name.variant) if wanted is None else list(wanted)
    folder = _folder(name, patterns, unwanted, label)
    if wanted is not None:
        return folder
    # Components with no weights of that variant, or only some: take the plain ones.
    if bare := list(_bare(folder)):
        more = [f"{x}/*.safetensors" for x in bare]
        more += [f"{x}/*.safetensors*.json" for x in bare]
        folder = _folder(name, more, unwanted, label)
    if not any((folder / x).exists() for x in (INDEX, "config.json")):
        raise UserError(
            f'{label} "{name.repo}": the repository has neither {INDEX} nor'
            " config.json; name one of its files, such as"
            f' "{name.repo}/FILE.safetensors"'
        )
    return folder


def _bare(folder: epath.Path) -> Iterable[str]:
    """Folders of components whose configuration came without weights."""
    for component in COMPONENTS.values():
        place = folder / component.folder
        if (place / "config.json").exists() and not any(
            path.name.endswith(".safetensors") for path in place.iterdir()
        ):
            yield component.folder


def _folder(name, patterns, unwanted, label) -> epath.Path:
    patterns = dict(allow_patterns=patterns, ignore_patterns=list(unwanted))
    return _downloaded("snapshot_download", name, label, **patterns)


def _downloaded(function: str, name: Name, label: str, **options) -> epath.Path:
    """The path that a function of huggingface_hub downloads to.

    UserError with what to do if it fails.
    """
    import huggingface_hub  # not needed for local paths
    from huggingface_hub.errors import RepositoryNotFoundError

    download = getattr(huggingface_hub, function)
    # Without a connection the hub's client retries for half a minute, even for what it
    # has in its cache.
    offline = not _reachable()
    try:
        options |= dict(revision=name.revision, local_files_only=offline)
        return epath.Path(download(name.repo, **options))
    except Exception as error:  # its errors have no common base
        lines = str(error).strip().splitlines() or [type(error).__name__]
        file = f"/{name.file}" if name.file else ""
        place = f'{label} "{name.repo}{file}"'
        message = f"{place}: no such local file or folder, and the hub"
        if offline:
            raise UserError(
                f"{message} cannot be reached, and it was not downloaded before"
            ) from None
        message += f" refuses it: {shown(lines[0], 200)}"
        # The hub answers for a private repository as for an absent one; the error for
        # a gated one is a subclass.
        if isinstance(error, RepositoryNotFoundError):
            message += (
                f"; if it is gated, accept its licence on huggingface.co/{name.repo},"
                " then run `hf auth login` or set HF_TOKEN"
            )
        raise UserError(message) from None


def _reachable() -> bool:
    """Whether the hub's host resolves; with a proxy, which resolves names, always."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True
