"""Policy of the cluster's listeners."""
