"""What mkdocs does to a page of docs/ before it is a page of the site."""

import re
from typing import Any

# A link out of docs/, to a file of the repository: the site has no such file, so its place is written out.
_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Tells where a file of the repository is instead of linking to it."""
    return _OUTSIDE.sub(lambda match: f"{match[1]} (`{match[2]}`)", markdown)
