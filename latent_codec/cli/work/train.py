"""`latent-codec train`."""

import argparse
import sys

from latent_codec.cli.progress import loading_libraries, showing
from latent_codec.training.config import preset_names, preset_notes


def run(args: argparse.Namespace) -> int:
    if args.list:
        for name in preset_names():
            notes = preset_notes(name)
            print(f"{name}\n    {notes.summary}.\n    Duration: {notes.duration}.")
        return 0
    # Not at the top: the list, and the processes that are started first, need no torch.
    from latent_codec.training.processes import start_missing_processes

    start_missing_processes()
    with loading_libraries():
        from latent_codec.training.run import train

    trained = train(
        args.preset,
        args.data,
        args.run_folder,
        settings=args.set,
        codec=args.codec,
        pipeline=args.for_pipeline,
        reference=args.reference,
        target=args.target,
        split=args.split,
        stream=args.stream,
        minutes=args.minutes,
        trackers=args.trackers,
        showing=showing,
    )
    if not trained.is_main_process:
        return 0
    if not trained.finished:
        print(f"wrote {trained.folder}: the averaged weights so far", file=sys.stderr)
        print(f"stopped at step {trained.step} of {trained.num_steps}; the same command goes on from there.")
        return 128 + trained.signal if trained.signal else 0
    if trained.was_finished:
        print(f"{trained.folder.parent} is finished, all {trained.step} steps of it.", file=sys.stderr)
    print(trained.folder)
    return 0
