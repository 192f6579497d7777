"""`quantkit bench-kernels`: how fast the kernels are beside the float layer, and their tiles tuned for this card."""

from typing import Any

import click

from quantkit.cli.options import CONTEXT, device_option, json_option, say
from quantkit.errors import QuantkitError


@click.command("bench-kernels", context_settings=CONTEXT)
@click.option(
    "--shapes",
    multiple=True,
    metavar="NAME|NxK",
    help="Llama-3-8B, Llama-3-70B, Qwen3-32B, Mixtral-8x7B, NxK, or NxKxE for E experts; repeatable, or with commas. "
    "[default: Llama-3-8B on a GPU, 4096x4096 on a CPU]",
)
@click.option(
    "--tokens",
    multiple=True,
    metavar="M",
    help="Tokens of a call; repeatable, or with commas. [default: 1,4,16,64, and on a GPU 512,2048,8192 too]",
)
@click.option("--ops", multiple=True, metavar="OP", help="Only these; repeatable, or with commas. [default: all]")
@click.option("--list", "as_list", is_flag=True, help="Print the names of ops and of models, and measure nothing.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of the activations.",
)
@click.option(
    "--seconds", type=click.FloatRange(0.01, 60), default=0.5, show_default=True, help="About how long a line takes."
)
@click.option("--hot", is_flag=True, help="Let weights stay in the cache: repeat a layer instead of going round many.")
@click.option("--plot", metavar="FILE", help="Write a roofline plot, as .png, .svg or .pdf; needs matplotlib.")
@click.option(
    "--tune",
    is_flag=True,
    help="Try the shipped tiles on this GPU and keep the fastest in your own table, which kernels read first.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights and activations.")
@device_option
@json_option
def command(as_list: bool, as_json: bool, device: str, **options: Any) -> None:
    """Measure how fast the kernels of linear layers are, beside the float layer and other libraries, in one run.

    A line is an op, a shape and a number of tokens M. Every result is checked against float64 first, and what is wrong
    gets no time. On a GPU a time is the median of replays of a CUDA graph of launches that go round operands larger
    than the cache, with the tenth and the ninetieth of a hundred; each op takes turns with the bfloat16 layer, and its
    ratio is of these turns; its share of the roofline is the least time that bytes and operations leave, at the card's
    bandwidth and bfloat16 product in this run, over the time. On a CPU a time is that of the fastest call, and the
    ratio is to the faster of float32 and bfloat16.
    """
    import json
    from pathlib import Path

    import torch
    from quantkit_kernels.benchmarks import cpu_clock, roofline, shapes, table, tuning

    from quantkit.devices import pick_device

    place = pick_device(device)
    if as_list:
        say(
            "\n".join(
                [
                    "ops",
                    *(f"  {name}" for name in table.op_names(place)),
                    "models",
                    *(f"  {name}" for name in shapes.MODELS),
                ]
            )
        )
        return
    if options["tune"]:
        tuning.require_cuda(place)
    if options["plot"] is not None:
        roofline.require_plots()
    on_gpu = place.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(place)
    words = _words(options["ops"])
    sizes = shapes.parsed(_words(options["shapes"]) or (table.GPU_SHAPES if on_gpu else table.CPU_SHAPES))
    tokens = _numbers(_words(options["tokens"])) or list(table.TOKENS if on_gpu else table.CPU_TOKENS)
    cache = torch.cuda.get_device_properties(place).L2_cache_size if on_gpu else cpu_clock.last_cache_bytes()
    bench = table.Bench(place, getattr(torch, options["dtype"]), options["seconds"], 0 if options["hot"] else cache)
    torch.manual_seed(options["seed"])
    if options["tune"]:
        _tune(bench, sizes, tokens, words, as_json)
        return
    heading = ""

    def show(record: dict[str, Any]) -> None:
        nonlocal heading
        if table.heading(record) != heading:
            heading = table.heading(record)
            say(f"\n{heading}")
        say(table.line(record))

    result = table.measure(bench, sizes, tokens, words, (lambda record: None) if as_json else show)
    say(json.dumps(result, indent=1) if as_json else "\n" + table.introduction(result))
    if options["plot"] is not None:
        roofline.plot(result, Path(options["plot"]))
    if result["failed"]:
        raise QuantkitError(
            f"these ops gave a wrong result or did not run, and have no time: {'; '.join(result['failed'])}"
        )


def _tune(bench: Any, sizes: list[Any], tokens: list[int], words: list[str], as_json: bool) -> None:
    """Tune, say each choice as it is made, and where they were written."""
    import json

    from quantkit_kernels import configurations
    from quantkit_kernels.benchmarks import gpu_clock, tuning

    cases = tuning.tunable(words)
    facts = gpu_clock.machine(bench.device)
    records = tuning.tune(bench, sizes, tokens, cases, lambda record: None if as_json else say(tuning.line(record)))
    if not records:
        raise QuantkitError("there was nothing to tune: none of these ops asks a table on this GPU, choose other --ops")
    path = tuning.write(records, configurations.architecture(bench.device), facts)
    if as_json:
        say(json.dumps({"table": str(path), "machine": facts, "records": records}, indent=1))
    else:
        say(f"{len(records)} choices written to {path}, which kernels read first; delete it to undo this")


def _words(given: tuple[str, ...]) -> list[str]:
    """The words of a repeatable option, each of which may hold several with commas between them."""
    return [word.strip() for text in given for word in text.split(",") if word.strip()]


def _numbers(words: list[str]) -> list[int]:
    """The numbers of tokens that the words are."""
    for word in words:
        if not (word.isascii() and word.isdecimal() and int(word) > 0):
            raise QuantkitError(f"tokens is {word!r}: expected a whole number from 1, such as 16")
    return [int(word) for word in words]
