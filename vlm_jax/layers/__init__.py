"""Layers shared by encoders, connectors and decoders."""
