"""``python -m mlx_cluster.stage``: started by an agent only, which speaks with it over stdin and stdout."""

from __future__ import annotations

import sys

from mlx_cluster.stage.child import main

if __name__ == "__main__":
    sys.exit(main())
