"""Other libraries' models on opoch_xp's attention."""
