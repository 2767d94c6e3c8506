"""Loops that a library owns: transformers' Trainer, Lightning, Accelerate."""
