"""From records of conversations to batches of tokens and labels. Knows nothing of models."""
