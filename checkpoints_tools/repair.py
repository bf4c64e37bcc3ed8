"""Restores what other programs lose when they save an exported folder again; the weights are not touched."""

import logging
from pathlib import Path

from checkpoints_tools.export_folder import CHECKSUMS, copy_code, write_checksums
from checkpoints_tools.tokenizer_files import add_token, keep_own_splitting
from sdlm_megatron.diffusion.settings import SDLMSettings, SettingError
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import read_json_object, regular_file, sha256, write_json
from sdlm_megatron.weights.hf_config import FAMILIES, SDLM_CLASS

log = logging.getLogger(__name__)


def repair(folder: Path) -> list[str]:
    """Restores code, classes and decoding settings of a re-saved SDLM folder; returns the names of changed files.

    `save_pretrained` drops custom_generate/ and the tokenizer's code, names our class under `architectures`, and moves
    rope_theta and rope_scaling to where older code does not look; the stock class also drops the model's code.

    Raises:
        CheckpointError: no config.json, one without the SDLM settings, which only the original folder has, another
            tokenizer, or a link, which would be written through. Nothing is written.
    """
    _refuse_links(folder)
    config = read_json_object(regular_file(folder, "config.json", CheckpointError), CheckpointError)
    old_generation = folder / "generation_config.json"
    if old_generation.exists():
        generation = read_json_object(old_generation, CheckpointError)
    else:
        ids = {f"{name}_token_id": config.get(f"{name}_token_id") for name in ("eos", "pad", "bos")}
        generation = {"do_sample": False} | {name: value for name, value in ids.items() if value is not None}
    try:
        sdlm = SDLMSettings.from_config_json(config, generation)
    except SettingError as error:
        raise CheckpointError(error.what, f"{folder / error.file}, field {error.field}", "correct it") from None
    if sdlm is None:
        raise CheckpointError(
            "config.json has no block_size: the settings of the training are lost, or it never was an SDLM folder",
            f"{folder / 'config.json'}, field block_size",
            "copy block_size, causal_attn, text_mask_token, text_mask_token_id from the original export's config.json",
        )
    if (model_type := str(config.get("model_type"))) not in FAMILIES:
        where, fix = f"{folder / 'config.json'}, field model_type", "copy it from the original export's config.json"
        raise CheckpointError(f"model_type {model_type!r:.60} is none of {', '.join(FAMILIES)}", where, fix)
    before = _contents(folder)
    if (folder / "tokenizer.json").is_file():
        if sdlm.mask_token:
            add_token(folder, sdlm.mask_token, sdlm.mask_token_id)
        keep_own_splitting(folder)
    copy_code(folder, model_type)
    config |= {"architectures": [FAMILIES[model_type].stock_class], "auto_map": {"AutoModelForCausalLM": SDLM_CLASS}}
    if isinstance(rope := config.get("rope_parameters"), dict):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        if "rope_theta" in rope:
            config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", scaling)
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    write_json(folder / "config.json", config)
    write_json(old_generation, generation | (sdlm.to_generation_json() | generation))  # in the order of the file
    after = _contents(folder)
    changed = sorted(name for name, content in after.items() if before.get(name) != content)
    changed += [] if (folder / CHECKSUMS).exists() else [CHECKSUMS]
    if changed:
        _update_checksums(folder, changed)
    return changed


def _update_checksums(folder: Path, changed: list[str]) -> None:
    """SHA256SUMS with the recorded sums of files that the repair did not write: new ones would hide damaged weights."""
    path = folder / CHECKSUMS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    parts = [line.partition("  ") for line in lines]
    recorded = {str(Path(name)): value for value, _, name in parts if name and str(Path(name)) not in changed}
    write_checksums(folder, recorded)
    for name, value in sorted(recorded.items()):
        if not (folder / name).is_file():
            log.warning("%s, which SHA256SUMS records, is missing", name)
        elif sha256(folder / name) != value:
            log.warning("%s is not the file that SHA256SUMS records: damaged, or changed after the export", name)


def _refuse_links(folder: Path) -> None:
    for path in (*folder.glob("*"), *folder.glob("custom_generate/*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            what = f"{path.name} is a link or no regular file: a repair could write to a place outside the folder"
            raise CheckpointError(what, str(path), "repair a copy of the folder: cp -rL FOLDER COPY")


def _contents(folder: Path) -> dict[str, bytes]:
    """Contents of the small files that a repair may change."""
    files = [*folder.glob("*.py"), *folder.glob("*.json"), *folder.glob("custom_generate/*.py")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
