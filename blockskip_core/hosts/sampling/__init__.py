"""Pictures sampled with the host's own samplers: probes, training samples, RALU."""
