"""What `python -m deepgen_jax.estimate` is made of: chips, the cost of a compiled program, model FLOPs, abstract inputs."""
