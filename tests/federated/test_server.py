"""The server in Flower, over clients that are late, gone, lying or masked: a round is what the others make of it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key

from molora.errors import ConfigError, FederationError
from molora_training.federated import flower_app, flower_server, masked, messages, row
from molora_training.federated.client import Base, Client, Order
from molora_training.federated.flower_client import Who, client_app, of_node
from molora_training.federated.flower_server import Fleet, serve
from molora_training.federated.lora import Lora, distance, read_bytes
from molora_training.federated.outcome import change_of, report
from molora_training.federated.place import only_server, state_folder
from molora_training.federated.private import QUANTA
from molora_training.federated.rounds import Federation
from molora_training.federated.settings import FederateSettings, LimitSettings, PrivacySettings
from tests.federated.grid import LocalGrid
from tests.federated.parties import ANSWERS, RANKS, make_settings, with_samples

NODES = {name: node for node, name in enumerate(ANSWERS, 1)}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_server, "POLL", 0.01)


def make_grid(folder: Path, secure: bool = False) -> LocalGrid:
    who = [Who(n, str(folder / "data" / f"{n}.jsonl"), RANKS[n], str(folder / "base"), secure) for n in ANSWERS]
    return LocalGrid(client_app(lambda context: who[int(context.node_config["partition-id"])]), len(who))


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> FederateSettings:
    return make_settings(folder, tmp_path / "adapter", rounds=1, limits=LimitSettings(seconds=20.0))


class Watched(list[tuple[str, Mapping[str, Any]]]):
    def __call__(self, what: str, told: Mapping[str, Any]) -> None:
        self.append((what, dict(told)))

    def of(self, what: str) -> list[Mapping[str, Any]]:
        return [told for one, told in self if one == what]


def alone(settings: FederateSettings, folder: Path, names: list[str]) -> Federation:
    """The round of these clients without Flower."""
    own = Federation.open(replace(settings, out=settings.out.with_name("alone")))
    base = Base.load(settings.base)
    clients = {name: Client.of_file(name, base, folder / "data" / f"{name}.jsonl") for name in names}
    own.close({name: client.train(own.order(name, RANKS[name])).to_bytes() for name, client in clients.items()})
    return own


def same(one: Federation, other: Federation) -> bool:
    return distance(one.lora, other.lora) < 1e-4 * one.reports[-1].norm


def test_a_round_over_flower_is_that_without(settings: FederateSettings, folder: Path) -> None:
    own, grid, seen = Federation.open(settings), make_grid(folder), Watched()
    losses = serve(grid, grid.context(), own, seen)  # type: ignore[arg-type]
    assert same(own, alone(settings, folder, list(ANSWERS)))
    found = change_of(losses["before"], losses["after"])
    assert found is not None and found.after < found.before and found.conversations > 10
    assert [told["answers"] for told in seen.of("answer")] == [1, 2, 3, 4]
    assert {name: row["rank"] for name, row in own.reports[0].clients.items()} == RANKS
    told = report(own, losses, "command", 1.0)
    assert told["clients"]["cyd"]["rounds"] == 1 and told["clients"]["cyd"]["bytes_up"] > 0
    assert told["learnt"]["after"] == found.after and told["privacy"] is None


def nan_update(reply: Message) -> Message:
    tensors, about, scale = read_bytes(messages.to_answer(reply.content))
    pairs = {name: (a, b * torch.nan) for name, (a, b) in Lora.from_tensors(tensors, scale).pairs.items()}
    reply.content = messages.of_answer(Lora(pairs, scale).to_bytes(about))
    return reply


def on_training(twist: Any) -> Any:
    """Of updates alone: the client says who it is as others do."""
    return lambda reply: twist(reply) if messages.ANSWER in reply.content.config_records else reply


@pytest.mark.parametrize("lie", [float("nan"), float("inf"), -1.0, "x", [1.0]], ids=str)
def test_a_loss_that_is_none_is_not_believed(settings: FederateSettings, folder: Path, lie: Any) -> None:
    own, grid, seen = Federation.open(settings), make_grid(folder), Watched()

    def lies(reply: Message) -> Message:
        record: Any = reply.content.config_records.get(messages.ABOUT, {})
        if "loss" in record:
            record["loss"] = lie
        return reply

    grid.twists = {NODES["ada"]: lies}
    losses = serve(grid, grid.context(), own, seen)  # type: ignore[arg-type]
    assert sorted(losses["before"]) == sorted(losses["after"]) == ["bob", "cyd", "dan"]
    assert seen.of("trial")[-1]["loss"] > 0


def crash(_: Message) -> Message:
    raise RuntimeError("out of memory")


def test_the_round_is_that_of_those_who_kept_to_it(settings: FederateSettings, folder: Path) -> None:
    """One is killed in the round, one is slow, one lies, one crashes."""
    settings = replace(settings, limits=LimitSettings(seconds=3.0, fewest=1))
    own, grid, seen = Federation.open(settings), make_grid(folder), Watched()
    grid.twists = {
        NODES["bob"]: on_training(lambda _: None),
        NODES["cyd"]: on_training(nan_update),
        NODES["dan"]: on_training(crash),
    }
    serve(grid, grid.context(), own, seen)  # type: ignore[arg-type]
    (told,) = own.reports
    assert list(told.clients) == ["ada"] and told.absent == ["bob", "dan"] and "NaN" in told.refused["cyd"]
    assert "out of memory" in seen.of("failed")[0]["why"] and 3 <= told.seconds < 6
    assert same(own, alone(settings, folder, ["ada"]))


def test_a_slow_client_is_not_waited_for_and_may_come_again(settings: FederateSettings, folder: Path) -> None:
    settings = replace(settings, rounds=2, limits=LimitSettings(seconds=2.5, fewest=2))
    own, grid, seen = Federation.open(settings), make_grid(folder), Watched()
    slow = Fleet(grid, 2.5, seen)  # type: ignore[arg-type]
    assert slow.look() == sorted(ANSWERS)
    kept: list[Message] = []

    def twist(reply: Message) -> Message:
        if messages.ANSWER in reply.content.config_records:
            kept.append(reply)
            if len(kept) == 2:  # of the second round: it hands in what it had ready for the first
                reply.content = kept[0].content
            grid.late[NODES["bob"]] = 10.0 if len(kept) == 1 else 0.0
        return reply

    grid.twists = {NODES["bob"]: twist}
    serve(grid, grid.context(), own, seen)  # type: ignore[arg-type]
    first, second = own.reports
    assert first.absent == ["bob"] and sorted(first.clients) == ["ada", "cyd", "dan"]
    assert second.absent == [] and "replay, or too late" in second.refused["bob"]


def test_a_round_with_too_few_is_tried_again_and_then_told(settings: FederateSettings, folder: Path) -> None:
    settings = replace(settings, limits=LimitSettings(seconds=1.5, fewest=4))
    own, grid, seen = Federation.open(settings), make_grid(folder), Watched()
    grid.twists = {NODES["bob"]: on_training(crash)}
    with pytest.raises(FederationError, match="3 updates that may be taken, and limits.fewest asks for 4"):
        serve(grid, grid.context(), own, seen)  # type: ignore[arg-type]
    assert len(seen.of("again")) == 2 and own.round == 0
    grid.twists = {}
    again = Federation.open(settings)
    serve(grid, grid.context(), again, seen)  # type: ignore[arg-type]
    assert again.over and len(again.reports[0].clients) == 4


def test_too_few_clients_are_waited_for_and_told(settings: FederateSettings, folder: Path) -> None:
    settings = replace(settings, limits=LimitSettings(seconds=0.2, fewest=4))
    grid = make_grid(folder)
    grid.gone = {1, 2}
    with pytest.raises(FederationError, match="2 clients came within 0.2 seconds"):
        serve(grid, grid.context(), Federation.open(settings), Watched())  # type: ignore[arg-type]


def test_nobody_takes_anothers_name(settings: FederateSettings, folder: Path) -> None:
    grid, seen = make_grid(folder), Watched()
    app = client_app(lambda _: Who("ada", str(folder / "data" / "ada.jsonl")))
    fleet = Fleet(LocalGrid(app, 2), 1.0, seen)  # type: ignore[arg-type]
    assert fleet.look() == ["ada"] and seen.of("refused") == [{"client": "ada", "why": "another client has its name"}]
    fleet = Fleet(grid, 1.0, seen)  # type: ignore[arg-type]
    fleet.look()
    grid.gone = {NODES["cyd"]}
    assert fleet.look() == ["ada", "bob", "dan"]


def test_who_never_says_who_it_is_is_waited_for_once(settings: FederateSettings, folder: Path) -> None:
    settings = replace(settings, rounds=2, limits=LimitSettings(seconds=1.5))
    own, grid = Federation.open(settings), make_grid(folder)
    grid.twists = {NODES["dan"]: lambda _: None}
    serve(grid, grid.context(), own, Watched())  # type: ignore[arg-type]
    asked = [one.metadata.dst_node_id for one in grid.sent if one.metadata.message_type == "query"]
    assert sorted(asked) == sorted(NODES.values()) and sorted(own.reports[1].clients) == ["ada", "bob", "cyd"]


def test_a_name_is_free_when_its_owner_is_gone(folder: Path) -> None:
    """A client that was started anew is another node, which comes before the first is known to be gone."""
    grid, seen = LocalGrid(client_app(lambda _: Who("ada", str(folder / "data" / "ada.jsonl"))), 2), Watched()
    fleet = Fleet(grid, 1.0, seen)  # type: ignore[arg-type]
    assert fleet.look() == ["ada"] and len(seen.of("refused")) == 1
    grid.gone = {owner := fleet.nodes["ada"]}  # whichever answered first
    assert fleet.look() == ["ada"] and fleet.nodes["ada"] == 3 - owner


def test_a_second_server_of_flwr_run_is_refused(settings: FederateSettings, folder: Path) -> None:
    grid = make_grid(folder)
    context = grid.context()
    context.run_config["settings"] = json.dumps({"settings": asdict(settings), "into": None}, default=str)
    with only_server(settings.out), pytest.raises(FederationError, match="Another server trains"):
        flower_app.main(grid, context)  # type: ignore[arg-type]
    assert [one.name for one in state_folder(settings.out).iterdir()] == [".lock"]


def test_a_name_cannot_steer_the_servers_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    told = {"round": 1, "clients": {}, "absent": [], "refused": {"\x1b[2Jeve": "NaN"}, "seconds": 1.0}
    flower_app._log("closed", told)
    assert "eve refused: NaN" in (out := capsys.readouterr().out) and "\x1b" not in out


MASKED = PrivacySettings(clip=0.5, secure=True)


def test_a_masked_round_has_the_mean_of_an_open_one(settings: FederateSettings, folder: Path) -> None:
    settings = replace(settings, aggregate="shared", privacy=MASKED)
    own, grid = Federation.open(settings), make_grid(folder, secure=True)
    losses = serve(grid, grid.context(), own, Watched())  # type: ignore[arg-type]
    assert losses == {"before": {}, "after": {}}
    assert "evaluate" not in {one.metadata.message_type for one in grid.sent}  # nobody is asked for a loss
    clear = alone(settings, folder, list(ANSWERS))
    entries = sum(b.numel() for _, b in own.lora.pairs.values())
    # An entry is rounded by a level of 2 clip / 2^22 at most, in each of four updates.
    off = max(float((b - clear.lora.pairs[name][1]).abs().max()) for name, (_, b) in own.lora.pairs.items())
    assert off < 2 * 2 * 0.5 / 2**22 and entries > 1000
    assert {name: row["rank"] for name, row in own.reports[0].clients.items()} == RANKS


@pytest.mark.parametrize("lie", ["x", b"x", -1.0])
def test_a_masked_lie_about_cost_is_left_out(settings: FederateSettings, folder: Path, lie: Any) -> None:
    own, grid = Federation.open(replace(settings, aggregate="shared", privacy=MASKED)), make_grid(folder, secure=True)

    def lies(reply: Message) -> Message:
        if "fitres.metrics" in reply.content.config_records:
            reply.content.config_records["fitres.metrics"]["seconds"] = lie
            reply.content.config_records["fitres.metrics"]["bytes_down"] = lie
        return reply

    grid.twists = {NODES["ada"]: lies}
    losses = serve(grid, grid.context(), own, Watched())  # type: ignore[arg-type]
    told = report(own, losses, "command", 1.0)["clients"]
    assert "seconds" not in told["ada"] and told["bob"]["seconds"] > 0
    assert told["ada"]["rank"] == 2 and told["ada"]["bytes_down"] > 1000 and "bytes_up" not in told["ada"]


def test_a_masked_round_has_the_mean_of_the_rows_moments(settings: FederateSettings, folder: Path) -> None:
    router = with_samples(folder / "model", settings.out.with_name("model"))
    settings = replace(settings, aggregate="shared", privacy=MASKED, router=router)
    own, grid = Federation.open(settings), make_grid(folder, secure=True)
    serve(grid, grid.context(), own, Watched())  # type: ignore[arg-type]
    clear = alone(settings, folder, list(ANSWERS))
    # An entry is rounded by a level of 2 * 256 / 2^22 at most, and the mean by no more.
    assert float((own.moments - clear.moments).abs().max()) < 2 * row.LARGEST / QUANTA
    assert float(own.moments[0, 0, 0]) == pytest.approx(1, abs=1e-3)
    assert distance(own.lora, clear.lora) < 1e-3 * own.reports[0].norm


def test_a_masked_lie_about_text_is_seen_in_the_sum(settings: FederateSettings, folder: Path) -> None:
    router = with_samples(folder / "model", settings.out.with_name("model"))
    own = Federation.open(replace(settings, aggregate="shared", privacy=MASKED, router=router))
    before, size = own.lora, sum(b.numel() for _, b in own.lora.pairs.values())
    with pytest.raises(FederationError, match="cannot be taken: its row's moments"):
        own.close_sum(torch.zeros(size + own.moments.numel()), {name: {} for name in ANSWERS})
    assert own.round == 0 and own.lora is before and not bool(own.moments.any())


def test_what_the_server_gets_of_one_client_is_noise(settings: FederateSettings, folder: Path) -> None:
    """Masked entries of one client are even over all residues, whatever it learnt."""
    settings = replace(settings, aggregate="shared", privacy=MASKED)
    own, grid, got = Federation.open(settings), make_grid(folder, secure=True), []

    def listen(reply: Message) -> Message:
        if RECORD_KEY_CONFIGS not in reply.content.config_records:
            return reply
        record: Any = reply.content.config_records[RECORD_KEY_CONFIGS]
        if Key.MASKED_PARAMETERS in record:
            vector = bytes_to_ndarray(record[Key.MASKED_PARAMETERS][-1])
            got.append(torch.from_numpy(vector.astype("float64")).flatten())
        return reply

    grid.twists = {NODES["ada"]: listen}
    serve(grid, grid.context(), own, Watched())  # type: ignore[arg-type]
    (masked,) = got
    even = (masked / 2**32).sort().values
    theory = torch.arange(1, len(even) + 1, dtype=torch.float64) / len(even)
    assert float((even - theory).abs().max()) < 1.95 / len(even) ** 0.5


def step(key: str) -> Any:
    """Whether a reply is that of the step of SecAgg+ in which a client sends ``key``."""
    return lambda reply: key in reply.content.config_records.get(RECORD_KEY_CONFIGS, {})


@pytest.mark.parametrize("when", [Key.PUBLIC_KEY_1, Key.DESTINATION_LIST, Key.MASKED_PARAMETERS])
def test_a_masked_round_is_that_of_those_who_stay(settings: FederateSettings, folder: Path, when: str) -> None:
    """One leaves before it sent its keys, before it shared them out, or after it learnt; once at the first try."""
    settings = replace(settings, aggregate="shared", privacy=MASKED, limits=LimitSettings(seconds=3.0, fewest=2))
    own, grid, seen, is_then = Federation.open(settings), make_grid(folder, secure=True), Watched(), step(when)
    grid.twists = {NODES["cyd"]: lambda reply: None if is_then(reply) else reply}
    serve(grid, grid.context(), own, seen)  # type: ignore[arg-type]
    (told,) = own.reports
    assert sorted(told.clients) == ["ada", "bob", "dan"] and told.absent == ["cyd"] and not seen.of("again")
    clear = alone(settings, folder, ["ada", "bob", "dan"])
    assert distance(own.lora, clear.lora) < 1e-3 * told.norm


def test_who_left_after_its_vector_is_part_of_the_sum(settings: FederateSettings, folder: Path) -> None:
    settings = replace(settings, aggregate="shared", privacy=MASKED, limits=LimitSettings(seconds=3.0, fewest=2))
    own, grid, is_last = Federation.open(settings), make_grid(folder, secure=True), step(Key.SHARE_LIST)
    grid.twists = {NODES["cyd"]: lambda reply: None if is_last(reply) else reply}
    serve(grid, grid.context(), own, Watched())  # type: ignore[arg-type]
    (told,) = own.reports
    assert sorted(told.clients) == sorted(ANSWERS) and told.absent == []
    assert distance(own.lora, alone(settings, folder, list(ANSWERS)).lora) < 1e-3 * told.norm


@pytest.mark.parametrize("key", [Key.PUBLIC_KEY_1, Key.CIPHERTEXT_LIST, Key.MASKED_PARAMETERS, Key.NODE_ID_LIST])
def test_who_breaks_the_protocol_ends_a_round_not_the_server(
    settings: FederateSettings, folder: Path, key: str
) -> None:
    settings = replace(settings, aggregate="shared", privacy=MASKED, limits=LimitSettings(seconds=1.0))
    own, grid, seen, tries = Federation.open(settings), make_grid(folder, secure=True), Watched(), []

    def breaks(reply: Message) -> Message:
        if step(key)(reply) and not tries:
            tries.append(reply.content.config_records[RECORD_KEY_CONFIGS].pop(key))
        return reply

    grid.twists = {NODES["ada"]: breaks}
    serve(grid, grid.context(), own, seen)  # type: ignore[arg-type]
    assert "masked sum of round 1 failed" in seen.of("again")[0]["why"] and own.over


def test_too_few_for_a_masked_sum_are_told(settings: FederateSettings, folder: Path) -> None:
    """Cohorts of one client each."""
    how = replace(MASKED, epsilon=1000.0, cohorts=4)
    own, grid = Federation.open(replace(settings, aggregate="shared", privacy=how)), make_grid(folder, secure=True)
    with pytest.raises(FederationError, match="asks 1 clients for a masked sum, which is of 2 to 1023"):
        serve(grid, grid.context(), own, Watched())  # type: ignore[arg-type]


def test_so_many_that_a_masked_sum_wraps_around_are_told(settings: FederateSettings, folder: Path) -> None:
    own, grid = Federation.open(replace(settings, aggregate="shared", privacy=MASKED)), make_grid(folder)
    with pytest.raises(FederationError, match="asks 1024 clients"):
        masked.mean(grid, grid.context(), own, dict.fromkeys(range(1024), Order(b"")))  # type: ignore[arg-type]


def test_a_client_that_answers_masked_alone_is_not_tricked(settings: FederateSettings, folder: Path) -> None:
    settings = replace(settings, limits=LimitSettings(seconds=1.0))
    grid, seen = make_grid(folder, secure=True), Watched()
    with pytest.raises(FederationError, match="0 updates"):
        serve(grid, grid.context(), Federation.open(settings), seen)  # type: ignore[arg-type]
    assert "answers masked only" in seen.of("failed")[0]["why"]


@pytest.mark.parametrize("kind", ["evaluate", "train", "train.default"])
@pytest.mark.parametrize("promised", [False, True])
def test_nothing_of_a_masked_client_comes_in_the_open(
    settings: FederateSettings, folder: Path, kind: str, promised: bool
) -> None:
    """Neither loss nor update, whatever type of message asks for it, and with SecAgg+ as if it were."""
    own, grid, seen = Federation.open(settings), make_grid(folder, secure=True), Watched()
    fleet = Fleet(grid, 1.0, seen)  # type: ignore[arg-type]
    fleet.look()
    content = messages.of_order(own.trial() if kind == "evaluate" else own.order("ada", 2))
    if promised:
        content.config_records[RECORD_KEY_CONFIGS] = ConfigRecord({Key.STAGE: "collect_masked_vectors"})
    assert list(fleet.ask({NODES["ada"]: content}, kind)) == [] and len(seen.of("failed")) == 1


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({"answer": ConfigRecord({"update": 7})})])
def test_an_answer_of_another_form_is_refused(settings: FederateSettings, content: RecordDict) -> None:
    assert messages.to_answer(content) == b""


def test_a_client_is_what_its_host_says(folder: Path) -> None:
    context = make_grid(folder).contexts[1]
    context.node_config["data"], context.node_config["rank"] = "chats/ada.jsonl", 4
    assert of_node(context) == Who("ada", "chats/ada.jsonl", 4)
    context.node_config["rnk"] = 4
    with pytest.raises(ConfigError, match="not rnk"):
        of_node(context)
    with pytest.raises(ConfigError, match="needs data"):
        of_node(make_grid(folder).contexts[1])
