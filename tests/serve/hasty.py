"""What a proxy of the tests puts around its app: the same as any other one, with less patience."""

from starlette.middleware import Middleware

from molora.serve import pace, proxies


def middlewares() -> list[Middleware]:
    """Called by Ray in the proxy's process."""
    pace.SLOW_S = 0.5
    return proxies.middlewares()
