"""Hostile adapters against the loader, by atheris: whatever the two files hold, it reads them or says why not.

    pip install atheris && python -m benchmarks.fuzz -max_total_time=120

What follows goes to libFuzzer. Begins with a good adapter, whose header, weights and config it changes, and with noise.
Anything but an AdapterError, and any input that takes longer than 10 seconds, stops it with the input in a file.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["molora"]):
    from molora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
    from molora.errors import AdapterError
    from molora.serve.manage import check_upload

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
KEYS = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern", "target_modules",
        "peft_type", "modules_to_save", "fan_in_fan_out", "lora_bias", "layers_to_transform", "trainable_token_indices",
        "exclude_modules", "base_model_name_or_path", "inference_mode", "megatron_config")  # fmt: skip
DTYPES = ("F32", "BF16", "F16", "F64", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "U8", "XX")
MODULE = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
counts = {"inputs": 0, "read": 0, "refused": 0}


def one(data: bytes) -> None:
    """Reads one adapter that ``data`` describes."""
    told = atheris.FuzzedDataProvider(data)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        folder = Path(place)
        (folder / CONFIG_FILE).write_bytes(config(told))
        (folder / WEIGHTS_FILE).write_bytes(weights(told))
        counts["inputs"] += 1
        if counts["inputs"] % 10_000 == 0:
            print(json.dumps(counts), flush=True)  # libFuzzer ends the process in its own way
        try:
            if told.ConsumeBool():
                check_upload(folder)
            else:
                Adapter.load(folder)
            counts["read"] += 1
        except AdapterError:
            counts["refused"] += 1


def config(told: Any) -> bytes:
    if told.ConsumeIntInRange(0, 7) == 7:  # data that has run out gives 0, which changes nothing
        return bytes(told.ConsumeBytes(64))
    found = dict(CONFIG)
    for _ in range(told.ConsumeIntInRange(0, 3)):
        found[KEYS[told.ConsumeIntInRange(0, len(KEYS) - 1)]] = value(told, 2)
    return json.dumps(found).encode("utf-8", "surrogatepass")


def value(told: Any, depth: int) -> Any:
    kinds = 7 if depth else 5
    kind = told.ConsumeIntInRange(0, kinds)
    if kind == 0:
        return None
    if kind == 1:
        return told.ConsumeBool()
    if kind == 2:
        return told.ConsumeIntInRange(-3, 10**6)
    if kind == 3:
        return told.ConsumeFloat()
    if kind in (4, 5):
        return told.ConsumeUnicodeNoSurrogates(12)
    if kind == 6:
        return [value(told, depth - 1) for _ in range(told.ConsumeIntInRange(0, 3))]
    return {told.ConsumeUnicodeNoSurrogates(12): value(told, depth - 1) for _ in range(told.ConsumeIntInRange(0, 3))}


def weights(told: Any) -> bytes:
    """A safetensors file, or something like it."""
    if told.ConsumeIntInRange(0, 7) == 7:  # data that has run out gives 0, which changes nothing
        return bytes(told.ConsumeBytes(128))
    header: dict[str, Any] = {}
    at = 0
    for letter, shape in (("A", [2, 3]), ("B", [4, 2])):
        name = f"{MODULE}{letter}.weight"
        if told.ConsumeIntInRange(0, 5) == 5:
            name = told.ConsumeUnicodeNoSurrogates(40)
        if told.ConsumeIntInRange(0, 5) == 5:
            shape = [told.ConsumeIntInRange(-1, 2**40) for _ in range(told.ConsumeIntInRange(0, 4))]
        dtype = DTYPES[told.ConsumeIntInRange(0, len(DTYPES) - 1)] if told.ConsumeIntInRange(0, 3) == 3 else "F32"
        size = 24 if letter == "A" else 32
        ends = (
            [at, at + size] if told.ConsumeIntInRange(0, 5) < 5 else [told.ConsumeIntInRange(-1, 99) for _ in range(2)]
        )
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
        at += size
    if told.ConsumeIntInRange(0, 5) == 5:
        header[told.ConsumeUnicodeNoSurrogates(16)] = value(told, 2)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = len(text) if told.ConsumeIntInRange(0, 5) < 5 else told.ConsumeIntInRange(0, 2**63)
    body = bytes(told.ConsumeBytes(at)) if told.ConsumeBool() else b""
    return struct.pack("<Q", length) + text + body.ljust(at, b"\x00")


def main() -> None:
    atheris.Setup([sys.argv[0], "-timeout=10", "-print_final_stats=1", *sys.argv[1:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
