"""Bytes on disk: the safetensors header, tensors read lazily, outputs whole or not at all."""
