"""The parts that every encoder, connector and decoder is made of."""
