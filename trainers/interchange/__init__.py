"""A finished arm in other people's formats: what `trainers.export` is made of. Run directories in, Hugging Face models out."""
