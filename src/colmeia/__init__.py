"""Colmeia turns a Linux machine into a KVM cloud with one Python package."""

__version__ = "0.1.0"
