"""A SuperLink and SuperNodes in processes of their own, over TLS: one is killed in the round, one is slow, one lies."""

import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from peft import PeftModel
from transformers import AutoModelForCausalLM

from molora_training.federated.flower_app import write_app
from molora_training.federated.settings import LimitSettings
from tests.federated.parties import make_settings

BIN = Path(sys.executable).parent
HOSTILE = '''"""Clients of which some misbehave, by their names."""

import os
import time
from pathlib import Path

import torch
from flwr.clientapp import ClientApp

from molora_training.federated import flower_app, messages
from molora_training.federated.lora import Lora, read_bytes

server_app = flower_app.server_app


class Some(ClientApp):
    def __call__(self, message, context):
        reply = flower_app.client_app(message, context)
        name = context.node_config["name"]
        if not message.metadata.message_type.startswith("train"):
            return reply
        if name in ("killed", "slow"):
            Path(os.environ["MARKERS"], name).write_text("trains")
            time.sleep(600)
        if name == "liar":
            tensors, about, scale = read_bytes(messages.to_answer(reply.content))
            pairs = {n: (a, b * torch.nan) for n, (a, b) in Lora.from_tensors(tensors, scale).pairs.items()}
            reply.content = messages.of_answer(Lora(pairs, scale).to_bytes(about))
        return reply


client_app = Some()
'''


def write_certificates(folder: Path) -> Path:
    """A CA and a server's certificate for localhost."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one)]) for one in ("test", "localhost"))

    def sign(subject: x509.Name, public: Any, *extensions: tuple[x509.ExtensionType, bool]) -> bytes:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(ca_name).public_key(public)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - day)
        builder = builder.not_valid_after(now + day)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    known = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    folder.mkdir(parents=True)
    authority = sign(
        ca_name, ca_key.public_key(), (x509.BasicConstraints(True, None), True), (usage, True), (known, False)
    )
    (folder / "ca.crt").write_bytes(authority)
    own = sign(name, key.public_key(), (names, False), (x509.BasicConstraints(False, None), True), (by, False))
    (folder / "server.crt").write_bytes(own)
    form = serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    (folder / "server.key").write_bytes(secret)
    return folder


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def stop(process: subprocess.Popen[str], how: signal.Signals = signal.SIGTERM) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)


class Hosts:
    """Processes of one federation. Their logs lie in the folder."""

    def __init__(self, place: Path) -> None:
        self.place, self.port = place, free_port()
        self.certificates = write_certificates(place / "certificates")
        (place / "markers").mkdir()
        (place / "flwr").mkdir()
        config = f'[superlink]\ndefault = "hosts"\n\n[superlink.hosts]\naddress = "localhost:{self.port}"\n'
        config += f'root-certificates = "{self.certificates / "ca.crt"}"\n'
        (place / "flwr" / "config.toml").write_text(config)
        paths = os.pathsep.join(one for one in sys.path if one)
        self.environment = {
            **os.environ, "PYTHONPATH": paths, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(place / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "MARKERS": str(place / "markers"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.running: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, *command: str) -> subprocess.Popen[str]:
        with (self.place / f"{name}.log").open("w") as log:
            self.running[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]], env=self.environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, text=True,
            )  # fmt: skip
        return self.running[name]

    def tls(self) -> list[str]:
        files = {"--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key", "--ssl-ca-certfile": "ca.crt"}
        return [part for option, file in files.items() for part in (option, str(self.certificates / file))]

    def superlink(self) -> None:
        self.start(
            "superlink", "flower-superlink", *self.tls(), "--host", "localhost", "--port", str(self.port),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip

    def node(self, name: str, config: str, ca: Path | None = None, *options: str) -> subprocess.Popen[str]:
        return self.start(
            name, "flower-supernode", "--superlink", f"localhost:{self.port}", "--root-certificates",
            str(ca or self.certificates / "ca.crt"), "--node-config", config, *self.tls(), "--host", "localhost",
            "--port", str(free_port()), *options,
        )  # fmt: skip

    def log(self, name: str) -> str:
        return (self.place / f"{name}.log").read_text()

    def wait_for(self, what: Any, seconds: float, name: str) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"{name}:\n{self.log(name)[-3000:]}"
            time.sleep(0.2)


@contextmanager
def hosts(place: Path) -> Iterator[Hosts]:
    found = Hosts(place)
    try:
        yield found
    finally:
        for process in found.running.values():
            stop(process, signal.SIGKILL)


@pytest.mark.slow
def test_a_federation_over_tls(folder: Path, tmp_path: Path) -> None:
    limits = LimitSettings(seconds=60.0, fewest=2)
    settings = make_settings(folder, tmp_path / "out" / "adapter", rounds=1, limits=limits)
    write_app(tmp_path / "app", replace(settings, ranks=(4,)), None)
    (tmp_path / "app" / "federation.py").write_text(HOSTILE)
    with hosts(tmp_path / "hosts") as all_of_them:
        all_of_them.superlink()
        all_of_them.wait_for(lambda: "Uvicorn running on https" in all_of_them.log("superlink"), 60, "superlink")
        stranger = write_certificates(tmp_path / "other") / "ca.crt"
        all_of_them.node("stranger", "", stranger, "--max-retries", "0")
        for name, file in (("ada", "ada"), ("bob", "bob"), ("killed", "cyd"), ("slow", "dan"), ("liar", "ada")):
            data, base = folder / "data" / f"{file}.jsonl", folder / "base"
            all_of_them.node(name, f'name="{name}" data="{data}" base="{base}" rank=4')
        # All five are to be there before the first is asked.
        nodes = ("ada", "bob", "killed", "slow", "liar")
        for name in nodes:
            all_of_them.wait_for(lambda: all_of_them.log("superlink").count("ActivateNode") >= 5, 60, name)
        run = all_of_them.start("run", "flwr", "run", str(tmp_path / "app"), "hosts", "--stream")
        marker = tmp_path / "hosts" / "markers" / "killed"
        all_of_them.wait_for(marker.is_file, 150, "superlink")
        stop(all_of_them.running["killed"], signal.SIGKILL)
        report = tmp_path / "out" / "adapter.report.json"
        all_of_them.wait_for(report.is_file, 240, "run")
        assert "certificate verify failed" in all_of_them.log("stranger").lower()
        stop(run)
    told = json.loads(report.read_text())
    (only,) = told["rounds"]
    assert sorted(only["clients"]) == ["ada", "bob"] and only["absent"] == ["killed", "slow"]
    assert list(only["refused"]) == ["liar"] and "NaN" in only["refused"]["liar"]
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)
