"""Streaming joint audio-video generation: LTX-2 and OmniForcing in JAX and Flax."""
