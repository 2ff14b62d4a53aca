"""The HTTP server: OpenAI's API over an engine, and what one needs to run it."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from molora._version import __version__
from molora.serve.answering import Answering
from molora.serve.door import MOST_ADAPTER_BYTES, MOST_BODY_BYTES, CheckHost, CheckKey, LimitBody, needs
from molora.serve.failures import answer_errors
from molora.serve.keys import Key, Keys
from molora.serve.manage import adapter_routes
from molora.serve.metrics import CountRequests, Metrics
from molora.serve.names import models, parse_model, told_adapters
from molora.serve.protocol import ChatRequest, CompletionRequest
from molora.serve.replies import Chat, LayerCard, ModelCard, ModelList, StackCard, Text
from molora.stack import AUTO

if TYPE_CHECKING:
    from molora.model import MoLoRAModel
    from molora.serve.engine import Engine
    from molora.serve.store import AdapterStore

TIMEOUT_S = 300.0
User = Annotated[Key, Depends(needs("use"))]


def build_app(
    engine: "Engine",
    *,
    keys: Keys | None = None,
    store: "AdapterStore | None" = None,
    hosts: Sequence[str] | None = None,
    timeout_s: float = TIMEOUT_S,
    most_body: int = MOST_BODY_BYTES,
    most_adapter: int = MOST_ADAPTER_BYTES,
) -> FastAPI:
    """The server's routes.

    Args:
        engine: answers; it is started and closed elsewhere.
        keys: who may do what; None: everybody may use it, and nobody may change it.
        store: where the engine's pools find adapters; those that are uploaded for them go there.
        hosts: the names under which it may be asked; None: any. Without keys a page in a browser could otherwise reach
            this machine's own address under a name of its own.
        timeout_s: after which an answer is given up.
        most_body, most_adapter: bytes of a request, and of an upload.
    """
    app = FastAPI(title="MoLoRA", version=__version__, docs_url=None, redoc_url=None)
    metrics = Metrics(engine, store)
    answering = Answering(engine, metrics, timeout_s)
    started = int(time.time())

    @app.post("/v1/chat/completions", response_model=Chat)
    async def chat(asked: ChatRequest, request: Request, key: User) -> Response:
        return await answering.answer(request, asked, key)

    @app.post("/v1/completions", response_model=Text)
    async def completions(asked: CompletionRequest, request: Request, key: User) -> Response:
        return await answering.answer(request, asked, key)

    @app.get("/v1/models")
    async def listed(key: User) -> ModelList:
        return ModelList(data=[ModelCard(id=name, created=started) for name in models(engine.model.stack, key.user)])

    @app.get("/v1/models/{name:path}")
    async def one(name: str, key: User) -> ModelCard:
        parse_model(name, engine.model.stack, str(engine.model.base_name), key.user, engine.pools)
        return ModelCard(id=name, created=started)

    @app.get("/v1/stack")
    async def stack(key: User) -> StackCard:
        """The layers, in order: what a selection may name."""
        return stack_card(engine.model, key.user)

    @app.get("/health")
    async def health() -> Response:
        runs = engine.runs
        return JSONResponse({"status": "ok" if runs else "stopped"}, 200 if runs else 503)

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app.include_router(adapter_routes(engine, store))
    answer_errors(app)
    # The last one added is the first to see a request.
    app.add_middleware(LimitBody, most=lambda path: most_adapter if path.startswith("/v1/adapters/") else most_body)
    app.add_middleware(CheckKey, keys=keys)
    if hosts is not None:
        app.add_middleware(CheckHost, hosts=hosts)
    app.add_middleware(CountRequests, metrics=metrics)
    return app


def stack_card(model: "MoLoRAModel", user: str | None) -> StackCard:
    """What ``user`` may be told of a model's stack."""
    layers = []
    for layer in list(model.stack.layers):
        names = told_adapters(layer, user)
        default = layer.default if layer.default == AUTO or layer.default in names else None
        layers.append(
            LayerCard(name=layer.name, adapters=names, default=default, shared=layer.shared, keyed=layer.keyed)
        )
    return StackCard(base=str(model.base_name), router=model.router is not None, layers=layers)
