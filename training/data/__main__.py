"""Preparation of training data: split, filter, precompute, inspect; for avatars the last two.

Each command resumes where it was stopped. Several processes can share the work: --part 0 --parts 4
is the first of four. Exit codes: 0 done, 2 refused (with a reason on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from training.data.filter import PIECES, FilterSettings, run_filter
from training.data.inspect import CLIPS, choose_record, decode_sample, describe
from training.data.precompute import NEGATIVE_PROMPT, EncoderFiles, run_precompute
from training.data.resumable_stage import Summary, Work, read_records, read_settings
from training.data.scores import LIMITS, Limit
from training.data.shots import SIZE_PRESETS, AvatarSource, Source, VideoSource
from training.data.split import SplitSettings, run_split
from turbotalk_core.cli.arguments import (
    Parser,
    find_device,
    parse_device,
    parse_sides,
    parse_threads,
    run,
)
from turbotalk_core.cli.console import say
from turbotalk_core.errors import RequestError
from turbotalk_core.geometry import check_size, count_latent_frames
from turbotalk_core.safe_io.paths import show


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    arguments = _make_parser().parse_args(argv)
    if getattr(arguments, "threads", None) is not None:
        torch.set_num_threads(arguments.threads)
    return run(lambda: say("\n".join(map(show, arguments.command(arguments))) + "\n"))


def _split(arguments: argparse.Namespace) -> list[str]:
    settings = SplitSettings(min_frames=arguments.min_frames, max_frames=arguments.max_frames)
    summary = run_split(
        arguments.videos, arguments.set, settings, _work(arguments), arguments.captions
    )
    return _report("videos", summary)


def _filter(arguments: argparse.Namespace) -> list[str]:
    settings = FilterSettings(
        face_detector=arguments.face,
        sync_network=arguments.sync,
        limits={**LIMITS, **dict(arguments.limit)},
    )
    summary = run_filter(arguments.videos, arguments.set, settings, _work(arguments))
    records = read_records(arguments.set / PIECES).values()
    tiers = [record["tier"] for record in records if "tier" in record]
    lines = _report("pieces", summary)
    return [*lines, *(f"tier {tier}: {tiers.count(tier)}" for tier in sorted(set(tiers)))]


def _precompute(arguments: argparse.Namespace) -> list[str]:
    files = EncoderFiles(
        vae=arguments.vae,
        audio=arguments.encoder,
        image=arguments.image_encoder,
        text=arguments.text_encoder,
        tokenizer=arguments.tokenizer,
    )
    summary = run_precompute(
        _find_source(arguments),
        arguments.out,
        files,
        _work(arguments),
        device=arguments.device,
        shard_samples=arguments.shard_samples,
        negative_prompt=arguments.negative_prompt,
    )
    return _report("shots", summary)


def _find_source(arguments: argparse.Namespace) -> Source:
    for frames in arguments.frames:
        count_latent_frames(frames)
    draws_avatars = arguments.avatars + arguments.pairs > 0
    if draws_avatars == (arguments.videos is not None):
        raise RequestError(
            "give either --videos and --set, or --avatars and --pairs: a prepared set has one kind"
        )
    if draws_avatars:
        return AvatarSource(
            arguments.avatars,
            arguments.pairs,
            split=arguments.split,
            short_frames=min(arguments.frames),
            long_frames=max(arguments.frames),
            long_every=arguments.long_every,
        )
    if arguments.set is None:
        raise RequestError("got --videos without --set; name the folder that split and filter made")
    sizes = [size for sizes in arguments.size for size in sizes]
    for height, width in sizes:
        check_size(height, width)
    folder = arguments.set / PIECES
    return VideoSource(
        arguments.videos,
        pieces=read_records(folder),
        fingerprint=read_settings(folder)["fingerprint"],
        sizes=sizes,
        clip_frames=arguments.frames,
    )


def _inspect(arguments: argparse.Namespace) -> list[str]:
    record = choose_record(arguments.prepared, arguments.key)
    lines = describe(record).split("\n")
    if arguments.mp4 is not None:
        if arguments.vae is None:
            raise RequestError("got --mp4 without --vae; give the VAE that the set was made with")
        num_frames = decode_sample(
            arguments.prepared,
            record,
            arguments.vae,
            arguments.mp4,
            clip=arguments.clip,
            device=arguments.device,
        )
        lines.append(f"{arguments.mp4}: {num_frames} frames of the {arguments.clip} clip")
    return lines


def _report(what: str, summary: Summary) -> list[str]:
    first, *further = summary.lines()
    return [f"{what}: {first}", *further]


def _work(arguments: argparse.Namespace) -> Work:
    return Work(
        part=arguments.part,
        parts=arguments.parts,
        overwrites=arguments.overwrite,
        retries=arguments.retry,
    )


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m training.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_split(commands.add_parser("split", help="find the scenes of videos"))
    _add_filter(commands.add_parser("filter", help="judge the pieces of scenes"))
    _add_precompute(commands.add_parser("precompute", help="encode shots into a prepared set"))
    _add_inspect(commands.add_parser("inspect", help="turn a prepared sample into a video again"))
    return parser


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_split)
    parser.add_argument(
        "--videos", type=Path, required=True, help="folder of videos (docs/training.md)"
    )
    parser.add_argument("--set", type=Path, required=True, help="folder to write scenes into")
    parser.add_argument(
        "--captions",
        type=Path,
        help="CSV or JSONL with columns file and caption; default: a .txt beside each video",
    )
    defaults = SplitSettings()
    parser.add_argument(
        "--min-frames", type=int, default=defaults.min_frames, help="of a piece (%(default)s)"
    )
    parser.add_argument(
        "--max-frames", type=int, default=defaults.max_frames, help="of a piece (%(default)s)"
    )
    _add_work(parser)


def _add_filter(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_filter)
    parser.add_argument("--videos", type=Path, required=True, help="folder that was split")
    parser.add_argument("--set", type=Path, required=True, help="folder that split made")
    parser.add_argument("--face", type=Path, help="face detector, .pt2 (docs/training.md)")
    parser.add_argument("--sync", type=Path, help="sync judge, .pt2 (docs/training.md)")
    parser.add_argument(
        "--limit",
        type=_parse_limit,
        action="append",
        default=[],
        metavar="SCORE=GOOD,FAIR",
        help=f"another limit for one of {', '.join(LIMITS)}",
    )
    _add_work(parser)


def _add_precompute(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_precompute)
    parser.add_argument("--out", type=Path, required=True, help="prepared set to make or go on")
    videos = parser.add_argument_group("recorded videos")
    videos.add_argument("--videos", type=Path, help="folder that was split")
    videos.add_argument("--set", type=Path, help="folder that filter made")
    videos.add_argument(
        "--size",
        type=_parse_sizes,
        nargs="+",
        default=[((640, 640),)],
        metavar="WxH",
        help="sizes, of which each piece takes the one nearest to its shape (640x640), or "
        f"{' or '.join(SIZE_PRESETS)}: all sizes of InfiniteTalk",
    )
    avatars = parser.add_argument_group("the synthetic set")
    avatars.add_argument("--avatars", type=int, default=0, help="seeds 0 to this, exclusive")
    avatars.add_argument("--pairs", type=int, default=0, help="seeds 0 to this, exclusive")
    avatars.add_argument("--split", choices=("train", "heldout"), default="train")
    avatars.add_argument(
        "--long-every",
        type=int,
        default=3,
        help="one avatar in this many has the longest clips, the rest the shortest; 0: none (3)",
    )
    models = parser.add_argument_group("models")
    models.add_argument("--vae", type=Path, required=True, help="video VAE")
    models.add_argument("--encoder", type=Path, required=True, help="audio encoder")
    models.add_argument("--image-encoder", type=Path, help="CLIP, for a model with an image branch")
    models.add_argument("--text-encoder", type=Path, help="umT5, for captions")
    models.add_argument(
        "--tokenizer", type=Path, help="spiece.model, where it is not inside of --text-encoder"
    )
    models.add_argument(
        "--negative-prompt",
        default=NEGATIVE_PROMPT,
        help="with --text-encoder, embedded once for all (InfiniteTalk's)",
    )
    parser.add_argument(
        "--frames",
        type=int,
        nargs="+",
        default=[81],
        metavar="N",
        help="lengths of clips, 4n + 1; a piece takes the longest that fits (81)",
    )
    parser.add_argument(
        "--shard-samples", type=int, default=16, help="shots per shard, and in memory (%(default)s)"
    )
    _add_machine(parser)
    _add_work(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_inspect)
    parser.add_argument("prepared", type=Path, help="prepared set")
    parser.add_argument("--key", help="of the sample; default: the first")
    parser.add_argument("--clip", choices=CLIPS, default=CLIPS[0], help="(%(default)s)")
    parser.add_argument("--mp4", type=Path, help="video to write; default: none")
    parser.add_argument("--vae", type=Path, help="the VAE that the set was made with")
    _add_machine(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=parse_device, default=find_device(), help="(%(default)s)")
    parser.add_argument("--threads", type=parse_threads, help="CPU threads of the networks")


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", type=int, default=0, help="of several processes, which one")
    parser.add_argument("--parts", type=int, default=1, help="how many processes share the work")
    parser.add_argument(
        "--overwrite", action="store_true", help="throw away what was made with other settings"
    )
    parser.add_argument("--retry", action="store_true", help="try again what was skipped")


def _parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    if text in SIZE_PRESETS:
        return SIZE_PRESETS[text]
    width, height = parse_sides(text)
    return ((height, width),)


def _parse_limit(text: str) -> tuple[str, Limit]:
    name, _, numbers = text.partition("=")
    try:
        good, fair = (float(number) for number in numbers.split(","))
        return name, Limit(good=good, fair=fair, is_most=LIMITS[name].is_most)
    except (KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; give one of {', '.join(LIMITS)} and two numbers, as in side=256,128"
        ) from error


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(main())
