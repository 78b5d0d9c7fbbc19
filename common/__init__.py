"""What every part needs: errors for people, atomic files, where a result comes from, what the terminal shows."""
