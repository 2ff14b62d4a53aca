"""The network from a text's embedding to an adapter: what it makes, how it is kept, and for whom."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from molora.errors import AdapterError, ConfigError, DataError, HypernetError
from molora.factors import write_factors
from molora.personalize.from_text import adapter_from_text, adapters_from_texts, factors_from_texts
from molora.personalize.generated import generated
from molora.personalize.text_net import CONFIG_FILE, WEIGHTS_FILE, TextNet, TextNetConfig
from tests.conftest import make_base

SIZE = 6
TEXTS = ["answers like a pirate", "speaks in verse", "is brief"]


def encoder(texts: list[str]) -> torch.Tensor:
    """Unit vectors that depend on nothing but the text."""
    found = [torch.randn(SIZE, generator=torch.Generator().manual_seed(sum(text.encode()))) for text in texts]
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


def make_net(base: Any, taught: bool = True, name: str = "tiny", **settings: Any) -> TextNet:
    """A small network, in evaluation mode; ``taught``: with weights as large as training would make them."""
    torch.manual_seed(1)
    net = TextNet(TextNetConfig.for_base(base, name, SIZE, **{"width": 8, "rank": 3, **settings}))
    net.standardise(encoder(TEXTS))
    if taught:
        for parameter in (*net.heads.values(), *net.bias_B.values()):
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


@pytest.fixture(params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Any:
    return make_base(request.param)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, factors: Any = None) -> torch.Tensor:
    if factors is None:
        return model(ids).logits
    with generated(model, factors):
        return model(ids).logits


@pytest.mark.parametrize("head", ["L", "M"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"], ids=["qv", "all"])
def test_an_untrained_network_changes_nothing(model: Any, ids: torch.Tensor, head: str, targets: Any) -> None:
    net = make_net(model, taught=False, head=head, targets=targets)
    factors = net(encoder(TEXTS))
    linear = 2 if isinstance(targets, tuple) else 7
    assert len(factors) == linear * 3
    for name, (A, B) in factors.items():
        module = model.get_submodule(name)
        assert A.shape == (3, 3, module.in_features) and B.shape == (3, module.out_features, 3)
        assert 0 < A.abs().max() <= module.in_features**-0.5 and not B.any()
    assert torch.equal(logits(model, ids, factors), logits(model, ids))


@pytest.mark.parametrize("head", ["L", "M"])
def test_each_sequence_has_its_own_adapter(model: Any, ids: torch.Tensor, head: str) -> None:
    net = make_net(model, head=head)
    together = net(encoder(TEXTS))
    found = logits(model, ids, together)
    for n, text in enumerate(TEXTS):
        alone = net(encoder([text]))
        torch.testing.assert_close(found[n : n + 1], logits(model, ids[n : n + 1], alone), rtol=1e-5, atol=1e-5)
    swapped = logits(model, ids, {name: (A.flip(0), B.flip(0)) for name, (A, B) in together.items()})
    assert (swapped - found)[0].abs().max() > 1e-2


@pytest.mark.parametrize("head", ["L", "M"])
def test_peft_runs_what_is_written(model: Any, ids: torch.Tensor, head: str, tmp_path: Path) -> None:
    net = make_net(model, head=head, targets="all-linear")
    folders = [tmp_path / "users" / f"{n}" for n in range(3)]
    made = adapters_from_texts(net, encoder, TEXTS, folders, "tiny")
    for folder, factors, text in zip(folders, made, TEXTS, strict=True):
        rounded = {name: (A[None].bfloat16().float(), B[None].bfloat16().float()) for name, (A, B) in factors.items()}
        expected = logits(model, ids, rounded)
        found = logits(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval(), ids)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (expected - logits(model, ids)).abs().max() > 1e-2
        assert text not in (folder / "generated.json").read_text()  # a profile tells of a person
        alone = adapter_from_text(net, encoder, text, folder.with_name(f"{folder.name}-alone"), "tiny")
        for name, (A, B) in alone.items():
            torch.testing.assert_close(A, factors[name][0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(B, factors[name][1], rtol=1e-5, atol=1e-6)


def test_the_scale_is_that_of_rank_stabilised_lora(base: Any) -> None:
    net = make_net(base, rank=4)
    assert net.config.alpha == 8 and net.config.scale == 4.0
    other = TextNet(dataclasses.replace(net.config, alpha=2.0)).eval()
    other.load_state_dict(net.state_dict())
    for name, (A, B) in net(encoder(TEXTS)).items():
        less = other(encoder(TEXTS))[name]
        assert torch.equal(A, less[0])
        torch.testing.assert_close(B, 4 * less[1])


def test_gradients_reach_every_part(base: Any) -> None:
    for head in ("L", "M"):
        net = make_net(base, head=head)
        sum((A.square().sum() + B.square().sum() for A, B in net(encoder(TEXTS)).values()), torch.zeros(())).backward()
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in net.parameters())


@pytest.mark.parametrize("head", ["L", "M"])
def test_saved_and_loaded_is_the_same(base: Any, head: str, tmp_path: Path) -> None:
    net = make_net(base, head=head)
    net.save(tmp_path / "nets" / "net")
    loaded = TextNet.load(tmp_path / "nets" / "net", base, "tiny")
    assert loaded.config == net.config and not loaded.training
    for name, pair in net(encoder(TEXTS)).items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(pair, loaded(encoder(TEXTS))[name], strict=True))
    assert sorted(file.name for file in (tmp_path / "nets" / "net").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    net.save(tmp_path / "half", torch.bfloat16)
    half = TextNet.load(tmp_path / "half")
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    assert torch.equal(half.mean, net.mean)
    with pytest.raises(OSError):
        net.save(tmp_path / "half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "nets"]


def test_another_base_is_refused(base: Any, tmp_path: Path) -> None:
    net = make_net(base, name="maker/tiny")
    net.save(tmp_path / "net")
    net.check(base, "/models/tiny")
    with pytest.raises(HypernetError, match="trained for maker/tiny, not for maker/other"):
        TextNet.load(tmp_path / "net", base, "maker/other")
    wide = make_base("qwen3")
    wide.model.layers[1].self_attn.q_proj = torch.nn.Linear(32, 16)
    with pytest.raises(HypernetError, match=r"layers\.1\.self_attn\.q_proj maps 32 to 32 .* maps 32 to 16"):
        net.check(wide)
    with pytest.raises(HypernetError, match="no such linear module"):
        net.check(make_base("phi3"))
    with pytest.raises(HypernetError, match="of 3 layers, and this base has 6"):
        TextNet.load(tmp_path / "net", make_base("gemma3"))
    with pytest.raises(HypernetError, match="not for maker/other"):
        adapter_from_text(net, encoder, "brief", tmp_path / "adapter", "maker/other")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": 10}, "multiple of 4"),
        ({"width": 0}, "width must be a whole number"),
        ({"rank": 0}, "rank must be"),
        ({"rank": 2.5}, "rank must be"),
        ({"head": "S"}, "head must be"),
        ({"dropout": 1.0}, "dropout must"),
        ({"alpha": -1.0}, "alpha must"),
        ({"alpha": float("inf")}, "alpha must"),
        ({"targets": ("q_proj", "query")}, "no linear module 'query'; there are: q_proj, k_proj"),
        ({"targets": ()}, "modules must name"),
    ],
    ids=str,
)
def test_bad_settings(base: Any, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TextNetConfig.for_base(base, "tiny", SIZE, **change)


def test_a_target_of_some_layers_only_is_refused(base: Any) -> None:
    odd = copy.deepcopy(base)
    odd.model.layers[2].self_attn.v_proj = torch.nn.Linear(32, 24)
    with pytest.raises(ConfigError, match="v_proj is not in every decoder layer of tiny with the same size"):
        TextNetConfig.for_base(odd, "tiny", SIZE)


def test_damaged_networks_are_told(base: Any, tmp_path: Path) -> None:
    with pytest.raises(HypernetError, match=f"no hypernetwork at {tmp_path}"):
        TextNet.load(tmp_path)

    def damaged(name: str, about: dict[str, Any] | None = None, weights: Any = None) -> Path:
        folder = tmp_path / name
        make_net(base).save(folder)
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | (about or {})))
        if isinstance(weights, bytes):
            (folder / WEIGHTS_FILE).write_bytes(weights)
        elif weights is not None:
            save_file(load_file(folder / WEIGHTS_FILE) | weights, folder / WEIGHTS_FILE)
        return folder

    cases = {
        "kind": ({"kind": "document"}, None, "adapters of a document"),
        "key": ({"depth": 3}, None, "is damaged"),
        "shape": ({"width": 16}, None, "is damaged"),
        "huge": ({"width": 4 * 10**9}, None, "is damaged"),
        "list": ({"modules": [1]}, None, "is damaged"),
        "cut": (None, b"12345678", "is damaged"),
        "nan": (None, {"mean": torch.full((SIZE,), float("nan"))}, "NaN or infinite"),
        "more": (None, {"more": torch.zeros(1)}, "is damaged"),
    }
    for name, (about, weights, told) in cases.items():
        with pytest.raises(HypernetError, match=told):
            TextNet.load(damaged(name, about, weights))


def test_bad_texts_and_encoders(base: Any, tmp_path: Path) -> None:
    net = make_net(base)
    for texts in ([], ["brief", " \n"]):
        with pytest.raises(DataError, match="empty"):
            factors_from_texts(net, encoder, texts)
    with pytest.raises(HypernetError, match=f"embeddings of {SIZE} numbers and these have 4"):
        factors_from_texts(net, lambda texts: torch.ones(len(texts), 4), ["brief"])
    with pytest.raises(HypernetError, match="not \\[texts, size\\]"):
        factors_from_texts(net, lambda texts: torch.ones(SIZE), ["brief"])
    with pytest.raises(HypernetError, match="NaN"):
        factors_from_texts(net, lambda texts: torch.full((1, SIZE), float("nan")), ["brief"])
    there, new = tmp_path / "there", tmp_path / "new"
    write_factors(there, factors_from_texts(net, encoder, ["brief"])[0], "tiny")
    for folders in ([new, there], [new, new], [new]):
        with pytest.raises(AdapterError):
            adapters_from_texts(net, encoder, ["brief", "long"], folders, "tiny")
    assert not new.exists()


def test_asking_leaves_the_networks_mode(base: Any) -> None:
    net = make_net(base, dropout=0.5).train()
    first, second = (factors_from_texts(net, encoder, ["brief"])[0] for _ in range(2))
    assert net.training and all(torch.equal(first[name][1], second[name][1]) for name in first)
