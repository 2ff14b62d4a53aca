"""The browser demo: a chat whose tokens are coloured by the adapter that spoke them."""

import os

# Gradio reads this when it is imported; nothing that is typed into the demo, nor that it runs, is told to anyone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
