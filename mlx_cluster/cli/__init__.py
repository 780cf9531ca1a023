"""The ``mlx-cluster`` command: one small module per command, imported when it runs."""
