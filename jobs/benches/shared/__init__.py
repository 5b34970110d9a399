"""What several benches need: networks, raylets, a plain model, simulated compute."""
