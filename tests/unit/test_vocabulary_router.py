"""Routing by token id: the rules, and a whole model under them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from molora import MoLoRAModel, VocabularyRouter
from molora.errors import RouterError
from molora.selection import router_rows
from tests.parity.test_equalities import make_stack

ROWS = ["domain/math", "domain/code", "domain/none", "user/*", "user/none"]


def chosen(router: VocabularyRouter, layer: str = "domain") -> list[str]:
    """For each token id, the row that wins."""
    columns = [i for i, row in enumerate(router.rows) if row.startswith(f"{layer}/")]
    table = router.parts[0].read_ids(torch.arange(97), torch.nn.Identity())  # type: ignore[operator]
    assert (table[:, columns].topk(2, -1).values.diff(dim=-1) < 0).all()
    return [router.rows[columns[i]] for i in table[:, columns].argmax(-1).tolist()]


def test_ids_and_ranges() -> None:
    router = VocabularyRouter({"domain/math": [3, [10, 12]], "domain/code": [[96, 96]]}, ROWS, 97)
    found = chosen(router)
    assert [i for i, row in enumerate(found) if row == "domain/math"] == [3, 10, 11, 12]
    assert [i for i, row in enumerate(found) if row == "domain/code"] == [96]
    assert found.count("domain/none") == 92
    assert set(chosen(router, "user")) == {"user/none"}


def test_later_rules_win() -> None:
    router = VocabularyRouter({"domain/math": [[0, 96]], "domain/code": [[5, 8]], "domain/none": [6]}, ROWS, 97)
    found = chosen(router)
    assert [found[i] for i in (4, 5, 6, 7, 9)] == [
        "domain/math",
        "domain/code",
        "domain/none",
        "domain/code",
        "domain/math",
    ]


def test_rules_of_one_layer_leave_the_others_alone() -> None:
    router = VocabularyRouter({"domain/math": [[0, 96]], "user/*": [[0, 9]]}, ROWS, 97)
    assert set(chosen(router)) == {"domain/math"}
    assert chosen(router, "user") == ["user/*"] * 10 + ["user/none"] * 87


@pytest.mark.parametrize("span", [97, -1, [5, 3], [0, 97], [-2, 4], [1, 2, 3], [], "all", [1.5, 2], None], ids=str)
def test_bad_spans(span: Any) -> None:
    with pytest.raises(RouterError, match="domain/math"):
        VocabularyRouter({"domain/math": [span]}, ROWS, 97)


def test_an_unknown_row() -> None:
    with pytest.raises(RouterError, match="domain/law"):
        VocabularyRouter({"domain/law": [3]}, ROWS, 97)


def test_other_candidates() -> None:
    router = VocabularyRouter({}, ROWS, 97)
    router.check(ROWS[::-1], 32, 3, 97)
    with pytest.raises(RouterError):
        router.check(ROWS[1:], 32, 3, 97)


RULES = {"domain/math": [[3, 40]], "domain/code": [[41, 70]]}


def make_model(base: Any, adapters: dict[str, Path], **layer: Any) -> MoLoRAModel:
    stack = make_stack(adapters, **layer)
    return MoLoRAModel.from_base(copy.deepcopy(base), stack, VocabularyRouter(RULES, router_rows(stack), 97))


def by_hand(model: MoLoRAModel, ids: torch.Tensor) -> torch.Tensor:
    names = model.slots.names
    math, code = names.index("domain/math"), names.index("domain/code")
    return torch.where(ids <= 40, math, torch.where(ids <= 70, code, -1)).masked_fill(ids < 3, -1)


@torch.no_grad()
def test_a_model_follows_the_rules(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_model(base, adapters)
    out = model(ids, output_routes=True)
    assert torch.equal(out.routes.slots[..., 1], by_hand(model, ids))
    assert len(out.routes.slots[..., 1].unique()) == 3


@torch.no_grad()
def test_generation_follows_the_rules(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_model(base, adapters)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    cached = model.generate(input_ids=ids, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))
    beams = [model.generate(input_ids=ids, num_beams=3, use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*beams)


@torch.no_grad()
def test_top_2_gives_only_what_a_rule_gives(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_model(base, adapters, top_k=2)
    routes = model(ids, output_routes=True).routes
    assert torch.equal(routes.slots[..., 1:3].amax(-1), by_hand(model, ids))


@torch.no_grad()
def test_a_token_whose_adapter_is_not_allowed_gets_none(
    base: Any, adapters: dict[str, Path], ids: torch.Tensor
) -> None:
    model = make_model(base, adapters)
    slots = model(ids, selection={"domain": ["code"]}, output_routes=True).routes.slots[..., 1]
    code = model.slots["domain/code"]
    assert torch.equal(slots, by_hand(model, ids).masked_fill(by_hand(model, ids) != code, -1))


@torch.no_grad()
def test_embeddings_alone_are_refused(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_model(base, adapters)
    with pytest.raises(RouterError, match="input_ids"):
        model(inputs_embeds=model.base.get_input_embeddings()(ids))


@torch.no_grad()
def test_it_is_saved_and_loaded(base: Any, adapters: dict[str, Path], ids: torch.Tensor, tmp_path: Path) -> None:
    model = make_model(base, adapters)
    model.save_pretrained(tmp_path / "saved")
    again = MoLoRAModel.from_pretrained(tmp_path / "saved", base=copy.deepcopy(base))
    assert isinstance(again.router, VocabularyRouter)
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_adapters_come_and_go(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_model(base, adapters)
    expected = by_hand(model, ids)
    model.add_adapter("domain", "law", adapters["sage"])
    assert torch.equal(model(ids, output_routes=True).routes.slots[..., 1], expected)
    code = model.slots["domain/code"]
    model.remove_adapter("domain", "code")
    assert torch.equal(model(ids, output_routes=True).routes.slots[..., 1], expected.masked_fill(expected == code, -1))
