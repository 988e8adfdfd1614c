"""Images to a gated ViT, its autoencoders and its profiles.

`export` imports this package first. So what libraries would send to their vendors is turned off here, before any of
them is imported; `service/__init__.py` does the same for the one that it uses. A value in the environment has
precedence.
"""

import os

TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime looks up its vendor's host, and writes an id and events into ~/.cache
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
for _name, _value in TELEMETRY_OFF.items():
    os.environ.setdefault(_name, _value)
