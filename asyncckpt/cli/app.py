"""The commands and their options. What a command does is imported when it is called: `ls` is to be quick."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from asyncckpt.cli.answers import EXIT_CODES, Answer, answering, parsed

_EPILOG = (
    "CHECKPOINT is RUN (its newest), RUN@100 or RUN/step-00000100; RUN is a directory or a URL. With --json each "
    "command prints one JSON object, errors included.\n\nExit codes:\n\n"
    + "\n\n".join(f"{code:3}  {text}" for code, text in EXIT_CODES.items())
    + "\n\n130  interrupted\n\n141  whoever read the output went away"
)
app = typer.Typer(
    help="Look at, check and manage checkpoints of asyncckpt; plan how often to save.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The directory of a run, or its URL.")]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="RUN for its newest, RUN@100, or RUN/step-00000100.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main() -> None:
    """The entry point."""
    gc.set_threshold(50_000)  # imports make no garbage
    try:
        app(prog_name="asyncckpt")
    finally:
        gc.freeze()  # nor need the interpreter look for any at its end: a tenth of the time that `ls` takes


@app.command()
@answering
def ls(run: RunArgument, as_json: JsonOption = False) -> Answer:
    """List the checkpoints of a run, oldest first."""
    from asyncckpt.cli import listing

    return listing.ls(run)


@app.command()
@answering
def show(
    checkpoint: CheckpointArgument,
    part: Annotated[str | None, typer.Option("--part", help="Only this part.")] = None,
    as_json: JsonOption = False,
) -> Answer:
    """Show what is in a checkpoint: parts, tensors, metrics, sizes."""
    from asyncckpt.cli import showing

    return showing.show(checkpoint, part)


@app.command()
@answering
def verify(
    checkpoint: CheckpointArgument,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint of the run.")] = False,
    as_json: JsonOption = False,
) -> Answer:
    """Read every byte of a checkpoint and check it."""
    from asyncckpt.cli import verifying

    return verifying.verify(checkpoint, every)


@app.command()
@answering
def path(
    checkpoint: CheckpointArgument,
    part: Annotated[str | None, typer.Argument(metavar="[PART]", help="The file of this part.")] = None,
    as_json: JsonOption = False,
) -> Answer:
    """Print where the files of a checkpoint are, or that of one part. No byte is verified."""
    from asyncckpt.cli import listing

    return listing.path(checkpoint, part)


@app.command()
@answering
def diff(
    before: Annotated[str, typer.Argument(metavar="CHECKPOINT")],
    after: Annotated[str, typer.Argument(metavar="CHECKPOINT")],
    as_json: JsonOption = False,
) -> Answer:
    """Say which parts, tensors and values differ between two checkpoints. Exit code 1: some do."""
    from asyncckpt.cli import differing

    return differing.compare(before, after)


@app.command()
@answering
def export(
    checkpoint: CheckpointArgument,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The file, or directory, to write.")],
    part: Annotated[
        str | None, typer.Option("--part", help="What to export [model; of torch and dcp, all parts].")
    ] = None,
    kind: Annotated[str, typer.Option("--format", help="safetensors, torch (torch.save) or dcp.")] = "safetensors",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Cast floating tensors to bf16, fp16 or fp32 [as they are].")
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", help="TARGET is a directory of files of at most so much, such as 5GB."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    as_json: JsonOption = False,
) -> Answer:
    """Write a part of a checkpoint to one safetensors file, or several with an index; or all of it as torch or dcp.

    Of a RUN, from its newest that has the part. Every byte is verified on the way. In a safetensors file tensors keep
    the names of their paths; other values have no place there. A file of torch.save and a directory of DCP hold values
    too, and are pickled.
    """
    from asyncckpt.cli import exporting, units

    size = None if max_shard_size is None else int(parsed("--max-shard-size", units.size, max_shard_size))
    return exporting.write(checkpoint, target, exporting.Wanted(part, kind, dtype, size, overwrite))


@app.command("import")
@answering
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The file or directory to read.")],
    run: Annotated[str, typer.Argument(metavar="RUN", help="The directory of a run: its next step; or RUN@100.")],
    kind: Annotated[
        str | None, typer.Option("--format", help="safetensors, torch (torch.save) or dcp [by what is there].")
    ] = None,
    part: Annotated[
        str | None, typer.Option("--part", help="The part that takes it all [its own keys, or model].")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read torch and dcp; tensors and plain values only.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the step if it is there.")] = False,
    as_json: JsonOption = False,
) -> Answer:
    """Make a checkpoint of a safetensors file (or several with an index), a file of torch.save, or a directory of DCP.

    It is read tensor by tensor, and committed as a training would: whole and durable, or not at all.
    """
    from asyncckpt.cli import importing

    return importing.read_in(source, run, kind, part, allow_pickle, overwrite)


@app.command()
@answering
def prune(
    run: RunArgument,
    keep_last: Annotated[int | None, typer.Option("--keep-last", help="Keep the newest N complete ones [1].")] = None,
    keep_every: Annotated[int | None, typer.Option("--keep-every", help="Keep steps that are multiples of N.")] = None,
    keep_within: Annotated[
        str | None, typer.Option("--keep-within", help="Keep those made so long before the newest, such as 12h.")
    ] = None,
    keep_best: Annotated[int | None, typer.Option("--keep-best", help="Keep the N best by --metric.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="What --keep-best goes by.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="Whether the least (min) or the greatest (max) is best.")] = "min",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; say what would stay and why.")] = False,
    as_json: JsonOption = False,
) -> Answer:
    """Delete checkpoints that no clause keeps, and say of each why it stays or goes.

    The newest complete one always stays, and so do pinned and damaged ones, and those that are being read.
    """
    from asyncckpt.cli import pruning, units

    within = None if keep_within is None else parsed("--keep-within", units.seconds, keep_within)
    clauses = pruning.Clauses(keep_last, keep_every, within, keep_best, metric, mode)
    return pruning.prune(run, clauses, dry_run)


@app.command()
@answering
def pin(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> Answer:
    """Keep a checkpoint from every policy, beside a live training too."""
    from asyncckpt.cli import pruning

    return pruning.pin(checkpoint, True)


@app.command()
@answering
def unpin(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> Answer:
    """Take back `pin`."""
    from asyncckpt.cli import pruning

    return pruning.pin(checkpoint, False)


@app.command()
@answering
def plan(
    state: Annotated[str, typer.Option("--state", help="Size of the state of the whole job, such as 280GB.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes of the job; each that fails ends it.")] = 1,
    failure_rate: Annotated[
        float | None, typer.Option("--failure-rate", help="Failures per node and day [6.5e-3, as published].")
    ] = None,
    mtbf: Annotated[str | None, typer.Option("--mtbf", help="Instead: time between failures of the job.")] = None,
    bandwidth: Annotated[
        str | None, typer.Option("--bandwidth", help="What one node writes at, such as 2GB/s [1GB/s].")
    ] = None,
    total_bandwidth: Annotated[
        str | None, typer.Option("--total-bandwidth", help="What the storage takes from all nodes.")
    ] = None,
    tax: Annotated[str | None, typer.Option("--tax", help="Training time that one save costs [1s].")] = None,
    restart: Annotated[
        str | None, typer.Option("--restart", help="From a failure until training goes on [5m].")
    ] = None,
    latency: Annotated[str, typer.Option("--latency", help="To committed, beside the time to write.")] = "0s",
    safe_after: Annotated[
        str | None, typer.Option("--safe-after", help="When failures can't take a save any more [committed].")
    ] = None,
    max_in_flight: Annotated[int, typer.Option("--max-in-flight", min=1, help="Saves not yet committed.")] = 2,
    step_time: Annotated[str, typer.Option("--step-time", help="Length of a training step.")] = "0s",
    max_overhead: Annotated[
        str | None, typer.Option("--max-overhead", help="Share of the time that saves may cost, such as 1%.")
    ] = None,
    interval: Annotated[str | None, typer.Option("--interval", help="Say what this interval would give, too.")] = None,
    simulate: Annotated[int, typer.Option("--simulate", min=0, help="Failures to simulate; 0 for none.")] = 1000,
    as_json: JsonOption = False,
) -> Answer:
    """Plan how often to save, by the published models and a simulation."""
    from asyncckpt.cli import planning, units

    def some(option: str, text: str | None) -> float | None:
        return None if text is None else parsed(option, units.seconds, text)

    def rate(option: str, text: str | None) -> float | None:
        return None if text is None else parsed(option, units.size, text)

    return planning.plan(
        planning.Question(
            state=parsed("--state", units.size, state),
            nodes=nodes,
            failure_rate=failure_rate,
            mtbf=some("--mtbf", mtbf),
            bandwidth=rate("--bandwidth", bandwidth),
            total_bandwidth=rate("--total-bandwidth", total_bandwidth),
            tax=some("--tax", tax),
            restart=some("--restart", restart),
            latency=parsed("--latency", units.seconds, latency),
            safe_after=some("--safe-after", safe_after),
            max_in_flight=max_in_flight,
            step=parsed("--step-time", units.seconds, step_time),
            max_overhead=None if max_overhead is None else parsed("--max-overhead", units.share, max_overhead),
            interval=some("--interval", interval),
            simulate=simulate,
        )
    )
