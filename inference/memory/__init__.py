"""Memory of sampling, predicted before it is allocated."""
