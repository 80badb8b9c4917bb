"""Pruned model classes, one file per family, and the layouts that name where it keeps its heads and channels.

These files are copied beside the weights, so that a checkpoint also loads with `trust_remote_code=True` where this
package is not installed. They therefore import nothing but torch, transformers, huggingface_hub and each other.
"""
