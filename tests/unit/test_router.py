"""The learned router: folding, rows, losses, gradients."""

import copy
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from molora import Router, RouterConfig
from molora.errors import ConfigError, RouterError
from molora.memory import Memory
from molora.router import NEVER, RouterPart, balance_loss, entropy, z_loss
from tests.parity.test_equalities import make_routed

ROWS = ["domain/math", "domain/code", "domain/none"]


def make_router(rows: list[str] | None = None, **config: Any) -> Router:
    torch.manual_seed(0)
    router = Router(RouterConfig(**{"width": 8, "hidden": 16, **config}), rows or ROWS, 32)
    for part in router.parts:
        part.std.fill_(0.05)
        part.mean.fill_(0.01)
        torch.nn.init.normal_(part.output.weight, std=2.0)
    return router


def part_of(router: Router) -> RouterPart:
    part = router.parts[0]
    assert isinstance(part, RouterPart)
    return part


def test_a_folded_table_is_a_direct_read(base: Any, ids: torch.Tensor) -> None:
    part = part_of(make_router().eval())
    embedding = base.get_input_embeddings()
    direct = part.read(embedding(ids))
    assert torch.allclose(part.read_ids(ids, embedding), direct, atol=1e-5)
    assert part.table is not None and part.table.shape == (97, 8) and part.table.dtype == torch.float32
    assert not part.table.requires_grad


def test_training_reads_with_a_gradient(base: Any, ids: torch.Tensor) -> None:
    part = part_of(make_router().train())
    part.read_ids(ids, base.get_input_embeddings()).square().sum().backward()
    assert part.project.weight.grad.abs().max() > 0
    assert part.table is None


@torch.no_grad()
def test_a_change_of_mode_folds_anew(base: Any, ids: torch.Tensor) -> None:
    router = make_router().eval()
    part, embedding = part_of(router), base.get_input_embeddings()
    part.read_ids(ids, embedding)
    router.train()
    part.project.weight.mul_(2)
    router.eval()
    assert torch.allclose(part.read_ids(ids, embedding), part.read(embedding(ids)), atol=1e-5)


@torch.no_grad()
def test_decays_are_kept_until_they_may_change() -> None:
    router, other = (make_router(decays=decays).eval() for decays in ((0.8, 0.95), (0.5, 0.6)))
    part = part_of(router)
    assert part.fixed_decays() is part.fixed_decays()
    for change in (lambda: part.decay_logits.add_(1), lambda: router.load_state_dict(other.state_dict())):
        router.train()
        change()
        assert torch.equal(part.fixed_decays(), part.decays)
        router.eval()
        assert torch.equal(part.fixed_decays(), part.decays)
    assert not part.fixed_decays().requires_grad
    part.fixed_decays()
    router.load_state_dict(make_router(decays=(0.7, 0.9)).state_dict())
    assert torch.equal(part.fixed_decays(), part.decays)


@torch.no_grad()
def test_evaluation_within_training_sees_the_latest_weights(base: Any, ids: torch.Tensor) -> None:
    part, embedding = part_of(make_router().train()), base.get_input_embeddings()
    part.read_ids(ids, embedding)
    part.project.weight.mul_(2)  # an optimiser's step
    assert torch.allclose(part.read_ids(ids, embedding), part.read(embedding(ids)), atol=1e-5)


@torch.no_grad()
def test_loaded_weights_are_folded_anew(base: Any, ids: torch.Tensor) -> None:
    router, other = make_router().eval(), make_router().eval()
    part_of(other).project.weight.mul_(2)
    embedding = base.get_input_embeddings()
    part_of(router).read_ids(ids, embedding)
    router.load_state_dict(other.state_dict())
    assert torch.allclose(part_of(router).read_ids(ids, embedding), part_of(other).read(embedding(ids)), atol=1e-5)


def test_features_are_the_formula(ids: torch.Tensor) -> None:
    part = part_of(make_router(decays=(0.8,)))
    z, real = torch.randn(1, 2, 8), torch.ones(1, 2, dtype=torch.bool)
    first = 0.2 * z[0, 0]
    u = torch.cat([z[0, 1], 0.8 * first + 0.2 * z[0, 1]])
    q = torch.nn.functional.silu(part.input.weight @ u + part.input.bias)
    assert torch.allclose(part.features(z, real, None)[0, 1], q, atol=1e-5)
    assert torch.allclose(part(q), part.output.weight @ q + part.output.bias, atol=1e-5)


@torch.no_grad()
def test_features_with_a_memory_are_those_of_the_whole() -> None:
    part = part_of(make_router())
    z, real = torch.randn(2, 12, 8), torch.ones(2, 12, dtype=torch.bool)
    memory = part.new_memory(2, part.signature())
    assert isinstance(memory, Memory)
    pieces = [part.features(piece, real[:, : piece.shape[1]], memory) for piece in z.split([5, 1, 6], 1)]
    assert torch.allclose(torch.cat(pieces, 1), part.features(z, real, None), atol=1e-5)


@torch.no_grad()
def test_a_new_row_leaves_the_others_alone_and_is_never_chosen() -> None:
    router = make_router()
    part, q = part_of(router), torch.randn(2, 9, 16)
    before, weight, bias = part(q), part.output.weight.clone(), part.output.bias.clone()
    router.add_row("domain/law")
    after = part(q)
    assert torch.equal(part.output.weight[:3], weight) and torch.equal(part.output.bias[:3], bias)
    assert router.rows == [*ROWS, "domain/law"] and part.output.out_features == 4
    assert (after[..., :3] - before).abs().max() <= 1e-6 * before.abs().max()  # a product of another width sums anew
    assert (after[..., 3] == NEVER).all() and (after.argmax(-1) != 3).all()
    assert all(parameter.requires_grad for parameter in part.output.parameters())


@pytest.mark.parametrize("reads", [0, (0, 2)])
@torch.no_grad()
def test_a_row_from_examples_wins_on_them(reads: Any) -> None:
    router = make_router(reads=reads)
    examples = [torch.randn(20, 16).abs() * 0.1 + 1 for _ in router.parts]
    before = [part(q) for part, q in zip(router.parts, examples, strict=True)]
    rows = [(part.output.weight.clone(), part.output.bias.clone()) for part in router.parts]
    router.add_row("domain/law")
    for index, q in enumerate(examples):
        router.set_row("domain/law", index, q)
    for part, q, old, (weight, bias) in zip(router.parts, examples, before, rows, strict=True):
        assert torch.equal(part.output.weight[:3], weight) and torch.equal(part.output.bias[:3], bias)
        logits = part(q)
        assert (logits[..., :3] - old).abs().max() <= 1e-6 * old.abs().max()  # a product of another width sums anew
        assert abs(float((logits[..., 3] - old.amax(-1)).mean()) - 1) < 1e-4
        assert (logits.argmax(-1) == 3).float().mean() > 0.5
        assert torch.isclose(part.output.weight[3].norm(), part.output.weight[:3].norm(dim=1).mean())


def separate(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features in four heaps, the last of which is a new adapter's, and which is whose."""
    torch.manual_seed(seed)
    heaps = torch.randn(4, 16, generator=torch.Generator().manual_seed(9)) * 2
    own = torch.arange(4).repeat_interleave(count)
    return heaps[own] + 0.5 * torch.randn(len(own), 16) + 3, own


@torch.no_grad()
def test_a_row_from_examples_takes_only_what_is_its_own() -> None:
    router = make_router()
    part = part_of(router)
    q, own = separate(60, 0)
    part.output.weight.copy_(torch.linalg.lstsq(torch.cat([q, torch.ones(len(q), 1)], 1), 8 * torch.eye(4)[own])
                             .solution[:-1, :3].T)  # fmt: skip
    part.output.bias.zero_()
    old = own < 3
    part.output.bias.copy_(-part(q)[old].mean(0))
    before = (part.output.weight.clone(), part.output.bias.clone())
    part.samples.set(q[old], own[old])
    router.add_row("domain/law")
    router.set_row("domain/law", 0, q[~old])
    assert torch.equal(part.output.weight[:3], before[0]) and torch.equal(part.output.bias[:3], before[1])
    more, theirs = separate(200, 1)
    chosen = part(more).argmax(-1)
    assert (chosen == theirs)[theirs == 3].float().mean() > 0.95
    was = torch.nn.functional.linear(more, *before).argmax(-1)
    kept = (chosen == was)[theirs < 3].float().mean()
    assert kept > 0.95
    assert part.samples.rows.tolist() == own[own < 3].tolist() + [3] * 60  # of the new one too
    router.remove_row("domain/math")
    assert part.samples.rows.unique().tolist() == [0, 1, 2] and len(part.samples.features) == 180


def test_samples_are_saved_and_older_routers_have_none() -> None:
    router, other = make_router(), make_router()
    part_of(router).samples.set(torch.randn(5, 16), torch.arange(5) % 3)
    state = router.state_dict()
    other.load_state_dict(state)
    assert torch.equal(part_of(other).samples.features, part_of(router).samples.features)
    assert part_of(other).samples.features.dtype == torch.float16
    assert torch.equal(part_of(other).samples.rows, torch.arange(5) % 3)
    other.load_state_dict({name: tensor for name, tensor in state.items() if "samples" not in name})
    assert len(part_of(other).samples.rows) == 0


@torch.no_grad()
def test_a_removed_row_leaves_the_others_alone() -> None:
    router = make_router()
    part, q = part_of(router), torch.randn(2, 9, 16)
    before = part(q)
    router.remove_row("domain/math")
    assert router.rows == ROWS[1:]
    assert torch.equal(part(q), before[..., 1:])


def test_balance_loss_is_one_for_even_use() -> None:
    logits = torch.eye(4).repeat(3, 1).unsqueeze(0) * 20
    real = torch.ones(1, 12, dtype=torch.bool)
    assert math.isclose(float(balance_loss(logits, real)), 1, rel_tol=1e-5)
    collapsed = torch.zeros(1, 12, 4)
    collapsed[..., 2] = 50
    assert math.isclose(float(balance_loss(collapsed, real)), 4, rel_tol=1e-5)


def test_losses_ignore_padding() -> None:
    logits = torch.randn(2, 6, 3)
    real = torch.rand(2, 6) > 0.4
    poisoned = logits.masked_fill(~real.unsqueeze(-1), 1e4)
    assert torch.equal(balance_loss(poisoned, real), balance_loss(logits, real))
    assert torch.equal(z_loss(poisoned, real), z_loss(logits, real))
    assert torch.equal(entropy(poisoned, real), entropy(logits, real))


def test_entropy_is_that_of_the_probabilities() -> None:
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 6, dtype=torch.bool)
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert math.isclose(float(entropy(logits, real)), float(expected), rel_tol=1e-5)
    assert float(entropy(logits * 1e3, real)) < 1e-3


def test_z_loss_is_the_squared_logsumexp() -> None:
    logits = torch.zeros(1, 5, 4, requires_grad=True)
    loss = z_loss(logits, torch.ones(1, 5, dtype=torch.bool))
    assert math.isclose(loss.item(), math.log(4) ** 2, rel_tol=1e-5)
    loss.backward()
    assert logits.grad.abs().max() > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"reads": -1},
        {"reads": (2, 0)},
        {"reads": (1, 2)},
        {"reads": (0, 0)},
        {"reads": (0, 1, 2)},
        {"reads": ()},
        {"reads": "0"},
        {"weights": "sigmoid"},
        {"decays": (0.0,)},
        {"decays": (1.0,)},
        {"decays": (float("nan"),)},
        {"units": -1},
        {"units": 1.5},
        {"units": 8, "decays": (0.5,)},
        {"learn_decays": True},
        {"width": 0},
        {"hidden": -3},
        {"hidden": "many"},
        {"depth": 0},
        {"depth": True},
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RouterConfig(**settings)


def test_settings_from_a_dict() -> None:
    config = RouterConfig.from_dict({"reads": [0, 2], "decays": [0.5], "weights": "softmax"})
    assert config == RouterConfig(reads=(0, 2), decays=(0.5,), weights="softmax") and config.points == (0, 2)
    with pytest.raises(ConfigError, match="Unknown router setting height"):
        RouterConfig.from_dict({"height": 3})


def test_a_memory_by_default_and_on_demand() -> None:
    assert (RouterConfig().units, RouterConfig().depth, RouterConfig().decays) == (128, 2, ())
    assert (RouterConfig(decays=(0.8,)).units, RouterConfig(decays=(0.8,)).decays) == (0, (0.8,))
    assert (RouterConfig(decays=()).units, RouterConfig(units=0).decays) == (0, ())
    old = {"reads": 0, "weights": "unit", "width": 8, "hidden": 16, "decays": [0.8, 0.95], "learn_decays": False}
    assert RouterConfig.from_dict(old).units == 0  # as routers were saved before there were gates
    assert RouterConfig.from_dict(asdict(RouterConfig())) == RouterConfig()


@torch.no_grad()
def test_gated_features_are_the_formula() -> None:
    part = part_of(make_router(units=6))
    z, real = torch.randn(1, 2, 8), torch.ones(1, 2, dtype=torch.bool)
    h = [torch.zeros(6), torch.zeros(6)]
    for seen in (torch.cat([z[0, 0], torch.zeros(24)]), torch.cat([z[0, 1], z[0, 0], torch.zeros(16)])):
        for layer in (0, 1):
            gate, candidate = part.gates[layer](torch.cat([seen, *h[:layer]])).chunk(2)
            h[layer] = (1 - gate.sigmoid()) * h[layer] + gate.sigmoid() * candidate
    q = torch.nn.functional.silu(part.input.weight @ torch.cat([z[0, 1], *h]) + part.input.bias)
    assert torch.allclose(part.features(z, real, None)[0, 1], q, atol=1e-5)


def test_gates_get_a_gradient(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_routed(base, adapters).train()
    model(ids, labels=ids).loss.backward()
    for parameter in model.router.parts[0].gates.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0


def test_a_router_for_something_else() -> None:
    router = make_router(reads=2)
    router.check(ROWS[::-1], 32, 3, 97)
    with pytest.raises(RouterError, match="domain/law"):
        router.check([*ROWS, "domain/law"], 32, 3, 97)
    with pytest.raises(RouterError, match="32 features"):
        router.check(ROWS, 64, 3, 97)
    with pytest.raises(RouterError, match="layer 2"):
        router.check(ROWS, 32, 2, 97)


def test_training_routes_are_evaluation_routes(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_routed(base, adapters)
    with torch.no_grad():
        expected = model(ids).logits
    found = model.train()(ids)
    assert found.logits.requires_grad
    assert (found.logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"reads": 1, "decays": (0.8, 0.95)},
        {"weights": "softmax", "top_k": 2},
        {"top_k": 2},
        {"decays": (0.8, 0.95)},
    ],
    ids=str,
)
def test_router_gradients_are_those_of_a_dense_mixture(
    kind: dict[str, Any], base: Any, adapters: dict[str, Path], ids: torch.Tensor
) -> None:
    """All adapters act on every token, at onehot + p_chosen - stop(p_chosen) (unit) or p over the chosen (softmax)."""
    model = make_routed(base, adapters, **kind).train()
    loss = model(ids, labels=ids, selection={"domain": "auto"}, use_cache=False).loss
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.router.named_parameters() if _used(parameter)}
    assert found and max(float(grad.abs().max()) for grad in found.values()) > 0
    model.router.zero_grad()
    dense_loss(model, base, ids, kind.get("top_k", 1)).backward()
    for name, parameter in model.router.named_parameters():
        if name in found:
            scale = parameter.grad.abs().max()
            assert scale > 0 and (found[name] - parameter.grad).abs().max() <= 1e-4 * scale, name


def _used(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.grad is not None


def dense_loss(model: Any, base: Any, ids: torch.Tensor, top_k: int) -> torch.Tensor:
    """The loss of the plain base with a hook on every linear module that mixes the domain's adapters densely."""
    plain = copy.deepcopy(base).requires_grad_(False)
    part, rows = model.router.parts[0], model.router.rows
    columns = [rows.index(f"domain/{name}") for name in ("math", "code", "none")]
    mixed: dict[str, torch.Tensor] = {}
    first = max(model.router.points)

    def mix(hidden: torch.Tensor) -> None:
        real = torch.ones(ids.shape, dtype=torch.bool)
        p = part(part.features(part.read(hidden), real, None))[..., columns].softmax(-1)
        top, choice = p.topk(top_k, -1)
        weight = top / top.sum(-1, keepdim=True)
        if model.router.weights == "unit":  # nothing that ranks below none
            weight = (1 + top - top.detach()) * (top >= p[..., -1:])
        mixed["w"] = torch.zeros_like(p).scatter(-1, choice, weight)

    def adapt(name: str, inside: int) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            for index, adapter in enumerate(("math", "code")):
                lora = model.adapters[f"domain/{adapter}"].modules.get(name)
                if lora is not None and inside >= first:
                    y = y + mixed["w"][..., index, None] * lora.scale * (args[0] @ lora.A.T @ lora.B.T)
            return y

        return hook

    if first:
        plain.model.layers[first].register_forward_pre_hook(lambda _, args: mix(args[0]))
    else:
        mix(plain.get_input_embeddings()(ids))
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(adapt(name, int(name.split(".")[2])))
    return plain(ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("use_cache", [None, False])
def test_learned_decays_get_a_gradient(
    use_cache: bool | None, base: Any, adapters: dict[str, Path], ids: torch.Tensor
) -> None:
    model = make_routed(base, adapters, decays=(0.8, 0.95), learn_decays=True).train()
    model(ids, labels=ids, use_cache=use_cache).loss.backward()
    grad = model.router.parts[0].decay_logits.grad
    assert grad is not None and grad.abs().max() > 0


def test_the_base_gets_no_gradient(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_routed(base, adapters).train()
    model(ids, labels=ids).loss.backward()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(name.startswith("router.") for name in trainable)
    assert all(parameter.grad is None for parameter in model.base.parameters())
