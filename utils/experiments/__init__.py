"""What is run: stages, studies, notebooks, published models."""
