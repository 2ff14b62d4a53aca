"""Requests made up from the server's own description: whatever they hold, it answers in words and goes on."""

import schemathesis
from hypothesis import HealthCheck, settings

from molora.serve.app import build_app
from tests.serve.fake_engine import FakeEngine

schema = schemathesis.openapi.from_asgi("/openapi.json", build_app(FakeEngine(script="ab"), most_body=20_000))


@schema.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_it(case):
    response = case.call()
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
