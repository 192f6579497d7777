"""Evaluation: numbers in, statistics out: windows, perplexity, comparisons of two models, tasks."""
