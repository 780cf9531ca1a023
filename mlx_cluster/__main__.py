"""``python -m mlx_cluster`` is the ``mlx-cluster`` command."""

from __future__ import annotations

from mlx_cluster.cli.app import main

if __name__ == "__main__":
    main()
