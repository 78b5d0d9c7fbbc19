"""What every part needs: errors for people, whole files, where a result comes from, what the terminal shows."""
