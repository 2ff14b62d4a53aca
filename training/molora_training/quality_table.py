"""Does routing by token pay? Every contender on held-out text that changes its domain in four ways, in one command.

What a contender closes is its share of the way from the base to the label oracle, which sends each token to its own
domain's adapter. Rows are kept as they are measured: an interrupted table goes on, and several processes may share it.
"""

import hashlib
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel, Router
from molora.errors import ConfigError
from molora.saved import load
from molora.stack import NONE
from molora_training.contenders import Contender, Contenders, Row, best_of
from molora_training.data import KINDS, Split
from molora_training.evaluate import LAYER, Losses, bootstrap, gap_closed
from molora_training.parts import file_name, keep_tensors, kept_tensors
from molora_training.quality_sets import DOCUMENTS, IN_A_TURN, TURNS, UNSEEN, QualitySets
from molora_training.report import heading, line, write_report

KEPT_ALONE = 0.99  # of the oracle's gain on single domains, which a router must keep


def run(
    folder: Path,
    data: Path,
    out: Path,
    command: str,
    *,
    routers: Path | None = None,
    limit: int = 0,
    batch_tokens: int = 8192,
    share: tuple[int, int] = (0, 1),
    split: Split = "test",
) -> dict[str, Any] | None:
    """Measures a saved MoLoRA; the rest as of :func:`fill`.

    Args:
        folder: the saved MoLoRA.
        data: prepared data of the domains.
        out: the report.
        command: to be named in it.
        routers: folder of saved MoLoRAs with other routers; those for the same adapters are measured, the saved
            one's own first.
        limit: see :class:`QualitySets`.
        batch_tokens: padded tokens in one forward.
        share: (i, n): of n processes, the i-th, which measures every n-th contender.
        split: "test", or "validation" to choose a router by: what is no router and no adapter is left out.

    Raises:
        ConfigError, DataError: the model has no learned router, fewer than two domains, or a domain no data.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MoLoRAModel.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    if not isinstance(model.router, Router):
        raise ConfigError(f"{folder} has no learned router to be measured.")
    variants = {"as saved": model.router}
    if routers is not None:
        folders = [path for path in sorted(routers.iterdir()) if (path / "molora.json").is_file()]
        found = {path.name: load(path).router for path in folders}
        variants = {n: one for n, one in found.items() if isinstance(one, Router) and _for(one, model)}
        for one in variants.values():
            one.add_missing(model.router.rows)  # of a layer that came after it was trained
        own = next((name for name, router in variants.items() if _same(router, model.router)), None)
        if own is None:
            raise ConfigError(f"None of the routers in {routers} is the one of {folder}.")
        variants = {own: variants.pop(own), **variants}
    sets = QualitySets(model, data, limit, split)
    work = out.parent / f".{out.stem}"
    contenders = Contenders(model, sets, variants, work, batch_tokens)
    return fill(contenders, out, command, _fingerprint(model, sets), share)


def fill(
    contenders: Contenders, out: Path, command: str, fingerprint: str, share: tuple[int, int] = (0, 1)
) -> dict[str, Any] | None:
    """Measures what is not measured yet, and writes ``out`` (the project's results format): all rows that are there,
    and under "missing" the names of those that are not.

    Returns:
        The report; None where the base or the label oracle, by which the others are told, is not measured yet.
    """
    everything = contenders.all()
    for index, contender in enumerate(everything):
        file, mark = _file(contenders.work, contender.name), fingerprint + contender.weights
        if index % share[1] == share[0] and _kept(file, mark) is None:
            row = contender.measure()
            _keep(row, file, mark)
            means = ", ".join(f"{name} {own.mean:.4f}" for name, own in row.sets.items())
            print(f"[{index + 1} of {len(everything)}] {row.name}: {means}", flush=True)
    rows = [_kept(_file(contenders.work, one.name), fingerprint + one.weights) for one in everything]
    if rows[0] is None or rows[1] is None:
        return None
    found = [row for row in rows if row is not None]
    for row in found:  # in the order of the sets, which a file does not keep
        row.sets = {name: row.sets[name] for name in contenders.sets.mixed if name in row.sets}
        row.single = {name: row.single[name] for name in contenders.sets.single if name in row.single}
    adapters = [row for row in found if row.kind == "adapter"]
    if len(adapters) == len(contenders.domains):
        found.insert(found.index(adapters[0]), best_of(adapters))
    report = {
        **heading(
            command,
            f"{contenders.sets.split} split by sha256 of the task or document id: {contenders.sets.described()}",
        ),
        "missing": [one.name for one, row in zip(everything, rows, strict=True) if row is None],
        "rows": [figures(one, found[0], found[1]) for one in found],
        "must": must(found) if _first(everything) in {row.name for row in found} else [],
        "integrated": must(found, "integrated"),
    }
    if contenders.sets.split == "validation":
        report["best"] = best_router(found)
    write_report(report, out)
    return report


def _first(contenders: Sequence[Contender]) -> str | None:
    """The router that the lines are about."""
    return next((one.name for one in contenders if one.kind == "router"), None)


def best_router(rows: Sequence[Row]) -> str | None:
    """The router at top-1 with the lowest loss: the mean over sets, in which all single domains together are one. Of
    those, if there are any, that keep on single domains what is asked of a router: what two adapters bring where they
    are needed at once must not be paid for by everybody else."""
    base, oracle = (next((row for row in rows if row.kind == kind), None) for kind in ("base", "oracle"))

    def loss(row: Row) -> float:
        single = [own.mean for own in row.single.values()]
        return statistics.mean([*(own.mean for own in row.sets.values()), statistics.mean(single)])

    plain = [row for row in rows if row.kind == "router" and row.name.endswith(", top-1 unit")]
    if base is not None and oracle is not None:
        plain = [row for row in plain if kept_alone(row, base, oracle) >= KEPT_ALONE] or plain
    return min(plain, key=loss).name if plain else None


def kept_alone(row: Row, base: Row, oracle: Row) -> float:
    """The share of the label oracle's gain over the base on text of one domain, the mean over domains."""
    names = base.single
    return statistics.mean(
        (base.single[n].mean - row.single[n].mean) / (base.single[n].mean - oracle.single[n].mean) for n in names
    )


def figures(row: Row, base: Row, oracle: Row) -> dict[str, Any]:
    """A row of the report."""
    sets = {}
    for name, own in row.sets.items():
        b, o = base.sets[name], oracle.sets[name]
        everything = torch.arange(len(own.loss))[None]
        share = partial(gap_closed, base=b, oracle=o, own=own)
        sets[name] = {
            "loss": own.mean,
            "domain_mean": own.domain_mean,
            "accuracy": own.accuracy,
            "gap_closed": float(share(everything)),
            "gap_closed_interval": list(bootstrap(share, len(own.loss))),
            "gap_closed_domain_mean": (b.domain_mean - own.domain_mean) / (b.domain_mean - o.domain_mean),
        }
    single = {name: own.mean for name, own in row.single.items()}
    return {"contender": row.name, "kind": row.kind, "sets": sets, "single": single, "right": row.right}


def must(rows: Sequence[Row], kind: str = "router") -> list[dict[str, Any]]:
    """The lines that the first router of a kind has to reach; none without one."""
    routers = [row for row in rows if row.kind == kind]
    if not routers:
        return []
    base, oracle, mine = rows[0], rows[1], routers[0]
    own = figures(mine, base, oracle)["sets"]
    lines = []
    bars = {TURNS: 0.965, DOCUMENTS: 0.965, UNSEEN: 0.96, IN_A_TURN: 0.82}
    for name, bar in ((name, bar) for name, bar in bars.items() if name in own):
        lines.append(line(f"{name}: share of the gap closed", own[name]["gap_closed"], bar, "higher", name))
        if name != UNSEEN:
            value = own[name]["gap_closed_domain_mean"]
            lines.append(line(f"{name}: share of the gap closed, mean of domains", value, bar, "higher"))
    for name in (TURNS, DOCUMENTS):
        theirs = oracle.sets[name].accuracy
        value = mine.sets[name].accuracy / theirs if theirs else 1.0  # where the oracle has none, none is lost
        lines.append(line(f"{name}: share of the oracle's short answers, word for word", value, 0.96, "higher"))
    needing_two = [name for name in KINDS if name in own]
    for name in needing_two:
        lines.append(line(f"{name}: share of the gap closed", own[name]["gap_closed"], 0.82, "higher"))
    if needing_two:
        best = {
            name: max(figures(row, base, oracle)["sets"][name]["gap_closed"] for row in routers) for name in needing_two
        }
        most = max(best, key=lambda name: best[name])
        note = f"a router of the table, on {most}"
        lines.append(line("share of the gap where two adapters are needed", best[most], 1.0, "higher", note))
    for other in rows:
        if other.kind in ("merge", "peft router", "sequence-oracle"):
            lines += [_below(mine, other, name, 0.15) for name in (TURNS, DOCUMENTS)]
        if other.kind == "multitask":
            lines += [_below(mine, other, name, 0.0, clearly=True) for name in (TURNS, DOCUMENTS)]
        if other.kind == "by turn":
            lines.append(_below(mine, other, TURNS, 0.0))
        if other.kind in ("by turn", "sequence-oracle"):
            lines += [_below(mine, other, name, 0.15) for name in (IN_A_TURN, *needing_two)]
        if other.kind == "adapter":
            domain = other.name.removesuffix(" alone")
            value = mine.single[domain].mean - other.single[domain].mean
            lines.append(line(f"single-domain {domain}: loss above its own adapter's", value, 0.01, "lower"))
    alone = kept_alone(mine, base, oracle)
    lines.append(line("single-domain: share of the oracle's gain, mean", alone, KEPT_ALONE, "higher"))
    return lines


def _below(mine: Row, other: Row, name: str, bar: float, clearly: bool = False) -> dict[str, Any]:
    """How many nats a token the router is below another contender; where a margin is asked for, or it is to be clear,
    the interval has to be above 0 too."""
    a, b = mine.sets[name], other.sets[name]

    def difference(index: torch.Tensor) -> torch.Tensor:
        loss = b.loss.sum(1)[index].sum(-1) - a.loss.sum(1)[index].sum(-1)
        return loss / a.tokens.sum(1).double()[index].sum(-1)

    value = float(difference(torch.arange(len(a.loss))[None]))
    low, high = bootstrap(difference, len(a.loss))
    found = line(f"{name}: below {other.name}, nats a token", value, bar, "higher", f"95% [{low:.3f}, {high:.3f}]")
    return {**found, "holds": found["holds"] and (low > 0 or not (clearly or bar))}


def _for(router: Router, model: MoLoRAModel) -> bool:
    """Whether it was trained for all the adapters among which it is to choose."""
    return {f"{LAYER}/{name}" for name in model.stack[LAYER].adapters} == {
        row for row in router.rows if row.startswith(f"{LAYER}/") and not row.endswith(f"/{NONE}")
    }


def _same(one: Router, other: Router) -> bool:
    mine, theirs = one.state_dict(), {name: tensor.cpu() for name, tensor in other.state_dict().items()}
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name].cpu(), theirs[name]) for name in mine)


def _fingerprint(model: MoLoRAModel, sets: QualitySets) -> str:
    """Changes with the adapters and with what is measured."""
    digest = hashlib.sha256(json.dumps([sets.domains, str(model.base_name)]).encode())
    for name in sets.domains:
        for parameters in sorted(Path(str(model.stack[LAYER].adapters[name])).glob("*.safetensors")):
            digest.update(parameters.read_bytes())
    for rows in (*sets.mixed.values(), *sets.single.values()):
        for row in rows:
            digest.update(row.input_ids.numpy().tobytes())
    return digest.hexdigest()


def _file(work: Path, name: str) -> Path:
    return work / f"{file_name(name)}.safetensors"


def _keep(row: Row, file: Path, fingerprint: str) -> None:
    tensors = {
        f"{part}/{name}/{what}": getattr(own, what)
        for part in ("sets", "single")
        for name, own in getattr(row, part).items()
        for what in ("loss", "tokens", "asked", "exact")
    }
    keep_tensors(file, fingerprint, tensors, {"name": row.name, "kind": row.kind, "right": row.right})


def _kept(file: Path, fingerprint: str) -> Row | None:
    """The row that was measured before, of the same adapters and text."""
    kept = kept_tensors(file, fingerprint)
    if kept is None:
        return None
    tensors, about = kept
    row = Row(about["name"], about["kind"], right=about["right"])
    for key in tensors:
        part, name, what = key.split("/")
        if what == "loss":
            own = (tensors[f"{part}/{name}/{of}"] for of in ("loss", "tokens", "asked", "exact"))
            getattr(row, part)[name] = Losses(*own)
    return row
