"""python -m deploy.dashboards [folder]: writes service.json and heads.json, which Grafana reads, beside this file."""

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.dashboards import heads, service


def main(folder: Path) -> None:
    for name, board in (("service", service.BOARD), ("heads", heads.BOARD)):
        (folder / f"{name}.json").write_text(JSONEncoder(indent=2, sort_keys=True).encode(board.build()) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
