"""One forward of the wrapped model: its outputs, its inputs, its modes."""

import copy
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from peft import PeftModel

from molora import MoLoRALinear, MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.errors import BaseModelError, SelectionError
from molora.router import Router
from tests.conftest import make_base, write_adapter
from tests.parity.test_equalities import close, make_routed, make_stack
from tests.unit.spoken import balance


@pytest.fixture
def model(base: Any, adapters: dict[str, Path]) -> MoLoRAModel:
    return make_routed(base, adapters)


MIXED = [{"personality": "sage"}, {"domain": "code", "user": "ada"}, {"domain": None}]


@torch.no_grad()
def test_routes_say_what_acted(model: MoLoRAModel, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[2, :4] = 0
    out = model(ids, mask, selection=MIXED, output_routes=True)
    routes = out.routes
    assert routes.slots.shape == routes.weights.shape == (3, 17, 3)
    assert routes.slots.dtype == torch.int64 and routes.weights.dtype == torch.float32
    assert routes.columns == ["personality", "domain", "user"]
    assert routes.names == ["personality/sage", "domain/math", "domain/code", "user/ada"]
    assert (routes.slots[0, :, 0] == 0).all() and (routes.slots[1:, :, 0] == -1).all()
    assert (routes.slots[1, :, 1] == 2).all() and (routes.slots[1, :, 2] == 3).all()
    assert (routes.slots[2] == -1).all()
    assert torch.equal(routes.real, mask.bool())
    assert routes.rows == model.router.rows and routes.logits[0].shape == (3, 17, len(routes.rows))
    assert routes.at(1, 5) == [("personality", None, 0.0), ("domain", "code", 1.0), ("user", "ada", 1.0)]
    assert model(ids).routes is None
    best = routes.logits[0][0][:, [routes.rows.index(f"domain/{n}") for n in ("math", "code", "none")]].argmax(-1)
    assert torch.equal(routes.slots[0, :, 1], torch.tensor([1, 2, -1])[best])


@torch.no_grad()
def test_routes_as_a_frame(model: MoLoRAModel, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[2, :4] = 0
    frame = model(ids, mask, selection=MIXED, output_routes=True).routes.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["sequence", "token", "layer", "adapter", "weight"]
    assert len(frame) == 3 * int(mask.sum())
    assert set(frame[(frame.sequence == 1) & (frame.layer == "domain")].adapter) == {"code"}
    assert frame[frame.sequence == 2].token.min() == 4
    assert frame[frame.sequence == 2].weight.sum() == 0


@torch.no_grad()
def test_soft_weights_are_shares(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    routes = make_routed(base, adapters, top_k=2, weights="softmax")(ids, output_routes=True).routes
    assert routes.columns == ["personality", "domain", "domain", "user"]
    total = routes.weights[..., 1:3].sum(-1)
    assert torch.allclose(total, torch.ones_like(total)) and (routes.weights[..., 1:3] > 0).all()
    assert (routes.slots[..., 1] != routes.slots[..., 2]).all()


@torch.no_grad()
def test_two_routers_give_the_deeper_routes(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    both = make_routed(base, adapters, reads=(0, 2))
    routes = both(ids, output_routes=True).routes
    assert len(routes.logits) == 2
    columns = [routes.rows.index(f"domain/{name}") for name in ("math", "code", "none")]
    slots = torch.tensor([both.slots["domain/math"], both.slots["domain/code"], -1])
    assert torch.equal(routes.slots[..., 1], slots[routes.logits[1][..., columns].argmax(-1)])
    assert not torch.equal(routes.logits[0], routes.logits[1])


@torch.no_grad()
def test_a_deep_router_leaves_the_layers_below(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_routed(base, adapters, reads=2)
    routed, plain = (
        model(ids, selection={"personality": None, "domain": choice}, output_hidden_states=True).hidden_states
        for choice in ("auto", None)
    )
    assert torch.equal(routed[2], plain[2]) and not torch.equal(routed[3], plain[3])
    forced = model(ids, selection={"domain": "math"}, output_hidden_states=True).hidden_states
    assert not torch.equal(forced[1], plain[1])


@pytest.mark.parametrize("reads", [0, 1, (0, 2)], ids=str)
@torch.no_grad()
def test_embeddings_route_as_ids(reads: Any, base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_routed(base, adapters, reads=reads)
    by_ids = model(ids, output_routes=True)
    by_embeddings = model(inputs_embeds=model.base.get_input_embeddings()(ids), output_routes=True)
    assert torch.equal(by_ids.routes.slots, by_embeddings.routes.slots)
    close(by_embeddings.logits, by_ids.logits)


@torch.no_grad()
def test_a_scaled_embedding_routes_as_ids(tmp_path: Path, ids: torch.Tensor) -> None:
    base = make_base("gemma3")
    stack = Stack([StackLayer("a", {"x": write_adapter(base, tmp_path / "x", 1)})])
    model = MoLoRAModel.from_base(base, stack, RouterConfig(width=8, hidden=16)).eval()
    model.router.parts[0].std.fill_(0.05)  # so that the choice changes from token to token
    torch.nn.init.normal_(model.router.parts[0].output.weight, std=3.0)
    found = model(inputs_embeds=base.get_input_embeddings()(ids), output_routes=True)
    expected = model(ids, output_routes=True)
    assert len(expected.routes.slots.unique()) == 2
    assert torch.equal(found.routes.slots, expected.routes.slots)


def test_no_input(model: MoLoRAModel) -> None:
    with pytest.raises(BaseModelError, match="input_ids or inputs_embeds"):
        model()


@torch.no_grad()
def test_more_selections_than_sequences(model: MoLoRAModel, ids: torch.Tensor) -> None:
    before = model(ids).logits
    with pytest.raises(SelectionError, match="2 selections were given for a batch of 3"):
        model(ids, selection=[{}, {}])
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_some_logits_are_some_of_all(model: MoLoRAModel, ids: torch.Tensor) -> None:
    whole = model(ids).logits
    close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    close(model(ids, logits_to_keep=torch.tensor([0, 5, 9])).logits, whole[:, [0, 5, 9]])


@torch.no_grad()
def test_some_logits_of_an_adapted_head(tmp_path: Path, ids: torch.Tensor) -> None:
    """The head sees fewer rows than there are tokens: those at the places that were asked for."""
    base = make_base("qwen3")
    stack = Stack([StackLayer("a", {"x": write_adapter(base, tmp_path / "x", 1, target_modules=["lm_head"])})])
    model = MoLoRAModel.from_base(base, stack, RouterConfig(width=8, hidden=16)).eval()
    model.router.parts[0].std.fill_(0.05)
    torch.nn.init.normal_(model.router.parts[0].output.weight, std=3.0)
    balance(model, ids)
    whole = model(ids, output_routes=True)
    assert len(whole.routes.slots.unique()) == 2
    close(model(ids, logits_to_keep=5).logits, whole.logits[:, -5:])
    close(model(ids, logits_to_keep=torch.arange(1, 6)).logits, whole.logits[:, 1:6])


@torch.no_grad()
def test_loss_is_the_next_tokens(model: MoLoRAModel, ids: torch.Tensor) -> None:
    labels = ids.clone()
    labels[:, :5] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(out.loss, expected)


@torch.no_grad()
def test_a_tuple_where_it_was_asked_for(model: MoLoRAModel, ids: torch.Tensor) -> None:
    expected = model(ids).logits
    found = model(ids, return_dict=False)
    assert torch.equal(found[0], expected)


def test_the_base_stays_in_evaluation_mode(model: MoLoRAModel) -> None:
    assert model.train() is model
    assert model.training and model.router.training and not any(m.training for m in model.base.modules())
    model.eval()
    assert not model.training and not model.router.training


@torch.no_grad()
def test_outside_a_routed_forward_the_base_is_the_base(model: MoLoRAModel, base: Any, ids: torch.Tensor) -> None:
    expected = base(ids).logits
    model(ids)
    assert torch.equal(model.base(ids).logits, expected)
    with torch.enable_grad():
        model.train()(ids)
    assert torch.equal(model.base(ids).logits, expected)
    assert torch.equal(model.base.model(ids).last_hidden_state, base.model(ids).last_hidden_state)


@torch.no_grad()
def test_an_error_inside_leaves_no_plan(model: MoLoRAModel, base: Any, ids: torch.Tensor) -> None:
    expected = model(ids).logits
    with pytest.raises(IndexError):
        model(torch.full_like(ids, 97), selection={"domain": "math"})
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.base(ids).logits, base(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("selection", [{"domain": "auto"}, {"domain": "code"}], ids=str)
@torch.no_grad()
def test_everything_follows_to_another_dtype(
    selection: Any, dtype: torch.dtype, model: MoLoRAModel, ids: torch.Tensor
) -> None:
    expected = model(ids, selection=selection).logits
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, MoLoRALinear):
            # On a CPU thin products are made in float32, where they are faster.
            work = torch.float32 if dtype == torch.bfloat16 else dtype
            assert {t.dtype for pair in module.factors.values() for t in pair} == {work}
    found = model(ids, selection=selection).logits
    assert found.dtype == dtype
    close(found.float(), expected, 1e-4 if dtype == torch.float64 else 0.3)  # a route may change in bfloat16
    model.generate(input_ids=ids, selection=selection, max_new_tokens=3)


@torch.no_grad()
def test_factors_follow_to_another_device(model: MoLoRAModel, ids: torch.Tensor) -> None:
    model(ids, selection={"domain": "code"})  # so that joined factors exist
    model.to("meta")
    for module in model.modules():
        if isinstance(module, MoLoRALinear):
            assert {t.device.type for pair in module.factors.values() for t in pair} == {"meta"}
        if isinstance(module, MoLoRALinear) and module._joined is not None:
            assert module._joined[1].A.device.type == "meta"


@torch.no_grad()
def test_autocast_is_pefts(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    peft = PeftModel.from_pretrained(copy.deepcopy(base), adapters["code"]).eval()
    model = make_routed(base, adapters)
    with torch.autocast("cpu", torch.bfloat16):
        expected = peft(ids).logits
        found = model(ids, selection={"personality": None, "domain": "code"}).logits
        model(ids)
    exact = peft(ids).logits
    assert found.dtype == expected.dtype
    assert (found - exact).square().mean() <= 1.5 * (expected - exact).square().mean()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        model.train()(ids, labels=ids).loss.backward()


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_autocast_leaves_the_router_in_float32(
    base: Any, adapters: dict[str, Path], ids: torch.Tensor, training: bool
) -> None:
    expected, found = (make_routed(base, adapters).train(training) for _ in range(2))
    plain = expected(ids, output_routes=True).routes.logits[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = found(ids, output_routes=True).routes.logits[0]
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)  # of embeddings, which are float32 in both


@torch.no_grad()
def test_a_half_precision_base(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    """As near to float32 as PEFT is in bfloat16, where both keep the factors in float32 on a CPU."""
    exact = PeftModel.from_pretrained(copy.deepcopy(base), adapters["code"]).eval()(ids).logits
    peft = PeftModel.from_pretrained(make_base().to(torch.bfloat16), adapters["code"]).eval()(ids).logits
    model = make_routed(make_base().to(torch.bfloat16), adapters)
    found = model(ids, selection={"personality": None, "domain": "code"}).logits
    assert found.dtype == torch.bfloat16
    assert (found - exact).square().mean() <= 1.5 * (peft - exact).square().mean()
    routed = model(ids, output_routes=True)
    assert routed.logits.dtype == torch.bfloat16 and routed.routes.logits[0].dtype == torch.float32


def test_state_dict_holds_the_router(model: MoLoRAModel) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert isinstance(model.router, Router)
    assert {name for name in state if name.startswith("router.")} == {f"router.{n}" for n in model.router.state_dict()}
    assert not model.load_state_dict(state).missing_keys


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(model: MoLoRAModel, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    out = model(ids, output_routes=True)
    expected, acted = out.logits, {out.routes.names[slot] for slot in out.routes.slots.unique().tolist() if slot >= 0}
    other = copy.deepcopy(model)
    other.remove_adapter("domain", "math" if "domain/math" in acted else "code")
    assert {"domain/math", "domain/code"} & acted
    assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(other(ids).logits, expected)


@torch.no_grad()
def test_two_models_of_one_stack(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    stack = make_stack(adapters)
    first, second = (MoLoRAModel.from_base(copy.deepcopy(base), stack) for _ in range(2))
    expected = second(ids, selection={"domain": "math"}).logits
    first.remove_adapter("domain", "math")
    first.add_adapter("domain", "law", adapters["sage"])
    assert torch.equal(second(ids, selection={"domain": "math"}).logits, expected)


def test_gradient_checkpointing_changes_no_gradient(model: MoLoRAModel, ids: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
            model.base.model.train()  # checkpointing is on in training mode only; there is no dropout
        model.train()
        model.router.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.router.parts[0].output.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    close(gradients[1], gradients[0])


@torch.no_grad()
def test_the_base_is_saved_as_the_base(model: MoLoRAModel, base: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    assert set(model.base.state_dict()) == set(base.state_dict())
    model.base.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, base(ids).logits)
    model.base.load_state_dict(base.state_dict())
    assert torch.equal(model(ids, selection={"domain": None}).logits, base(ids).logits)


def test_a_base_that_serves_another_model_is_refused(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    """Its modules follow the other's plans: what is put into them would never act."""
    stack = Stack([StackLayer("domain", {"math": adapters["math"]}, default="math")])
    base = copy.deepcopy(base)
    first = MoLoRAModel.from_base(base, stack)
    before = first(ids).logits
    other = Stack([StackLayer("domain", {"code": adapters["code"]}, default="code")])
    with pytest.raises(BaseModelError, match="serves another MoLoRAModel already"):
        MoLoRAModel.from_base(base, other)
    assert torch.equal(first(ids).logits, before)
