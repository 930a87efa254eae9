"""The Helm chart's values as types, and what `make generate` writes of them. Its templates are in charts/sonoforge."""
