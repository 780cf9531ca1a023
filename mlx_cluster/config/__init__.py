"""Settings: schema, layers, explanation."""
