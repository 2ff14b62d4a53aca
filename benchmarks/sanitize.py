"""Runs every kernel once on small odd shapes, for a tool that watches memory: it prints the tool's findings, not ours.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.sanitize
(and --tool racecheck). Each tensor then has an allocation of its own, so that no read past its end goes unseen.
"""

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks import common
from benchmarks.contenders import exact, make_problem
from benchmarks.step import fill, routing_of
from molora.blueprint import blueprint
from molora.compose.joint import Basis
from molora.decode import DecodeStep
from molora.groups import AdapterGroup
from molora.step_routes import StepRoutes
from molora_kernels import Factors
from molora_kernels.paged import add_lora_paged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    for by_token in (True, False):
        forms(device, by_token)
    for compressed in (False, True):
        for batch in (1, 3, 9):
            step(device, batch, compressed)
        prompt(device, compressed)
    print("every kernel ran")


def forms(device: torch.device, by_token: bool) -> None:
    """Both forms of the product over pages, and its gradients."""
    problem = make_problem(37, 100, (104, 24), 5, 2, 20, "zipf", torch.float32, str(device))
    expected = exact(problem)
    tensors = (problem.y.clone(), problem.x, problem.weights, problem.pages.A, problem.pages.B)
    y, x, weights, *factors = (tensor.requires_grad_() for tensor in tensors)
    problem.pages.A, problem.pages.B = factors
    found = add_lora_paged(y * 1, x, problem.pages, problem.slots, weights, by_token=by_token)
    assert float((found.detach() - expected).norm() / expected.norm()) < 1e-5
    found.square().sum().backward()


def adapters(base: Any, compressed: bool) -> dict[str, AdapterGroup]:
    """Five; two of them share a basis if ``compressed``."""
    groups = fill(base, 5, 20)
    for group in {id(group): group for group in groups.values()}.values() if compressed else ():
        A = group.pages.A
        for index, width in enumerate(group.pages.outputs):
            basis = Basis(torch.randn(width, 20) / 5, torch.randn(group.pages.inputs, 20) / 5)
            for slot in (1, 3):
                core = Factors(torch.randn(7, 20).to(A), torch.randn(7, 20).to(A) / 5)
                group.put(slot, index, core, basis=basis)
    return groups


@torch.no_grad()
def step(device: torch.device, batch: int, compressed: bool) -> None:
    """A whole decode step, and the one after it. Half a head is as wide as a warp: of what is narrower Triton keeps
    copies, and racecheck takes equal writes of them for a race."""
    config = Qwen3Config(
        vocab_size=150, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128,
    )  # fmt: skip
    base: Any = AutoModelForCausalLM.from_config(config).eval().to(device)
    state, selection = routing_of(base, 5, 2)
    routes = StepRoutes(state, batch, device)
    routes.start(selection.expand(batch).to(device), None)
    decode = DecodeStep(blueprint(base), adapters(base, compressed), routes, batch, 70)
    for _ in range(2):
        assert torch.isfinite(decode(torch.arange(batch, device=device))).all()


@torch.no_grad()
def prompt(device: torch.device, compressed: bool) -> None:
    """A routed prompt of many tokens: plan, memory, shrink and all that stands between the products, by blocks."""
    base = common.random_base("tiny", device, torch.float32)
    model = common.routed_model(base, adapters(base, compressed), top=2)
    ids = torch.randint(3, base.config.vocab_size, (1, 139), device=device)
    with model.routing.active(lambda: model._resolve(None)), model.steps.serve((ids,), {"max_new_tokens": 1}) as given:
        assert "past_key_values" in given, "no kernel of ours read the prompt"
        logits = model.base(ids, past_key_values=given["past_key_values"], use_cache=True, logits_to_keep=1).logits
    assert torch.isfinite(logits).all()


if __name__ == "__main__":
    main()
