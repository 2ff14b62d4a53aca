"""What Nsight Compute sees of each kernel: one layer of a decode step or of a prompt, run once after a warm-up.

    benchmarks/profile.sh                                             # all of it, under ncu, and the tables
    python -m benchmarks.one_launch decode --batch 64                 # what ncu runs: a 1-layer model's decode step
    python -m benchmarks.one_launch prompt --tokens 2048              # ... and a prompt
    python -m benchmarks.one_launch metrics                           # names of the metrics that this ncu knows
    python -m benchmarks.one_launch table runs/gpu/ncu-decode-1.csv   # its CSV as Markdown, kernel by kernel
    TRITON_INTERPRET=1 python -m benchmarks.one_launch decode --batch 2 --device cpu --shape tiny --context 12

Only the one run lies between cudaProfilerStart and cudaProfilerStop. It is not captured, so each kernel stands alone.
ncu runs kernels one after the other and, unless told otherwise, with cold caches: times are a little longer than within
a graph, and the percentages are those of the kernel alone.
"""

import argparse
import csv
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.step import fill
from molora.blueprint import blueprint
from molora.decode import DecodeStep
from molora.step_routes import StepRoutes

TIME, BYTES = "gpu__time_duration.sum", "dram__bytes.sum"
MEMORY = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
L2 = "lts__throughput.avg.pct_of_peak_sustained_elapsed"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
ACTIVE = ".avg.pct_of_peak_sustained_active"
# Of the tensor cores: the first line of which this GPU and ncu know a name.
TENSOR = (
    ("sm__pipe_tensor_cycles_active",),
    ("sm__pipe_tensor_op_hmma_cycles_active", "sm__pipe_tensor_op_gmma_cycles_active"),
    ("sm__inst_executed_pipe_tensor_op_hmma", "sm__inst_executed_pipe_tensor_op_gmma"),
    ("sm__inst_executed_pipe_tensor",),
)
ALWAYS = (TIME, BYTES, MEMORY, L2, WARPS)


def metrics(known: set[str] | None) -> list[str]:
    """What to ask ncu for. known: the names (without their suffixes) that it knows, None where it does not say."""
    names = list(ALWAYS)
    if known is None:
        return [*names, *(name + ACTIVE for name in TENSOR[0])]
    names = [name for name in names if name.partition(".")[0] in known]
    for family in TENSOR:
        found = [name + ACTIVE for name in family if name in known]
        if found:
            return names + found
    return names


def known_metrics() -> set[str] | None:
    """Names that ``ncu --query-metrics`` lists for the GPU that is here."""
    try:
        answer = subprocess.run(["ncu", "--query-metrics"], capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError):
        return None
    found = {line.split()[0] for line in answer.stdout.splitlines() if "__" in line}
    return found or None


@torch.no_grad()
def decode(settings: argparse.Namespace, device: torch.device) -> Callable[[], Any]:
    """The decode step of a model of one layer, routed over random adapters, after a context."""
    base = common.random_base(settings.shape, device, common.compute_dtype(device), layers=1)
    model = common.routed_model(base, fill(base, settings.adapters, settings.rank), settings.top)
    plan = blueprint(base)
    routes = StepRoutes(model.routing, settings.batch, plan.device)
    step = DecodeStep(plan, model.adapted.groups, routes, settings.batch, 2 * settings.context)
    ids = tokens(settings.batch, settings.context + 1, base)
    common.begin(step, model, ids[:, :-1])
    step.ids.copy_(ids[:, -1])
    return step.run


@torch.no_grad()
def prompt(settings: argparse.Namespace, device: torch.device) -> Callable[[], Any]:
    """A prompt through a model of one layer, routed over random adapters, as ``generate`` reads it."""
    base = common.random_base(settings.shape, device, common.compute_dtype(device), layers=1)
    model = common.routed_model(base, fill(base, settings.adapters, settings.rank), settings.top)
    ids = tokens(1, settings.tokens, base)

    def by_modules() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    def by_kernels() -> None:
        active = model.routing.active(lambda: model._resolve(None))
        with active, model.steps.serve((ids,), {"max_new_tokens": 1}) as options:
            if "past_key_values" not in options:
                sys.exit("Our own kernels do not read this prompt: try --modules.")
            model.base(input_ids=ids, past_key_values=options["past_key_values"], use_cache=True, logits_to_keep=1)

    return by_modules if settings.modules else by_kernels


def tokens(sequences: int, count: int, base: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, base.config.vocab_size, (sequences, count), generator=generator).to(base.device)


@torch.no_grad()
def once(call: Callable[[], Any], device: torch.device, warm: int) -> None:
    """Runs a call ``warm`` times, and once more where the profiler looks."""
    for _ in range(warm):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def read(lines: Iterable[str]) -> list[dict[str, str]]:
    """ncu's raw CSV as one dict a kernel, in order. What it and the program print around the CSV is passed over."""
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    at = next((index for index, row in enumerate(rows) if "Kernel Name" in row), None)
    if at is None:
        raise ValueError("no kernel was measured: the file has no line with a 'Kernel Name'")
    found = [dict(zip(rows[at], row, strict=False)) for row in rows[at + 1 :]]
    return [row for row in found if row.get("ID")]  # the line of units has no ID


def table(rows: list[dict[str, str]]) -> list[str]:
    """Markdown: a line for each kernel in the order of the launches, and their sum."""
    tensor = [name for name in rows[0] if name.removesuffix(ACTIVE) in {n for family in TENSOR for n in family}]
    lines = [
        "| kernel | grid | block | µs | MB | GB/s | DRAM % | L2 % | occupancy % | tensor % |",
        "|---|" + "---|" * 9,
    ]
    total_us = total_mb = 0.0
    for row in rows:
        us, mb = (_number(row, TIME) or 0) / 1e3, (_number(row, BYTES) or 0) / 1e6
        total_us, total_mb = total_us + us, total_mb + mb
        pace = f"{mb / us * 1e3:.0f}" if us and mb else ""
        shares = [_shown(_number(row, name)) for name in (MEMORY, L2, WARPS)]
        cores = [value for name in tensor if (value := _number(row, name)) is not None]
        shares.append(_shown(max(cores, default=None)))
        name = row["Kernel Name"].partition("(")[0].replace("|", "\\|")[:60]
        size = (row.get("Grid Size", ""), row.get("Block Size", ""))
        lines.append(f"| `{name}` | {size[0]} | {size[1]} | {us:.2f} | {mb:.2f} | {pace} | {' | '.join(shares)} |")
    pace = f"{total_mb / total_us * 1e3:.0f}" if total_us else ""
    lines.append(f"| {len(rows)} kernels | | | {total_us:.2f} | {total_mb:.2f} | {pace} | | | | |")
    if tensor:
        lines += ["", f"tensor %: {', '.join(tensor)}"]
    return lines


def _number(row: dict[str, str], name: str) -> float | None:
    """None where ncu could not measure it. It writes thousands with commas."""
    try:
        return float(row.get(name, "").replace(",", ""))
    except ValueError:
        return None


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "prompt", "metrics", "table"])
    parser.add_argument("files", type=Path, nargs="*", help="of table: what ncu wrote")
    common.add_device(parser)
    parser.add_argument("--batch", type=int, default=1, help="of decode")
    parser.add_argument("--context", type=int, default=512, help="of decode")
    parser.add_argument("--tokens", type=int, default=2048, help="of prompt")
    parser.add_argument("--modules", action="store_true", help="of prompt: by transformers' modules, as unknown bases")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top", type=int, default=1)
    parser.add_argument("--warm", type=int, default=2, help="runs before the one that is measured")
    settings = parser.parse_args()
    if settings.what == "metrics":
        print(",".join(metrics(known_metrics())))
        return
    if settings.what == "table":
        for file in settings.files:
            try:
                lines = table(read(file.read_text(encoding="utf-8").splitlines()))
            except (OSError, ValueError) as error:
                sys.exit(f"{file}: {error}")
            print("\n".join([f"### {file.stem}", "", *lines, ""]))
        return
    device = common.check_device(settings)
    once((decode if settings.what == "decode" else prompt)(settings, device), device, settings.warm)
    print(f"{settings.what} ran on {common.device_name(device)}")


if __name__ == "__main__":
    main()
