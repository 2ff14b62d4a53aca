"""A document becomes an adapter: the network's shapes and files, the reading, and the live and the saved model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from molora import MoLoRAModel, Router
from molora.adapter import Adapter
from molora.chat import render
from molora.cli import app
from molora.errors import AdapterError, ConfigError, DocumentError, HypernetError, StackError
from molora.examples import encode_examples, features_of
from molora.factors import cut
from molora.personalize import internalize
from molora.personalize.document_net import DocumentNet, DocumentNetConfig, by_module
from molora.personalize.generated import generated
from molora.personalize.internalize import factors_of, read_as, states_of
from molora.versions import Versions
from tests.conftest import SMALL, make_base
from tests.unit.spoken import make_spoken, save_spoken

DOCUMENT = "The lamp is green. It stands in the hall by the door. Nobody may move it before noon. " * 3


def make_net(base: Any, trained: bool = True, **settings: Any) -> DocumentNet:
    torch.manual_seed(4)
    sizes = {"modules": ("down_proj", "q_proj"), "rank": 2, "width": 16, "latents": 3, "blocks": 2, "heads": 2}
    net = DocumentNet(DocumentNetConfig.for_base(base, "tiny", **{**sizes, "chunk": 64, **settings}))
    if trained:
        for parameter in (*net.scale_B.values(), *net.bias_B.values(), net.down):
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


@pytest.fixture
def model(tmp_path: Path) -> MoLoRAModel:
    return make_spoken(tmp_path)


@pytest.fixture
def saved_net(model: MoLoRAModel, tmp_path: Path) -> Path:
    make_net(model.base).save(tmp_path / "net")
    return tmp_path / "net"


def asked(model: MoLoRAModel, text: str = "Where is the lamp?") -> torch.Tensor:
    prompt = render(model.tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
    return model.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]


@torch.no_grad()
def test_states_are_what_transformers_calls_hidden_states(model: MoLoRAModel) -> None:
    ids, mask = read_as(model.tokenizer, ["A short one.", "This one is a good deal longer."], "cpu")
    found = states_of(model.base, ids, mask, 2)
    wanted = model.base(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    assert found.shape == (2, 2, *ids.shape[1:], SMALL["hidden_size"])
    for layer in range(2):  # padding is on the right, where nothing of it reaches what is before
        torch.testing.assert_close(found[:, layer][mask], wanted[layer][mask], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_network_that_has_not_learnt_changes_nothing(model: MoLoRAModel) -> None:
    net = make_net(model.base, trained=False)
    factors = factors_of(model.base, model.tokenizer, net, DOCUMENT)
    assert all(not B.any() and A.any() for A, B in factors.values())
    ids = asked(model)
    with generated(model.base, {name: (A[None], B[None]) for name, (A, B) in factors.items()}):
        changed = model.base(ids).logits
    assert torch.equal(changed, model.base(ids).logits)


@torch.no_grad()
def test_padding_and_company_change_nothing(model: MoLoRAModel) -> None:
    net = make_net(model.base).double()
    base = model.base.double()
    parts = ["One.", "Another chunk, which is longer than the first.", "And a third."]
    ids, mask = read_as(model.tokenizer, parts, "cpu")
    together = net(states_of(base, ids, mask, net.config.exit), mask)
    for row, part in enumerate(parts):
        own, real = read_as(model.tokenizer, [part], "cpu")
        alone = net(states_of(base, own, real, net.config.exit), real)
        for name in together:
            for mine, theirs in zip(together[name], alone[name], strict=True):
                torch.testing.assert_close(mine[row], theirs[0], rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_texts_of_several_chunks_are_joined_with_what_every_text_has(model: MoLoRAModel) -> None:
    net = make_net(model.base)
    ids, mask = read_as(model.tokenizer, ["a b c", "d e", "f"], "cpu")
    chunks = net(states_of(model.base, ids, mask, net.config.exit), mask)
    joined = net.joined(chunks, torch.tensor([0, 1, 1]), 2)
    for name, (A, B) in joined.items():
        own_A, own_B = net.learned()[name]
        assert A.shape[2] == B.shape[3] == 6  # learned, and two chunks of rank 2
        for text, members in enumerate(([0], [1, 2])):
            for layer in range(net.config.layers):
                wanted = own_B[layer] @ own_A[layer]
                wanted = wanted + sum(chunks[name][1][c, layer] @ chunks[name][0][c, layer] for c in members)
                torch.testing.assert_close(B[text, layer] @ A[text, layer], wanted)
    names = by_module(model.base, joined)
    assert set(names) == {
        f"model.layers.{layer}.{inner}" for layer in range(3) for inner in ("mlp.down_proj", "self_attn.q_proj")
    }


@torch.no_grad()
def test_what_all_chunks_have_in_common_counts_no_more_often_than_in_training(model: MoLoRAModel) -> None:
    net = make_net(model.base, together=2)
    quiet, loud = ["d e f g"] * 4, "What is this?"
    ids, mask = read_as(model.tokenizer, [*quiet, loud], "cpu")
    chunks = net(states_of(model.base, ids, mask, net.config.exit), mask)
    balanced = net.balanced(chunks)
    for name, (A, B) in chunks.items():
        delta = (B @ A).double()  # [chunks, layers, out, in]
        wanted = delta[0] + delta[4]  # of what is common to five chunks, two chunks' worth
        mine_A, mine_B = balanced[name]
        torch.testing.assert_close((mine_B.double() @ mine_A.double()).sum(0), wanted, rtol=1e-5, atol=1e-6)
    few = {name: (A[:2], B[:2]) for name, (A, B) in chunks.items()}
    assert net.balanced(few) == few and make_net(model.base).balanced(chunks) == chunks


@torch.no_grad()
def test_a_gate_weakens_a_chunk_or_takes_it_out_of_a_layer(model: MoLoRAModel) -> None:
    net = make_net(model.base)
    ids, mask = read_as(model.tokenizer, ["a b c", "d e", "f", "What is this?"], "cpu")
    states = states_of(model.base, ids, mask, net.config.exit)
    seen: list[torch.Tensor] = []
    hook = net.decode.register_forward_hook(lambda _, __, found: seen.append(found))
    wide_open = net(states, mask)
    torch.nn.init.normal_(net.gate, std=30.0)
    found = net(states, mask)
    hook.remove()
    vectors = seen[0].view(4, 3, 4, 16).mean(2)  # [chunks, layers, width]
    gate = torch.stack([1 + vectors[:, layer] @ net.gate[layer] / 4 for layer in range(3)], 1).clamp(min=0)
    assert (gate == 0).any() and (gate > 0).any()
    for name, (A, B) in found.items():
        assert torch.equal(A, wide_open[name][0])
        torch.testing.assert_close(B, wide_open[name][1] * gate[..., None, None])
        assert not B[gate == 0].any()


@torch.no_grad()
def test_layers_beyond_the_exit_read_what_the_last_one_before_it_reads(model: MoLoRAModel) -> None:
    net = make_net(model.base, exit=1)
    ids, mask = read_as(model.tokenizer, ["a b c"], "cpu")
    states = states_of(model.base, ids, mask, 1)
    whole = make_net(model.base)
    whole.load_state_dict(net.state_dict())
    found, wanted = net(states, mask), whole(states.expand(-1, 3, -1, -1), mask)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name])


def test_gradients_reach_every_parameter(model: MoLoRAModel) -> None:
    net = make_net(model.base)
    ids, mask = read_as(model.tokenizer, ["a b c", "d"], "cpu")
    joined = net.joined(net(states_of(model.base, ids, mask, net.config.exit), mask), torch.tensor([0, 1]), 2)
    with generated(model.base, by_module(model.base, joined)):
        model.base(asked(model).expand(2, -1)).logits.square().mean().backward()
    without = [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not without


def test_a_saved_network_is_the_same_and_made_for_one_base(model: MoLoRAModel, saved_net: Path, tmp_path: Path) -> None:
    again, net = DocumentNet.load(saved_net, torch.bfloat16), make_net(model.base).bfloat16()
    assert again.config == net.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(HypernetError, match="trained for tiny .3 layers of 32., and qwen has 2 layers of 32"):
        net.check(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})), "qwen")
    with pytest.raises(HypernetError, match="down_proj maps 48 to 32"):
        net.check(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "intermediate_size": 40})), "x")
    with pytest.raises(HypernetError, match="no hypernetwork at"):
        DocumentNet.load(tmp_path / "nowhere")
    about = json.loads((saved_net / "hypernet.json").read_text())
    (saved_net / "hypernet.json").write_text(json.dumps({**about, "kind": "profile"}))
    with pytest.raises(HypernetError, match="makes adapters of a profile"):
        DocumentNet.load(saved_net)
    for wrong in ({"rank": 3}, {"rank": 10**9}):  # of the second nothing is allocated
        (saved_net / "hypernet.json").write_text(json.dumps({**about, **wrong}))
        with pytest.raises(HypernetError, match="(?s)is damaged.*size mismatch"):
            DocumentNet.load(saved_net)
    (saved_net / "hypernet.json").write_text(json.dumps(about))
    weights = load_file(saved_net / "hypernet.safetensors")
    weights["latents"][0, 0] = torch.inf
    save_file(weights, saved_net / "hypernet.safetensors")
    with pytest.raises(HypernetError, match="holds NaN or infinite values"):
        DocumentNet.load(saved_net)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"modules": ("lm_head",)}, "no linear module 'lm_head'"),
        ({"modules": ()}, "nothing that is to be adapted"),
        ({"rank": 0}, "rank must be a whole number from 1"),
        ({"width": 15}, "not a multiple of heads"),
        ({"exit": 4}, "exit must be from 1 to the base's 3"),
        ({"together": -1}, "together must be a whole number from 0"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_net(make_base(), **settings)


@torch.no_grad()
def test_the_live_model_is_the_base_with_the_documents_factors(model: MoLoRAModel, saved_net: Path) -> None:
    plain = model.base(asked(model)).logits
    before = model(asked(model)).logits
    reading = DocumentNet.load(saved_net)
    factors = factors_of(model.base, model.tokenizer, reading, DOCUMENT)
    model.internalize(DOCUMENT, hypernet=saved_net, name="lamp")
    off = {layer.name: None for layer in model.stack.layers}
    rounded = {name: (A[None].bfloat16().float(), B[None].bfloat16().float()) for name, (A, B) in factors.items()}
    with generated(model.base, rounded):
        wanted = model.base(asked(model)).logits
    found = model(asked(model), selection={**off, "document": "lamp"}).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    assert torch.equal(model(asked(model), selection=off).logits, plain)
    model.reset()
    assert [layer.name for layer in model.stack.layers] == ["domain", "user"]
    assert torch.equal(model(asked(model)).logits, before)
    assert not any(row.startswith("document") for row in model.router.rows)


@torch.no_grad()
def test_the_rank_can_stay_what_it_is(model: MoLoRAModel, saved_net: Path) -> None:
    net = DocumentNet.load(saved_net)
    whole = factors_of(model.base, model.tokenizer, net, DOCUMENT)
    assert {len(A) for A, _ in whole.values()} == {2 * (-(-len(DOCUMENT) // 64) + 1)} or len(DOCUMENT) % 64
    few = factors_of(model.base, model.tokenizer, net, DOCUMENT, most_rank=3)
    assert {len(A) for A, _ in few.values()} == {3}
    for name, (A, B) in cut(whole, 3).items():
        torch.testing.assert_close(few[name][1] @ few[name][0], B @ A)


def test_the_router_finds_the_document_and_leaves_other_text_alone(model: MoLoRAModel, saved_net: Path) -> None:
    """The samples of a trained router are the null's in a layer that comes later."""
    router = model.router
    assert isinstance(router, Router)
    other = "12 + 34 = 46; 7 * 8 = 56; 99 - 11 = 88. " * 4
    features = features_of(model, encode_examples(model, [other], False), 0, {})
    for part in router.parts:
        part.samples.set(features, torch.arange(len(features)) % 2)
    model.internalize(DOCUMENT, hypernet=saved_net, name="lamp")
    selection = {"domain": None, "user": None, "document": "auto"}

    def share(text: str) -> float:
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        routes = model(ids, selection=selection, output_routes=True).routes
        return float((routes.slots[0, :, -1] >= 0).float().mean())

    with torch.no_grad():
        assert share(DOCUMENT) > 0.6  # a random router tells little more apart
        assert share(other) < 0.1


def test_several_documents_and_names_that_are_taken(model: MoLoRAModel, saved_net: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("The other document.")
    model.internalize(DOCUMENT, hypernet=saved_net, name="a")
    model.internalize(tmp_path / "b.txt", hypernet=saved_net, name="b")
    model.internalize(DOCUMENT, hypernet=saved_net, name="mine", layer="user")
    assert list(model.stack["document"].adapters) == ["a", "b"]
    rows = list(model.router.rows)
    with pytest.raises(StackError, match=r"already has 'a'.*reset"):
        model.internalize(DOCUMENT, hypernet=saved_net, name="a")
    with pytest.raises(DocumentError, match="is empty"):
        model.internalize(" ", hypernet=saved_net, name="c", layer="new")
    with pytest.raises(StackError):
        model.internalize(DOCUMENT, hypernet=saved_net, name="../c")
    assert model.router.rows == rows and [one.name for one in model.stack.layers] == ["domain", "user", "document"]
    model.save_pretrained(tmp_path / "kept")
    assert Adapter.load(tmp_path / "kept/adapters/document/b").modules
    model.reset()
    model.reset()  # nothing is left to be taken away
    assert list(model.stack["user"].adapters) == []


def test_after_a_document_that_found_no_place_the_next_one_does(
    model: MoLoRAModel, saved_net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise AdapterError("full")

    with monkeypatch.context() as patch, pytest.raises(AdapterError, match="full"):
        patch.setattr(MoLoRAModel, "add_adapter", full)
        model.internalize(DOCUMENT, hypernet=saved_net, name="lamp")
    assert [layer.name for layer in model.stack.layers] == ["domain", "user"]
    model.internalize(DOCUMENT, hypernet=saved_net, name="lamp")
    assert list(model.stack["document"].adapters) == ["lamp"]


def test_a_document_whose_row_cannot_be_fitted_leaves_the_model_as_it_was(
    model: MoLoRAModel, saved_net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise AdapterError("full")

    inputs = model.encode("1 + 1 = 2")
    before, rows, layers = model(**inputs).logits, list(model.router.rows), list(model.routing.layers)  # type: ignore[union-attr]
    with monkeypatch.context() as patch, pytest.raises(AdapterError, match="full"):
        patch.setattr(Router, "set_row", full)
        model.internalize(DOCUMENT, hypernet=saved_net, name="lamp")
    assert model.router.rows == rows and len(model.routing.layers) == len(layers)  # type: ignore[union-attr]
    assert torch.equal(model(**inputs).logits, before)


def test_a_document_that_is_too_long(model: MoLoRAModel, saved_net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internalize, "MOST_TOKENS", 128)
    with pytest.raises(DocumentError, match="more than 128 tokens"):
        factors_of(model.base, model.tokenizer, DocumentNet.load(saved_net), DOCUMENT)


class TestCommand:
    @pytest.fixture
    def saved(self, model: MoLoRAModel, tmp_path: Path) -> Path:
        for part in model.router.parts:  # type: ignore[union-attr]
            features = features_of(model, encode_examples(model, ["1 + 1 = 2"], False), 0, {})
            part.samples.set(features, torch.zeros(len(features), dtype=torch.int64))
        return save_spoken(model, tmp_path)

    def run(self, capsys: Any, *arguments: str) -> dict[str, Any]:
        app(["internalize", *arguments, "--json"], standalone_mode=False)
        return dict(json.loads(capsys.readouterr().out))

    def test_an_adapter_and_its_next_version(self, saved: Path, saved_net: Path, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "lamp.txt").write_text(DOCUMENT)
        line = [str(tmp_path / "lamp.txt"), "--as", "user/ada", "--model", str(saved), "--hypernet", str(saved_net)]
        first = self.run(capsys, *line)
        assert (first["adapter"], first["version"]) == ("user/ada", 1) and first["rank"] > 2
        second = self.run(capsys, *line, "--most-rank", "2")
        assert (second["version"], second["rank"]) == (2, 2)
        versions = Versions(saved, "user", "ada")
        assert versions.current == 2 and versions[2].parent == 1
        assert versions[1].data["made_from"] == "a document" and "lamp is green" not in json.dumps(versions[1].data)
        assert Adapter.load(versions.path(2)).ranks == [2]
        versions.rollback()
        assert MoLoRAModel.from_pretrained(saved).adapters["user/ada"].ranks == [first["rank"]]

    def test_a_row_of_the_router_where_the_layer_is_left_to_it(
        self, saved: Path, saved_net: Path, tmp_path: Path, capsys: Any
    ) -> None:
        (tmp_path / "lamp.txt").write_text(DOCUMENT)
        line = [str(tmp_path / "lamp.txt"), "--as", "domain/lamp", "--model", str(saved), "--hypernet", str(saved_net)]
        self.run(capsys, *line)
        loaded = MoLoRAModel.from_pretrained(saved)
        assert "domain/lamp" in loaded.router.rows and Versions(saved).current is not None

    @pytest.mark.parametrize(
        ("where", "sentence"),
        [
            ("ada", "write LAYER/NAME"),
            ("nobody/ada", "has no layer 'nobody'"),
            ("user/../ada", "cannot name an adapter"),
        ],
    )
    def test_places_that_are_none(
        self, where: str, sentence: str, saved: Path, saved_net: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "lamp.txt").write_text(DOCUMENT)
        arguments = [str(tmp_path / "lamp.txt"), "--as", where, "--model", str(saved), "--hypernet", str(saved_net)]
        with pytest.raises(StackError, match=sentence):
            app(["internalize", *arguments], standalone_mode=False)
        assert not (saved / "versions").exists()
