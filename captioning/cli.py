"""The user's commands: check params.yaml, caption images with a trained model, apply a recipe, clean up, recover.

python -m captioning check
python -m captioning caption data/models/efficientnet_lite0-lstm photo.jpg
python -m captioning recipe recipes/flickr8k.yaml
python -m captioning clean
python -m captioning heal
python -m captioning checkpoints list
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from captioning import paths, stage


def caption_images(model: Path, images: list[Path], num_beams: int, max_length: int) -> list[str]:
    """Captions image files with nothing but a model directory.

    Raises:
        CapstanError: no model directory, or a file that is no image; names it.
    """
    import numpy as np
    import torch

    from captioning.beam_search import beam_search
    from captioning.models import load_captioner

    captioner = load_captioner(model, with_encoder=True)
    assert captioner.encoder is not None
    pixels = [captioner.encoder.transform.resize(_decode(path)) for path in images]
    with torch.inference_mode():
        features = captioner.encoder(torch.from_numpy(np.stack(pixels)))
        # Training saw features after float16 storage; so does this.
        found = beam_search(captioner.decoder, features.half().float(), num_beams, max_length, no_repeat_trigram=True)
    return [captioner.vocabulary.decode(hypothesis.token_ids) for hypothesis in found]


def _decode(path: Path) -> Any:
    from captioning.errors import CapstanError
    from captioning.images import decode_image

    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise CapstanError(f"{path} cannot be read: {error.strerror}") from error
    except CapstanError as error:
        raise CapstanError(f"{path}: {error}") from error


def merge(base: Any, overlay: Any) -> None:
    """Writes the overlay's values into the base in place: mappings merge, anything else replaces. So does a mapping of
    another `name` or `type` (an optimizer's, a decoder's): it has other keys."""
    for key, value in overlay.items():
        old = base.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not _differs_in_kind(old, value):
            merge(old, value)
        else:
            base[key] = value


def _differs_in_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return any(kind in new and new[kind] != old.get(kind) for kind in ("name", "type"))


def apply_recipe(recipe: Path, params: Path) -> None:
    """Merges a recipe into params.yaml, comments kept; nothing is written unless the result is valid.

    Raises:
        CapstanError: a file does not exist or is not YAML, or the recipe holds keys that params.yaml does not know.
    """
    import io

    from ruamel.yaml import YAML

    from captioning.errors import CapstanError
    from captioning.params import parse_params, read_params
    from captioning.storage import atomic_write

    if not recipe.is_file():
        known = ", ".join(str(path) for path in sorted(recipe.parent.glob("*.yaml"))) or "none here"
        raise CapstanError(f"{recipe} is missing; recipes: {known}")
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 150, True
    # a key without a value looks like one that was forgotten
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    tree = read_params(params, yaml)
    merge(tree, read_params(recipe))
    buffer = io.StringIO()
    yaml.dump(tree, buffer)
    parse_params(YAML(typ="safe", pure=True).load(buffer.getvalue()), f"{params} with {recipe}")
    with atomic_write(params) as temporary:
        temporary.write_text(buffer.getvalue(), "utf-8")


def stale_results(captioners: list[str], encoders: list[str]) -> list[Path]:
    """Results in the tree of captioners and encoders that params.yaml no longer lists."""
    keep = set(captioners)
    found = [p for p in paths.FEATURES.glob("*") if p.is_dir() and p.name not in encoders]
    for folder in (paths.MODELS, paths.CAPTIONS, paths.SCORES, paths.IMAGE_SCORES, paths.TRAINING):
        found += [p for p in folder.glob("*") if p.name != ".gitignore" and p.name.split(".")[0] not in keep]
    return sorted(found)


def clean(force: bool) -> None:
    """Names stale results; deletes them only with `force`."""
    import shutil

    from captioning.params import load_params

    params = load_params()
    stale = stale_results(params.captioners(), params.encoders)
    for path in stale:
        print(f"{'deleted' if force else 'stale'}: {path}")
        if force:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not stale:
        print("nothing is stale: every result belongs to a captioner in params.yaml")
    elif not force:
        print("delete them with `make clean FORCE=1`; DVC's cache keeps what it has until `dvc gc`")


def check() -> None:
    """Raises CapstanError where params.yaml is wrong, before DVC deletes the outs of a stage that would then fail."""
    from captioning.decoders import check_decoder
    from captioning.encoders import build_encoder, check_encoder
    from captioning.errors import CapstanError
    from captioning.params import parse_params, read_params
    from captioning.run_logs import check_installed

    tree = read_params()
    try:
        params = parse_params(tree)
    except CapstanError:
        for encoder in _listed_encoders(tree):  # of an unknown one, its nearest says more than that it lacks settings
            check_encoder(encoder)
        raise
    check_installed(params.logging)
    for encoder in params.encoders:
        check_encoder(encoder)
        trainable = params.encoder_settings[encoder].trainable
        if params.train.encoder_mode == "live" and trainable not in ("none", "all"):
            build_encoder(encoder, "random").choose_stages(trainable)
    for decoder in params.decoders:
        check_decoder(params.decoder_settings[decoder].type)


def _listed_encoders(tree: object) -> list[str]:
    """What `encoders` lists in a params.yaml that need not be right otherwise."""
    names = tree.get("encoders") if isinstance(tree, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def manage_checkpoints(action: str, force: bool) -> None:
    """Lists, verifies or prunes; raises CapstanError where a checkpoint is damaged."""
    from captioning import recovery_commands
    from captioning.errors import CapstanError
    from captioning.params import load_params

    num_damaged = 0
    if action == "list":
        lines = recovery_commands.list_checkpoints()
    elif action == "verify":
        lines, num_damaged = recovery_commands.verify_checkpoints()
    else:
        recovery = load_params().recovery
        min_free = int(recovery.min_free_gb * stage.GIGABYTE)
        lines = recovery_commands.prune_work(recovery.keep_work_days, min_free, force)
    print(*lines or ["none"], sep="\n")
    if num_damaged:
        raise CapstanError(
            f"{num_damaged} checkpoints are damaged; a resumed run sets them aside and takes an older one"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m captioning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="check params.yaml; `make repro` does so first")
    caption = commands.add_parser("caption", help="caption image files with a model directory")
    caption.add_argument("model", type=Path, help="a directory below data/models")
    caption.add_argument("images", type=Path, nargs="+")
    caption.add_argument("--num-beams", type=int, default=5)
    caption.add_argument("--max-length", type=int, default=30)
    recipe = commands.add_parser("recipe", help="merge a recipe into params.yaml")
    recipe.add_argument("recipe", type=Path, help="such as recipes/flickr8k.yaml")
    cleaner = commands.add_parser("clean", help="name results that no longer belong to params.yaml")
    cleaner.add_argument("--force", action="store_true", help="delete them")
    commands.add_parser("heal", help="mend DVC's lock files after a kill; `make repro` does so first")
    checkpoints = commands.add_parser("checkpoints", help="show, verify or prune work in progress")
    checkpoints.add_argument("action", choices=["list", "verify", "prune"])
    checkpoints.add_argument("--force", action="store_true", help="prune: all that no process uses, not only the old")
    return parser


def main() -> None:
    stage.run_command(_main)


def _main() -> None:
    args = build_parser().parse_args()
    if args.command == "check":
        check()
        print(f"{paths.PARAMS} is valid")
    elif args.command == "caption":
        captions = caption_images(args.model, args.images, args.num_beams, args.max_length)
        for path, caption in zip(args.images, captions, strict=True):
            print(f"{path}\t{caption}")
    elif args.command == "recipe":
        apply_recipe(args.recipe, paths.PARAMS)
        print(f"{paths.PARAMS} now follows {args.recipe}; see `git diff {paths.PARAMS}`, then run `dvc repro`")
    elif args.command == "heal":
        from captioning.recovery_commands import heal

        print(*heal() or ["nothing to mend"], sep="\n")
    elif args.command == "checkpoints":
        manage_checkpoints(args.action, args.force)
    else:
        clean(args.force)
