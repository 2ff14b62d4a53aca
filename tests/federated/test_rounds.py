"""Rounds of a federated training on a tiny model, in one process: who is taken, what comes of it, and resuming."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from molora.cli import app
from molora.commands.common import MissingExtraError
from molora.errors import AdapterNotFoundError, ConfigError, DataError, FederationError, UpdateError
from molora_training.federated import local, private
from molora_training.federated.aggregate import DeltaSum
from molora_training.federated.changes import b_vector, from_vector
from molora_training.federated.client import Client, Order, clipped
from molora_training.federated.lora import Lora, distance, read_bytes
from molora_training.federated.place import only_server, state_folder
from molora_training.federated.rounds import Federation
from molora_training.federated.settings import FederateSettings, LimitSettings, LocalSettings, PrivacySettings
from tests.federated.parties import ANSWERS, RANKS, make_settings

OFF = (float("nan"), float("inf"), 0.0)


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> FederateSettings:
    return make_settings(folder, tmp_path / "adapter")


def answers(own: Federation, clients: dict[str, Client]) -> dict[str, bytes]:
    return {name: client.train(own.order(name, RANKS[name])).to_bytes() for name, client in clients.items()}


def loss(own: Federation, clients: dict[str, Client]) -> float:
    told = [client.evaluate(own.trial()) for client in clients.values()]
    return sum(one["loss"] for one in told) / sum(one["tokens"] for one in told)


def finished(settings: FederateSettings, clients: dict[str, Client]) -> Federation:
    own = Federation.open(settings)
    while not own.over:
        own.close(answers(own, clients))
    return own


@pytest.mark.parametrize("how", ["flexlora", "changes", "stack", "factors", "shared"])
def test_every_way_of_putting_updates_together_learns(
    settings: FederateSettings, clients: dict[str, Client], how: Any
) -> None:
    settings = replace(settings, aggregate=how, local=replace(settings.local, epochs=2))
    before = loss(Federation.open(settings), clients)
    own = finished(settings, clients)
    assert loss(own, clients) < 0.9 * before
    assert [report.round for report in own.reports] == [1, 2, 3]
    row = own.reports[-1].clients["bob"]
    assert row["rank"] == 4 and row["examples"] == 12 and row["bytes_up"] > 0 and row["bytes_down"] > 0
    assert row["seconds"] > 0 and row["peak_bytes"] > 2**20 and row["norm"] > 0 and own.reports[-1].norm > 0


def test_a_round_is_the_weighted_sum_of_deltas(settings: FederateSettings, clients: dict[str, Client]) -> None:
    own = Federation.open(settings)
    told = answers(own, clients)
    total = DeltaSum()
    for message in told.values():
        tensors, _, scale = read_bytes(message)
        total.add(Lora.from_tensors(tensors, scale), 1 / 4)  # each learnt from twelve
    own.close(told)
    expected = total.cut(8, 2.0)
    assert distance(own.lora, expected) < 1e-5 * distance(expected, Federation.open(settings, resume=False).lora)


def test_a_round_of_changes_adds_what_each_changed_of_its_slice(
    settings: FederateSettings, clients: dict[str, Client]
) -> None:
    own = Federation.open(replace(settings, aggregate="changes"))
    own.close(answers(own, clients))
    total, told = DeltaSum(), answers(own, clients)
    total.add(own.lora, 1.0)
    for name, message in told.items():
        total.add(Lora.from_tensors(*read_bytes(message)[::2]), 1 / 4)
        total.add(own.lora.slice(RANKS[name]), -1 / 4)
    expected = total.cut(8, 2.0)
    assert own.close(told).norm > 0 and distance(own.lora, expected) < 1e-4 * own.reports[1].norm


def test_the_servers_rank_is_the_largest_in_whatever_turn() -> None:
    assert FederateSettings(ranks=(4, 32, 8)).rank == 32


@pytest.mark.parametrize("how", ["flexlora", "changes", "factors", "shared", "stack"])
def test_the_rest_is_aggregated_as_if_they_were_alone(
    settings: FederateSettings, clients: dict[str, Client], how: Any
) -> None:
    """One is gone, one lies, one comes with an old answer: the round is that of the two others."""
    settings = replace(settings, aggregate=how)
    own = Federation.open(settings)
    orders = {name: own.order(name, RANKS[name]) for name in ANSWERS}
    own.order("eve", 4)
    told = {name: clients[name].train(orders[name]).to_bytes() for name in ("ada", "bob")}
    first = Federation.open(replace(settings, out=settings.out.with_name("other")))
    assert distance(first.lora, own.lora) == pytest.approx(0, abs=1e-5)
    hostile = clients["cyd"].train(orders["cyd"])
    pairs = {name: (a * torch.nan, b) for name, (a, b) in hostile.lora.pairs.items()}
    told["cyd"] = replace(hostile, lora=Lora(pairs, 2.0)).to_bytes()
    told["dan"] = clients["dan"].train(first.order("dan", 2)).to_bytes()  # right, but of another order
    told["mallory"] = told["ada"]
    report = own.close(told)
    alone = {name: clients[name].train(first.order(name, RANKS[name])).to_bytes() for name in ("ada", "bob")}
    first.close(alone)
    assert distance(own.result(), first.result()) < 1e-4 * max(1.0, report.norm)
    assert sorted(report.clients) == ["ada", "bob"] and report.absent == ["eve"]
    assert "NaN" in report.refused["cyd"] and "replay" in report.refused["dan"]
    assert "not asked" in report.refused["mallory"]


def test_a_huge_update_does_not_move_the_round(settings: FederateSettings, clients: dict[str, Client]) -> None:
    own = Federation.open(settings)
    orders = {name: own.order(name, RANKS[name]) for name in ANSWERS}
    learnt = {name: client.train(orders[name]) for name, client in clients.items()}
    wild = Lora({name: (a, 1e3 + b) for name, (a, b) in learnt["dan"].lora.pairs.items()}, 2.0)
    told = {name: one.to_bytes() for name, one in learnt.items()} | {
        "dan": replace(learnt["dan"], lora=wild).to_bytes()
    }
    report = own.close(told)
    assert "median" in report.refused["dan"] and sorted(report.clients) == ["ada", "bob", "cyd"]
    assert report.norm < 10 * max(row["norm"] for row in report.clients.values())


@pytest.mark.parametrize("how", ["shared", "factors", "flexlora"])
def test_a_delta_as_usual_of_wild_factors_does_no_harm(
    settings: FederateSettings, clients: dict[str, Client], how: Any
) -> None:
    """Where B is added up apart from A, a tiny A beside a huge B is refused; elsewhere it is what it says."""
    own = Federation.open(replace(settings, aggregate=how))
    own.close(answers(own, clients))  # at first B is zero, and so is what it changes
    told = {name: client.train(own.order(name, RANKS[name])) for name, client in clients.items()}
    wild = Lora({name: (1e-6 * a, 1e6 * b) for name, (a, b) in told["dan"].lora.pairs.items()}, 2.0)
    told["dan"] = replace(told["dan"], lora=wild)
    report = own.close({name: one.to_bytes() for name, one in told.items()})
    assert report.norm < 10 * own.reports[0].norm
    assert "median" in report.refused["dan"] if how != "flexlora" else not report.refused


@pytest.mark.parametrize("lie", ["x", 10**400, -1, float("nan"), float("inf"), None], ids=lambda lie: repr(lie)[:5])
def test_a_lie_about_cost_is_left_out(settings: FederateSettings, clients: dict[str, Client], lie: Any) -> None:
    own = Federation.open(settings)
    told = answers(own, clients)
    tensors, about, scale = read_bytes(told["dan"])
    told["dan"] = Lora.from_tensors(tensors, scale).to_bytes({**about, "usage": {"seconds": lie, "cpu_seconds": 2}})
    row = own.close(told).clients["dan"]
    assert "seconds" not in row and row["cpu_seconds"] == 2


def test_nobody_weighs_more_than_it_was_asked_to_learn_from(
    settings: FederateSettings, clients: dict[str, Client]
) -> None:
    own = Federation.open(settings)
    told = answers(own, clients)
    tensors, about, scale = read_bytes(told["dan"])
    told["dan"] = Lora.from_tensors(tensors, scale).to_bytes({**about, "examples": 13})  # of twelve
    assert "1 to 12 are believed" in own.close(told).refused["dan"]


def test_too_few_updates_change_nothing(settings: FederateSettings, clients: dict[str, Client]) -> None:
    own = Federation.open(settings)
    before = own.lora
    told = {"ada": clients["ada"].train(own.order("ada", 2)).to_bytes(), "bob": b"nothing"}
    own.order("bob", 4)
    with pytest.raises(FederationError, match=r"1 updates that may be taken.*bob was refused: it is no safetensors"):
        own.close(told)
    assert own.round == 0 and own.lora is before
    told = answers(own, clients)  # again, and now all are there
    assert len(own.close(told).clients) == 4


@pytest.mark.parametrize("how", ["flexlora", "stack", "shared"])
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(
    settings: FederateSettings, clients: dict[str, Client], how: Any
) -> None:
    settings = replace(settings, aggregate=how)
    whole = finished(replace(settings, out=settings.out.with_name("whole")), clients)
    own = Federation.open(settings)
    stale = answers(own, clients)
    own.close(stale)
    own.close(answers(own, clients))
    own.order("ada", 2)  # and here it is killed
    again = Federation.open(settings)
    assert again.round == 2 and [path.name for path in state_folder(settings.out).glob("[0-9]*")] == ["2"]
    assert distance(again.lora, own.lora) == pytest.approx(0, abs=1e-5)
    with pytest.raises(UpdateError, match="replay"):
        again.order("ada", 2)
        again.guard.read(stale["ada"], again.asked["ada"])
    assert again.guard.seen == own.guard.seen and len(own.guard.seen) == 8
    again.close(answers(again, clients))
    assert distance(again.result(), whole.result()) < 1e-3 * sum(one.norm for one in whole.reports)


def test_what_a_training_begins_with_is_of_its_own_settings(
    settings: FederateSettings, clients: dict[str, Client]
) -> None:
    """Not what another one, which was killed in its first round or is begun anew, began with in the same place."""
    whole = Federation.open(replace(settings, seed=5, out=settings.out.with_name("whole"))).lora
    small = replace(settings, ranks=(2,))
    assert Federation.open(small).lora.rank == 2
    own = Federation.open(replace(settings, seed=5))
    assert all(torch.equal(a, whole.pairs[name][0]) for name, (a, _) in own.lora.pairs.items())
    own.close(answers(own, clients))
    assert Federation.open(small, resume=False).lora.rank == Lora.from_folder(own.blank).rank == 2


@pytest.mark.parametrize("method", ["backprop", "forward"])
def test_a_seed_is_a_training(settings: FederateSettings, clients: dict[str, Client], method: Any) -> None:
    """To the rounding of sums; also of ranks that are drawn anew, and of directions."""
    local = replace(settings.local, method=method, learning_rate=1e-3)
    settings = replace(settings, local=local, aggregate="stack", rounds=2)
    one, other, third = (
        finished(replace(settings, out=settings.out.with_name(f"seed{number}"), seed=number // 2), clients)
        for number in range(3)
    )
    assert distance(one.result(), other.result()) < 1e-3 * distance(one.result(), third.result())
    assert all(torch.equal(a, other.lora.pairs[name][0]) for name, (a, _) in one.lora.pairs.items())


def test_another_trainings_state_is_not_taken(settings: FederateSettings, clients: dict[str, Client]) -> None:
    own = Federation.open(settings)
    own.close(answers(own, clients))
    with pytest.raises(FederationError, match="other settings"):
        Federation.open(replace(settings, aggregate="changes"))
    longer = Federation.open(replace(settings, rounds=9, limits=replace(settings.limits, seconds=5.0)))
    assert longer.round == 1 and not longer.over
    assert Federation.open(settings, resume=False).round == 0


def test_a_place_has_one_server(settings: FederateSettings) -> None:
    for _ in range(2):  # which lets go
        with (
            only_server(settings.out),
            only_server(settings.out.with_name("other")),
            pytest.raises(FederationError, match="Another server trains"),
            only_server(settings.out),
        ):
            pass


def test_it_goes_on_from_an_adapter(settings: FederateSettings, folder: Path, tmp_path: Path) -> None:
    start = folder / "adapters" / "math"  # rank 4
    own = Federation.open(replace(settings, start=start))
    assert own.lora.rank == 8 and distance(own.lora, Lora.from_folder(start)) < 1e-4
    with pytest.raises(FederationError, match="has rank 4, and the largest of `ranks` is 2"):
        Federation.open(replace(settings, start=start, ranks=(2,), out=tmp_path / "two"))
    with pytest.raises(AdapterNotFoundError):
        Federation.open(replace(settings, start=tmp_path / "none", out=tmp_path / "three"))


def test_the_loss_is_what_the_base_says(settings: FederateSettings, clients: dict[str, Client]) -> None:
    own = finished(settings, clients)
    client = clients["ada"]
    told = client.evaluate(own.trial())
    row = client._rows(64)[1][0]
    base = client.base.model
    with torch.no_grad(), local.generated(base, local.acting(own.lora, "cpu")):
        logits = base(row.input_ids[None]).logits[0, :-1]
    one = local.loss(base, 0, own.lora, [row])
    assert one[0] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, row.labels[1:], ignore_index=-100, reduction="sum")), rel=1e-4
    )
    few = Federation.open(replace(settings, out=settings.out.with_name("few"), local=replace(settings.local, judged=2)))
    assert client.evaluate(few.trial())["conversations"] == 2
    assert told["conversations"] == len(client._rows(64)[1]) > 2 and told["tokens"] == one[1] * told["conversations"]


def test_what_is_held_out_is_never_learnt(clients: dict[str, Client]) -> None:
    learnt, apart = clients["ada"].split
    assert len(learnt) + len(apart) == 30 and len(apart) > 1 and not [row for row in learnt if row in apart]


def test_an_order_for_b_alone_leaves_a_and_clips(settings: FederateSettings, clients: dict[str, Client]) -> None:
    masked = PrivacySettings(clip=0.01, secure=True)
    own = Federation.open(replace(settings, aggregate="shared", privacy=masked))
    order = own.order("ada", 2)
    before = Lora.from_tensors(*read_bytes(order.factors)[::2])
    after = clients["ada"].train(order).lora
    assert all(torch.equal(after.pairs[name][0], a) for name, (a, _) in before.pairs.items())
    vector = b_vector(before, after, 8)
    assert float(vector.norm()) == pytest.approx(0.01, rel=1e-4)
    assert distance(clipped(before, after, 1.0), after) == pytest.approx(0, abs=1e-6)
    back = from_vector(vector, own.lora)
    for name, (_, b) in after.pairs.items():
        assert torch.equal(back[name][:, :2], b - before.pairs[name][1]) and not back[name][:, 2:].any()
    with pytest.raises(FederationError, match="entries"):
        from_vector(vector[:-1], own.lora)


def test_a_round_of_which_the_mean_alone_is_known(settings: FederateSettings, clients: dict[str, Client]) -> None:
    masked = PrivacySettings(clip=0.5, secure=True)
    settings = replace(settings, aggregate="shared", privacy=masked)
    own, other = (Federation.open(replace(settings, out=settings.out.with_name(name))) for name in ("one", "two"))
    told = answers(own, clients)
    vectors = []
    for name, message in told.items():
        tensors, _, scale = read_bytes(message)
        after = Lora.from_tensors(tensors, scale)
        vectors.append(b_vector(own.lora.slice(RANKS[name]), after, 8))
    own.close(told)
    for name in told:
        other.order(name, RANKS[name])
    report = other.close_sum(torch.stack(vectors).mean(0), {name: {} for name in told})
    assert distance(own.lora, other.lora) < 1e-5 and report.norm == pytest.approx(own.reports[0].norm, rel=1e-4)
    with pytest.raises(FederationError, match="not finite"):
        other.close_sum(torch.full_like(vectors[0], torch.nan), {name: {} for name in told})


def test_private_rounds_are_kept_on_disk_and_go_on(
    settings: FederateSettings, clients: dict[str, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two trees of two cohorts, interrupted in each of them and between them."""
    monkeypatch.setattr(private, "noise_multiplier", lambda *_: 0.1)
    how = PrivacySettings(epsilon=8.0, clip=0.5, cohorts=2)
    settings = replace(settings, rounds=4, aggregate="shared", privacy=how, limits=LimitSettings(fewest=1))
    taken: list[str] = []
    for number in range(1, 5):
        own = Federation.open(settings)
        turn = own.cohort(sorted(clients))
        report = own.close({name: clients[name].train(own.order(name, RANKS[name])).to_bytes() for name in turn})
        assert report.round == number and len(report.clients) == 2 and report.noise == pytest.approx(0.1 * 0.5 / 2)
        cost = {"name", "rank", "bytes_down", "bytes_up", "seconds", "cpu_seconds", "peak_bytes"}
        assert all(row.keys() == cost for row in report.clients.values())  # no norm, which no noise covers
        taken += turn
    assert sorted(taken[:2] + taken[2:4]) == sorted(taken[4:]) == sorted(clients)
    assert Federation.open(settings).over
    with pytest.raises(FederationError, match="other settings"):
        Federation.open(replace(settings, rounds=5))  # its noise was chosen for four


def test_a_masked_sum_gets_its_noise(settings: FederateSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of who came, times their number, over the number that is expected."""
    monkeypatch.setattr(private, "noise_multiplier", lambda *_: 0.0)
    how = PrivacySettings(epsilon=8.0, clip=0.5, secure=True)
    own = Federation.open(replace(settings, aggregate="shared", privacy=how))
    before, turn = own.lora, own.cohort(sorted(ANSWERS))
    for name in turn:
        own.order(name, RANKS[name])
    mean = torch.linspace(-1, 1, sum(b.numel() for _, b in before.pairs.values()))
    own.close_sum(mean, {name: {} for name in turn[:3]})
    for name, change in from_vector(mean, before).items():
        assert torch.allclose(own.lora.pairs[name][1], before.pairs[name][1] + 0.75 * change, atol=1e-6)


def test_who_does_not_clip_is_clipped(
    settings: FederateSettings, clients: dict[str, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promise of epsilon does not rest on what clients say; nor is A what they say."""
    monkeypatch.setattr(private, "noise_multiplier", lambda *_: 0.0)
    how = PrivacySettings(epsilon=8.0, clip=0.5)
    own = Federation.open(replace(settings, aggregate="shared", privacy=how))
    turn, before = own.cohort(sorted(clients)), own.lora
    learnt = {name: clients[name].train(own.order(name, RANKS[name])) for name in turn}
    wild = Lora({name: (a + 1, b + 1e3) for name, (a, b) in learnt["dan"].lora.pairs.items()}, 2.0)
    told = {name: one.to_bytes() for name, one in {**learnt, "dan": replace(learnt["dan"], lora=wild)}.items()}
    assert sorted(own.close(told).clients) == sorted(clients)  # whose update is taken does not hang on the others'
    honest = from_vector(
        sum((b_vector(before.slice(RANKS[n]), learnt[n].lora, 8) for n in ("bob", "cyd")), torch.zeros(()))
        + b_vector(before.slice(2), learnt["ada"].lora, 8),
        before,
    )
    changed = {name: 4 * (b - before.pairs[name][1]) - honest[name] for name, (_, b) in own.lora.pairs.items()}
    norm = sum(float(one.double().square().sum()) for one in changed.values()) ** 0.5
    assert norm == pytest.approx(0.5, rel=1e-3)
    assert all(torch.equal(a, before.pairs[name][0]) for name, (a, _) in own.lora.pairs.items())


def test_a_client_cannot_have_more_than_the_servers_rank(settings: FederateSettings) -> None:
    own = Federation.open(settings)
    for asked, given in ((10**9, 8), (0, 1), (-3, 1), (3, 3)):
        assert Lora.from_tensors(*read_bytes(own.order("ada", asked).factors)[::2]).rank == given


def test_what_is_wrong_is_said(settings: FederateSettings, clients: dict[str, Client], tmp_path: Path) -> None:
    own = Federation.open(settings)
    with pytest.raises(UpdateError, match="the order lacks"):
        clients["ada"].train(Order(own.lora.to_bytes({"round": 1})))
    none = Client("none", clients["ada"].base, [])
    with pytest.raises(DataError, match="none has no conversation"):
        none.train(own.order("none", 2))
    with pytest.raises(DataError, match="cannot be read"):
        Client.of_file("x", clients["ada"].base, tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: FederateSettings(ranks=()), "ranks"),
        (lambda: FederateSettings(ranks=(0,)), "ranks"),
        (lambda: FederateSettings(rounds=0), "rounds"),
        (lambda: LocalSettings(examples=0), "local"),
        (lambda: LimitSettings(seconds=0), "limits"),
        (lambda: PrivacySettings(epsilon=-1.0), "epsilon"),
        (lambda: PrivacySettings(delta=1.0), "delta"),
        *((lambda off=off: LocalSettings(learning_rate=off), "local") for off in OFF),
        *((lambda off=off: LimitSettings(seconds=off), "limits") for off in OFF),
        *((lambda off=off: PrivacySettings(epsilon=off), "epsilon") for off in OFF),
        *((lambda off=off: PrivacySettings(clip=off), "clip") for off in OFF),
        (lambda: LimitSettings(max_norm=float("nan")), "limits"),
        (lambda: FederateSettings(privacy=PrivacySettings(epsilon=8.0)), "aggregate: shared"),
        (lambda: FederateSettings(privacy=PrivacySettings(secure=True)), "aggregate: shared"),
    ],
)
def test_settings_that_cannot_be(wrong: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        wrong()


@pytest.mark.parametrize("command", [["run"], ["app", "folder"]])
def test_without_flower_the_command_says_what_to_install(
    settings: FederateSettings, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "flwr" or ".federated.flower" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "molora_training.federated.simulate", raising=False)
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(MissingExtraError, match=r"needs flwr.*molora\[federated\]"):
        CliRunner().invoke(app, ["federate", *command, f"data={settings.data}"], catch_exceptions=False)
