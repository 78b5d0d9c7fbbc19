"""What train.py needs: flags, the trainer, checkpoints, a run's identity, FSDP, fp8."""
