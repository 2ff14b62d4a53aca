"""Every error MoLoRA raises on purpose: one type a cause, each with a sentence that says what to do."""


class MoLoRAError(Exception):
    """Base class. ``str(error)`` is a sentence for a person."""


class ConfigError(MoLoRAError, ValueError):
    """A setting is unknown, missing or out of range."""


class BackendError(MoLoRAError, RuntimeError):
    """The code that was asked for to multiply adapters is not installed; the message says how to install it."""


class BaseModelError(MoLoRAError, RuntimeError):
    """The base model cannot be brought, or is not one that MoLoRA can wrap."""


class DataError(MoLoRAError, ValueError):
    """A data file or row is not what the reader expects."""


class AdapterError(MoLoRAError, ValueError):
    """An adapter folder cannot be used."""


class AdapterNotFoundError(AdapterError):
    """There is no adapter at the given place."""


class AdapterFormatError(AdapterError):
    """An adapter's files are damaged, hostile or not safetensors."""


class UnsupportedAdapterError(AdapterError):
    """An adapter uses a part of PEFT that MoLoRA does not run; the message names it."""


class AdapterMismatchError(AdapterError):
    """An adapter was made for another base: its modules or sizes do not fit."""


class NonFiniteError(AdapterError):
    """Weights hold NaN or infinite values."""


class StackError(MoLoRAError, ValueError):
    """A stack is malformed: duplicate or unsafe names, bad top-k, an unknown key."""


class SelectionError(MoLoRAError, ValueError):
    """A selection names what the stack does not have, or does not fit the batch."""


class RouterError(MoLoRAError, ValueError):
    """A router is missing, or was saved for other candidates or another base."""


class VersionError(MoLoRAError, ValueError):
    """There is no such version, or it may not serve."""


class CacheError(MoLoRAError, RuntimeError):
    """A key-value cache cannot be continued: it lacks the router's memory, or its batch differs."""


class HypernetError(MoLoRAError, ValueError):
    """A network that makes adapters is missing, damaged, or was trained for another base."""


class DocumentError(MoLoRAError, ValueError):
    """A document cannot be read, or is too long."""


class EncoderError(MoLoRAError, RuntimeError):
    """A sentence encoder cannot be brought or read."""


class StoreError(MoLoRAError, RuntimeError):
    """A store of adapters cannot be reached, or what it holds is damaged."""


class FederationError(MoLoRAError, RuntimeError):
    """A federated training cannot begin or go on: too few clients, or what is on disk belongs to another one."""


class UpdateError(MoLoRAError, ValueError):
    """A client's update is refused; the message says why, to follow "refused: "."""


class RequestError(MoLoRAError, ValueError):
    """A request asks for what cannot be served: a value out of range, a prompt that is too long."""


class BusyError(MoLoRAError, RuntimeError):
    """Too much is waiting already. ``retry_after_s``: seconds after which to ask again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
