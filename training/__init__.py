"""Images to a gated ViT, its autoencoders and its profiles.

Every process of the project imports this package first: the other two do so in theirs. So what libraries would send to
their vendors is turned off here, before any of them is imported. A value in the environment has precedence.
"""

import os

TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime looks up its vendor's host, and writes an id and events into ~/.cache
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
for _name, _value in TELEMETRY_OFF.items():
    os.environ.setdefault(_name, _value)
