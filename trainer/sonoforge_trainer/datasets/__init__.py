"""Public ultrasound sets, as their users download them, into evaluation shards with a data card."""
