"""How fast a training step is, where its time goes, and how near it comes to what the machine can do.

Real steps of real recipes, with the loop's own functions (benchmarks/steps.py): batches of uint8 images that lie on the
device already, or with --data the real loader over shards. Variants take turns within one process, round by round:

    images/s  median over rounds (min - max)
    MFU       useful operations per second against the fastest matrix product of the same precision in the same rounds;
              operations are counted by mim/planning/footprint.py: what the recipe needs, a multiply-add being two
    memory    on a GPU the most that torch held for this variant; on a CPU the most that the process has held so far
    split     seconds of a step: data (waiting for the loader, by the host's clock), transfer (to the device, uint8 to
              float, colours), frozen networks (tokenizer, teacher), forward, backward, optimizer (clip, update)

The split of a GPU comes from events that stand in its stream; no step waits for them. `--profile` runs a few more steps
of each variant in torch's profiler and names the operators (on a GPU the kernels) that cost most.

WORK is an objective at a --size, or a recipe: mae, simmim, mpp, beit, beit2, classify, tokenize (dVAE), vqkd; with
`-codes` (beit-codes) the codes are given, as with a token cache.

    python -m benchmarks.throughput                                         # all objectives, tiny, on a CPU
    python -m benchmarks.throughput mae beit-codes --size base --precision bf16 no --json base.json
    python -m benchmarks.throughput mae --size large --batch-size 256 --compile off on --profile       # on a GPU
    python -m benchmarks.throughput mae --size large --batch-size 256 --data shards/in1k --set train.workers=16
    python -m benchmarks.throughput simmim_swinb_in1k --batch-size 8
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import rounds, steps
from mim.config import ConfigError

OBJECTIVES = ("mae", "simmim", "mpp", "beit", "beit-codes", "beit2", "classify", "tokenize")
ROWS = {"cpu": {"tiny": 64}, "cuda": {"tiny": 1024, "small": 512, "base": 256, "large": 128, "huge": 64}}
FEWEST = 16  # images of a step where ROWS says nothing
COMPILE = {"off": "false", "on": "true"}
TOP = 12  # operators of a profile


class Variant:
    """One line of the table: a training, and a turn of it."""

    def __init__(self, wanted: steps.Work, given: argparse.Namespace, device: torch.device) -> None:
        self.work, self.device, self.count = wanted, device, given.steps
        self.rows = given.batch_size or ROWS.get(device.type, {}).get(given.size, FEWEST)
        before = self._allocated()
        self.training = steps.Training(
            wanted, rows=self.rows, compile_mode=given.compile_mode if wanted.cfg.train.compile is not False else None,
            shards=given.data is not None,
        )  # fmt: skip
        self.phases = rounds.Phases(device)
        began = time.perf_counter()
        for _ in range(given.warmup):
            self.loss = self.training.step()
        rounds.synchronize(device)
        self.warmup_seconds = time.perf_counter() - began
        self.own = self._allocated() - before  # bytes that stay between steps
        self.peak, self.split = 0, list[dict[str, float]]()

    def turn(self) -> float:
        """Seconds of a step, from `count` of them; the split and the memory are noted."""
        others = self._allocated() - self.own
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rounds.synchronize(self.device)
        began, waited = time.perf_counter(), 0.0
        for _ in range(self.count):
            self.loss = self.training.step(self.phases)
            waited += self.training.waited
        rounds.synchronize(self.device)
        seconds = (time.perf_counter() - began) / self.count
        self.split.append({n: s / self.count for n, s in (self.phases.read() | {"data": waited}).items()})
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)
        else:
            self.peak = rounds.resident()
        return seconds

    def costs(self) -> list[dict[str, Any]]:
        """The operators, or on a GPU the kernels, of `count` steps that took most of the time by themselves."""
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as found:
            for _ in range(self.count):
                self.training.step()
            rounds.synchronize(self.device)
        return most_expensive(found.key_averages(), on_gpu=on_gpu, steps=self.count)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0


def most_expensive(events: Any, *, on_gpu: bool, steps: int) -> list[dict[str, Any]]:
    """The TOP entries of a profile by their own time: name, share of all, milliseconds and calls per step."""
    kernels = torch.autograd.DeviceType.CUDA
    chosen = [event for event in events if not on_gpu or event.device_type == kernels]
    times = [(e.self_device_time_total if on_gpu else e.self_cpu_time_total, e) for e in chosen]
    total = sum(microseconds for microseconds, _ in times) or 1.0
    times.sort(key=lambda pair: -pair[0])
    return [
        {"name": e.key, "share": t / total, "ms_per_step": t / 1000 / steps, "calls_per_step": e.count / steps}
        for t, e in times[:TOP]
    ]


# ---- what is measured ----------------------------------------------------------------------------


def works(given: argparse.Namespace) -> list[tuple[str, steps.Work]]:
    """Every objective or recipe at every precision, compiled and not, with its name in the table."""
    found = []
    data = [f"data.path={given.data}"] if given.data else []
    for name, precision, compiled in itertools.product(given.work, given.precision, given.compile or [None]):
        machine = {"precision": precision, "cpu": str(given.cpu).lower()}
        machine |= {"compile": COMPILE[compiled]} if compiled else {}
        wanted = steps.work(name, given.size, [*data, *given.set], **machine)
        shown = f"{wanted.name}, {'fp32' if precision == 'no' else precision}"
        found.append((shown + (f", compile {compiled}" if compiled else ""), wanted))
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Build all variants, let them and the matrix products take turns, and work out the figures."""
    device = rounds.device_of(given.cpu)
    variants: dict[str, Variant] = {}
    flops: dict[str, float] = {}
    peaks: dict[str, rounds.Peak] = {}
    for name, wanted in works(given):
        rounds.say(f"{name}: building and {given.warmup} steps of warm-up")
        variants[name] = found = Variant(wanted, given, device)
        flops[name] = steps.flops(wanted, found.rows)
        precision = wanted.cfg.train.precision
        peaks.setdefault(precision, rounds.Peak(device, precision, shapes(found)))
        rounds.say(f"{name}: {flops[name] / 1e9:.3f} GFLOP per image, warm after {found.warmup_seconds:.1f} s")
    turns = {name: variant.turn for name, variant in variants.items()} | {f"peak {k}": p for k, p in peaks.items()}
    seconds = rounds.interleaved(turns, given.rounds, tell=rounds.say)
    rows = {}
    for name, variant in variants.items():
        peak = seconds[f"peak {variant.work.cfg.train.precision}"]
        rows[name] = row_of(variant, seconds[name], flops[name], peak)
        if given.profile:
            rows[name]["profile"] = variant.costs()
    return {
        **rounds.machine(device),
        "size": given.size,
        "rounds": given.rounds,
        "steps": given.steps,
        "peak": {key: vars(rounds.Spread.of(seconds[f"peak {key}"])) for key in peaks},
        "variants": rows,
    }


def shapes(variant: Variant) -> list[tuple[int, int, int]]:
    """Matrix products of the sizes of a variant's encoder, or of a square where it has none."""
    encoder = variant.training.built.encoder
    if encoder is None:
        return rounds.peak_shapes(variant.device, 2048, 512)
    h, w = encoder.grid(variant.training.built.views.sizes[0])
    return rounds.peak_shapes(variant.device, variant.rows * h * w, encoder.width)


def row_of(variant: Variant, seconds: list[float], flops: float, peak: list[float]) -> dict[str, Any]:
    """The figures of a variant."""
    names = [name for name in steps.PHASES if any(name in split for split in variant.split)]
    medians = {n: rounds.Spread.of([split.get(n, 0.0) for split in variant.split]).median for n in names}
    return {
        "rows": variant.rows,
        "seconds": seconds,
        "images_per_s": vars(rounds.throughput(seconds, variant.rows)),
        "gflop_per_image": flops / 1e9,
        "mfu": vars(rounds.mfu(flops * variant.rows, seconds, peak)),
        "split_s": medians,
        "data_wait": medians["data"] / rounds.Spread.of(seconds).median,
        "memory_bytes": variant.peak,
        "warmup_s": variant.warmup_seconds,
        "loss": variant.loss.item(),
    }


# ---- table ---------------------------------------------------------------------------------------


def show(found: dict[str, Any]) -> None:
    """Print the figures as tables."""
    peaks = ", ".join(f"{key} {value['median'] / 1e9:.0f} GFLOP/s" for key, value in found["peak"].items())
    print(f"\n{found['size']}, {found.get('gpu', found['cpu'])}, {found['threads']} threads; matmul peak: {peaks}")
    phases = "".join(f"{name.replace('frozen networks', 'frozen'):>10}" for name in steps.PHASES)
    print(
        f"{'':34}{'batch':>6}{'images/s':>10} {'(min - max)':>21}{'GFLOP':>9}{'MFU':>7}{'GiB':>7}  ms of each:{phases}"
    )
    for name, row in found["variants"].items():
        speed, split = row["images_per_s"], row["split_s"]
        spread = f"({speed['low']:.2f} - {speed['high']:.2f})"
        parts = "".join(f"{split.get(phase, 0.0) * 1000:10.1f}" for phase in steps.PHASES)
        print(
            f"{name:34}{row['rows']:6}{speed['median']:10.2f} {spread:>21}{row['gflop_per_image']:9.3f}"
            f"{row['mfu']['median']:7.1%}{row['memory_bytes'] / 2**30:7.2f}{'':12}{parts}",
            flush=True,
        )
    for name, row in found["variants"].items():
        for number, cost in enumerate(row.get("profile", ())):
            if not number:
                print(f"\n{name}: own time of operators\n{'share':>7}{'ms/step':>10}{'calls':>8}")
            print(f"{cost['share']:7.1%}{cost['ms_per_step']:10.2f}{cost['calls_per_step']:8.1f}  {cost['name'][:90]}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    given = parse(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    found = measure(given)
    show(found)
    if given.json:
        rounds.write_json(given.json, found)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("work", nargs="*", default=list(OBJECTIVES), metavar="WORK", help="objectives or recipes (default: objectives)")
    add("--size", choices=["tiny", *steps.SIZES], help="of an objective (default: tiny on a CPU, base on a GPU)")
    add("--batch-size", type=int, help="images per step (default: 64 for tiny, else 16; more on a GPU)")
    add("--precision", nargs="+", choices=list(rounds.DTYPES), help="(default: no on a CPU, bf16 on a GPU)")
    add("--compile", nargs="+", choices=list(COMPILE), help="blocks, off or on or both (default: as a run would)")
    add("--compile-mode", metavar="MODE", help="of torch.compile, e.g. max-autotune-no-cudagraphs")
    add("--data", metavar="SHARDS", help="dataset folder: batches come from the real loader")
    add("--rounds", type=int, default=5, help="after the warm-up (default: %(default)s)")
    add("--steps", type=int, default=3, help="of a turn (default: %(default)s)")
    add("--warmup", type=int, default=2, help="steps (default: %(default)s)")
    add("--threads", type=int, help="of torch (default: its own choice)")
    add("--cpu", action="store_true", help="although there is a GPU")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of all recipes")
    add("--profile", action="store_true", help="name the operators that cost most")
    add("--json", type=Path, help="file for the figures")
    given = parser.parse_args(arguments)
    on_gpu = rounds.device_of(given.cpu).type == "cuda"
    given.size = given.size or ("base" if on_gpu else "tiny")
    given.precision = given.precision or (["bf16"] if on_gpu else ["no"])
    return given


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"throughput: {error}") from error
