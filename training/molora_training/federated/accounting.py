"""What the noise of a training is worth: epsilon at a delta, by Google's `dp-accounting` (Renyi differential privacy).

Assumed: neighbours differ in all that one client ever sent (its updates are there, or zeros are instead); each client
is in a tree once at most, and in all trees; the server that adds the noise is honest; the number of clients is no
secret.
"""

from typing import Any

from molora.errors import ConfigError

_MOST = 1e4  # noise over clip


def trees(rounds: int, cohorts: int) -> list[int]:
    """Steps of each tree: one for each cohort, after which the tree begins anew."""
    whole, rest = divmod(rounds, cohorts)
    return [cohorts] * whole + [rest] * (rest > 0)


def epsilon(multiplier: float, delta: float, rounds: int, cohorts: int) -> float:
    """Of a training whose nodes have noise of ``multiplier`` times the clip."""
    accountant: Any
    try:
        from dp_accounting import dp_event
        from dp_accounting.privacy_accountant import NeighboringRelation
        from dp_accounting.rdp import RdpAccountant
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"privacy.epsilon needs {error.name}, which is not installed. Run: pip install 'molora[federated]'"
        ) from error
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    for steps in trees(rounds, cohorts):
        accountant.compose(dp_event.SingleEpochTreeAggregationDpEvent(multiplier, steps))
    return float(accountant.get_epsilon(delta))


def noise_multiplier(wanted: float, delta: float, rounds: int, cohorts: int) -> float:
    """The least noise, over the clip, at which the training costs no more than ``wanted``, to a thousandth.

    Raises:
        ConfigError: no noise that still lets anything be learnt is enough.
    """
    low, high = 0.0, 1.0
    while epsilon(high, delta, rounds, cohorts) > wanted:
        low, high = high, 2 * high
        if high > _MOST:
            raise ConfigError(f"privacy.epsilon {wanted} takes noise of over {_MOST:g} times privacy.clip.")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon(middle, delta, rounds, cohorts) > wanted else (low, middle)
    return high
