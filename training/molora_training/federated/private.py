"""DP-FTRL (arXiv 2103.00039): what the server makes of sums of clipped updates, with noise of a tree that begins anew.

    theta_t = theta_0 + (G_t + N_t) / n

theta_0 is what the tree began with, G_t the sum of all clipped updates since, N_t the tree's noise, n how many clients
are expected in a round, whoever comes. In a tree each client has one turn at most; after as many rounds as there are
cohorts the next tree begins with what is there.
"""

import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from molora_training.federated.accounting import epsilon, noise_multiplier
from molora_training.federated.lora import Lora
from molora_training.federated.settings import PrivacySettings
from molora_training.federated.tree import TreeNoise

QUANTA = 2**22  # levels that SecAgg+ rounds an entry to


@dataclass
class Private:
    """The state between two rounds.

    Args:
        how: the settings.
        rounds: of the whole training.
        multiplier: noise of a node over what a client may change.
        origin: what this tree began with. total: G_t, by module [out, rank].
        noise_tree: of this tree. turns: who had theirs in it.
        expected: n; 0 before the first round.
    """

    how: PrivacySettings
    rounds: int
    multiplier: float
    origin: Lora
    total: dict[str, torch.Tensor]
    noise_tree: TreeNoise
    turns: set[str] = field(default_factory=set)
    expected: float = 0.0

    @classmethod
    def begin(cls, how: PrivacySettings, rounds: int, lora: Lora) -> "Private":
        """Chooses the noise for all rounds.

        Raises:
            ConfigError: no noise is enough, or the accountant is not installed.
        """
        assert how.epsilon is not None
        multiplier = noise_multiplier(how.epsilon, how.delta, rounds, how.cohorts)
        return cls(how, rounds, multiplier, lora, _zeros(lora), _tree(how, multiplier, lora))

    @property
    def noise(self) -> float:
        """Standard deviation of the noise of one node, on an entry of the mean."""
        return self.noise_tree.std / self.expected

    def cohort(self, clients: Sequence[str]) -> list[str]:
        """Those whose turn it is: of those that had none in this tree an even part for each round that is left."""
        if not self.expected:
            self.expected = len(clients) / self.how.cohorts
        left = [client for client in sorted(clients, key=_order) if client not in self.turns]
        return left[: math.ceil(len(left) / (self.how.cohorts - self.noise_tree.step))]

    def step(self, summed: Mapping[str, torch.Tensor], clients: Sequence[str]) -> Lora:
        """What serves after a round.

        Args:
            summed: of what the round's clients changed of B, each clipped, by module [out, rank].
            clients: who they are.
        """
        self.turns |= set(clients)
        noise, place = self.noise_tree.next(), 0
        pairs = {}
        for name, (a, b) in sorted(self.origin.pairs.items()):
            self.total[name] = self.total[name] + summed[name]
            own = noise[place : place + b.numel()].view_as(b)
            place += b.numel()
            pairs[name] = a, b + (self.total[name] + own) / self.expected
        found = Lora(pairs, self.origin.scale)
        if self.noise_tree.step == self.how.cohorts:
            self.origin, self.total, self.turns = found, _zeros(found), set()
            self.noise_tree = _tree(self.how, self.multiplier, found)
        return found

    def report(self) -> dict[str, Any]:
        """What is promised, and on what it rests."""
        how = self.how
        return {
            "epsilon": epsilon(self.multiplier, how.delta, self.rounds, how.cohorts),
            "delta": how.delta,
            "unit": "all that one client sends in the whole training",
            "clip": how.clip,
            "noise_multiplier": self.multiplier,
            "rounds": self.rounds,
            "rounds_of_a_tree": how.cohorts,
            "accountant": "dp_accounting.rdp.RdpAccountant, SingleEpochTreeAggregationDpEvent, composed over trees",
            "assumptions": [
                "one client more or less: its updates are there, or zeros are instead",
                "a client has one turn in a tree at most",
                "the server adds the noise, and tells nobody its seed or the sums without it",
                "the number of clients and who takes part are no secret",
                *(["each client clips honestly: of a masked update the server cannot see it"] if how.secure else []),
            ],
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """What :meth:`read` takes."""
        # Copies: what serves may be the same tensors, and safetensors writes none twice.
        found = {f"origin.{name}": one.clone() for name, one in self.origin.tensors().items()}
        return found | {f"total.{name}": one for name, one in self.total.items()}

    def state(self) -> dict[str, Any]:
        """What :meth:`read` takes beside the tensors."""
        return {
            "rounds": self.rounds, "multiplier": self.multiplier, "scale": self.origin.scale,
            "std": self.noise_tree.std, "seed": self.noise_tree.seed.hex(), "step": self.noise_tree.step,
            "turns": sorted(self.turns), "expected": self.expected,
        }  # fmt: skip

    @classmethod
    def read(cls, how: PrivacySettings, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Private":
        """Of what was kept."""
        origin = {name.removeprefix("origin."): one for name, one in tensors.items() if name.startswith("origin.")}
        total = {name.removeprefix("total."): one for name, one in tensors.items() if name.startswith("total.")}
        size = sum(one.numel() for one in total.values())
        tree = TreeNoise(state["std"], size, bytes.fromhex(state["seed"]), state["step"])
        return cls(
            how, state["rounds"], state["multiplier"], Lora.from_tensors(origin, state["scale"]), total, tree,
            set(state["turns"]), state["expected"],
        )  # fmt: skip


def _tree(how: PrivacySettings, multiplier: float, lora: Lora) -> TreeNoise:
    size = sum(b.numel() for _, b in lora.pairs.values())
    # Rounding to SecAgg+'s levels moves each entry by less than one of them.
    most = how.clip + (2 * how.clip / QUANTA * math.sqrt(size) if how.secure else 0.0)
    return TreeNoise(multiplier * most, size, secrets.token_bytes(32))


def _zeros(lora: Lora) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(b) for name, (_, b) in lora.pairs.items()}


def _order(client: str) -> bytes:
    return hashlib.sha256(client.encode()).digest()
