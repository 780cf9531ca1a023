#!/usr/bin/env python3
"""The script that ``mpirun`` runs for every rank: one node agent, its id and its peers' addresses taken from MPI."""

from __future__ import annotations

import sys

from mlx_cluster.node.mpi import main

if __name__ == "__main__":
    sys.exit(main())
