"""The test kit: what a test of Colmeia, or of something built on it, needs. Never imported by the product."""
