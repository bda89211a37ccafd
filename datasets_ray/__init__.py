"""Rows in, batches out: Ray Data pipelines for captions, conversations and multiple-choice sets. Knows no model and no study."""
