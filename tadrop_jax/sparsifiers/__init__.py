"""Sparsifiers: steps that map a stack of task vectors to a stack with more zeros. One method a file."""
